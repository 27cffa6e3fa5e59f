"""``prime-async bench failover``: how long a round takes in which a node dies."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from prime_async.bench.failover import ROLES, FailoverBench, measure
from prime_async.cli.options import Json, Runs
from prime_async.cli.report import figures_table, report


def failover(
    *,
    nodes: Annotated[int, Parameter(validator=Number(gte=3, lte=16))] = 4,
    runs: Runs = 5,
    failure_timeout_s: Annotated[float, Parameter(validator=Number(gt=2, lte=3600))] = 10.0,
    json_: Json = False,
) -> int:
    """Kill a node in the middle of an exchange, and time how long the others take to finish the round.

    With SIGKILL: first the leader, again and again, then other members. Keep the machine idle meanwhile.

    Parameters
    ----------
    nodes
        How many processes.
    runs
        Kills of each kind.
    failure_timeout_s
        As run.failure_timeout_s: without waiting for it nobody can tell a dead node from a slow one.
    """
    bench = FailoverBench(nodes=nodes, runs=runs, failure_timeout_s=failure_timeout_s)
    return report(partial(_measure, bench), (_table,), json_)


async def _measure(bench: FailoverBench, console: Console) -> dict[str, Any]:
    result: dict[str, Any] = {
        "nodes": bench.nodes,
        "runs": bench.runs,
        "failure_timeout_s": bench.failure_timeout_s,
    }
    for role in ROLES:
        console.print(f"the {role} of {bench.nodes} nodes is killed, {bench.runs} times ...")
        result[role] = await measure(bench, role)
    return result


def _table(result: dict[str, Any]) -> Table:
    """One row a kind of victim."""
    title = f"{result['nodes']} nodes, failure timeout {result['failure_timeout_s']:g} s"
    table = figures_table(title, ("killed",), ("median", "least", "most", "lost tokens"))
    for role in ROLES:
        seconds = result[role]["seconds"]
        row = (f"{s:.2f} s" for s in (result[role]["median_s"], min(seconds), max(seconds)))
        table.add_row(role, *row, str(result[role]["lost_tokens"]))
    return table
