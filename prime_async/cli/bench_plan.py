"""``prime-async bench plan``: what ``prime-async plan`` foretells, against what is measured."""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

from rich.console import Console
from rich.table import Table

from prime_async.bench.overlap import Measured, Mode, OverlapBench, measure_alone, measure_mode, rate_for
from prime_async.bench.plan import choice_of, compare, modes_of, setup_of
from prime_async.cli.options import (
    SEVERAL,
    Count,
    Fragments,
    Json,
    LinkRtt,
    LongSteps,
    MeasuredRounds,
    Model,
    TrainingNodes,
)
from prime_async.cli.report import figures_table, report
from prime_async.config.schema import ContributionCodec
from prime_async.errors import ConfigError
from prime_async.plan import Choice, Setup

Case: TypeAlias = tuple[OverlapBench, Mode]
ModeName: TypeAlias = Literal["blocking", "overlapped", "streaming", "eager"]


def plan(
    *,
    nodes: TrainingNodes = 2,
    model: Model = "llama-1m",
    modes: Annotated[list[ModeName], SEVERAL] = ["blocking", "overlapped", "streaming"],  # noqa: B006  (kept)
    codecs: Annotated[list[ContributionCodec], SEVERAL] = ["int8", "int4"],  # noqa: B006
    exchange_shares: Annotated[list[float], SEVERAL] = [0.17, 0.5],  # noqa: B006
    inner_steps: LongSteps = 400,
    rounds: MeasuredRounds = 2,
    runs: Count = 1,
    fragments: Fragments = 4,
    rtt_ms: LinkRtt = 40.0,
    json_: Json = False,
) -> int:
    """Compare what `prime-async plan` says of an exchange with real nodes behind slow links.

    Real node processes, each in a host of its own on this machine: needs root, /dev/net/tun, iproute2 and nftables.
    Keep the machine idle meanwhile.

    Parameters
    ----------
    modes
        As run.mode. Each is measured with each codec.
    codecs
        As run.exchange.codec.
    exchange_shares
        Of the time, that a blocking int8 exchange is to take: so slow are the links. Each is measured.
    runs
        Of each kind; medians are compared.
    """
    if wrong := [s for s in exchange_shares if not 0 < s < 1]:
        raise ConfigError([f"--exchange-shares has {wrong}: expected shares of the time, above 0 and below 1"])
    bench = OverlapBench(
        nodes=nodes,
        model=model,
        inner_steps=inner_steps,
        rounds=rounds,
        exchange_share=0.0,  # of each case its own
        slow_down=1.0,
        fragments=fragments,
        rtt_ms=rtt_ms,
    )
    cases = [
        (replace(bench, exchange_share=part), mode)
        for part in exchange_shares
        for mode in modes_of(modes, codecs, fragments)
    ]
    return report(partial(_measure, bench, cases, runs), (_table,), json_)


async def _measure(bench: OverlapBench, cases: list[Case], runs: int, console: Console) -> dict[str, Any]:
    alone: list[Measured] = []
    found: list[list[Measured]] = [[] for _ in cases]
    rates: dict[float, float] = {}
    parameters = 0
    for run in range(1, runs + 1):
        console.print(f"run {run} of {runs}: without any exchange ...")
        plain, parameters = await measure_alone(bench)
        alone.append(plain)
        for (case, mode), measured in zip(cases, found, strict=True):
            rate = rates.setdefault(case.exchange_share, rate_for(case, plain, parameters))
            console.print(f"run {run} of {runs}: {mode.name}, {rate:.2f} Mbit/s ...")
            measured.append(await measure_mode(case, mode, rate))
    usual = replace(alone[0], steps_per_s=statistics.median(a.steps_per_s for a in alone))
    rows = []
    for (case, mode), measured in zip(cases, found, strict=True):
        setup, choice = setup_of(case, usual, parameters, rates[case.exchange_share]), choice_of(case, mode)
        rows.append(_row(case, setup, choice, alone, measured))
    return {
        **{name: value for name, value in asdict(bench).items() if name not in {"exchange_share", "slow_down"}},
        "parameters": parameters,
        "step_s": bench.nodes / usual.steps_per_s,
        "alone": list(map(asdict, alone)),
        "cases": rows,
    }


def _row(
    bench: OverlapBench, setup: Setup, choice: Choice, alone: list[Measured], together: list[Measured]
) -> dict[str, Any]:
    return {
        "setup": asdict(setup),
        "choice": asdict(choice),
        "exchange_share": bench.exchange_share,
        **{name: asdict(figure) for name, figure in compare(setup, choice, alone, together).items()},
        "runs": list(map(asdict, together)),
    }


def _table(result: dict[str, Any]) -> Table:
    """One row a setting; predicted, measured, and the error of the prediction."""
    title = (
        f"{result['nodes']} nodes, {result['parameters']:,} parameters, H = {result['inner_steps']}, "
        f"{1000 * result['step_s']:.1f} ms a step, {result['rtt_ms']:g} ms: predicted, measured, error"
    )
    table = figures_table(title, ("mode", "codec"), ("Mbit/s", "exchange", "", "", "training", "", ""), no_wrap=True)
    for case in result["cases"]:
        seconds, part = case["exchange_s"], case["share"]
        table.add_row(
            case["choice"]["mode"],
            case["choice"]["codec"],
            f"{case['setup']['up_mbit']:.2f}",
            f"{seconds['predicted']:.2f} s",
            f"{seconds['measured']:.2f} s",
            f"{seconds['error']:+.0%}",
            f"{part['predicted']:.1%}",
            f"{part['measured']:.1%}",
            f"{part['error']:+.1%}",
        )
    return table
