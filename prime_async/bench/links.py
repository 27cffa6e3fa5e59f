"""The exchange over links of a given rate, delay and loss: whole nodes in hosts of the network lab.

**Share of the links.** With n nodes each link has to carry 2 (n - 1) / n payloads, each way: a node sends its
contribution to the owners of the others' chunks, and the means of the chunks that it owns, 1 / n of them, to the n - 1
others; it receives as much. The share is the time that these bytes take at the link's rate, over the measured time.
Nothing else counts as useful: neither headers and acknowledgements nor the time in which the links are idle, for
encoding,
plan, commit and the outer step.

**Share without headers.** TCP and IP take 52 of the 1,500 bytes of each packet, and the acknowledgements of what comes
the other way a packet of 52 bytes for two of these. So of a link that is full both ways payloads can get
``TCP_SHARE`` at most; this share is the other one over that.

**Filled.** What did pass the busiest link, all bytes of all packets, over what could have passed in the time. Where it
is much more than the first, it was headers, or bytes sent again after a loss.

The time of an exchange: from the first node whose inner steps end to the last that holds the digest of the new outer
state. Between two exchanges the links are idle, as they are in a run, so TCP begins slowly each time.
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

from prime_async.bench.journal import mean_of
from prime_async.bench.links_worker import LinkExchange, LinksReport, LinksSpec, Mark
from prime_async.bench.netlab import Lab, Links, address
from prime_async.bench.nodes import PORTS, make_homes
from prime_async.bench.workers import reports_of, worker_process
from prime_async.config.schema import CodecName
from prime_async.work.chunks import ChunkCodec, Chunks
from prime_async.work.codec import make_codec

PACKET_BYTES: Final = 1500
HEADER_BYTES: Final = 52
"""With IPv4 and TCP's timestamps: 20 + 20 + 12."""
TCP_SHARE: Final = (PACKET_BYTES - HEADER_BYTES) / (PACKET_BYTES + HEADER_BYTES / 2)
"""Of a link that is full both ways, what payloads can get: 94.9 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksBench:
    """What is measured."""

    nodes: int
    elements: int
    chunk_elements: int
    iterations: int
    codec: CodecName
    encrypt: bool
    pause_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCase:
    """The links, each host's, each way, and the TCP connections to each peer. ``rtt_ms``: without queues."""

    rate_mbit: float
    rtt_ms: float
    loss_percent: float
    congestion: str
    streams: int


async def measure(bench: LinksBench, case: LinkCase) -> dict[str, Any]:
    """The figures of one case, as ``prime-async bench links --json`` prints them.

    Raises :class:`~prime_async.errors.EnvironmentFault` if a process ends badly, and
    :class:`~prime_async.bench.netlab.LabError` if there can be no lab; then, and on cancellation, no process is left.
    """
    links = Links(
        hosts=bench.nodes,
        rate_mbit=case.rate_mbit,
        delay_ms=case.rtt_ms / 2,
        loss_percent=case.loss_percent,
        congestion=case.congestion,
    )
    counted: list[dict[tuple[int, int], int]] = []
    with TemporaryDirectory(prefix="prime-async-bench-") as directory, Lab(links) as lab:

        def count(rank: int, line: bytes) -> None:
            if rank == 0 and b'"exchanges"' not in line:
                msgspec.json.decode(line, type=Mark)
                counted.append(lab.bytes_sent())

        async with AsyncExitStack() as stack:
            workers = [
                await stack.enter_async_context(worker) for worker in _workers(bench, case, lab, Path(directory))
            ]
            lines = await reports_of(workers, count)
    reports = [msgspec.json.decode(line, type=LinksReport) for line in lines]
    return _figures(bench, case, reports, counted)


def _workers(bench: LinksBench, case: LinkCase, lab: Lab, directory: Path) -> list[Any]:
    """One in each host, to be entered."""
    homes, ids = make_homes(directory, bench.nodes)
    return [
        worker_process(rank, lab.command(rank, _command(bench, case, rank, directory, ids)), homes[rank] / "stderr")
        for rank in range(bench.nodes)
    ]


def _command(bench: LinksBench, case: LinkCase, rank: int, directory: Path, ids: tuple[str, ...]) -> list[str]:
    spec = LinksSpec(
        rank=rank,
        nodes=bench.nodes,
        elements=bench.elements,
        chunk_elements=bench.chunk_elements,
        iterations=bench.iterations,
        codec=bench.codec,
        encrypt=bench.encrypt,
        streams=case.streams,
        pause_s=bench.pause_s,
        directory=str(directory),
        ids=ids,
        contact=f"{ids[0]}@{address(0)}:{PORTS[0]}",
    )
    return [sys.executable, "-m", "prime_async.bench.links_worker", msgspec.json.encode(spec).decode()]


def payload_of(bench: LinksBench) -> int:
    """Bytes of an encoded vector."""
    codec = ChunkCodec(make_codec(bench.codec), Chunks(bench.elements, bench.chunk_elements))
    return sum(codec.payload_bytes(chunk) for chunk in range(Chunks(bench.elements, bench.chunk_elements).count))


def link_bytes(bench: LinksBench) -> float:
    """Payload bytes that have to cross each link, each way."""
    return 2 * (bench.nodes - 1) / bench.nodes * payload_of(bench)


def _figures(
    bench: LinksBench,
    case: LinkCase,
    reports: Sequence[LinksReport],
    counted: Sequence[dict[tuple[int, int], int]],
) -> dict[str, Any]:
    rows = [[report.exchanges[i] for report in reports] for i in range(bench.iterations)]
    seconds = [max(e.ended_s for e in row) - min(e.began_s for e in row) for row in rows]
    rate = case.rate_mbit * 1e6 / 8
    ideal_s = link_bytes(bench) / rate
    shares = [ideal_s / s for s in seconds]
    busiest = [busiest_link(counted[2 * i], counted[2 * i + 1], bench.nodes) for i in range(bench.iterations)]
    return {
        "payload_bytes": payload_of(bench),
        "link_payload_bytes": round(link_bytes(bench)),
        "link_wire_bytes": round(statistics.median(busiest)),
        "ideal_s": ideal_s,
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        "share": statistics.median(shares),
        "shares": shares,
        "share_without_headers": statistics.median(shares) / TCP_SHARE,
        "filled": statistics.median(b / rate / s for b, s in zip(busiest, seconds, strict=True)),
        "sent_bytes": round(statistics.median(sum(e.sent_bytes for e in row) for row in rows)),
        "cpu_s_per_process": statistics.median(statistics.mean(e.cpu_s for e in row) for row in rows),
        "bitwise_equal": all(len({e.digest for e in row}) == 1 for row in rows),
        "phases_s": mean_of([e.phases for e in _all(rows)]),
        "busy_s": mean_of([e.busy for e in _all(rows)]),
    }


def busiest_link(before: dict[tuple[int, int], int], after: dict[tuple[int, int], int], hosts: int) -> int:
    """The most bytes that one host has sent, or received, between two counts."""
    passed = {pair: count - before.get(pair, 0) for pair, count in after.items()}
    sent = [sum(n for (source, _), n in passed.items() if source == host) for host in range(hosts)]
    received = [sum(n for (_, target), n in passed.items() if target == host) for host in range(hosts)]
    return max(*sent, *received)


def _all(rows: Sequence[Sequence[LinkExchange]]) -> list[LinkExchange]:
    return [exchange for row in rows for exchange in row]
