"""The model of ``prime-async plan`` against measurements: the same settings, forecast and in the network lab.

The step time and the parameters are those of the trainers alone, the links are as slow as
:mod:`prime_async.bench.overlap` makes them; the rest is what :func:`prime_async.plan.forecast` knows. The nodes of the
lab train on the CPUs with which they exchange, which the model leaves out: so rounds have to be long.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prime_async.bench.overlap import Measured, Mode, OverlapBench, share
from prime_async.config.schema import ContributionCodec
from prime_async.plan import Choice, Setup, forecast


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """``error``: of the prediction, relative to what was measured; positive where it was too high."""

    predicted: float
    measured: float
    error: float


def modes_of(modes: Sequence[str], codecs: Sequence[ContributionCodec], fragments: int) -> list[Mode]:
    """Each mode with each codec."""
    return [Mode(name=f"{mode} {codec}", run=_run(mode, codec, fragments)) for mode in modes for codec in codecs]


def _run(mode: str, codec: ContributionCodec, fragments: int) -> dict[str, Any]:
    parts = {"fragments": fragments} if mode == "streaming" else {}
    return {"mode": mode, **parts, "exchange": {"codec": codec}}


def choice_of(bench: OverlapBench, mode: Mode) -> Choice:
    """The same settings, as the model knows them."""
    return Choice(
        mode=mode.run["mode"],
        codec=mode.run["exchange"]["codec"],
        inner_steps=bench.inner_steps,
        fragments=mode.run.get("fragments", 1),
    )


def setup_of(bench: OverlapBench, alone: Measured, parameters: int, rate_mbit: float) -> Setup:
    """The nodes and links of the lab. A node has a core of its own."""
    return Setup(
        parameters=parameters,
        step_s=bench.nodes / alone.steps_per_s,
        nodes=bench.nodes,
        up_mbit=rate_mbit,
        down_mbit=rate_mbit,
        rtt_ms=bench.rtt_ms,
    )


def compare(setup: Setup, choice: Choice, alone: Sequence[Measured], together: Sequence[Measured]) -> dict[str, Figure]:
    """Seconds of an exchange, and the share of time spent training: medians over the repetitions."""
    predicted = forecast(setup, choice)
    return {
        "exchange_s": figure(predicted.exchange_s, statistics.median(m.exchange_s for m in together)),
        "share": figure(predicted.share, share(alone, together)),
    }


def figure(predicted: float, measured: float) -> Figure:
    return Figure(predicted=predicted, measured=measured, error=predicted / measured - 1)
