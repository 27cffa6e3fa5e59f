"""What the tests of measurements in the network lab have in common."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prime_async.bench.netlab import PREFIX, why_not
from prime_async.bench.overlap import Measured, OverlapBench

needs_a_lab = pytest.mark.skipif(why_not() is not None, reason=f"no network lab: {why_not()}")

BENCH = OverlapBench(
    nodes=4,
    model="llama-1m",
    inner_steps=100,
    rounds=2,
    exchange_share=0.2,
    slow_down=4.0,
    fragments=4,
    rtt_ms=20,
)


def measured(steps_per_s: float, exchange_s: float = 0.0) -> Measured:
    """Of which the rest does not matter."""
    return Measured(steps_per_s=steps_per_s, cpu_s_per_step=0.01, round_s=1.0, exchange_s=exchange_s)


def hosts_left() -> list[Path]:
    """Of the labs of this process."""
    return list(Path("/run/netns").glob(f"{PREFIX}{os.getpid()}x*"))
