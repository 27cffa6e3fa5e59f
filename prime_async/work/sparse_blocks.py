"""What the codecs share that send few elements: blocks of 4096, the last may be shorter, and positions in them.

A position is an element's index in its block. Positions stand in one stream of 12 bits each, the lowest bits first, two
in three bytes; the half byte behind an odd number of them is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prime_async.work.block_scales import require_finite

BLOCK: Final = 4096
KEPT: Final = 64
"""How many of a block's elements ``topk`` keeps."""
SPARSITY: Final = BLOCK // KEPT
LEAST: Final = 2.0**-126
"""The smallest normal fp32: what is below it counts as zero."""
ROWS: Final = 64
"""Blocks that are looked at together: what that takes stays in the cache."""

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Indices: TypeAlias = NDArray[np.int64]


def kept_elements(n: int) -> int:
    """How many of ``n`` elements ``topk`` keeps."""
    return -(-n // SPARSITY)


def block_count(n: int) -> int:
    """Blocks of ``n`` elements."""
    return -(-n // BLOCK)


def block_sizes(n: int) -> Indices:
    """Elements of each block."""
    sizes = np.full(block_count(n), BLOCK)
    if n % BLOCK:
        sizes[-1] = n % BLOCK
    return sizes


def kept_of_blocks(n: int) -> Indices:
    """How many elements of each block ``topk`` keeps."""
    return -(-block_sizes(n) // SPARSITY)


def groups(values: Floats) -> Iterator[Floats]:
    """(n,) as blocks (up to ``ROWS``, 4096), and the last one (1, n % 4096) if that is shorter."""
    whole = len(values) // BLOCK * BLOCK
    for start in range(0, whole, ROWS * BLOCK):
        yield values[start : min(start + ROWS * BLOCK, whole)].reshape(-1, BLOCK)
    if whole < len(values):
        yield values[whole:].reshape(1, -1)


def require_finite_values(values: Tensor) -> None:
    """Raises :class:`~prime_async.errors.NonFiniteError` if an element is NaN or infinite."""
    if values.numel():
        require_finite(torch.stack([values.amin(), values.amax()]))


def stream_bytes(count: int) -> int:
    """Of ``count`` positions."""
    return -(-3 * count // 2)


def pack_positions(positions: Indices) -> Bytes:
    """12 bits each."""
    pairs = np.zeros((-(-len(positions) // 2), 2), np.uint16)
    pairs.reshape(-1)[: len(positions)] = positions
    even, odd = pairs[:, 0], pairs[:, 1]
    triples = np.stack([even & 255, even >> 8 | (odd & 15) << 4, odd >> 4], axis=1).astype(np.uint8)
    return triples.reshape(-1)[: stream_bytes(len(positions))]


def unpack_positions(stream: Bytes, count: int) -> Indices:
    """The opposite of :func:`pack_positions`."""
    triples = np.zeros((-(-count // 2), 3), np.int64)
    triples.reshape(-1)[: len(stream)] = stream
    pairs = np.stack([triples[:, 0] | (triples[:, 1] & 15) << 8, triples[:, 1] >> 4 | triples[:, 2] << 4], axis=1)
    return pairs.reshape(-1)[:count]


def wrong_stream(stream: Bytes, count: int) -> str | None:
    """Why what :func:`pack_positions` made of ``count`` is not that."""
    return "the half byte behind the last position is not 0" if count % 2 and stream[-1] > 15 else None


def wrong_positions(positions: Indices, counts: Indices, n: int) -> str | None:
    """Why these are not ascending ones of blocks. ``counts``: how many there are of each."""
    if (positions >= np.repeat(block_sizes(n), counts)).any():
        return "a position is beyond the end of its block"
    begins = np.zeros(len(positions), bool)
    begins[(np.cumsum(counts) - counts)[counts > 0]] = True
    if ((positions[1:] <= positions[:-1]) & ~begins[1:]).any():
        return "positions do not ascend"
    return None
