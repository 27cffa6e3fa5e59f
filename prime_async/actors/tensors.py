"""Calls of a workload, from the event loop: in worker threads, chunk by chunk, a bounded number at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

import trio
from blake3 import blake3

from prime_async.messages import ChunkInfo
from prime_async.work.buffers import BufferPool
from prime_async.work.device import usable_cores
from prime_async.work.workload import Workload

T = TypeVar("T")
MAX_WORKERS = 4
TURN_S = 0.02
"""A worker thread does chunks for so long before others get their turn: a change of threads costs 0.1 ms of either."""


class Tensors:
    """A workload, the worker threads that may touch its chunks, and the buffers that its chunks are encoded into."""

    def __init__(self, workload: Workload, workers: int | None = None) -> None:
        self.workload = workload
        self.workers = workers or min(MAX_WORKERS, usable_cores())
        self.state_lock = trio.StrictFIFOLock()  # held while the outer state is replaced or saved
        self._limiter = trio.CapacityLimiter(self.workers)
        chunks = range(workload.chunk_count)
        self.buffers = BufferPool(
            max((max(workload.payload_bytes(c), workload.mean_bytes(c)) for c in chunks), default=0)
        )

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """One call in a worker thread. Cancellation waits for it to end."""
        return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)

    async def for_each(self, function: Callable[[int], None], chunks: Iterable[int]) -> None:
        """``function`` of every chunk, as many at once as there are workers. The first error ends it.

        Cancellation waits for the chunks that are under way.
        """
        waiting = deque(chunks)
        failures: list[Exception] = []  # of several at once, the first is what the caller can handle

        def take_turn() -> None:
            until = time.monotonic() + TURN_S
            while time.monotonic() < until:
                try:
                    chunk = waiting.popleft()
                except IndexError:
                    return
                try:
                    function(chunk)
                except Exception as error:
                    failures.append(error)
                    waiting.clear()
                trio.from_thread.check_cancelled()

        async def work() -> None:
            while waiting:
                await self.run(take_turn)

        async with trio.open_nursery() as nursery:
            for _ in range(self.workers):
                nursery.start_soon(work)
        if failures:
            raise failures[0]

    def encode(self, chunk: int) -> tuple[memoryview, ChunkInfo]:
        """This node's contribution to ``chunk`` (in a worker thread)."""
        out = self.buffers.take()[: self.workload.payload_bytes(chunk)]
        self.workload.encode(chunk, out)
        return out, ChunkInfo(digest=blake3(out).digest())
