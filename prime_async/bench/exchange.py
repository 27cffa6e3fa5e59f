"""The benchmark of the exchange: our nodes and gloo's all-reduce side by side, in the same processes.

A group is ``nodes`` processes. Each runs a node of ours, whole (``open_node``: membership, plan, commit, ZeroMQ on
loopback), and a rank of gloo; both average the same fp32 vector. An iteration of gloo, then one of ours, and so on.
The groups come one after the other, each with its own iterations of gloo: plain and encrypted, as nodes of a run do it,
who have the means on their disks before they count; and plain in memory, where nothing is kept, as in an all-reduce.

The time of an iteration, ours and gloo's: from the first process that leaves the barrier before it, to the last process
that holds the whole result. For ours that begins where the inner steps end, and ends with the digest of the new outer
state; for gloo it is ``all_reduce`` alone, without the division.

Bytes on the wire are those of the loopback interface: other programs on the machine count too, so it should be idle.
Peak memory is the most that a process had in its first two exchanges, before it ran gloo at all, above what it had
before them, with the vector already there.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import msgspec

from prime_async.bench.figures import Timing, WorkerReport, WorkerSpec
from prime_async.bench.journal import mean_of
from prime_async.bench.workers import Worker, reports_of, worker_process
from prime_async.transport.keys import write_key_file

FP32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeBench:
    """What is measured."""

    nodes: int
    mib: int
    chunk_elements: int
    iterations: int

    @property
    def elements(self) -> int:
        return (self.mib << 20) // FP32_BYTES


@dataclass(frozen=True, slots=True)
class Group:
    """What differs between the groups. ``keep``: the means are on every node's disk before they count."""

    encrypt: bool = False
    keep: bool = True


GROUPS: Final = {"plain": Group(), "encrypted": Group(encrypt=True), "in memory": Group(keep=False)}


async def measure(bench: ExchangeBench, group: Group) -> dict[str, Any]:
    """The figures of one group, as ``prime-async bench exchange --json`` prints them.

    Raises :class:`~prime_async.errors.EnvironmentFault` if a process ends badly; then, and on
    cancellation, no process is left.
    """
    with TemporaryDirectory(prefix="prime-async-bench-") as directory:
        reports = await _reports(bench, group, Path(directory))
    return _figures(bench, reports)


async def _reports(bench: ExchangeBench, group: Group, directory: Path) -> list[WorkerReport]:
    homes = [directory / f"node-{rank}" for rank in range(bench.nodes)]
    for home in homes:
        home.mkdir()
    ids = tuple(write_key_file(home / "node.key").id for home in homes)
    async with AsyncExitStack() as stack:
        workers: list[Worker] = []
        for rank in range(bench.nodes):
            spec = WorkerSpec(
                rank=rank,
                nodes=bench.nodes,
                elements=bench.elements,
                chunk_elements=bench.chunk_elements,
                iterations=bench.iterations,
                encrypt=group.encrypt,
                keep=group.keep,
                directory=str(directory),
                ids=ids,
            )
            words = [sys.executable, "-m", "prime_async.bench.worker", msgspec.json.encode(spec).decode()]
            environment = {"GLOO_SOCKET_IFNAME": "lo"}
            worker = worker_process(rank, words, homes[rank] / "stderr", environment)
            workers.append(await stack.enter_async_context(worker))
        return [msgspec.json.decode(report, type=WorkerReport) for report in await reports_of(workers)]


def _figures(bench: ExchangeBench, reports: Sequence[WorkerReport]) -> dict[str, Any]:
    ours = [[r.exchanges[i] for r in reports] for i in range(bench.iterations)]
    gloo = [[r.all_reduces[i] for r in reports] for i in range(bench.iterations)]
    own_timings = [[node.timing for node in row] for row in ours]
    seconds, gloo_seconds = _seconds(own_timings), _seconds(gloo)
    wire, gloo_wire = _wire_bytes(own_timings), _wire_bytes(gloo)
    return {
        "seconds": seconds,
        "gloo_seconds": gloo_seconds,
        "median_s": statistics.median(seconds),
        "gloo_median_s": statistics.median(gloo_seconds),
        "ratio": statistics.median(seconds) / statistics.median(gloo_seconds),
        "wire_bytes": wire,
        "gloo_wire_bytes": gloo_wire,
        "wire_share": wire / gloo_wire,
        "sent_bytes": round(statistics.median(sum(node.sent_bytes for node in row) for row in ours)),
        "relative_error": reports[0].relative_error,
        "digests": [node.digest for node in ours[-1]],
        "bitwise_equal": all(len({node.digest for node in row}) == 1 for row in ours),
        "cpu_s_per_process": _cpu(own_timings),
        "gloo_cpu_s_per_process": _cpu(gloo),
        "peak_memory_vectors": max(r.peak_memory_bytes for r in reports) / (FP32_BYTES * bench.elements),
        "phases_s": mean_of([node.phases for row in ours for node in row]),
        "busy_s": mean_of([node.busy for row in ours for node in row]),
    }


def _seconds(rows: Sequence[Sequence[Timing]]) -> list[float]:
    return [max(t.ended_s for t in row) - min(t.began_s for t in row) for row in rows]


def _wire_bytes(rows: Sequence[Sequence[Timing]]) -> int:
    """As rank 0 read them."""
    return round(statistics.median(row[0].wire_bytes for row in rows))


def _cpu(rows: Sequence[Sequence[Timing]]) -> float:
    return statistics.median(statistics.mean(t.cpu_s for t in row) for row in rows)
