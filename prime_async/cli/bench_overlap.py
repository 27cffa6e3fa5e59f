"""``prime-async bench overlap``: how much of the time goes into training, by mode."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from prime_async.bench.overlap import Measured, OverlapBench, measure_alone, measure_mode, modes_of, rate_for, share
from prime_async.cli.options import Count, Fragments, Json, LinkRtt, LongSteps, MeasuredRounds, Model, TrainingNodes
from prime_async.cli.report import figures_table, report


def overlap(
    *,
    nodes: TrainingNodes = 2,
    model: Model = "llama-1m",
    inner_steps: LongSteps = 400,
    rounds: MeasuredRounds = 3,
    runs: Count = 3,
    exchange_share: Annotated[float, Parameter(validator=Number(gt=0, lt=1))] = 0.17,
    slow_down: Annotated[float, Parameter(validator=Number(gte=1))] = 4.0,
    fragments: Fragments = 4,
    rtt_ms: LinkRtt = 40.0,
    json_: Json = False,
) -> int:
    """Train in every mode over slow links, and compare with the same trainers without any exchange.

    Real node processes, each in a host of its own on this machine: needs root, /dev/net/tun, iproute2 and nftables.
    Keep the machine idle meanwhile.

    Parameters
    ----------
    runs
        Of each kind, interleaved; shares are of medians.
    exchange_share
        Of the time, that a blocking exchange is to take: so slow are the links.
    slow_down
        The second half is measured over links that are so many times slower still.
    """
    bench = OverlapBench(
        nodes=nodes,
        model=model,
        inner_steps=inner_steps,
        rounds=rounds,
        exchange_share=exchange_share,
        slow_down=slow_down,
        fragments=fragments,
        rtt_ms=rtt_ms,
    )
    return report(partial(_measure, bench, runs), (_table,), json_)


async def _measure(bench: OverlapBench, runs: int, console: Console) -> dict[str, Any]:
    alone: list[Measured] = []
    found: dict[str, list[Measured]] = {mode.name: [] for mode in modes_of(bench)}
    rate = 0.0
    parameters = 0
    for run in range(1, runs + 1):
        console.print(f"run {run} of {runs}: without any exchange ...")
        plain, parameters = await measure_alone(bench)
        alone.append(plain)
        rate = rate or rate_for(bench, plain, parameters)
        for mode in modes_of(bench):
            slower = bench.slow_down if mode.slow else 1
            console.print(f"run {run} of {runs}: {mode.name}, {rate / slower:.2f} Mbit/s ...")
            found[mode.name].append(await measure_mode(bench, mode, rate))
    return {
        **asdict(bench),
        "parameters": parameters,
        "rate_mbit": round(rate, 3),
        "alone": [asdict(m) for m in alone],
        "modes": {name: _figures(alone, measured) for name, measured in found.items()},
    }


def _figures(alone: list[Measured], together: list[Measured]) -> dict[str, Any]:
    """``cpu_share``: what the exchange takes of the CPU time of the nodes' cores, as long as the round lasts."""
    shares = [share([a], [t]) for a, t in zip(alone, together, strict=True)]
    plain = statistics.median(a.cpu_s_per_step for a in alone)
    used = statistics.median(t.cpu_s_per_step for t in together) - plain
    return {
        "share": round(share(alone, together), 4),
        "shares": [round(s, 4) for s in shares],
        "round_s": round(statistics.median(t.round_s for t in together), 3),
        "exchange_s": round(statistics.median(t.exchange_s for t in together), 3),
        "cpu_share": round(used / plain, 4),
        "runs": [asdict(t) for t in together],
    }


def _table(result: dict[str, Any]) -> Table:
    title = (
        f"{result['nodes']} nodes, {result['parameters']:,} parameters, H = {result['inner_steps']}, "
        f"{result['rate_mbit']:.2f} Mbit/s, {result['rtt_ms']:g} ms; slow: {result['slow_down']:g} times slower"
    )
    table = figures_table(
        title, ("mode",), ("time spent training", "least", "most", "H steps take", "exchange", "CPU of it")
    )
    for name, figures in result["modes"].items():
        shares = (figures["share"], min(figures["shares"]), max(figures["shares"]))
        table.add_row(
            name,
            *(f"{value:.1%}" for value in shares),
            f"{figures['round_s']:.1f} s",
            f"{figures['exchange_s']:.2f} s",
            f"{figures['cpu_share']:+.1%}",
        )
    return table
