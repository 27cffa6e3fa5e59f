"""``prime-async bench join``: how fast a node joins over links of given rates."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from prime_async.bench.join import TOKEN_PARAMETERS, JoinBench, measure, tokens_for
from prime_async.cli.options import SEVERAL, Congestion, Json, LinkRtt, Positive, Runs
from prime_async.cli.report import figures_table, report
from prime_async.errors import ConfigError
from prime_async.watch.words import size


def join(
    *,
    parameters: Positive = 8e6,
    up_mbit: Annotated[list[float], SEVERAL] = [40.0, 40.0, 40.0],  # noqa: B006  (not changed)
    down_mbit: Positive = 100.0,
    rtt_ms: LinkRtt = 20.0,
    congestion: Congestion = ["cubic"],  # noqa: B006
    runs: Runs = 3,
    json_: Json = False,
) -> int:
    """Let a node join a run whose members have slow uplinks, and time how long it fetches the state of the run.

    Whole nodes, each in a host of its own on this machine: needs root, /dev/net/tun, iproute2 and nftables. The share
    is that of the links: the sum of the uplinks, or the downlink if that is less. Keep the machine idle meanwhile, and
    stay below 200 Mbit/s, all links together.

    Parameters
    ----------
    parameters
        Of the model, about: 8 bytes of each are fetched.
    up_mbit
        Uplinks of the members, one for each.
    down_mbit
        Downlink of the joiner.
    runs
        Joins of each kind.
    """
    if min(up_mbit, default=0.0) <= 0:
        raise ConfigError([f"--up-mbit is {up_mbit}: expected a rate above 0 for each member, and at least one"])
    bench = JoinBench(tokens=tokens_for(parameters), up_mbit=tuple(up_mbit), down_mbit=down_mbit, rtt_ms=rtt_ms)
    return report(partial(_measure, bench, congestion, runs), (_table,), json_)


async def _measure(bench: JoinBench, congestion: list[str], runs: int, console: Console) -> dict[str, Any]:
    cases = {}
    for control in congestion:
        found = []
        for run in range(1, runs + 1):
            console.print(f"{control}, join {run} of {runs} ...")
            found.append(await measure(bench, control))
            console.print(f"  {found[-1]['seconds']:.2f} s, {found[-1]['share']:.1%} of the links")
        cases[control] = {
            "median_s": statistics.median(f["seconds"] for f in found),
            "share": statistics.median(f["share"] for f in found),
            "runs": found,
        }
    return {
        **asdict(bench),
        "parameters": bench.tokens * TOKEN_PARAMETERS,
        "limit_mbit": bench.limit_mbit,
        "ideal_s": bench.ideal_s,
        "congestion": cases,
    }


def _table(result: dict[str, Any]) -> Table:
    """One row a kind of congestion control."""
    ups = " + ".join(f"{rate:g}" for rate in result["up_mbit"])
    title = (
        f"a joiner fetches the state of {result['parameters']:,} parameters: {ups} Mbit/s up, "
        f"{result['down_mbit']:g} down, {result['rtt_ms']:g} ms; the links allow {result['ideal_s']:.2f} s"
    )
    table = figures_table(title, ("TCP",), ("median", "least", "most", "share of the links", "fetched", "on the wire"))
    for control, case in result["congestion"].items():
        seconds = [run["seconds"] for run in case["runs"]]
        table.add_row(
            control,
            *(f"{s:.2f} s" for s in (case["median_s"], min(seconds), max(seconds))),
            f"{case['share']:.1%}",
            size(case["runs"][-1]["fetched_bytes"]),
            size(sum(case["runs"][-1]["wire_bytes_by_member"])),
        )
    return table
