"""``prime-async bench bytes``: what crosses the wire, against data-parallel training."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated, Any

import trio
from cyclopts import Parameter
from cyclopts.validators import Number
from rich import box
from rich.console import Console
from rich.table import Table

from prime_async.actors.groups import single_errors
from prime_async.bench.bytes import BytesBench, measure
from prime_async.cli.demo_report import size
from prime_async.config.schema import CodecName


def bytes_(
    *,
    nodes: Annotated[int, Parameter(validator=Number(gte=2, lte=16))] = 4,
    model: str = "llama-10m",
    codecs: Annotated[list[CodecName], Parameter(negative="", consume_multiple=True)] = ["int8", "int4"],  # noqa: B006
    inner_steps: Annotated[int, Parameter(validator=Number(gte=1))] = 500,
    rounds: Annotated[int, Parameter(validator=Number(gte=1, lte=1000))] = 1,
    sequence_length: Annotated[int, Parameter(validator=Number(gte=1))] = 8,
    step_s: Annotated[float, Parameter(validator=Number(gt=0))] = 1.0,
    error_feedback: Annotated[bool, Parameter(negative="")] = False,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Count what real nodes send in whole rounds, against data-parallel fp32 with a ring all-reduce at every step.

    All frames that the nodes hand to their sockets on loopback, headers and heartbeats included, but not what TCP, IP
    and encryption add. The model and H are real, the batches are tiny (one sequence), so that it takes minutes;
    heartbeats go by time, so the last column reckons with the seconds of a real inner step.

    Parameters
    ----------
    nodes
        How many.
    model
        As run.model.
    codecs
        As run.exchange.codec, of contributions and means; one run for each.
    inner_steps
        H.
    rounds
        Counted, after the first one with all nodes.
    sequence_length
        Of the only sequence of a batch.
    step_s
        Seconds of a real inner step, for the last column.
    error_feedback
        As run.exchange.error_feedback: sparse codecs need it; it does not change what is sent.
    json_
        Print one JSON object as the last line of stdout; the table goes to stderr.
    """
    console = Console(stderr=json_, highlight=False)
    bench = BytesBench(
        nodes=nodes,
        model=model,
        inner_steps=inner_steps,
        rounds=rounds,
        sequence_length=sequence_length,
        step_s=step_s,
        error_feedback=error_feedback,
    )
    with single_errors():
        result = trio.run(_measure, bench, codecs, console)
    console.print(_table(result))
    if json_:
        print(json.dumps(result))
    return 0


async def _measure(bench: BytesBench, codecs: list[CodecName], console: Console) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for codec in codecs:
        console.print(f"{codec}: {bench.nodes} nodes, {bench.rounds} rounds of {bench.inner_steps} inner steps ...")
        found[codec] = await measure(bench, codec)
        console.print(f"  {found[codec]['reduction']:,.0f} times fewer bytes")
    return {**asdict(bench), "cores": len(os.sched_getaffinity(0)), "codecs": found}


def _table(result: dict[str, Any]) -> Table:
    """One row a codec."""
    parameters = next(iter(result["codecs"].values()))["parameters"]
    title = (
        f"{result['nodes']} nodes, {parameters:,} parameters, H = {result['inner_steps']}, one sequence of "
        f"{result['sequence_length']} tokens at a step"
    )
    table = Table("codec", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    reckoned = f"at {result['step_s']:g} s a step"
    for name in ("sent", "data-parallel", "times fewer", "a round took", "heartbeats", reckoned, "bitwise equal"):
        table.add_column(name, justify="right")
    for codec, figures in result["codecs"].items():
        idle, ratio = figures["heartbeat_bytes_per_s"], figures["reckoned_reduction"]
        table.add_row(
            codec,
            size(figures["sent_bytes"]),
            size(figures["data_parallel_bytes"]),
            f"{figures['reduction']:,.0f}",
            f"{figures['round_s']:.1f} s",
            "" if idle is None else f"{size(round(idle))}/s",
            "" if ratio is None else f"{ratio:,.0f}",
            "yes" if figures["bitwise_equal"] else "NO",
        )
    return table
