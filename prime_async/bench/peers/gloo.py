"""gloo: the all-reduce of fp32 that comes with torch, over the default process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from prime_async.bench.peers.base import Group, Setting

SETTINGS: Final = ("gloo fp32",)


class AllReduce:
    """The sum, in place. The division is not timed."""

    forks = False

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._values = torch.empty(0)

    def prepare(self, source: Tensor, values: Tensor) -> None:
        """See :class:`Setting`, as for all methods here."""
        self._values = values.copy_(source)

    def average(self) -> None:
        dist.all_reduce(self._values)

    def result(self) -> Tensor:
        return self._values.div_(self._nodes)


def opened(group: Group) -> Sequence[Setting]:
    """The process group itself is opened by who measures: barriers need it too."""
    return (AllReduce(group.nodes),)
