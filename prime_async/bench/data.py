"""The vectors that the benchmark averages: standard normal, different on each node, made anew where they are needed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from prime_async.work.chunks import Chunks


def fill(values: Tensor, chunks: Chunks, node: int) -> None:
    """Write the vector of ``node`` into ``values``, fp32 (elements,)."""
    for chunk in range(chunks.count):
        _draw(values[chunks.span(chunk)], _seed(chunks, node, chunk))


def relative_error(values: Tensor, chunks: Chunks, nodes: int, of: Iterable[int] | None = None) -> float:
    """The L2 norm of ``values`` - m over that of m, m being the exact mean of all nodes' vectors, in fp64.

    ``of``: only of these chunks.
    """
    wrong = whole = 0.0
    for chunk in range(chunks.count) if of is None else of:
        size = chunks.size(chunk)
        mean, drawn = torch.zeros(size, dtype=torch.float64), torch.empty(size)
        for node in range(nodes):
            _draw(drawn, _seed(chunks, node, chunk))
            mean += drawn
        mean /= nodes
        wrong += float((values[chunks.span(chunk)] - mean).square().sum())
        whole += float(mean.square().sum())
    return math.sqrt(wrong / whole)


def _seed(chunks: Chunks, node: int, chunk: int) -> int:
    """Different for each; torch's generator looks at the lower 32 bits alone."""
    return node * chunks.count + chunk


def _draw(out: Tensor, seed: int) -> None:
    torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), out=out)
