"""An exchange by itself: the average of a tensor among friends, in somebody's own program.

What depends on what: owners of chunks are those of a view, so an exchange needs membership; who joins must come to the
outer state that the commits lead to, so it needs checkpoint, and a directory; and when a contribution begins is for the
training machine to say. So this is a node with all four machines, whose outer state is the newest mean, and whose inner
step is a call of :meth:`Friends.average`. Failures are handled as in training: whoever dies is left out.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
import trio
from torch import Tensor

from prime_async.actors.groups import single_errors
from prime_async.config.schema import MAX_ROUND_TOKENS, Config, RoundSettings
from prime_async.errors import ConfigError, LocalError, NonFiniteError
from prime_async.machines.vocabulary import StepsDone
from prime_async.node.node import Node, open_with
from prime_async.transport.base import Transport
from prime_async.work.average_workload import AverageWorkload, Offer


class Friends:
    """Those who average together, as one of them sees them. Made by :func:`open_exchange`.

    It is the :class:`~prime_async.actors.training.Stepping` of its node.
    """

    def __init__(self, config: Config, elements: int) -> None:
        self.workload = AverageWorkload(elements, config.run.exchange, self._on_mean)
        self._witness = config.node.witness
        self._node: Node | None = None
        self._turn = trio.StrictFIFOLock()
        self._changed = trio.Event()  # the offer, its mean, whether steps are wanted, or this node's part
        self._given = False  # the offer is this node's contribution
        self._stopped = False
        self._left = False

    @property
    def node(self) -> Node:
        """The node that does it: its ``events``, ``traffic``, ``contact``, ``round``."""
        assert self._node is not None
        return self._node

    async def average(self, tensor: Tensor, weight: int = 1) -> Tensor:
        """The mean of what all friends who are in the round gave, weighted by ``weight``, from 1 to 2^36.

        ``tensor``: finite, of the size that the exchange was opened with, of any shape, device and dtype; it is copied,
        to fp32. The mean, fp32 of the same shape on the host, is the same on all friends, bit for bit.

        It waits until all who are members call it, too, or ``run.straggler_timeout_s`` is over. If the round is over
        without this node, or it was cut off, its tensor counts in the next: calls of different friends belong together
        by that alone. Calls at once come one after the other.

        Cancelled, it takes back what was not given yet; what was may still count. Raises :class:`LocalError` for a
        tensor or weight that cannot be averaged, or after the node has left; :class:`NonFiniteError`.
        """
        values = await trio.to_thread.run_sync(self._checked, tensor, weight)
        async with self._turn:
            while self.workload.offer is not None:  # of a call that was cancelled too late
                await self._until_changed()
            offer = self.workload.offer = Offer(values, weight)
            self._given = False
            self._wake()
            try:
                while offer.mean is None:
                    await self._until_changed()
            except trio.Cancelled:
                if not self._given:
                    self.workload.offer = None
                raise
            return offer.mean.view(tensor.shape)

    def _checked(self, tensor: Tensor, weight: int) -> Tensor:
        """A flat copy on the host, fp32."""
        if self._witness:
            raise LocalError("a witness has nothing to average: set node.witness = false")
        if tensor.numel() != self.workload.elements:
            raise LocalError(f"the tensor has {tensor.numel()} elements, the exchange {self.workload.elements}")
        if not 1 <= weight <= MAX_ROUND_TOKENS:
            raise LocalError(f"the weight is {weight}: give one from 1 to {MAX_ROUND_TOKENS}")
        values = torch.empty(tensor.numel())
        values.copy_(tensor.detach().reshape(-1))
        if not torch.isfinite(values).all():
            raise NonFiniteError("the tensor holds NaN or infinity, or what fp32 cannot hold: average finite numbers")
        return values

    # --- what happens -------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _until_changed(self) -> None:
        if self._left:
            raise LocalError("this node has left the exchange: average inside the `async with` block")
        await self._changed.wait()

    def _on_mean(self) -> None:
        trio.from_thread.run_sync(self._wake)

    async def watch(self, node: Node) -> None:
        """Tell who waits when ``node`` has left."""
        try:
            await node.wait()
        finally:
            self._left = True
            self._wake()

    # --- the inner step -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True
        self._wake()

    async def run(self) -> StepsDone:
        began = time.perf_counter()
        while self.workload.offer is None and not self._stopped:
            await self._changed.wait()
        offer, seconds = self.workload.offer, time.perf_counter() - began
        if offer is None:
            return StepsDone(steps=0, tokens=0, seconds=seconds)
        self._given = True
        return StepsDone(steps=1, tokens=offer.weight, seconds=seconds)


@asynccontextmanager
async def open_exchange(config: Config, elements: int, *, transport: Transport | None = None) -> AsyncIterator[Friends]:
    """Average tensors of ``elements`` numbers with the other members of a run, for as long as the block lasts.

    Of ``config`` everything counts that is about the network, members, failures, the exchange and its codec; the model,
    the data, the optimisers, the mode, and how the run begins and ends do not. ``run.min_members`` is how many friends
    a mean has at least. ``elements`` is part of the run: who comes with another number is refused.

    Leaving the block, cancellation and errors: as with :func:`prime_async.open_node`. The newest mean is kept in
    ``node.directory``, for those who join.
    """
    if elements < 1:
        raise ConfigError([f"an exchange of {elements} elements: give the number of elements of your tensors"])
    changes = {"model": f"vector-{elements}", "mode": "blocking", "rounds": 0, "round": RoundSettings(inner_steps=1)}
    run = config.run.model_copy(update=changes | {"warmup_sync_steps": 0})
    config = config.model_copy(update={"run": run})
    friends = await trio.to_thread.run_sync(Friends, config, elements)
    async with open_with(config, friends.workload, transport=transport, stepping=friends) as node:
        friends._node = node
        with single_errors():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(friends.watch, node)
                yield friends
                nursery.cancel_scope.cancel()
