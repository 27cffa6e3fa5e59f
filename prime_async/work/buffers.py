"""Memory that is made once and used again: a fresh large allocation costs more than the arithmetic on it."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from prime_async.errors import LocalError


class BufferPool:
    """Page-aligned buffers of one size for payloads. For any thread.

    A buffer comes back by itself, when the last thing that refers to it is gone: a slice, a tensor, a frame that
    ZeroMQ has yet to send. So it cannot be written while somebody reads it, and nobody can forget to give it back.

    At most ``limit`` are out at once; None: as many as the callers hold, who are to bound that. Buffers are made when
    they are first needed, and kept until the pool goes. Nothing clears them between two uses.
    """

    def __init__(self, size_bytes: int, limit: int | None = None) -> None:
        self._size_bytes = size_bytes
        self._limit = limit
        self._making = threading.Lock()
        self._made = 0
        # A buffer may come back in the midst of anything, also of take(): no lock may be needed for it.
        self._idle: deque[mmap.mmap] = deque()

    @property
    def size_bytes(self) -> int:
        """Of each buffer."""
        return self._size_bytes

    @property
    def in_use(self) -> int:
        """How many buffers are out."""
        return self._made - len(self._idle)

    def take(self) -> memoryview:
        """A writable buffer of ``size_bytes``, with whatever its last user left in it.

        Raises :class:`LocalError` if ``limit`` buffers are out.
        """
        try:
            pages = self._idle.pop()
        except IndexError:
            pages = self._make()
        lease = np.frombuffer(pages, np.uint8, self._size_bytes)  # what all views of the buffer refer to
        weakref.finalize(lease, self._idle.append, pages).atexit = False
        return lease.data

    def _make(self) -> mmap.mmap:
        with self._making:
            if self._made == self._limit:
                raise LocalError(
                    f"all {self._limit} buffers of {self._size_bytes} bytes are in use: let go of one before taking "
                    "another, or make the pool larger"
                )
            self._made += 1
        return mmap.mmap(-1, max(self._size_bytes, 1))


class ScratchPool:
    """Pairs of fp32 tensors of one size, for the arithmetic on one chunk. For any thread.

    As many pairs are made as there are callers at once: the worker threads bound them.
    """

    def __init__(self, elements: int, allocate: Callable[[int], Tensor] = torch.empty) -> None:
        self._elements = elements
        self._allocate = allocate
        self._idle: list[tuple[Tensor, Tensor]] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Two tensors fp32 (elements,), with whatever the last user left in them."""
        with self._lock:
            pair = self._idle.pop() if self._idle else None
        first, second = pair or (self._allocate(self._elements), self._allocate(self._elements))
        try:
            yield first[:elements], second[:elements]
        finally:
            with self._lock:
                self._idle.append((first, second))
