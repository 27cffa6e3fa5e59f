"""The benchmark of the exchange: our nodes and gloo's all-reduce side by side, in the same processes; and other peers.

A group is ``nodes`` processes. Each runs a node of ours, whole (``open_node``: membership, plan, commit, ZeroMQ on
loopback), a rank of gloo, and a member of each peer that was asked for; all average the same fp32 vector. An iteration
of gloo, one of each peer in each of its settings, then one of ours, and so on. The groups come one after the other,
each with its own iterations of gloo and the peers: plain and encrypted, as nodes of a run do it, who have the means on
their disks before they count; and plain in memory, where nothing is kept, as in an all-reduce.

The time of an iteration, ours and theirs: from the first process that leaves the barrier before it, to the last process
that holds the whole result. For ours that begins where the inner steps end, and ends with the digest of the new outer
state; for a peer it is the average alone, for gloo ``all_reduce`` without the division.

Bytes on the wire are those of the loopback interface: other programs on the machine count too, so it should be idle.
Peak memory is the most that a process had in its first two exchanges, before it ran gloo or a peer at all, above what
it had before them, with the vector already there.
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

from prime_async.bench.figures import PeerReport, Timing, WorkerReport, WorkerSpec
from prime_async.bench.journal import mean_of
from prime_async.bench.nodes import make_homes
from prime_async.bench.peers import PeerName
from prime_async.bench.workers import Worker, reports_of, worker_process
from prime_async.errors import EnvironmentFault

FP32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeBench:
    """What is measured."""

    nodes: int
    mib: int
    chunk_elements: int
    iterations: int
    peers: tuple[PeerName, ...] = ()

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
    homes, ids = make_homes(directory, bench.nodes)
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
                peers=bench.peers,
            )
            words = [sys.executable, "-m", "prime_async.bench.worker", msgspec.json.encode(spec).decode()]
            environment = {"GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(homes[rank])}  # peers leave things there
            worker = worker_process(rank, words, homes[rank] / "stderr", environment)
            workers.append(await stack.enter_async_context(worker))
        return [msgspec.json.decode(report, type=WorkerReport) for report in await reports_of(workers)]


def _figures(bench: ExchangeBench, reports: Sequence[WorkerReport]) -> dict[str, Any]:
    ours = [[r.exchanges[i] for r in reports] for i in range(bench.iterations)]
    own_timings = [[node.timing for node in row] for row in ours]
    seconds, wire = _seconds(own_timings), _wire_bytes(own_timings)
    median = statistics.median(seconds)
    peers = {row[0].name: _peer(row, median) for row in zip(*(r.peers for r in reports), strict=True)}
    gloo, *_ = peers.values()
    if "failed" in gloo:
        raise EnvironmentFault(f"gloo, which all else is measured against, did not work here: {gloo['failed']}")
    return {
        "seconds": seconds,
        "gloo_seconds": gloo["seconds"],
        "median_s": median,
        "gloo_median_s": gloo["median_s"],
        "ratio": gloo["ratio"],
        "wire_bytes": wire,
        "gloo_wire_bytes": gloo["wire_bytes"],
        "wire_share": wire / gloo["wire_bytes"],
        "sent_bytes": round(statistics.median(sum(node.sent_bytes for node in row) for row in ours)),
        "relative_error": reports[0].relative_error,
        "digests": [node.digest for node in ours[-1]],
        "bitwise_equal": all(len({node.digest for node in row}) == 1 for row in ours),
        "cpu_s_per_process": _cpu(own_timings),
        "gloo_cpu_s_per_process": gloo["cpu_s_per_process"],
        "peers": peers,
        "peak_memory_vectors": max(r.peak_memory_bytes for r in reports) / (FP32_BYTES * bench.elements),
        "phases_s": mean_of([node.phases for row in ours for node in row]),
        "busy_s": mean_of([node.busy for row in ours for node in row]),
    }


def _peer(reports: Sequence[PeerReport], our_median_s: float) -> dict[str, Any]:
    """The figures of a peer in one setting, or why there are none. The error is that of the worst process and run."""
    if reason := next((f"{r.reason} (process {rank})" for rank, r in enumerate(reports) if r.reason), ""):
        return {"failed": reason}
    rows = list(zip(*(r.runs for r in reports), strict=True))
    timings = [[run.timing for run in row] for row in rows]
    seconds = _seconds(timings)
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "median_s": median,
        "ratio": our_median_s / median,
        "wire_bytes": _wire_bytes(timings),
        "cpu_s_per_process": _cpu(timings),
        "relative_error": max(run.relative_error for row in rows for run in row),
        "bitwise_equal": all(len({run.digest for run in row}) == 1 for row in rows),
    }


def _seconds(rows: Sequence[Sequence[Timing]]) -> list[float]:
    return [max(t.ended_s for t in row) - min(t.began_s for t in row) for row in rows]


def _wire_bytes(rows: Sequence[Sequence[Timing]]) -> int:
    """As rank 0 read them."""
    return round(statistics.median(row[0].wire_bytes for row in rows))


def _cpu(rows: Sequence[Sequence[Timing]]) -> float:
    return statistics.median(statistics.mean(t.cpu_s for t in row) for row in rows)
