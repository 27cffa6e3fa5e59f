"""``prime-async bench exchange``: one exchange among processes, with gloo and other programs beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from prime_async.bench.exchange import GROUPS, ExchangeBench, measure
from prime_async.bench.peers import PeerName, choose
from prime_async.cli.bench_peers import peers_table
from prime_async.cli.options import SEVERAL, ChunkElements, Flag, Json, Repetitions
from prime_async.cli.report import figures_table, report
from prime_async.watch.words import size


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


async def _measure(
    bench: ExchangeBench, plain: bool, left_out: dict[PeerName, str], console: Console
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "nodes": bench.nodes,
        "mib": bench.mib,
        "chunk_elements": bench.chunk_elements,
        "iterations": bench.iterations,
        "peers_left_out": left_out,
    }
    for peer, reason in left_out.items():
        console.print(f"{peer} is left out: {reason}", markup=False)
    for name, group in GROUPS.items():
        if plain and group.encrypt:
            continue
        console.print(f"{name}: {bench.nodes} x {bench.mib} MiB, {bench.iterations} iterations ...")
        result[name] = await measure(bench, group)
    return result


def _modes(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, result[name]) for name in GROUPS if name in result]


def _table(result: dict[str, Any]) -> Table:
    """One column a mode."""
    modes = _modes(result)
    title = f"exchange of {result['nodes']} x {result['mib']} MiB on {result['cores']} cores"
    table = figures_table(title, ("",), (name for name, _ in modes))
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
    table = figures_table("one phase after the other, mean of all nodes", ("ms",), names)
    for mode, figures in modes:
        table.add_row(mode, *(f"{1000 * figures['phases_s'][name]:.0f}" for name in names))
    return table
