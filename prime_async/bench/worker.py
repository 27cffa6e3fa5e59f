"""One process of the benchmark: ``python -m prime_async.bench.worker SPEC``. The report is the last line of its stdout.

Between two exchanges come averages of the same vector by gloo and the peers, barriers, measurements; then a barrier,
and the next exchange begins. In the untimed rounds gloo and the peers do not run at all, so that the peak of memory is
ours alone; each peer has as many of its own.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import trio
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from prime_async.bench import data, proc
from prime_async.bench.contest import Contest, Stopwatch
from prime_async.bench.figures import Exchanged, WorkerReport, WorkerSpec
from prime_async.bench.journal import Journal
from prime_async.bench.nodes import LOOPBACK
from prime_async.bench.vector_node import UNTIMED_ROUNDS, BenchWorkload, config_of, open_measured
from prime_async.bench.workers import begin_worker, keep_stdout
from prime_async.bench.workers import report as write_report
from prime_async.transport.base import Traffic
from prime_async.work.chunks import Chunks
from prime_async.work.codec import make_codec

GROUP_TIMEOUT = timedelta(seconds=120)


class Rounds:
    """What happens between two exchanges. All in the node's training thread, but for the last ``close``."""

    def __init__(self, spec: WorkerSpec, contest: Contest) -> None:
        self.chunks = Chunks(spec.elements, spec.chunk_elements)
        self.journal = Journal()
        self.exchanges: list[Exchanged] = []
        self.peak_memory_bytes = 0
        self.traffic = Traffic()  # the node's counters, once it is open
        # All nodes begin with the same outer state, as in a real run; the vectors to average are filled in later.
        self.workload = BenchWorkload(
            torch.zeros(spec.elements),
            spec.chunk_elements,
            self.journal,
            self.between,
            make_codec("int8"),
            spec.keep,
        )
        self._contest = contest
        self._source = torch.empty(spec.elements)
        data.fill(self._source, self.chunks, spec.rank)
        self._begun = 0
        self._memory_before = 0
        self._sent_before = 0
        self._watch: Stopwatch | None = None

    def between(self) -> None:
        """End a round, if there was one, let gloo and the peers do their part, and begin the next round."""
        self.close()
        if self._begun == UNTIMED_ROUNDS:
            self.peak_memory_bytes = proc.peak_bytes() - self._memory_before
            for _ in range(UNTIMED_ROUNDS):  # the first ones connect, and allocate
                self._contest.turn(self._source, self.workload.values, keep=False)
        if self._begun >= UNTIMED_ROUNDS:
            self._contest.turn(self._source, self.workload.values, keep=True)
        self._begin()

    def close(self) -> None:
        """The round is over once everybody has its result."""
        if self._watch is None:
            return
        began, ended = self._watch.began_at, self.workload.ended_at
        exchanged = Exchanged(
            timing=self._watch.stop(ended),
            digest=self.workload.state_digest().hex(),
            sent_bytes=self.traffic.sent - self._sent_before,
            phases=self.journal.phases(began, ended),
            busy=self.journal.busy(),
        )
        self._watch = None
        if self._begun > UNTIMED_ROUNDS:
            self.exchanges.append(exchanged)

    def _begin(self) -> None:
        self.workload.values.copy_(self._source)
        self.journal.clear()
        if self._begun == 0:
            proc.reset_peak()
            self._memory_before = proc.resident_bytes()
        self._begun += 1
        self._sent_before = self.traffic.sent
        self._watch = Stopwatch()


async def _run(spec: WorkerSpec, contest: Contest, store: Store) -> WorkerReport:
    rounds = await trio.to_thread.run_sync(Rounds, spec, contest)
    contact = "" if spec.rank == 0 else (await trio.to_thread.run_sync(store.get, "contact")).decode()
    config = config_of(spec, contact, LOOPBACK)
    async with open_measured(config, rounds) as node:
        if spec.rank == 0:
            store.set("contact", node.contact)
        await node.wait()
    await trio.to_thread.run_sync(rounds.close)
    error = None if spec.rank else data.relative_error(rounds.workload.values, rounds.chunks, spec.nodes)
    return WorkerReport(
        exchanges=rounds.exchanges,
        peers=contest.reports(),
        peak_memory_bytes=rounds.peak_memory_bytes,
        relative_error=error,
    )


def main() -> None:
    """Measure, and report."""
    spec = msgspec.json.decode(sys.argv[1], type=WorkerSpec)
    begin_worker()
    pipe = keep_stdout()
    torch.set_num_threads(1)
    store = FileStore(str(Path(spec.directory) / "group"), spec.nodes)
    contest = Contest(spec, store)
    dist.init_process_group("gloo", store=store, rank=spec.rank, world_size=spec.nodes, timeout=GROUP_TIMEOUT)
    report = trio.run(_run, spec, contest, PrefixStore("bench", store))
    dist.destroy_process_group()
    write_report(msgspec.json.encode(report), pipe)
    if spec.peers:
        os._exit(0)  # what they have running ends with this process's group; an interpreter that waits for it may hang


if __name__ == "__main__":
    main()
