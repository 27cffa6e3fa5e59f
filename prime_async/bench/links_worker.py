"""One node of ``prime-async bench links``: ``python -m prime_async.bench.links_worker SPEC``, in a host of the lab.

Its inner steps are a pause, which ends for all nodes at once; then the exchange begins, as in any run. The hosts share
this machine's clock and disk, so the nodes agree on that moment through files, and nothing but the run itself crosses
the links.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Final

import msgspec
import torch
import trio
from msgspec import Struct

from prime_async.bench import data
from prime_async.bench.figures import Busy, Phases, VectorSpec
from prime_async.bench.journal import Journal
from prime_async.bench.netlab import address
from prime_async.bench.nodes import lab_doors
from prime_async.bench.vector_node import UNTIMED_ROUNDS, BenchWorkload, config_of, open_measured
from prime_async.bench.workers import begin_worker, report
from prime_async.config.schema import CodecName
from prime_async.transport.base import Traffic
from prime_async.work.chunks import Chunks
from prime_async.work.codec import make_codec

POLL_S: Final = 0.002


class LinksSpec(VectorSpec, frozen=True, kw_only=True):
    """One node. ``pause_s``: between two exchanges, at least, in which the links are idle."""

    codec: CodecName
    streams: int
    pause_s: float
    contact: str  # of the first node


class LinkExchange(Struct, frozen=True, kw_only=True):
    """One exchange, as one node saw it; times on the monotonic clock that all processes of a machine share."""

    began_s: float
    ended_s: float
    cpu_s: float
    sent_bytes: int  # by the node's own counters, both planes
    digest: str  # of the result
    phases: Phases
    busy: Busy


class LinksReport(Struct, frozen=True, kw_only=True):
    """What a node found."""

    exchanges: list[LinkExchange]


class Mark(Struct, frozen=True, kw_only=True):
    """Node 0 tells when it begins, or has ended, a timed exchange: what passed the links is counted then."""

    exchange: int


class Meeting:
    """Where all nodes wait for each other: a file each in a folder that they share."""

    def __init__(self, directory: Path, rank: int, nodes: int) -> None:
        self._directory = directory
        self._rank = rank
        self._nodes = nodes
        self._count = 0

    def wait(self) -> None:
        """Until all have called this as often."""
        self._count += 1
        (self._directory / f"meeting-{self._count}-{self._rank}").touch()
        missing = [self._directory / f"meeting-{self._count}-{rank}" for rank in range(self._nodes)]
        while missing:
            missing = [path for path in missing if not path.exists()]
            if missing:
                time.sleep(POLL_S)


class Rounds:
    """What happens between two exchanges. All in the node's training thread, but for the last ``close``."""

    def __init__(self, spec: LinksSpec) -> None:
        self.exchanges: list[LinkExchange] = []
        self.journal = Journal()
        self.traffic = Traffic()  # the node's counters, once it is open
        values = torch.zeros(spec.elements)
        self.workload = BenchWorkload(values, spec.chunk_elements, self.journal, self.between, make_codec(spec.codec))
        self._source = torch.empty(spec.elements)
        data.fill(self._source, Chunks(spec.elements, spec.chunk_elements), spec.rank)
        self._spec = spec
        self._meeting = Meeting(Path(spec.directory), spec.rank, spec.nodes)
        self._begun = 0
        self._began = self._cpu = 0.0
        self._sent = 0

    def between(self) -> None:
        """End an exchange, if there was one, pause, and begin the next."""
        self.close()
        self.workload.values.copy_(self._source)
        time.sleep(self._spec.pause_s)
        self.journal.clear()
        self._meeting.wait()
        self._begun += 1
        if self._begun > UNTIMED_ROUNDS:
            self._mark()
        self._sent, self._cpu = self.traffic.sent, time.process_time()
        self._began = time.monotonic()

    def close(self) -> None:
        """The exchange is over once everybody has its result."""
        if self._begun == 0:
            return
        self._meeting.wait()
        if self._begun > UNTIMED_ROUNDS:
            self.exchanges.append(self._exchanged())
            self._mark()

    def _exchanged(self) -> LinkExchange:
        ended = self.workload.ended_at
        return LinkExchange(
            began_s=self._began,
            ended_s=ended,
            cpu_s=time.process_time() - self._cpu,
            sent_bytes=self.traffic.sent - self._sent,
            digest=self.workload.state_digest().hex(),
            phases=self.journal.phases(self._began, ended),
            busy=self.journal.busy(),
        )

    def _mark(self) -> None:
        if self._spec.rank == 0:
            report(msgspec.json.encode(Mark(exchange=self._begun - UNTIMED_ROUNDS - 1)))


async def _run(spec: LinksSpec) -> LinksReport:
    rounds = await trio.to_thread.run_sync(Rounds, spec)
    config = config_of(spec, spec.contact, {**lab_doors(address(spec.rank)), "streams": spec.streams}, spec.codec)
    async with open_measured(config, rounds) as node:
        await node.wait()
    await trio.to_thread.run_sync(rounds.close)
    return LinksReport(exchanges=rounds.exchanges)


def main() -> None:
    """Measure, and report."""
    spec = msgspec.json.decode(sys.argv[1], type=LinksSpec)
    begin_worker()
    torch.set_num_threads(1)
    report(msgspec.json.encode(trio.run(_run, spec)))


if __name__ == "__main__":
    main()
