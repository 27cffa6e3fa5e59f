"""``prime-async bench links``: the exchange over links of a given rate, delay and loss."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from prime_async.bench.links import TCP_SHARE, LinkCase, LinksBench, measure
from prime_async.cli.options import (
    SEVERAL,
    ChunkElements,
    Congestion,
    Flag,
    Json,
    Nodes,
    NotNegative,
    Positive,
    Repetitions,
)
from prime_async.cli.report import figures_table, report
from prime_async.config.schema import CodecName
from prime_async.errors import ConfigError
from prime_async.watch.words import size


def links(
    *,
    nodes: Nodes = 4,
    mib: Annotated[float, Parameter(validator=Number(gt=0, lte=65536))] = 256,
    iterations: Repetitions = 5,
    rate_mbit: Positive = 50.0,
    rtt_ms: Annotated[list[float], SEVERAL] = [20.0, 100.0],  # noqa: B006  (not changed)
    loss: Annotated[list[float], SEVERAL] = [0.0, 0.5],  # noqa: B006
    streams: Annotated[list[int], SEVERAL] = [4],  # noqa: B006
    congestion: Congestion = ["cubic"],  # noqa: B006
    codec: CodecName = "int8",
    chunk_elements: ChunkElements = 2**17,
    pause_s: NotNegative = 2.0,
    plain: Flag = False,
    json_: Json = False,
) -> int:
    """Average a vector among nodes behind slow links, as a round does, and say which share of the links it used.

    Whole nodes, each in a host of its own on this machine: needs root, /dev/net/tun, iproute2 and nftables. The share
    is the time that the payloads must take, 2 (n - 1) / n of them over each link, each way, over the measured time;
    "of TCP" is the same without the headers of full packets and their acknowledgements; "filled" is all that passed.
    Keep the machine idle meanwhile, and stay below 200 Mbit/s, all links together.

    Parameters
    ----------
    nodes
        How many, each with a link of its own.
    mib
        Size of the vector on each, fp32: what is sent is a quarter of it with int8.
    iterations
        Timed exchanges of each case, after two others.
    rate_mbit
        Of each link, each way.
    rtt_ms
        Round trips, one for each kind of link.
    loss
        Percent of packets lost, for each of these.
    streams
        As node.streams: TCP connections to each peer. Each number is measured.
    codec
        Of contributions and means, as run.exchange.codec.
    chunk_elements
        Elements per chunk, a multiple of 256: as run.exchange.chunk_elements. A chunk crosses on one connection, so
        more streams than chunks that each node owns are of no use.
    pause_s
        Between two exchanges, in which the links are idle and TCP forgets how fast they were.
    plain
        Without encryption.
    """
    bench = LinksBench(
        nodes=nodes,
        elements=round(mib * 2**18),
        chunk_elements=chunk_elements,
        iterations=iterations,
        codec=codec,
        encrypt=not plain,
        pause_s=pause_s,
    )
    cases = _cases(rate_mbit, rtt_ms, loss, streams, congestion)
    return report(partial(_measure, bench, cases), (_table, _phases), json_)


def _cases(
    rate_mbit: float, rtts: list[float], losses: list[float], streams: list[int], congestion: list[str]
) -> list[LinkCase]:
    if len(rtts) != len(losses):
        raise ConfigError(
            [f"--rtt-ms has {len(rtts)} values and --loss {len(losses)}: give one loss for each round trip"]
        )
    return [
        LinkCase(rate_mbit=rate_mbit, rtt_ms=rtt, loss_percent=loss, congestion=control, streams=count)
        for rtt, loss in zip(rtts, losses, strict=True)
        for control in congestion
        for count in streams
    ]


async def _measure(bench: LinksBench, cases: list[LinkCase], console: Console) -> dict[str, Any]:
    found = []
    for case in cases:
        console.print(f"{_name(asdict(case))}: {bench.iterations} iterations ...")
        figures = {**asdict(case), **await measure(bench, case)}
        console.print(f"  {figures['median_s']:.2f} s, {figures['share']:.1%} of the links")
        found.append(figures)
    return {**asdict(bench), "tcp_share": TCP_SHARE, "cases": found}


def _name(case: dict[str, Any]) -> str:
    """Short, so that the table fits."""
    return f"{case['rtt_ms']:g} ms, {case['loss_percent']:g} %, {case['streams']} {case['congestion']}"


def _table(result: dict[str, Any]) -> Table:
    """One row a kind of link."""
    first = result["cases"][0]
    kind = "encrypted" if result["encrypt"] else "plain"
    title = (
        f"exchange of {result['nodes']} x {size(4 * result['elements'])}, {result['codec']}, {kind}: "
        f"{size(first['link_payload_bytes'])} of payloads over each link, each way, "
        f"{first['ideal_s']:.2f} s at {first['rate_mbit']:g} Mbit/s"
    )
    names = ("median", "share", "range", "of TCP", "filled", "equal")
    table = figures_table(title, ("links",), names, no_wrap=True)
    for case in result["cases"]:
        table.add_row(
            _name(case),
            f"{case['median_s']:.2f} s",
            f"{case['share']:.1%}",
            f"{min(case['shares']):.0%} to {max(case['shares']):.0%}",
            f"{case['share_without_headers']:.1%}",
            f"{case['filled']:.1%}",
            "yes" if case["bitwise_equal"] else "NO",
        )
    return table


def _phases(result: dict[str, Any]) -> Table:
    """Where the time went, one row a kind of link."""
    names = list(result["cases"][0]["phases_s"])
    table = figures_table("one phase after the other, mean of all nodes", ("s",), names)
    for case in result["cases"]:
        table.add_row(_name(case), *(f"{case['phases_s'][name]:.2f}" for name in names))
    return table
