"""What becomes of the contributions to one chunk, decoded: ``run.exchange.reduce``.

A mean is made anew by whoever takes over a chunk, and by an audit, and must be the same bytes. So a result follows from
the payloads, their order and their weights alone, on every processor and with any number of threads. Elements are
multiplied, added, compared and converted one by one; where elements are added to each other (:func:`norm`) the order
is written down here, for torch's own sums go by the width of the processor's vectors. No reducer sees more than the
chunk: what is said of a contribution's size or direction is that of its part in the chunk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from prime_async.config.schema import ReducerName
from prime_async.work.codec import Codec

NORM_BLOCK: Final = 2**16
"""Elements whose squares are added at once: 512 KiB in fp64, which a processor has in its cache."""
SORT_BLOCK: Final = 2**14
UNIT_ROUNDOFF: Final = 2.0**-24
"""Of fp32: by how much, relative to it, a number may be off after one operation."""


class Reducer(Protocol):
    """Makes one vector of many."""

    def __call__(self, codec: Codec, terms: Sequence[tuple[Tensor, int]], out: Tensor, scratch: Tensor) -> None:
        """Write what becomes of ``terms``, valid payloads with their weights, into ``out``, fp32 (n,).

        It may hold infinities, where a result is beyond the largest fp32, and no NaN. ``scratch``, fp32 (n,), is
        overwritten.
        """
        ...


def make_reducer(name: ReducerName, trim: int) -> Reducer:
    """The one of ``run.exchange.reduce`` and ``run.exchange.trim``."""
    match name:
        case "mean":
            return mean
        case "rda":
            return by_direction_and_size
        case "trimmed_mean":
            return TrimmedMean(trim)
        case "median":
            return TrimmedMean(None)


# --- mean -----------------------------------------------------------------------------------------------------------


def mean(codec: Codec, terms: Sequence[tuple[Tensor, int]], out: Tensor, scratch: Tensor) -> None:
    """The weighted mean; zero without any weight.

    The share of payload i is ``weight_i / total``, the correctly rounded fp64 quotient of two integers, rounded to
    fp32. The sum is in fp32 and in the order given: ``share_0 * x_0 + share_1 * x_1 + ...``, with a multiplication and
    an addition per term.
    """
    if not terms:
        out.zero_()
    for i, ((payload, _), share) in enumerate(zip(terms, shares([w for _, w in terms]), strict=True)):
        if i == 0:
            codec.decode(payload, out, share)
        else:
            codec.decode(payload, scratch, share)
            out.add_(scratch)


def shares(weights: Sequence[int]) -> list[float]:
    """Each weight over their sum, rounded to fp32; zeros if the sum is zero."""
    return [float(np.float32(share)) for share in _exact_shares(weights)]


def _exact_shares(weights: Sequence[int]) -> list[float]:
    """Each weight over their sum, rounded to fp64; zeros if the sum is zero."""
    total = sum(weights)
    return [weight / total if total else 0.0 for weight in weights]


# --- direction and size ---------------------------------------------------------------------------------------------


def by_direction_and_size(codec: Codec, terms: Sequence[tuple[Tensor, int]], out: Tensor, scratch: Tensor) -> None:
    """RDA, radial-directional averaging (arXiv 2604.21428): the mean direction, as long as the c_i are in the mean.

    With shares w_i, which are weights over their sum::

        u = sum_i w_i c_i / ||c_i||
        g = (sum_i w_i ||c_i||) u / ||u||

    The weighted mean of contributions that disagree is shorter than they are, the more nodes the shorter; this one is
    not. And the direction is not that of whoever moved furthest. Both are of the chunk, for an owner has seen no
    more. So each chunk keeps its own size, and is turned for itself; with another ``chunk_elements`` the result is
    another. The paper leaves embeddings to the mean, since there nodes disagree less; here all chunks are alike.

    A contribution of zeros has no direction, and its size, 0, counts in the mean size. Where the directions cancel
    out, u is zero but for what rounding has left of it, at most ``len(terms)`` times the unit roundoff; then there is
    no direction to go to, and g is zero.

    Sizes, shares and factors are in fp64, and sizes are added in the order given. An element is multiplied by its
    factor, ``w_i / ||c_i||`` or that of the last line, in fp64, and rounded to fp32; u is a sum in fp32, in the order
    given.
    """
    size = 0.0
    out.zero_()
    for (payload, _), share in zip(terms, _exact_shares([w for _, w in terms]), strict=True):
        codec.decode(payload, scratch)
        length = norm(scratch)
        size += share * length
        if length > 0:
            _scale(scratch, share / length)
            out.add_(scratch)
    length = norm(out)
    if length > len(terms) * UNIT_ROUNDOFF:
        _scale(out, size / length)
    else:
        out.zero_()


def norm(values: Tensor) -> float:
    """The Euclidean norm of ``values``, fp32 (n,), all finite: the same bits on every processor.

    In fp64, where the square of an fp32 number is exact and no sum of them overflows. The squares of each block of
    ``NORM_BLOCK`` elements are added by halves: of m numbers the last ``m // 2`` are added, one by one, to the first of
    them, until one is left. The blocks' sums are added in order. Square roots are rounded correctly (IEEE 754).
    """
    buffer = torch.empty(min(NORM_BLOCK, values.numel()), dtype=torch.float64)
    total = 0.0
    for block in torch.split(values, NORM_BLOCK):
        squares = buffer[: block.numel()].copy_(block)
        total += _sum_by_halves(squares.mul_(squares))
    return math.sqrt(total)


def _sum_by_halves(values: Tensor) -> float:
    """Of fp64 (m,), which is overwritten."""
    while values.numel() > 1:
        rest = values.numel() // 2
        kept = values[: values.numel() - rest]
        kept[:rest].add_(values[kept.numel() :])
        values = kept
    return float(values.sum())  # of one number, or of none


def _scale(values: Tensor, factor: float) -> None:
    """Each of ``values``, fp32 (n,), times ``factor`` in fp64, rounded to fp32."""
    buffer = torch.empty(min(NORM_BLOCK, values.numel()), dtype=torch.float64)
    for block in torch.split(values, NORM_BLOCK):
        block.copy_(buffer[: block.numel()].copy_(block).mul_(factor))


# --- order statistics -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """Of each element the mean without the ``trim`` largest and the ``trim`` smallest values (arXiv 1803.01498).

    ``None``: without all but the middle one, or the middle two: the median. So up to ``trim`` contributions, or fewer
    than half of them, may hold anything: each element stays within what the others say of it. If there are no more
    than twice ``trim`` it is the median.

    Weights do not count, but for zero: they are what the nodes say of themselves, and a large one must not carry a
    contribution through. What is left is added in ascending order, each times the fp32 nearest to one over its number.
    Zero counts as positive.

    An element of all contributions is needed at once: it takes 4 bytes for each element of the chunk and contribution.
    """

    trim: int | None

    def __call__(self, codec: Codec, terms: Sequence[tuple[Tensor, int]], out: Tensor, scratch: Tensor) -> None:
        payloads = [payload for payload, weight in terms if weight]
        if not payloads:
            out.zero_()
            return
        rows = torch.empty(len(payloads), out.numel())
        for row, payload in zip(rows, payloads, strict=True):
            codec.decode(payload, row)
            row.add_(0.0)  # makes 0 of -0, so that numbers that are equal are the same bits
        for block, spare, mean in zip(*(torch.split(t, SORT_BLOCK, -1) for t in (rows, scratch, out)), strict=True):
            self._reduce(list(block), spare, mean)

    def _reduce(self, rows: list[Tensor], spare: Tensor, out: Tensor) -> None:
        """All (m,); the mean of ``rows``, which are overwritten, goes into ``out``."""
        most = (len(rows) - 1) // 2
        trim = most if self.trim is None else min(self.trim, most)
        kept = _sorted(rows, spare)[trim : len(rows) - trim]
        share = float(np.float32(1 / len(kept)))
        torch.mul(kept[0], share, out=out)
        for row in kept[1:]:
            out.add_(row.mul_(share))


def _sorted(rows: list[Tensor], spare: Tensor) -> list[Tensor]:
    """The same numbers, all (m,), in each place in ascending order. Overwrites them, and ``spare``, with each other."""
    for low, high in _comparisons(len(rows)):
        torch.minimum(rows[low], rows[high], out=spare)
        torch.maximum(rows[low], rows[high], out=rows[high])
        rows[low], spare = spare, rows[low]
    return rows


def _comparisons(count: int) -> Iterator[tuple[int, int]]:
    """Batcher's merge exchange (Knuth, The Art of Computer Programming 3, algorithm 5.2.2M): sorts any ``count``.

    Elementwise comparisons of whole rows, about ``count * log2(count)^2 / 4`` of them, where a sort would go
    from place to place.
    """
    top = 1 << max(0, (count - 1).bit_length() - 1)
    step = top
    while step:
        bound, rest, distance = top, 0, step
        while True:
            for low in itertools.takewhile(lambda i: i < count - distance, itertools.count()):  # noqa: B023
                if low & step == rest:
                    yield low, low + distance
            if bound == step:
                break
            distance, bound, rest = bound - step, bound // 2, step
        step //= 2
