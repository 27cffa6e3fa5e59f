"""What the benchmark asks of a peer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from torch import Tensor
from torch._C._distributed_c10d import Store

TIMEOUT_S: Final = 60.0
"""For what a peer does with the others: to find them, to average once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The processes that average, seen from one of them."""

    rank: int
    nodes: int
    elements: int  # of the vector
    store: Store  # where they leave word for each other, under keys of the peer's own
    directory: Path  # of this process; it is removed with everything in it


class Setting(Protocol):
    """One way in which a peer averages. Any error of its own may come out of each method.

    Of an average only :meth:`average` is timed. Nothing is closed: what it started ends with the process and its group.
    """

    forks: bool
    """Whether it works in processes of its own, beside this one."""

    def prepare(self, source: Tensor, values: Tensor) -> None:
        """Before the barrier. ``source``: this process's vector, to be left as it is; ``values``: room for a result.

        Both are fp32 (elements,).
        """

    def average(self) -> None:
        """From the barrier until this process holds the whole result, the sum or the mean."""

    def result(self) -> Tensor:
        """The mean, fp32 (elements,); it may be the ``values`` of :meth:`prepare`."""


Opened = Callable[[Group], Sequence[Setting]]
"""``opened`` of an adapter. All processes call it; it returns once they have found each other, or raises."""
