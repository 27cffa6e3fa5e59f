"""One process of the benchmark: ``python -m prime_async.bench.worker SPEC``. The report is the last line of its stdout.

What a round is here: the inner steps of the workload are what happens *between* two exchanges: averages of the same
vector by gloo and the peers, barriers, measurements. They end with a barrier, and the exchange begins: from the moment
that ``train`` returns, encoding, plan, transfers, reduction, commit and the outer step are those of any run.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import trio
from torch import Tensor
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from prime_async.bench import data, proc
from prime_async.bench.contest import Contest, Stopwatch
from prime_async.bench.figures import Exchanged, WorkerReport, WorkerSpec
from prime_async.bench.journal import Journal, JournalTransport
from prime_async.bench.workers import begin_worker, keep_stdout
from prime_async.bench.workers import report as write_report
from prime_async.config.load import config_from
from prime_async.config.schema import Config
from prime_async.node import open_node
from prime_async.node.build import allow_list, largest_payload, open_transport
from prime_async.transport.base import Traffic
from prime_async.work.buffer_workload import BufferWorkload
from prime_async.work.chunks import Chunks
from prime_async.work.codec import Codec, make_codec
from prime_async.work.inner import Span
from prime_async.work.workload import Reduction, StepReport

UNTIMED_ROUNDS = 2
"""Before gloo and the peers run at all: they warm up, and their peak of memory is ours alone. Each peer has as many."""
GROUP_TIMEOUT = timedelta(seconds=120)


class BenchWorkload(BufferWorkload):
    """A vector to average, whose inner steps are ``between``, and whose pieces of work are written down.

    Without ``keep`` it has nothing to keep on disk.
    """

    def __init__(
        self,
        values: Tensor,
        chunk_elements: int,
        journal: Journal,
        between: Callable[[], None],
        codec: Codec,
        keep: bool = True,
    ) -> None:
        super().__init__(values, chunk_elements, codec)
        self._keep = keep
        self._journal = journal
        self._between = between
        self.ended_at = 0.0

    @property
    def spans(self) -> Sequence[Span]:
        return super().spans if self._keep else ()

    def train(self, steps: int, on_step: Callable[[StepReport], None]) -> None:  # noqa: ARG002  (no steps to report)
        self._between()

    def encode(self, chunk: int, out: memoryview) -> None:
        with self._journal.entry("encode"):
            super().encode(chunk, out)

    def reduce(
        self, chunk: int, payloads: Sequence[memoryview], weights: Sequence[int], out: memoryview, round: int
    ) -> Reduction:
        with self._journal.entry("reduce"):
            return super().reduce(chunk, payloads, weights, out, round)

    def apply(self, chunk: int, mean: memoryview, included: bool, own: memoryview | None = None) -> None:
        with self._journal.entry("apply"):
            super().apply(chunk, mean, included, own)

    def end_round(self) -> bytes:
        digest = super().end_round()
        self.ended_at = time.monotonic()
        return digest


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


def _config(spec: WorkerSpec, contact: str) -> Config:
    home = Path(spec.directory) / f"node-{spec.rank}"
    return config_from(
        {
            "run": {
                "name": "bench",
                "rounds": UNTIMED_ROUNDS + spec.iterations,
                "min_members": spec.nodes,
                "exchange": {"chunk_elements": spec.chunk_elements},
            },
            "node": {
                "key": str(home / "node.key"),
                "directory": str(home),
                "host": "127.0.0.1",
                "advertise": "127.0.0.1",
                "port": 0,
                "bulk_port": 0,
                "join": [contact] if contact else [],
                "allow": list(spec.ids),
                "encrypt": spec.encrypt,
                "snapshot_every": 0,  # they would read the vector while it is filled for the next exchange
                "threads": 1,
            },
        }
    )


async def _run(spec: WorkerSpec, contest: Contest, store: Store) -> WorkerReport:
    rounds = await trio.to_thread.run_sync(Rounds, spec, contest)
    contact = "" if spec.rank == 0 else (await trio.to_thread.run_sync(store.get, "contact")).decode()
    config = _config(spec, contact)
    async with open_transport(config.node, largest_payload(rounds.workload), allow_list(config.node)) as transport:
        rounds.traffic = transport.traffic
        timed = JournalTransport(transport, rounds.journal)
        async with open_node(config, transport=timed, workload=rounds.workload) as node:
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
