"""hivemind: averages in groups that meet in a DHT; 8-bit blockwise, and fp32.

It works in processes of its own, forked from this one, and sends through a daemon that encrypts. The search for a group
is not timed: its optimizer makes it beforehand, too, and lets the all-reduce itself begin with a trigger.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Final

import hivemind
import torch
from hivemind.averaging.control import AveragingStage
from hivemind.compression import BlockwiseQuantization, NoCompression
from hivemind.p2p import P2P
from torch import Tensor

from prime_async.bench.peers.base import TIMEOUT_S, Group, Setting
from prime_async.errors import EnvironmentFault

SETTINGS: Final = ("hivemind int8 blockwise", "hivemind fp32")
MATCHMAKING_S: Final = 3.0
"""How long members of a group wait for the rest, of whom none must be missing."""
POLL_S: Final = 0.005


class Averager:
    """The mean, in place, in memory that is shared with the process that averages."""

    forks = True

    def __init__(self, averager: Any, nodes: int) -> None:
        self._averager = averager
        self._nodes = nodes
        self._step: Any = None

    def prepare(self, source: Tensor, values: Tensor) -> None:  # noqa: ARG002  (it has room of its own)
        """See :class:`Setting`, as for all methods here."""
        with self._averager.get_tensors() as (own,):
            own.copy_(source)
        self._step = self._averager.step(wait=False, require_trigger=True, timeout=TIMEOUT_S, allow_retries=False)
        while self._step.stage != AveragingStage.AWAITING_TRIGGER:
            if self._step.done():
                self._step.result()
                raise EnvironmentFault("it averaged before it was told to")
            time.sleep(POLL_S)

    def average(self) -> None:
        self._step.allow_allreduce()
        members = len(self._step.result(timeout=TIMEOUT_S))
        if members < self._nodes:
            raise EnvironmentFault(f"it averaged {members} of {self._nodes} vectors")

    def result(self) -> Tensor:
        with self._averager.get_tensors() as (own,):
            mean: Tensor = own
        return mean


class Missing:
    """A setting that cannot be, and says why."""

    forks = False

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def prepare(self, source: Tensor, values: Tensor) -> None:  # noqa: ARG002
        raise EnvironmentFault(self._reason)

    def average(self) -> None:
        raise EnvironmentFault(self._reason)

    def result(self) -> Tensor:
        raise EnvironmentFault(self._reason)


def opened(group: Group) -> Sequence[Setting]:
    """All meet in the DHT that rank 0 begins.

    To be called while this process has as few threads as can be, from the main one: it forks.
    """
    # They are left behind, even by those that end in good order.
    P2P._UNIX_SOCKET_PREFIX = f"/unix{group.directory}/hivemind-"
    if group.rank == 0:
        dht = hivemind.DHT(start=True)
        group.store.set("hivemind", "\n".join(str(address) for address in dht.get_visible_maddrs()))
    else:
        dht = hivemind.DHT(initial_peers=group.store.get("hivemind").decode().split("\n"), start=True)
    blockwise: Setting
    if find_spec("bitsandbytes") is None:
        blockwise = Missing("its 8-bit blockwise codec needs bitsandbytes: pip install bitsandbytes")
    else:
        blockwise = _averager(group, dht, "int8", BlockwiseQuantization())
    return (blockwise, _averager(group, dht, "fp32", NoCompression()))


def _averager(group: Group, dht: Any, prefix: str, compression: Any) -> Averager:
    averager = hivemind.DecentralizedAverager(
        [torch.zeros(group.elements)],
        dht,
        start=True,
        prefix=prefix,
        compression=compression,
        target_group_size=group.nodes,
        min_group_size=group.nodes,
        min_matchmaking_time=MATCHMAKING_S,
        request_timeout=MATCHMAKING_S / 2,
        allreduce_timeout=TIMEOUT_S,
        allow_state_sharing=False,
    )
    return Averager(averager, group.nodes)
