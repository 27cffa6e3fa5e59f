"""torchft: its process group over gloo, which can be made anew when members fail; fp32. (On a CPU it has no 8 bits.)"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, ReduceOp, TCPStore
from torchft import process_group

from prime_async.bench.peers.base import TIMEOUT_S, Group, Setting

SETTINGS: Final = ("torchft gloo fp32",)
TIMEOUT: Final = timedelta(seconds=TIMEOUT_S)
HOST: Final = "127.0.0.1"


class AllReduce:
    """The sum, in place. The division is not timed, as with gloo. ``meeting``: kept open while the group is in use."""

    forks = False

    def __init__(self, group: Any, nodes: int, meeting: TCPStore | None) -> None:
        self._group = group
        self._nodes = nodes
        self._meeting = meeting
        self._options = AllreduceOptions()
        self._options.reduceOp = ReduceOp(ReduceOp.SUM)
        self._values = torch.empty(0)

    def prepare(self, source: Tensor, values: Tensor) -> None:
        """See :class:`Setting`, as for all methods here."""
        self._values = values.copy_(source)

    def average(self) -> None:
        self._group.allreduce([self._values], self._options).wait()

    def result(self) -> Tensor:
        return self._values.div_(self._nodes)


def opened(group: Group) -> Sequence[Setting]:
    """Rank 0 listens, and the others meet there."""
    meeting = None
    if group.rank == 0:
        meeting = TCPStore(HOST, 0, group.nodes, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        group.store.set("torchft", f"{HOST}:{meeting.port}/bench")
    address = group.store.get("torchft").decode()
    processes = process_group.ProcessGroupGloo(timeout=TIMEOUT)
    if hasattr(processes, "configure"):  # up to 0.2
        processes.configure(address, f"node-{group.rank}", group.rank, group.nodes)
    else:
        process_group.reconfigure_with_store(processes, address, group.rank, group.nodes, TIMEOUT)
    return (AllReduce(processes, group.nodes, meeting),)
