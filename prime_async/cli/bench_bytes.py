"""``prime-async bench bytes``: what crosses the wire, against data-parallel training."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from prime_async.bench.bytes import BytesBench, measure
from prime_async.cli.options import SEVERAL, Count, Flag, Json, Model, Nodes, Positive, Repetitions
from prime_async.cli.report import figures_table, report
from prime_async.config.schema import CodecName
from prime_async.watch.words import size


def bytes_(
    *,
    nodes: Nodes = 4,
    model: Model = "llama-10m",
    codecs: Annotated[list[CodecName], SEVERAL] = ["int8", "int4"],  # noqa: B006
    inner_steps: Count = 500,
    rounds: Repetitions = 1,
    sequence_length: Count = 8,
    step_s: Positive = 1.0,
    error_feedback: Flag = False,
    json_: Json = False,
) -> int:
    """Count what real nodes send in whole rounds, against data-parallel fp32 with a ring all-reduce at every step.

    All frames that the nodes hand to their sockets on loopback, headers and heartbeats included, but not what TCP, IP
    and encryption add. The model and H are real, the batches are tiny (one sequence), so that it takes minutes;
    heartbeats go by time, so the last column reckons with the seconds of a real inner step.

    Parameters
    ----------
    nodes
        How many.
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
    """
    bench = BytesBench(
        nodes=nodes,
        model=model,
        inner_steps=inner_steps,
        rounds=rounds,
        sequence_length=sequence_length,
        step_s=step_s,
        error_feedback=error_feedback,
    )
    return report(partial(_measure, bench, codecs), (_table,), json_)


async def _measure(bench: BytesBench, codecs: list[CodecName], console: Console) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for codec in codecs:
        console.print(f"{codec}: {bench.nodes} nodes, {bench.rounds} rounds of {bench.inner_steps} inner steps ...")
        found[codec] = await measure(bench, codec)
        console.print(f"  {found[codec]['reduction']:,.0f} times fewer bytes")
    return {**asdict(bench), "codecs": found}


def _table(result: dict[str, Any]) -> Table:
    """One row a codec."""
    parameters = next(iter(result["codecs"].values()))["parameters"]
    title = (
        f"{result['nodes']} nodes, {parameters:,} parameters, H = {result['inner_steps']}, one sequence of "
        f"{result['sequence_length']} tokens at a step"
    )
    reckoned = f"at {result['step_s']:g} s a step"
    table = figures_table(
        title,
        ("codec",),
        ("sent", "data-parallel", "times fewer", "a round took", "heartbeats", reckoned, "bitwise equal"),
    )
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
