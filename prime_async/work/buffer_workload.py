"""Averaging a plain vector through the same interface as training: for the benchmark, and for tests of the exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import blake3
import torch
from torch import Tensor

from prime_async.errors import ProtocolError
from prime_async.machines.fragments import Fragments
from prime_async.work.chunks import ChunkCodec, Chunks
from prime_async.work.codec import Codec, as_bytes, as_tensor
from prime_async.work.inner import Span
from prime_async.work.reducers import Reducer, mean
from prime_async.work.vector_workload import VectorWorkload
from prime_async.work.workload import Reduction, StepReport


class BufferWorkload(VectorWorkload):
    """A fp32 vector (n,) that every round replaces by the mean of all nodes' vectors. There is no outer optimiser.

    ``train`` does nothing. The outer state is the vector. Its digest is the BLAKE3 of the round, 8 bytes little-endian,
    and of the BLAKE3 of each chunk, and changes at the end of a round or an import alone.
    """

    def __init__(
        self,
        values: Tensor,
        chunk_elements: int,
        codec: Codec,
        mean_codec: Codec | None = None,
        reducer: Reducer = mean,
    ) -> None:
        """``values``, fp32 (n,) on the host, is taken over and not copied. ``mean_codec``: of means, if another.

        ``reducer`` makes them.
        """
        self.values = values
        self._chunks = Chunks(values.numel(), chunk_elements)
        super().__init__(ChunkCodec(codec, self._chunks, mean_codec=mean_codec))
        self._reducer = reducer
        self._round = 0
        self._digests = [self._hash(chunk) for chunk in range(self._chunks.count)]
        self._digest = self._combine()

    @classmethod
    def random(cls, elements: int, chunk_elements: int, codec: Codec, seed: int) -> BufferWorkload:
        """Standard normal values, the same for the same ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(elements, generator=generator), chunk_elements, codec)

    @property
    def elements(self) -> int:
        return self._chunks.elements

    @property
    def chunk_count(self) -> int:
        """See :class:`Workload`, as for all methods below."""
        return self._chunks.count

    @property
    def fragments(self) -> Fragments:
        return Fragments(self.chunk_count)

    @property
    def round(self) -> int:
        return self._round

    def state_bytes(self, chunk: int) -> int:
        return 4 * self._chunks.size(chunk)

    def train(self, steps: int, on_step: Callable[[StepReport], None]) -> None:
        """Nothing to do, and no step to report."""

    def encode(self, chunk: int, out: memoryview) -> None:
        with self._codec.work_on(chunk) as (scratch, _):
            self._codec.encode(self._view(chunk), out, scratch)

    def reduce(
        self,
        chunk: int,
        payloads: Sequence[memoryview],
        weights: Sequence[int],
        out: memoryview,
        round: int,  # noqa: ARG002
    ) -> Reduction:
        return self._codec.reduce(chunk, payloads, weights, out, self._reducer)

    def apply(self, chunk: int, mean: memoryview, included: bool, own: memoryview | None = None) -> None:  # noqa: ARG002
        with self._codec.work_on(chunk):
            self._codec.decode(mean, self._view(chunk))
            self._digests[chunk] = self._hash(chunk)

    def apply_beside(self, chunk: int, mean: memoryview, included: bool, share: float) -> None:  # noqa: ARG002
        """As ``apply``."""
        self.apply(chunk, mean, included)

    def end_round(self) -> bytes:
        return self.end_import(self._round + 1)

    def state_digest(self) -> bytes:
        return self._digest

    def export_state(self, chunk: int) -> bytes:
        return self._view(chunk).numpy().tobytes()

    def import_state(self, chunk: int, data: memoryview) -> None:
        """Raises :class:`ProtocolError` if the size is wrong."""
        if data.nbytes != self.state_bytes(chunk):
            raise ProtocolError(f"chunk {chunk} has {data.nbytes} bytes instead of {self.state_bytes(chunk)}")
        self._view(chunk).view(torch.uint8).copy_(as_tensor(data))
        self._digests[chunk] = self._hash(chunk)

    def end_import(self, round: int) -> bytes:
        self._round = round
        self._digest = self._combine()
        return self._digest

    @property
    def spans(self) -> Sequence[Span]:
        """One parameter: the vector."""
        return [Span("values", 0, self.elements, (self.elements,))]

    @property
    def state_prefixes(self) -> Sequence[str]:
        return ("",)

    def chunk_digests(self) -> bytes:
        return b"".join(self._digests)

    def _view(self, chunk: int) -> Tensor:
        return self.values[self._chunks.span(chunk)]

    def _hash(self, chunk: int) -> bytes:
        return blake3.blake3(as_bytes(self._view(chunk))).digest()

    def _combine(self) -> bytes:
        return blake3.blake3(b"".join([self._round.to_bytes(8, "little"), *self._digests])).digest()
