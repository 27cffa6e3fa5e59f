"""How many threads torch divides one operation among, set where it matters: per Python thread.

What ``torch.set_num_threads(n)`` does (ATen/ParallelOpenMP.cpp, and measured with 2.13): it sets the count of the
*calling* thread, and the default that another thread takes over when it first asks for a count or runs an operation
large enough to be divided. Threads that have asked before keep theirs. So a count set once, in the main thread, holds
for worker threads only as long as no other thread sets one, and a worker that sets 1 and is then used by somebody else
(trio keeps its threads) still has 1. Every piece of work therefore states its count when it begins and puts the old one
back. It costs 0.2 us.

Each Python thread that runs a divided operation has an OpenMP team of its own: two threads that both divide among
two cores are slower than two that do not. So codec work runs undivided, several chunks side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch divide operations of the calling thread among ``count`` threads; afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
