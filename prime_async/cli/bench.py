"""``prime-async bench``: how fast, against what others offer, on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import trio
from cyclopts import App, Parameter
from cyclopts.validators import Number
from rich import box
from rich.console import Console
from rich.table import Table

from prime_async.actors.groups import single_errors
from prime_async.bench import failover as failovers
from prime_async.bench import restart as restarts
from prime_async.bench.exchange import GROUPS, ExchangeBench, measure
from prime_async.bench.peers import PeerName, choose
from prime_async.cli.bench_peers import peers_table
from prime_async.cli.demo_report import size
from prime_async.cli.options import SEVERAL, ChunkElements, Flag, Json, Repetitions, Runs
from prime_async.cli.report import report

app = App(name="bench", help="Measure this program on this machine.")
app.command("prime_async.cli.bench_overlap:overlap", name="overlap")
app.command("prime_async.cli.bench_links:links", name="links")
app.command("prime_async.cli.bench_bytes:bytes_", name="bytes")
app.command("prime_async.cli.bench_join:join", name="join")
app.command("prime_async.cli.bench_plan:plan", name="plan")


@app.command
def exchange(
    *,
    nodes: Annotated[int, Parameter(validator=Number(gte=2, lte=64))] = 4,
    mib: Annotated[int, Parameter(validator=Number(gte=1, lte=65536))] = 64,
    iterations: Repetitions = 6,
    chunk_elements: ChunkElements = 2**20,
    peers: Annotated[list[PeerName | Literal["all"]], SEVERAL] = [],  # noqa: B006  (kept)
    plain: Flag = False,
    json_: Json = False,
) -> int:
    """Average a vector among node processes, as a round does, and with gloo's fp32 all-reduce beside it.

    And with other programs, if they are asked for. Keep the machine idle meanwhile.

    Parameters
    ----------
    nodes
        How many processes.
    mib
        Size of the vector on each, fp32.
    iterations
        Timed exchanges, and averages by gloo and each peer, after two others.
    chunk_elements
        Elements per chunk, a multiple of 256: as run.exchange.chunk_elements.
    peers
        Other programs to measure in the same processes, if they are installed beside this one: pccl (8-bit zero-point
        and fp32), torchft (fp32, over gloo), hivemind (8-bit blockwise and fp32, encrypted; without its search for a
        group), or all that are. Each result is compared with the exact mean.
    plain
        Without the group that is encrypted.
    """
    chosen = choose(peers)
    bench = ExchangeBench(
        nodes=nodes, mib=mib, chunk_elements=chunk_elements, iterations=iterations, peers=chosen.names
    )
    return report(partial(_measure, bench, plain, chosen.left_out), (_table, peers_table, _phases), json_)


@app.command
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
    bench = failovers.FailoverBench(nodes=nodes, runs=runs, failure_timeout_s=failure_timeout_s)
    return report(partial(_measure_failover, bench), (_failover_table,), json_)


@app.command
def restart(
    *,
    models: Annotated[list[str], SEVERAL] = ["llama-10m", "llama-100m"],  # noqa: B006  (kept)
    runs: Runs = 3,
    json_: Json = False,
) -> int:
    """Kill a node, and time how long it takes to be back with what is on its disk; and how much memory it had.

    Keep the machine idle meanwhile.

    Parameters
    ----------
    models
        Named sizes; of two or more the memory per parameter is told, without what every process takes.
    runs
        Kills of each.
    """
    return report(partial(_measure_restart, models, runs), (_restart_table,), json_)


async def _measure_restart(models: list[str], runs: int, console: Console) -> dict[str, Any]:
    result: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "models": {}}
    with single_errors():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_interrupt_on_sigterm)
            for model in models:
                console.print(f"a node with {model} is killed, {runs} times ...")
                bench = restarts.RestartBench(model=model, runs=runs)
                result["models"][model] = await restarts.measure(bench)
            nursery.cancel_scope.cancel()
    sizes = sorted((m["parameters"], m["peak_bytes"]) for m in result["models"].values())
    if len(sizes) > 1:
        (few, less), (many, more) = sizes[0], sizes[-1]
        result["bytes_per_parameter"] = round((more - less) / (many - few), 2)
    return result


def _restart_table(result: dict[str, Any]) -> Table:
    """One row a model."""
    title = "killed, and back from the disk"
    if "bytes_per_parameter" in result:
        title += f"; {result['bytes_per_parameter']:.1f} bytes of memory per parameter"
    table = Table("model", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("parameters", "median", "least", "most", "of that, disk", "peak memory"):
        table.add_column(name, justify="right")
    for model, figures in result["models"].items():
        seconds = figures["seconds"]
        times = (figures["median_s"], min(seconds), max(seconds), figures["restoring_s"])
        row = (f"{s:.2f} s" for s in times)
        table.add_row(model, f"{figures['parameters']:,}", *row, size(figures["peak_bytes"]))
    return table


async def _measure_failover(bench: failovers.FailoverBench, console: Console) -> dict[str, Any]:
    result: dict[str, Any] = {
        "nodes": bench.nodes,
        "runs": bench.runs,
        "failure_timeout_s": bench.failure_timeout_s,
        "cores": len(os.sched_getaffinity(0)),
    }
    with single_errors():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_interrupt_on_sigterm)
            for role in failovers.ROLES:
                console.print(f"the {role} of {bench.nodes} nodes is killed, {bench.runs} times ...")
                result[role] = await failovers.measure(bench, role)
            nursery.cancel_scope.cancel()
    return result


def _failover_table(result: dict[str, Any]) -> Table:
    """One row a kind of victim."""
    title = f"{result['nodes']} nodes, failure timeout {result['failure_timeout_s']:g} s"
    table = Table("killed", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("median", "least", "most", "lost tokens"):
        table.add_column(name, justify="right")
    for role in failovers.ROLES:
        seconds = result[role]["seconds"]
        row = (f"{s:.2f} s" for s in (result[role]["median_s"], min(seconds), max(seconds)))
        table.add_row(role, *row, str(result[role]["lost_tokens"]))
    return table


async def _measure(
    bench: ExchangeBench, plain: bool, left_out: dict[PeerName, str], console: Console
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "nodes": bench.nodes,
        "mib": bench.mib,
        "chunk_elements": bench.chunk_elements,
        "iterations": bench.iterations,
        "cores": len(os.sched_getaffinity(0)),
        "peers_left_out": left_out,
    }
    for peer, reason in left_out.items():
        console.print(f"{peer} is left out: {reason}", markup=False)
    with single_errors():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_interrupt_on_sigterm)
            for name, group in GROUPS.items():
                if plain and group.encrypt:
                    continue
                console.print(f"{name}: {bench.nodes} x {bench.mib} MiB, {bench.iterations} iterations ...")
                result[name] = await measure(bench, group)
            nursery.cancel_scope.cancel()
    return result


async def _interrupt_on_sigterm() -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            raise KeyboardInterrupt


def _modes(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, result[name]) for name in GROUPS if name in result]


def _table(result: dict[str, Any]) -> Table:
    """One column a mode."""
    modes = _modes(result)
    title = f"exchange of {result['nodes']} x {result['mib']} MiB on {result['cores']} cores"
    table = Table("", *(name for name, _ in modes), title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    rows: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("seconds, median", lambda m: f"{m['median_s']:.3f}"),
        ("gloo fp32 all-reduce", lambda m: f"{m['gloo_median_s']:.3f}"),
        ("ratio", lambda m: f"{m['ratio']:.2f}"),
        ("on the wire", lambda m: size(m["wire_bytes"])),
        ("gloo, on the wire", lambda m: size(m["gloo_wire_bytes"])),
        ("share of gloo's bytes", lambda m: f"{m['wire_share']:.1%}"),
        ("sent, by our counters", lambda m: size(m["sent_bytes"])),
        ("relative L2 error", lambda m: f"{m['relative_error']:.3%}"),
        ("bitwise equal on all nodes", lambda m: "yes" if m["bitwise_equal"] else "NO"),
        ("CPU seconds per process", lambda m: f"{m['cpu_s_per_process']:.3f}"),
        ("gloo, CPU seconds per process", lambda m: f"{m['gloo_cpu_s_per_process']:.3f}"),
        ("peak memory, in vectors", lambda m: f"{m['peak_memory_vectors']:.2f}"),
    )
    for name, text in rows:
        table.add_row(name, *(text(mode) for _, mode in modes))
    return table


def _phases(result: dict[str, Any]) -> Table:
    """Where the time went, one row a mode."""
    modes = _modes(result)
    names = list(modes[0][1]["phases_s"])
    table = Table("ms", *names, title="one phase after the other, mean of all nodes", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for mode, figures in modes:
        table.add_row(mode, *(f"{1000 * figures['phases_s'][name]:.0f}" for name in names))
    return table
