"""``prime-async bandwidth``: how fast links must be for a share of the time to go into training."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

from rich.console import Console
from rich.table import Table

from prime_async.cli.options import SEVERAL, Cores, Count, Fragments, Json, LongestRtt, ManyNodes
from prime_async.cli.report import figures_table
from prime_async.errors import ConfigError
from prime_async.plan import Setup
from prime_async.utilisation import TARGETS, Need, needs


def bandwidth(
    *,
    parameters: Annotated[list[float], SEVERAL] = [1e9, 1e10, 1e11],  # noqa: B006  (kept)
    step_s: Annotated[list[float], SEVERAL] = [0.1, 0.8, 4.9],  # noqa: B006
    nodes: ManyNodes = 2,
    rtt_ms: LongestRtt = 100.0,
    inner_steps: Count = 100,
    fragments: Fragments = 10,
    cores: Cores = 16,
    json_: Json = False,
) -> int:
    """Say how many Gbit/s each mode needs so that 50 to 99 % of the time goes into training.

    By the model of `prime-async plan`, for nodes whose GPU trains. Beside the three models of the defaults stands
    what the paper on Streaming DiLoCo (arXiv 2501.18512, table 4) simulated of them.

    Parameters
    ----------
    parameters
        Of each model; 1e9 for 1 B.
    step_s
        Seconds of an inner step, for each model.
    inner_steps
        H, a multiple of fragments.
    """
    _check(parameters, step_s, inner_steps, fragments)
    found = []
    for count, seconds in zip(parameters, step_s, strict=True):
        setup = Setup(
            parameters=round(count),
            step_s=seconds,
            nodes=nodes,
            up_mbit=0.0,  # is what is asked for
            down_mbit=0.0,
            rtt_ms=rtt_ms,
            cores=cores,
        )
        found.append((setup, needs(setup, inner_steps, fragments)))
    if json_:
        models = [
            {"parameters": s.parameters, "step_s": s.step_s, "methods": list(map(asdict, rows))} for s, rows in found
        ]
        given = {"nodes": nodes, "rtt_ms": rtt_ms, "inner_steps": inner_steps, "fragments": fragments, "cores": cores}
        print(json.dumps({**given, "targets": TARGETS, "models": models}))
        return 0
    console = Console(highlight=False)
    console.print(f"Gbit/s of each node, each way; {nodes} nodes, H = {inner_steps}, {rtt_ms:g} ms, {cores} cores")
    for setup, rows in found:
        console.print(_table(setup, rows))
    return 0


def _check(parameters: list[float], step_s: list[float], inner_steps: int, fragments: int) -> None:
    problems = []
    if len(parameters) != len(step_s):
        problems.append(
            f"--parameters has {len(parameters)} values and --step-s {len(step_s)}: give one step time for each model"
        )
    if min([*parameters, *step_s], default=1) <= 0:
        problems.append("--parameters and --step-s: expected numbers above 0")
    if inner_steps % fragments:
        problems.append(f"--inner-steps {inner_steps} is no multiple of --fragments {fragments}: change one of them")
    if problems:
        raise ConfigError(problems)


def _table(setup: Setup, rows: list[Need]) -> Table:
    title = f"{setup.parameters / 1e9:g} B parameters, {setup.step_s:g} s a step"
    table = figures_table(title, ("time spent training",), (f"{target:.0%}" for target in TARGETS))
    for row in rows:
        table.add_row(
            f"paper: {row.name}" if row.published else row.name,
            *map(_rate, row.gbit),
        )
    return table


def _rate(gbit: float | None) -> str:
    if gbit is None:
        return "never"
    return f"{gbit:,.0f}" if gbit >= 100 else f"{gbit:.3g}"
