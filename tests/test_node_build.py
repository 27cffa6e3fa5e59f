"""What a node's machines are made with."""

from __future__ import annotations

import pytest
import torch

from prime_async.node.build import chunks_under_way
from prime_async.work.buffer_workload import BufferWorkload
from prime_async.work.codec import make_codec


@pytest.mark.parametrize(
    ("streams", "chunk_elements", "expected"),
    [
        pytest.param(1, 1 << 16, 4, id="a few, whatever the streams"),
        pytest.param(16, 1 << 16, 16, id="one for each stream"),
        pytest.param(64, 1 << 20, 7, id="as many as the memory for them allows"),
        pytest.param(64, 1 << 23, 4, id="a few, however large"),
    ],
)
def test_so_many_chunks_of_a_round_are_under_way_from_each_member(
    streams: int, chunk_elements: int, expected: int
) -> None:
    workload = BufferWorkload(torch.zeros(chunk_elements), chunk_elements, make_codec("int8"))
    assert chunks_under_way(streams, workload) == expected
