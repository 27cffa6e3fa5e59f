"""DiLoCo (arXiv 2311.08105): inner steps alone, outer steps on what all nodes moved in the mean.

The blocking form, as INTELLECT-1 ran it (arXiv 2412.01152): inner steps, exchange, outer step, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from prime_async.config.schema import NodeSettings, RunSpec
from prime_async.work.chunks import ChunkCodec
from prime_async.work.codec import Codec, make_codec
from prime_async.work.device import Device, usable_cores
from prime_async.work.factory import open_inner_trainer
from prime_async.work.inner import Span
from prime_async.work.outer import OuterState
from prime_async.work.threads import torch_threads
from prime_async.work.workload import StepReport


class Trainer(Protocol):
    """What DiLoCo needs of the inner loop; :class:`prime_async.work.inner.InnerTrainer` is the one that trains."""

    @property
    def flat(self) -> Tensor:
        """All parameters, fp32 (n,) on the device; the model's own are views into it."""
        ...

    @property
    def device(self) -> Device:
        """Where ``flat`` lies."""
        ...

    @property
    def spans(self) -> Sequence[Span]:
        """Where each parameter lies in ``flat``."""
        ...

    def train(self, first_step: int, steps: int, on_step: Callable[[StepReport], None]) -> None:
        """Do the inner steps ``first_step`` to ``first_step + steps - 1`` of the schedule and of the data."""
        ...

    def reset_optimizer(self) -> None:
        """Forget the inner optimiser's moments."""
        ...

    def evaluate(self, *, weights: Tensor | None = None) -> float:
        """Held-out loss, nats per token, at ``flat``, or at ``weights``, which trade places with it meanwhile."""
        ...


class DilocoWorkload:
    """A node's share of a DiLoCo run: the inner trainer, and the outer state that all nodes have in common.

    The contribution to a chunk is ``theta - x``: outer minus local weights. Applying a mean moves theta by the outer
    step, and x to theta; or, if this node's contribution is not in the mean, x by as much as theta, so that the
    progress ``x - theta`` counts in the next round. The moments of the inner optimiser stay, as in the paper.

    ``encode``, ``reduce``, ``apply``, ``export_state`` and ``import_state`` may run for different chunks at once.
    ``train``, ``evaluate``, ``restore``, ``end_round`` and ``end_import`` run alone; exporting goes on beside them.
    """

    def __init__(self, trainer: Trainer, outer: OuterState, codec: Codec, inner_steps: int, threads: int) -> None:
        """``outer`` starts at the trainer's weights. ``threads``: torch threads of the inner steps."""
        self.trainer = trainer
        self._outer = outer
        self._codec = ChunkCodec(codec, outer.chunks, trainer.device.staging)
        self._inner_steps = inner_steps
        self._threads = threads
        self._steps = 0  # inner steps in this round
        self._away = False  # local weights are not the outer weights
        self._kept = False  # in a chunk of this round, local progress was kept

    @property
    def elements(self) -> int:
        """See :class:`Workload`, as for all methods below."""
        return self._outer.chunks.elements

    @property
    def chunk_count(self) -> int:
        return self._outer.chunks.count

    @property
    def round(self) -> int:
        return self._outer.round

    def payload_bytes(self, chunk: int) -> int:
        return self._codec.payload_bytes(chunk)

    def state_bytes(self, chunk: int) -> int:
        return self._outer.state_bytes(chunk)

    def train(self, steps: int, on_step: Callable[[StepReport], None]) -> None:
        """Schedule and data go on at ``round * inner_steps``, plus the steps already done in this round."""

        def count(report: StepReport) -> None:
            self._steps += 1
            on_step(report)

        self._away = True
        with torch_threads(self._threads):
            self.trainer.train(self.round * self._inner_steps + self._steps, steps, count)

    def encode(self, chunk: int, out: memoryview) -> None:
        with self._codec.work_on(chunk) as (delta, _):
            torch.sub(self._outer.theta(chunk), self._on_host(chunk, delta), out=delta)
            self._codec.encode(delta, out, scratch=delta)

    def reduce(self, chunk: int, payloads: Sequence[memoryview], weights: Sequence[int], out: memoryview) -> list[int]:
        return self._codec.reduce(chunk, payloads, weights, out)

    def apply(self, chunk: int, mean: memoryview, included: bool) -> None:
        """Raises :class:`ProtocolError` if ``mean`` is not valid, :class:`LocalError` if this round had one already.

        Then nothing has changed.
        """
        with self._codec.work_on(chunk) as (gradient, scratch):
            self._codec.decode(mean, gradient)
            if included:
                self._outer.step(chunk, gradient, scratch)
                self._move_local(chunk, self._outer.theta(chunk))
            else:
                self._step_and_keep_progress(chunk, gradient, scratch)

    def end_round(self) -> bytes:
        digest = self._outer.end_round()
        self._steps, self._away, self._kept = 0, self._kept, False
        return digest

    def state_digest(self) -> bytes:
        """After ``round`` rounds: while the chunks of the next one are applied, that of the last one."""
        return self._outer.digest

    def restore(self) -> None:
        for chunk in range(self.chunk_count):
            self._move_local(chunk, self._outer.theta(chunk))
        self.trainer.reset_optimizer()
        self._steps, self._away, self._kept = 0, False, False

    def export_state(self, chunk: int) -> bytes:
        """Its BLAKE3 is ``chunk_digest(chunk)``."""
        return self._outer.export_chunk(chunk)

    def chunk_digest(self, chunk: int) -> bytes:
        """BLAKE3 of what ``export_state`` gives."""
        return self._outer.chunk_digest(chunk)

    def import_state(self, chunk: int, data: memoryview) -> None:
        with torch_threads(1):
            self._outer.import_chunk(chunk, data)

    def end_import(self, round: int) -> bytes:
        """Also does what ``restore`` does: the local progress was made from other outer weights."""
        digest = self._outer.end_import(round)
        self.restore()
        return digest

    def named_state(self) -> Mapping[str, Tensor]:
        """The weights by the model's parameter names, the momentum by ``momentum.`` and the name."""
        return self._outer.named(self.trainer.spans)

    def load_named_state(self, tensors: Mapping[str, Tensor], round: int) -> bytes:
        """Also does what ``restore`` does. If it raises nothing has changed."""
        digest = self._outer.load_named(self.trainer.spans, tensors, round)
        self.restore()
        return digest

    def evaluate(self) -> float:
        """If the local weights are others than the outer ones, the two trade places, and exporting waits meanwhile."""
        with torch_threads(self._threads):
            if not self._away:
                return self.trainer.evaluate()
            with self._outer.whole_theta() as theta:
                return self.trainer.evaluate(weights=theta)

    def _local(self, chunk: int) -> Tensor:
        return self.trainer.flat[self._outer.chunks.span(chunk)]

    def _on_host(self, chunk: int, staging: Tensor) -> Tensor:
        """The local weights of ``chunk``, to read: copied into ``staging`` unless the host is the device."""
        if not self.trainer.device.is_cuda:
            return self._local(chunk)
        self.trainer.device.to_host(self._local(chunk), staging)
        self.trainer.device.synchronize()
        return staging

    def _move_local(self, chunk: int, weights: Tensor) -> None:
        self.trainer.device.to_device(weights, self._local(chunk))
        self.trainer.device.synchronize()

    def _step_and_keep_progress(self, chunk: int, gradient: Tensor, scratch: Tensor) -> None:
        """x <- theta' + (x - theta): without local progress x is exactly theta', which x + (theta' - theta) is not."""
        with self._codec.work_on(chunk) as (progress, _):
            torch.sub(self._on_host(chunk, progress), self._outer.theta(chunk), out=progress)
            self._outer.step(chunk, gradient, scratch)
            self._move_local(chunk, progress.add_(self._outer.theta(chunk)))
        self._kept = True


def build_workload(run: RunSpec, node: NodeSettings, stream: int) -> DilocoWorkload:
    """The workload of a node that trains. ``stream`` in [0, 2^64) picks its data: another one for each node.

    Raises :class:`~prime_async.errors.ConfigError` and :class:`~prime_async.errors.DataError` for settings and files
    that do not fit.
    """
    trainer = open_inner_trainer(run, node, stream)
    theta = torch.empty(trainer.flat.numel())
    trainer.device.to_host(trainer.flat, theta)
    trainer.device.synchronize()
    outer = OuterState(theta, run.exchange.chunk_elements, run.outer)
    codec = make_codec(run.exchange.codec)
    return DilocoWorkload(trainer, outer, codec, run.round.inner_steps, node.threads or usable_cores())
