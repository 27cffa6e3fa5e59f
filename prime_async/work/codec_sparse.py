"""``sparse``: those elements that are not zero, with eight bits each; for the means of ``topk`` contributions.

Such a mean is zero outside the union of what the contributions kept, and ``sparse`` has all of that: nothing is dropped
again. Its size depends on the values. Payload, for n elements in b blocks of 4096::

    bytes              what
    4 * b              per block one fp32 scale
    2 * b              per block how many elements it has, c
    ceil(3 * C / 2)    the positions of those in blocks with few, ascending in each, block by block; C in all
    ceil(m / 8) each   of each block with many, of m elements, a bitmap of those it has, the lowest bit first
    1 each             a signed byte q per element, in order, block by block

A block has few if ``3 * c < 2 * ceil(m / 8)``: then positions, which are as in
:mod:`prime_async.work.sparse_blocks`, take less than a bitmap. An element is ``q * scale``, one fp32 multiplication;
scale and q are as in ``int8`` (:mod:`prime_async.work.codec`), and an element whose q is 0 is left out.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prime_async.work.block_scales import wrong_scales, wrong_size
from prime_async.work.sparse_blocks import (
    BLOCK,
    LEAST,
    Bytes,
    Floats,
    Indices,
    block_count,
    block_sizes,
    kept_of_blocks,
    pack_positions,
    require_finite_values,
    stream_bytes,
    unpack_positions,
    wrong_positions,
    wrong_stream,
)

LEVELS: Final = 127
MAX_SCALE: Final = float.fromhex("0x1.020406p+121")
"""The largest fp32 whose 127-fold is finite."""


class SparseCodec:
    """Those elements that are not zero, with eight bits each; see the module for the layout.

    The error of an element is at most half the scale of its block, as in ``int8``. NaN or infinity raises
    :class:`~prime_async.errors.NonFiniteError`.
    """

    name: Literal["sparse"] = "sparse"

    def payload_bytes(self, n: int) -> int:
        """The largest size of a payload of ``n`` elements: that of one in which none is zero."""
        return 6 * block_count(n) + int(_bitmap_bytes(block_sizes(n)).sum()) + n

    def usual_bytes(self, n: int, contributors: int) -> int:
        """The size for a mean of so many ``topk`` contributions that have no element in common."""
        sizes = block_sizes(n)
        counts = np.minimum(contributors * kept_of_blocks(n), sizes)
        return 6 * len(sizes) + _body_bytes(counts, sizes)

    def encode(self, values: Tensor, out: Tensor, scratch: Tensor) -> int:  # noqa: ARG002  (needs no scratch)
        """See :meth:`Codec.encode <prime_async.work.codec.Codec.encode>`."""
        n, x = values.numel(), values.numpy()
        require_finite_values(values)
        where = np.flatnonzero(x != 0)
        block = where // BLOCK
        scales = self._scales(x[where], block, block_count(n))
        q = np.zeros(len(where), np.int8)
        there = scales[block] > 0
        q[there] = np.rint(x[where[there]] / scales[block[there]])
        where, q = where[q != 0], q[q != 0]
        counts = np.bincount(where // BLOCK, minlength=len(scales))
        payload = _sparse_payload(scales, counts, where, q, n)
        out.numpy()[: len(payload)] = payload
        return len(payload)

    @staticmethod
    def _scales(elements: Floats, block: Indices, blocks: int) -> Floats:
        """Of each block; ``block``: that of each element, ascending."""
        absmax = np.zeros(blocks, np.float32)
        if len(block):
            firsts = np.flatnonzero(np.diff(block, prepend=-1))
            absmax[block[firsts]] = np.maximum.reduceat(np.abs(elements), firsts)
        scales = np.minimum(absmax / np.float32(LEVELS), np.float32(MAX_SCALE))
        return np.where(scales < np.float32(LEAST), np.float32(0), scales)

    def check(self, payload: Tensor, n: int) -> str | None:
        """See :meth:`Codec.check <prime_async.work.codec.Codec.check>`. ``payload`` ends where its last value does."""
        data, sizes = payload.numpy(), block_sizes(n)
        if len(data) < 6 * len(sizes):
            return f"{len(data)} bytes instead of {6 * len(sizes)} for scales and counts alone"
        scales, counts = _head(data, len(sizes))
        if (counts > sizes).any():
            return "a block has more elements than it is long"
        if (reason := wrong_size(payload, 6 * len(sizes) + _body_bytes(counts, sizes))) or not n:
            return reason
        if reason := wrong_scales(torch.from_numpy(scales), LEAST, MAX_SCALE):
            return reason
        if ((scales > 0) != (counts > 0)).any():
            return "a scale is 0 exactly if its block has no elements: here it is not"
        return _wrong_body(data[6 * len(sizes) :], counts, n)

    def decode(self, payload: Tensor, out: Tensor, weight: float = 1.0) -> None:
        """See :meth:`Codec.decode <prime_async.work.codec.Codec.decode>`. The scales are multiplied by the weight."""
        data, n = payload.numpy(), out.numel()
        out.zero_()
        scales, counts = _head(data, block_count(n))
        where, q = _body(data[6 * len(counts) :], counts, n)
        out.numpy()[where] = q.astype(np.float32) * (scales * np.float32(weight))[where // BLOCK]


def _bitmap_bytes(sizes: Indices) -> Indices:
    return -(-sizes // 8)


def _has_few(counts: Indices, sizes: Indices) -> NDArray[np.bool_]:
    """Of each block, whether positions take less than a bitmap."""
    return 3 * counts < 2 * _bitmap_bytes(sizes)


def _body_bytes(counts: Indices, sizes: Indices) -> int:
    """Of what follows the scales and counts."""
    few = _has_few(counts, sizes)
    return stream_bytes(int(counts[few].sum())) + int(_bitmap_bytes(sizes)[~few].sum()) + int(counts.sum())


def _sparse_payload(scales: Floats, counts: Indices, where: Indices, q: NDArray[np.int8], n: int) -> Bytes:
    """``where``: the elements that are there, ascending; ``q``: their values."""
    sizes = block_sizes(n)
    few = _has_few(counts, sizes)
    in_few = few[where // BLOCK]
    bits = np.zeros(BLOCK * block_count(n), np.uint8)
    bits[where[~in_few]] = 1
    bitmaps = np.packbits(bits.reshape(-1, BLOCK)[~few], axis=1, bitorder="little")
    body = [bitmap[:size] for bitmap, size in zip(bitmaps, _bitmap_bytes(sizes)[~few], strict=True)]
    head = scales.astype("<f4").view(np.uint8), counts.astype("<u2").view(np.uint8)
    return np.concatenate([*head, pack_positions(where[in_few] % BLOCK), *body, q.view(np.uint8)])


def _head(data: Bytes, blocks: int) -> tuple[Floats, Indices]:
    """Scales and counts; the payload may lie at any address."""
    scales, counts = data[: 4 * blocks].copy().view("<f4"), data[4 * blocks : 6 * blocks].copy().view("<u2")
    return scales, counts.astype(np.int64)


def _body(data: Bytes, counts: Indices, n: int) -> tuple[Indices, NDArray[np.int8]]:
    """Which elements there are, ascending, and their values."""
    few = _has_few(counts, block_sizes(n))
    starts = np.arange(len(counts)) * BLOCK
    count = int(counts[few].sum())
    listed = np.repeat(starts[few], counts[few]) + unpack_positions(data[: stream_bytes(count)], count)
    bits = _bitmaps(data, counts, n)
    mapped = np.flatnonzero(bits)
    mapped = starts[~few][mapped // BLOCK] + mapped % BLOCK
    where = np.sort(np.concatenate([listed, mapped])) if len(mapped) else listed
    return where, data[len(data) - int(counts.sum()) :].view(np.int8)


def _bitmaps(data: Bytes, counts: Indices, n: int) -> Bytes:
    """A byte per bit, (blocks with many, 4096)."""
    sizes = block_sizes(n)
    few = _has_few(counts, sizes)
    lengths = _bitmap_bytes(sizes)[~few]
    rows = np.zeros((len(lengths), BLOCK // 8), np.uint8)
    start = stream_bytes(int(counts[few].sum()))
    packed = data[start : start + int(lengths.sum())]
    rows.reshape(-1)[: len(packed)] = packed  # only the last one may be shorter
    return np.unpackbits(rows, axis=1, bitorder="little")


def _wrong_body(data: Bytes, counts: Indices, n: int) -> str | None:
    sizes = block_sizes(n)
    few = _has_few(counts, sizes)
    count = int(counts[few].sum())
    stream = data[: stream_bytes(count)]
    if reason := wrong_stream(stream, count) or wrong_positions(
        unpack_positions(stream, count), np.where(few, counts, 0), n
    ):
        return reason
    bits = _bitmaps(data, counts, n)
    if (bits.sum(1, dtype=np.int64) != counts[~few]).any():
        return "a bitmap has another number of elements than was said"
    if (bits * (np.arange(BLOCK) >= sizes[~few][:, None])).any():
        return "a bitmap has an element beyond the end of its block"
    return _wrong_values(data[len(data) - int(counts.sum()) :].view(np.int8), counts)


def _wrong_values(q: NDArray[np.int8], counts: Indices) -> str | None:
    if not len(q):
        return None
    magnitudes = np.abs(q.astype(np.int16))
    if (magnitudes == 0).any():
        return "a value is 0: what is zero is left out"
    if (magnitudes > LEVELS).any():
        return "a value is -128: values go from -127 to 127"
    largest = np.maximum.reduceat(magnitudes, (np.cumsum(counts) - counts)[counts > 0])
    return "the largest value of a block is not 127" if (largest < LEVELS).any() else None
