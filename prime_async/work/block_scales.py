"""What the codecs share that divide a vector into blocks of 256 elements, with one fp32 scale each.

A scale is 0, for a block of zeros, or from a codec's least to its largest one. The limits are such that whatever a
scale is multiplied by is a normal fp32 number, or zero: a payload decodes to the same bits on every processor,
denormals flushed or not.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prime_async.errors import NonFiniteError

BLOCK = 256


def block_count(n: int) -> int:
    """Blocks of ``n`` elements; the last may be shorter."""
    return -(-n // BLOCK)


def blocks(flat: Tensor) -> list[Tensor]:
    """(n,) as its whole blocks (n // 256, 256) and, if there is a rest, the last block (1, n % 256)."""
    whole = flat.numel() // BLOCK * BLOCK
    parts = [flat[:whole].view(-1, BLOCK), flat[whole:].view(1, -1)]
    return [part for part in parts if part.numel()]


def per_part(per_block: Tensor, n: int) -> list[Tensor]:
    """(blocks,) divided as :func:`blocks` divides ``n`` elements."""
    return [part for part in (per_block[: n // BLOCK], per_block[n // BLOCK :]) if part.numel()]


def absmax_scales(values: Tensor, levels: int, least: float, most: float) -> Tensor:
    """``absmax / levels`` of each block, fp32 (blocks,), at most ``most``, and 0 where it would be below ``least``.

    Raises :class:`NonFiniteError` if an element is NaN or infinite.
    """
    n = values.numel()
    scales = torch.empty(block_count(n))
    # amax and amin read the values twice, and are still 20 times faster than aminmax over a dimension.
    for x, scale in zip(blocks(values), per_part(scales, n), strict=True):
        torch.maximum(torch.amax(x, 1), torch.amin(x, 1).neg_(), out=scale)  # NaN and infinity come through
    require_finite(scales)
    scales.div_(levels).clamp_(max=most)
    return scales.masked_fill_(scales < least, 0.0)


def divide(values: Tensor, scales: Tensor, out: Tensor) -> None:
    """``values / scale`` of its block, a true division; 0, or near it, in a block whose scale is 0."""
    divisors = scales.masked_fill(scales == 0, 1.0)  # what it divides rounds to 0
    for x, divisor, quotient in zip(blocks(values), per_part(divisors, values.numel()), blocks(out), strict=True):
        torch.div(x, divisor[:, None], out=quotient)


def read_scales(payload: Tensor, n: int) -> Tensor:
    """A copy of the scales at the beginning of a payload, fp32 (blocks,): the payload may lie at any address."""
    scales = torch.empty(block_count(n))
    scales.view(torch.uint8).copy_(payload[: 4 * scales.numel()])
    return scales


def write_scales(scales: Tensor, out: Tensor) -> None:
    """Put them at the beginning of a payload."""
    out[: 4 * scales.numel()].copy_(scales.view(torch.uint8))


def wrong_scales(scales: Tensor, least: float, most: float) -> str | None:
    """Why these, at least one, are not all valid."""
    low, high = float(scales.amin()), float(scales.amax())
    if not (np.isfinite(low) and np.isfinite(high)):
        return "a scale is NaN or infinite"
    if low < 0:
        return f"a scale is negative ({low})"
    if high > most:
        return f"a scale ({high}) is above {most}: values would decode to infinity"
    if bool(((scales > 0) & (scales < least)).any()):
        return f"a scale is denormal, or makes values that are: it must be 0 or at least {least}"
    return None


def require_finite(values: Tensor) -> None:
    """Raises :class:`NonFiniteError`."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("the values to encode hold NaN or infinity: this node's training has diverged")


def wrong_size(payload: Tensor, expected: int) -> str | None:
    """Why the payload has not the size that follows from the number of elements."""
    return None if payload.numel() == expected else f"{payload.numel()} bytes instead of {expected}"
