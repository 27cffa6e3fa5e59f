"""What is the same in workloads whatever their outer state is, as long as there are no local weights beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from prime_async.work.chunks import ChunkCodec


class VectorWorkload:
    """The part of a :class:`~prime_async.work.workload.Workload` that goes by its codec, or would move local weights.

    A workload that has those overrides the latter.
    """

    def __init__(self, codec: ChunkCodec) -> None:
        self._codec = codec

    def payload_bytes(self, chunk: int) -> int:
        """See :class:`Workload`, as for all methods below."""
        return self._codec.payload_bytes(chunk)

    def mean_bytes(self, chunk: int) -> int:
        return self._codec.mean_bytes(chunk)

    def usual_mean_bytes(self, chunk: int) -> int:
        return self._codec.usual_mean_bytes(chunk)

    def check(self, chunk: int, payload: memoryview) -> bool:
        return self._codec.is_valid(chunk, payload)

    # --- there are no local weights, and no local progress ------------------------------------------------------

    def capture(self, chunk: int) -> None:
        """Nothing to note."""

    def jump(self, chunk: int, own: memoryview) -> None:
        """Nothing to move."""

    def merge(self, chunk: int) -> None:
        """Nothing to move."""

    def give_up(self, chunk: int) -> None:
        """Nothing to give up."""

    def take_back(self, chunk: int) -> None:
        """Nothing to take back."""

    def restore(self) -> None:
        """Nothing to give up."""

    def inner_state(self) -> Mapping[str, Tensor]:
        return {}

    def load_inner_state(self, tensors: Mapping[str, Tensor]) -> bool:  # noqa: ARG002
        return False

    def evaluate(self, on_batch: Callable[[], None]) -> float:  # noqa: ARG002
        """NaN: that takes a model and data."""
        return math.nan
