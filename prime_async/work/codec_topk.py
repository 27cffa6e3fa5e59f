"""``topk``: the few largest elements of each block of 4096, with two bits each; contributions of a 136th of fp32.

It keeps of each block of m elements the ``ceil(m / 64)`` largest by magnitude, 64 of 4096, as SparseLoCo does (arXiv
2508.15706, and at 72 B parameters 2603.08163). Payload, for n elements in b blocks, K of them kept::

    bytes              what
    8 * b              per block two fp32 magnitudes: low, high
    ceil(3 * K / 2)    the positions of the elements that are kept, ascending in each block, block by block
    ceil(K / 4)        a code of two bits for each, four in a byte, the lowest bits first; the rest of the last is 0

Positions are as in :mod:`prime_async.work.sparse_blocks`. Bit 0 of a code says which magnitude it is (1: high), bit 1
is the sign. All other elements are zero. What is below 2^-126, the smallest normal fp32, counts as zero.

It is for contributions with error feedback: what it drops is most of what there is. Means of them are ``sparse``
(:mod:`prime_async.work.codec_sparse`).
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
    groups,
    kept_elements,
    kept_of_blocks,
    pack_positions,
    require_finite_values,
    stream_bytes,
    unpack_positions,
    wrong_positions,
    wrong_stream,
)

_CODE_PLACES: Final = np.array([0, 2, 4, 6], np.uint8)


class TopkCodec:
    """The largest elements of each block; see the module for the layout.

    Of elements that are as large as each other, those at lower positions are kept. ``low`` and ``high`` are the means
    of the smaller and of the larger kept magnitudes, divided where the sum of the squared errors is least (the first
    such place): the means are sums in fp64, in ascending order, divided in fp64 and rounded to fp32.

    - If zeros must be kept, for there are fewer other elements, ``low`` is 0 and stands for these, and ``high`` for all
      others.
    - If all kept elements are as large as each other, ``low`` is 0 and is not used.
    - A block of zeros has ``low`` and ``high`` 0, and codes 0.
    - NaN or infinity anywhere raises :class:`~prime_async.errors.NonFiniteError`.
    """

    name: Literal["topk"] = "topk"

    def payload_bytes(self, n: int) -> int:
        """Size of the payload of ``n`` elements."""
        kept = kept_elements(n)
        return 8 * block_count(n) + stream_bytes(kept) + -(-kept // 4)

    def encode(self, values: Tensor, out: Tensor, scratch: Tensor) -> int:  # noqa: ARG002  (needs no scratch)
        """See :meth:`Codec.encode <prime_async.work.codec.Codec.encode>`."""
        n, payload = values.numel(), out.numpy()
        require_finite_values(values)
        levels, positions, codes = [], [], []
        for rows in groups(values.numpy()):
            where = _select(np.abs(rows), kept_elements(rows.shape[1]))
            low_high, code = _two_levels(np.take_along_axis(rows, where, axis=1))
            levels.append(low_high.reshape(-1))
            positions.append(where.reshape(-1))
            codes.append(code.reshape(-1))
        size = self.payload_bytes(n)
        if n:
            parts = (
                np.concatenate(levels).view(np.uint8),
                pack_positions(np.concatenate(positions)),
                _pack_codes(np.concatenate(codes)),
            )
            np.concatenate(parts, out=payload[:size])
        return size

    def check(self, payload: Tensor, n: int) -> str | None:
        """See :meth:`Codec.check <prime_async.work.codec.Codec.check>`.

        Valid is what :meth:`encode` makes, and nothing else: a vector has one payload.
        """
        if (reason := wrong_size(payload, self.payload_bytes(n))) or not n:
            return reason
        levels, stream, packed = self._split(payload, n)
        counts = kept_of_blocks(n)
        if reason := wrong_stream(stream, kept_elements(n)) or _wrong_levels(levels):
            return reason
        codes = _unpack_codes(packed)
        if codes[kept_elements(n) :].any():
            return "bits behind the last code are not 0"
        positions = unpack_positions(stream, kept_elements(n))
        return wrong_positions(positions, counts, n) or _wrong_codes(
            codes[: kept_elements(n)], positions, levels, counts
        )

    def decode(self, payload: Tensor, out: Tensor, weight: float = 1.0) -> None:
        """See :meth:`Codec.decode <prime_async.work.codec.Codec.decode>`. The weight multiplies the
        magnitudes."""
        n = out.numel()
        out.zero_()
        if not n:
            return
        levels, stream, packed = self._split(payload, n)
        kept = kept_elements(n)
        block = np.repeat(np.arange(block_count(n)), kept_of_blocks(n))
        codes = _unpack_codes(packed)[:kept]
        magnitudes = (levels * np.float32(weight))[block, codes & 1]
        where = block * BLOCK + unpack_positions(stream, kept)
        out.numpy()[where] = np.where(codes & 2, -magnitudes, magnitudes)

    @staticmethod
    def _split(payload: Tensor, n: int) -> tuple[Floats, Bytes, Bytes]:
        """The magnitudes (blocks, 2), the stream of positions, and the packed codes."""
        data, blocks = payload.numpy(), block_count(n)
        levels = data[: 8 * blocks].copy().view("<f4").reshape(blocks, 2)  # the payload may lie at any address
        end = 8 * blocks + stream_bytes(kept_elements(n))
        return levels, data[8 * blocks : end], data[end:]


def _select(magnitudes: Floats, kept: int) -> Indices:
    """The positions of the ``kept`` largest of each row of (rows, m), ascending; the first ones of equal ones.

    ``magnitudes`` may be overwritten.
    """
    least = _least_kept(magnitudes, kept)
    if (least < LEAST).any():
        magnitudes[magnitudes < LEAST] = 0
        least = _least_kept(magnitudes, kept)
    chosen = magnitudes >= least
    for row in np.flatnonzero(chosen.sum(1) > kept):
        equal = np.flatnonzero(magnitudes[row] == least[row])
        chosen[row, equal[kept - int(chosen[row].sum()) + len(equal) :]] = False
    found: Indices = np.flatnonzero(chosen).reshape(len(chosen), kept) % chosen.shape[1]
    return found


def _least_kept(magnitudes: Floats, kept: int) -> Floats:
    """(rows, 1). Ten times as fast as ``torch.topk``, whose order of equal ones is not defined either."""
    at = magnitudes.shape[1] - kept
    return np.partition(magnitudes, at, axis=1)[:, at : at + 1]


def _two_levels(chosen: Floats) -> tuple[Floats, Bytes]:
    """The magnitudes (rows, 2) that stand for the elements (rows, kept), and the code of each."""
    magnitudes = np.abs(chosen)
    magnitudes[magnitudes < np.float32(LEAST)] = 0
    ordered = np.sort(magnitudes, axis=1)
    rows, kept = ordered.shape
    below = np.concatenate([np.zeros((rows, 1)), np.cumsum(ordered, axis=1, dtype=np.float64)], axis=1)
    low_count = _divide(ordered, below)
    row = np.arange(rows)
    low_sum = below[row, low_count]
    low = low_sum / np.maximum(low_count, 1)
    high = (below[:, -1] - low_sum) / np.maximum(kept - low_count, 1)
    first_high = np.append(ordered, np.full((rows, 1), np.inf, np.float32), axis=1)[row, low_count]
    is_high = magnitudes >= first_high[:, None]
    codes = is_high | ((chosen < 0) & (magnitudes > 0)) << 1
    return np.stack([low, high], axis=1).astype("<f4"), codes.astype(np.uint8)


def _divide(ordered: Floats, below: NDArray[np.float64]) -> Indices:
    """How many of each row of ``ordered`` (rows, kept) are low. ``below`` (rows, kept + 1): the sums of the first ones.

    The squared error is that of all less ``low_sum^2 / low_count + high_sum^2 / high_count``.
    """
    kept = ordered.shape[1]
    zeros: Indices = (ordered == 0).sum(1)
    if kept == 1:
        return zeros
    count = np.arange(1, kept)
    low, high = below[:, 1:-1], below[:, -1:] - below[:, 1:-1]
    explained = low * low / count + high * high / (kept - count)
    explained[ordered[:, 1:] == ordered[:, :-1]] = -1.0  # equal ones are not parted
    best = np.where(explained.max(1) < 0, 0, explained.argmax(1) + 1)
    return np.where(zeros > 0, zeros, best)


def _pack_codes(codes: Bytes) -> Bytes:
    quads: Bytes = np.zeros((-(-len(codes) // 4), 4), np.uint8)
    quads.reshape(-1)[: len(codes)] = codes
    packed: Bytes = (quads << _CODE_PLACES).sum(1, dtype=np.uint8)
    return packed


def _unpack_codes(packed: Bytes) -> Bytes:
    codes: Bytes = (packed[:, None] >> _CODE_PLACES & np.uint8(3)).reshape(-1)
    return codes


def _wrong_levels(levels: Floats) -> str | None:
    if reason := wrong_scales(torch.from_numpy(levels.reshape(-1)), LEAST, float(np.finfo(np.float32).max)):
        return reason
    low, high = levels[:, 0], levels[:, 1]
    if (low >= high)[(low > 0) | (high > 0)].any():
        return "the low magnitude of a block is not below the high one"
    return None


def _wrong_codes(codes: Bytes, positions: Indices, levels: Floats, counts: Indices) -> str | None:
    """Whether each magnitude is used, and zeros are those that would be kept."""
    first = np.cumsum(counts) - counts
    block = np.repeat(np.arange(len(counts)), counts)
    is_low, is_zero = codes & 1 == 0, levels[block, codes & 1] == 0
    if (np.add.reduceat(is_low.astype(np.int64), first) == 0)[levels[:, 0] > 0].any():
        return "a low magnitude is not used: it must be 0"
    if (np.add.reduceat((~is_low).astype(np.int64), first) == 0)[levels[:, 1] > 0].any():
        return "a high magnitude is not used"
    if (codes[is_zero] != 0).any():
        return "a zero has a sign, or is high"
    if (positions != np.arange(len(positions)) - first[block])[is_zero].any():
        return "a zero is kept, and not the first one of its block"
    return None
