"""``prime-async plan``: what an exchange will cost, and which settings to begin with."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from prime_async.cli.options import Cores, Count, Fragments, Json, LongestRtt, ManyNodes, NotNegative, Positive
from prime_async.cli.report import figures_table
from prime_async.plan import Forecast, Setup, choices, forecast, recommend
from prime_async.watch.words import size


def plan(
    *,
    parameters: Positive,
    step_s: Positive,
    up_mbit: Positive,
    down_mbit: NotNegative = 0.0,
    nodes: ManyNodes = 4,
    rtt_ms: LongestRtt = 100.0,
    inner_steps: Count = 500,
    fragments: Fragments = 4,
    cores: Cores = 4,
    json_: Json = False,
) -> int:
    """Say what each mode will cost over given links, and recommend mode, H and codec to begin with.

    For nodes whose GPU trains: what the exchange takes of a CPU that trains as well is not in it.

    Parameters
    ----------
    parameters
        Of the model; 1e9 for 1 B.
    step_s
        Seconds of an inner step on the slowest node.
    up_mbit
        Uplink of the slowest node.
    down_mbit
        Its downlink; 0: as fast as the uplink.
    inner_steps
        H of the table.
    """
    setup = Setup(
        parameters=round(parameters),
        step_s=step_s,
        nodes=nodes,
        up_mbit=up_mbit,
        down_mbit=down_mbit or up_mbit,
        rtt_ms=rtt_ms,
        cores=cores,
    )
    found = [forecast(setup, choice) for choice in choices(inner_steps, fragments)]
    best, reason = recommend(setup, fragments)
    if json_:
        print(json.dumps({**asdict(setup), "modes": list(map(asdict, found)), "best": asdict(best), "why": reason}))
        return 0
    console = Console(highlight=False)
    title = f"{parameters:,.0f} parameters, {nodes} nodes, H = {inner_steps}; {size(best.device_bytes)} to train them"
    console.print(_table(title, found))
    chosen = best.choice
    parts = f", run.fragments = {chosen.fragments}" if chosen.mode == "streaming" else ""
    console.print(
        f'begin with run.mode = "{chosen.mode}"{parts}, run.round.inner_steps = {chosen.inner_steps}, '
        f'run.exchange.codec = "{chosen.codec}": {best.share:.1%} of the time goes into training; {reason}.'
    )
    return 0


def _table(title: str, found: list[Forecast]) -> Table:
    table = figures_table(title, ("mode", "codec"), ("sent in H", "steps", "exchange", "training", "delay", "host"))
    for f in found:
        table.add_row(
            f.choice.mode,
            f.choice.codec,
            size(f.sent_bytes),
            f"{f.training_s:.1f} s",
            f"{f.exchange_s:.1f} s",
            f"{f.share:.1%}",
            f"{f.delay:.1%}",
            size(f.host_bytes),
        )
    return table
