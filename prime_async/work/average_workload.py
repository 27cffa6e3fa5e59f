"""What somebody's own program wants averaged, through the same interface as training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prime_async.config.schema import ExchangeSettings
from prime_async.work.buffer_workload import BufferWorkload
from prime_async.work.codec import make_codec
from prime_async.work.reducers import make_reducer


class Offer:
    """A vector to be averaged, fp32 (n,), with its weight. ``mean``: what came of it, fp32 (n,), once it has."""

    def __init__(self, values: Tensor, weight: int) -> None:
        self.values = values
        self.weight = weight
        self.mean: Tensor | None = None


class AverageWorkload(BufferWorkload):
    """The outer state is the newest mean, fp32 (n,), zeros before the first; a contribution is the vector on offer.

    An offer stands, from round to round, until this node's contribution is in the mean of some chunk.
    """

    def __init__(self, elements: int, exchange: ExchangeSettings, on_mean: Callable[[], None]) -> None:
        """``on_mean`` is called, in a worker thread, when the offer has its mean and another can be made."""
        codec, mean_codec = make_codec(exchange.codec), make_codec(exchange.codec_of_means)
        reducer = make_reducer(exchange.reduce, exchange.trim)
        super().__init__(torch.zeros(elements), exchange.chunk_elements, codec, mean_codec, reducer)
        self.offer: Offer | None = None
        self._on_mean = on_mean
        self._counted = False

    def encode(self, chunk: int, out: memoryview) -> None:
        assert self.offer is not None, "a contribution without an offer"
        with self._codec.work_on(chunk) as (scratch, _):
            self._codec.encode(self.offer.values[self._chunks.span(chunk)], out, scratch)

    def apply(self, chunk: int, mean: memoryview, included: bool, own: memoryview | None = None) -> None:
        super().apply(chunk, mean, included, own)
        self._counted = self._counted or included

    def end_round(self) -> bytes:
        digest = super().end_round()
        counted, self._counted = self._counted, False
        if counted and self.offer is not None:
            self.offer.mean, self.offer = self.values.clone(), None
            self._on_mean()
        return digest
