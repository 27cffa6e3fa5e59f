"""``prime-async bench bytes``: it counts what it says."""

from __future__ import annotations

import json

import pytest

from prime_async.bench.bytes import BytesBench, Count, data_parallel_bytes, figures
from prime_async.cli.bench_bytes import bytes_

BENCH = BytesBench(nodes=4, model="llama-10m", inner_steps=500, rounds=2, sequence_length=8, step_s=1.0)


def test_a_ring_sends_each_gradient_twice_but_for_the_own_part() -> None:
    """Of each of 4 nodes, 2 * 3/4 of 4 bytes a parameter, at every step."""
    assert data_parallel_bytes(BENCH, 100) == 500 * 4 * round(2 * 3 / 4 * 400)


def test_heartbeats_are_reckoned_for_the_seconds_of_real_inner_steps() -> None:
    """Given two rounds of 50 s with 10 bytes a second; then rounds of 500 s send 900 s more of these in all."""
    before, after = Count(at=0, sent_bytes=0, round=1, steps=0), Count(at=100, sent_bytes=10_000, round=3, steps=4000)
    found = figures(BENCH, 1000, before, after, 10.0, ["d"] * 4)
    assert found["reduction"] == found["data_parallel_bytes"] / 10_000
    assert found["reckoned_reduction"] == found["data_parallel_bytes"] / 19_000
    assert found["bitwise_equal"] is True
    assert figures(BENCH, 1000, before, after, None, ["d"] * 3)["bitwise_equal"] is False


def test_a_small_count_is_that_of_whole_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    """Given two nodes with int8; then a round sends two payloads, 1 1/64 bytes a parameter, and little else.

    The model sleeps through its steps, for shorter rounds could not be counted one by one, also on a fast machine.
    """
    model = "tests.node_processes:paced_model"
    assert bytes_(nodes=2, model=model, codecs=["int8"], inner_steps=80, sequence_length=8, json_=True) == 0
    output, errors = capsys.readouterr()
    result = json.loads(output.splitlines()[-1])
    found = result["codecs"]["int8"]
    payloads = 2 * found["parameters"] * (1 + 4 / 256)
    assert payloads < found["sent_bytes"] < 1.05 * payloads
    assert found["inner_steps_done"] == 2 * 80
    assert found["reduction"] == pytest.approx(4 * 80 / (1 + 4 / 256), rel=0.05)
    assert 0 < found["heartbeat_bytes_per_s"] < 0.01 * payloads
    assert found["bitwise_equal"] is True
    assert "times" in errors  # the table
