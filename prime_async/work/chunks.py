"""A flat vector in chunks, and the codec applied to one chunk at a time from worker threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from prime_async.work.buffers import ScratchPool
from prime_async.work.codec import Codec, as_tensor, mean_payload_bytes
from prime_async.work.reduce import weighted_mean
from prime_async.work.reducers import Reducer, mean
from prime_async.work.threads import torch_threads
from prime_async.work.workload import Reduction

USUAL_CONTRIBUTORS = 8
"""To guess the size of a mean by, where that depends on who is in it."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """How a flat vector of ``elements`` is divided: chunks of ``chunk_elements``, the last one may be shorter."""

    elements: int
    chunk_elements: int

    @property
    def count(self) -> int:
        """How many."""
        return -(-self.elements // self.chunk_elements)

    def span(self, chunk: int) -> slice:
        """Where ``chunk`` lies. Raises :class:`IndexError` if there is no such chunk."""
        if not 0 <= chunk < self.count:
            raise IndexError(f"chunk {chunk} of {self.count}")
        start = chunk * self.chunk_elements
        return slice(start, min(start + self.chunk_elements, self.elements))

    def size(self, chunk: int) -> int:
        """Elements of ``chunk``."""
        return len(range(self.elements)[self.span(chunk)])


class ChunkCodec:
    """The codecs over the chunks of one vector, of contributions and of means: memoryviews in and out.

    Called from several worker threads at once, for different chunks. Its operations are not divided among torch
    threads: the cores are better used by several chunks side by side.
    """

    def __init__(
        self,
        codec: Codec,
        chunks: Chunks,
        allocate: Callable[[int], Tensor] = torch.empty,
        mean_codec: Codec | None = None,
    ) -> None:
        """``mean_codec``: of means, if not ``codec``.

        ``allocate(n)`` makes scratch, fp32 (n,) on the host: pinned, if a device copies into it.
        """
        self._codec = codec
        self._mean_codec = mean_codec or codec
        self._chunks = chunks
        self._scratch = ScratchPool(min(chunks.chunk_elements, chunks.elements), allocate)

    def payload_bytes(self, chunk: int) -> int:
        """Size of a contribution to ``chunk``."""
        return self._codec.payload_bytes(self._chunks.size(chunk))

    def mean_bytes(self, chunk: int) -> int:
        """Size of a mean of ``chunk``, at most."""
        return self._mean_codec.payload_bytes(self._chunks.size(chunk))

    def usual_mean_bytes(self, chunk: int) -> int:
        """Size of a mean of ``chunk`` to reckon with."""
        return mean_payload_bytes(self._mean_codec, self._chunks.size(chunk), USUAL_CONTRIBUTORS)

    @contextmanager
    def work_on(self, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Two scratch tensors fp32 (elements of the chunk,); inside, torch does not divide operations."""
        with torch_threads(1), self._scratch.borrow(self._chunks.size(chunk)) as scratch:
            yield scratch

    def encode(self, values: Tensor, out: memoryview, scratch: Tensor) -> None:
        """As :meth:`Codec.encode`, into ``out``."""
        self._codec.encode(values, as_tensor(out), scratch)

    def decode(self, mean: memoryview, out: Tensor) -> None:
        """Decode ``mean`` into ``out``, fp32 (elements of the chunk,).

        :meth:`is_valid` was asked where it came in, from a peer or from the disk. To check it here again would take
        nearly as long as decoding it, with four bits.
        """
        self._mean_codec.decode(as_tensor(mean), out)

    def decode_contribution(self, payload: memoryview, out: Tensor) -> None:
        """Decode what :meth:`encode` made into ``out``, fp32 (elements of the chunk,)."""
        self._codec.decode(as_tensor(payload), out)

    def is_valid(self, chunk: int, payload: memoryview) -> bool:
        """Whether ``payload`` is a mean of ``chunk``, and decodes to finite values."""
        with torch_threads(1):
            return self._mean_codec.check(as_tensor(payload), self._chunks.size(chunk)) is None

    def reduce(
        self,
        chunk: int,
        payloads: Sequence[memoryview],
        weights: Sequence[int],
        out: memoryview,
        reducer: Reducer = mean,
    ) -> Reduction:
        """As :func:`weighted_mean`."""
        with self.work_on(chunk) as scratch:
            tensors = [as_tensor(p) for p in payloads]
            return weighted_mean(self._codec, tensors, weights, as_tensor(out), scratch, self._mean_codec, reducer)
