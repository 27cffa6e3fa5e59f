"""What the training and the checkpoint actor do with a workload."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import trio
from blake3 import blake3

from prime_async.actors.auditor import Auditor
from prime_async.actors.checkpoint import CheckpointActor
from prime_async.actors.ledger import LedgerKeeper
from prime_async.actors.store import ChunkStore
from prime_async.actors.tensors import Tensors
from prime_async.actors.training import TrainingActor
from prime_async.audit import AuditFolder
from prime_async.config.schema import ExchangeSettings
from prime_async.errors import ProtocolError
from prime_async.machines.vocabulary import (
    Applied,
    Apply,
    ChunkImported,
    Encode,
    Encoded,
    EndImport,
    Evaluate,
    Evaluated,
    EvaluationStopped,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    ImportChunk,
    Imported,
    RunSteps,
    StepsDone,
    StopEvaluation,
    StopSteps,
)
from prime_async.messages import ChunkInfo, ChunkKey, bitmap
from prime_async.transport.base import Chunk
from prime_async.transport.memory import MemoryNetwork
from prime_async.work.buffer_workload import BufferWorkload
from prime_async.work.chunks import Chunks
from prime_async.work.codec import make_codec
from prime_async.work.workload import StepReport
from tests.machine_harness import key

LIMIT_S = 10.0


class Noting(BufferWorkload):
    """Its inner steps, and its batches, wait for a permit each. It notes which chunks counted it.

    What is not finite it refuses.
    """

    def __init__(self, seed: int = 1) -> None:
        super().__init__(BufferWorkload.random(600, 256, make_codec("fp32"), seed).values, 256, make_codec("fp32"))
        self.permits = threading.Semaphore(0)
        self.included: dict[int, bool] = {}
        self.batches = self.evaluated = 0
        self.examined = threading.Event()
        self.import_gate: Callable[[], object] = lambda: None

    def train(self, steps: int, on_step: Callable[[StepReport], None]) -> None:
        for step in range(steps):
            assert self.permits.acquire(timeout=LIMIT_S)
            on_step(StepReport(step=step + 1, loss=1.0, tokens=10, seconds=0.0))

    def evaluate(self, on_batch: Callable[[], None]) -> float:
        for _ in range(self.batches):
            assert self.permits.acquire(timeout=LIMIT_S)
            self.evaluated += 1
            self.examined.set()
            on_batch()
        return float(self.batches)

    def apply(self, chunk: int, mean: memoryview, included: bool, own: memoryview | None = None) -> None:
        self.included[chunk] = included
        super().apply(chunk, mean, included, own)

    def import_state(self, chunk: int, data: memoryview) -> None:
        if not self.check(chunk, data):
            raise ProtocolError("not finite")
        super().import_state(chunk, data)

    def end_import(self, round: int) -> bytes:
        if hasattr(self, "import_gate"):
            self.import_gate()
        return super().end_import(round)


@dataclass
class Bench:
    """A training actor, and what it posted."""

    workload: Noting
    store: ChunkStore
    actor: TrainingActor
    events: trio.MemoryReceiveChannel[Event]
    keeper: LedgerKeeper

    async def posted(self) -> Event:
        with trio.fail_after(LIMIT_S):
            return await self.events.receive()


@asynccontextmanager
async def training(store: ChunkStore | None = None, audit: AuditFolder | None = None) -> AsyncIterator[Bench]:
    send, receive = trio.open_memory_channel[Event](20)
    async with trio.open_nursery() as nursery:
        workload, store = Noting(), store or ChunkStore()
        keeper = LedgerKeeper(None, Tensors(workload, 2), None)
        actor = TrainingActor(
            keeper,
            store,
            nursery,
            send.send_nowait,
            report=lambda _: None,
            fail=lambda _: None,
            auditor=Auditor(audit, keeper.tensors) if audit is not None else None,
        )
        yield Bench(workload, store, actor, receive, keeper)
        nursery.cancel_scope.cancel()


def chunk_of(data: bytes, *members: int) -> Chunk:
    info = ChunkInfo(digest=blake3(data).digest(), contributors=bitmap(members), total_weight=len(members))
    return Chunk(info=info, payload=memoryview(data))


async def test_steps_end_after_the_one_that_is_under_way_and_there_is_at_least_one() -> None:
    async with training() as bench:
        bench.actor.perform(RunSteps(round=0, steps=2**20))
        bench.actor.perform(StopSteps())  # before the first one has begun, maybe
        bench.workload.permits.release(100)
        done = await bench.posted()
        assert isinstance(done, StepsDone)
        assert (done.steps, done.tokens) == (1, 10)


async def test_what_ended_the_last_steps_does_not_end_the_next() -> None:
    async with training() as bench:
        bench.workload.permits.release(100)
        bench.actor.perform(StopSteps())
        bench.actor.perform(RunSteps(round=0, steps=3))
        done = await bench.posted()
        assert isinstance(done, StepsDone)
        assert (done.steps, done.tokens) == (3, 30)


async def test_an_evaluation_ends_between_two_batches_when_it_is_told_to_and_the_next_one_does_not() -> None:
    """Given an evaluation of a great many batches, when it is stopped, then it ends, and one that is not has a loss."""
    async with training() as bench:
        bench.workload.batches = 2**20
        bench.workload.permits.release(2)
        bench.actor.perform(Evaluate(round=0))
        bench.actor.perform(StopEvaluation())  # before the first batch, maybe
        assert await bench.posted() == EvaluationStopped()

        bench.workload.batches = 3
        bench.workload.permits.release(3)
        bench.actor.perform(Evaluate(round=1))
        assert await bench.posted() == Evaluated(loss=3.0)


async def test_an_evaluation_is_cancelled_between_two_batches() -> None:
    """Defect: a node that ended for an error waited for its evaluation first."""
    async with training() as bench:
        bench.workload.batches = 2**20
        bench.workload.permits.release(2**20)
        bench.actor.perform(Evaluate(round=0))
        await trio.to_thread.run_sync(bench.workload.examined.wait, LIMIT_S)
    assert 0 < bench.workload.evaluated < 2**20


async def test_a_contribution_is_written_for_an_audit_before_it_can_be_served(tmp_path: Path) -> None:
    class Looking(ChunkStore):
        """It looks how many files there are when it is given a chunk."""

        def put(self, key: ChunkKey, chunk: Chunk) -> None:
            there.append(len(list(tmp_path.rglob("contribution-*"))))
            super().put(key, chunk)

    there: list[int] = []
    folder = AuditFolder(tmp_path, "a" * 64, ExchangeSettings(codec="fp32"), Chunks(600, 256))
    async with training(Looking(), folder) as bench:
        bench.actor.perform(Encode(round=4))
        assert await bench.posted() == Encoded(round=4, finite=True)
        assert there == [3, 3, 3]


@pytest.mark.parametrize(("position", "counted"), [(-1, []), (0, [0, 1]), (2, [1, 2])])
async def test_the_settled_means_are_applied_and_their_headers_say_who_is_in_them(
    position: int, counted: list[int]
) -> None:
    async with training() as bench:
        values = np.arange(600, dtype=np.float32)
        for chunk, members in enumerate([(0, 1), (0, 2), (1, 2)]):
            settled = values[256 * chunk : 256 * chunk + 256].tobytes()
            bench.store.put(key("mean", chunk, round=4), chunk_of(settled, *members))
            bench.store.put(key("mean", chunk, round=4, epoch=3, attempt=1), chunk_of(b"", 0, 1, 2))
        bench.workload.end_import(4)
        bench.actor.perform(Apply(round=4, position=position))
        assert await bench.posted() == Applied(round=5, digest=bench.workload.state_digest())
        assert bench.workload.values.tolist() == values.tolist()
        assert [chunk for chunk, included in sorted(bench.workload.included.items()) if included] == counted
        assert bench.keeper.served_round == 5


@dataclass
class Import:
    """A checkpoint actor that fetches from a peer, which serves what is in ``offered``."""

    workload: Noting
    offered: ChunkStore
    actor: CheckpointActor
    keeper: LedgerKeeper
    events: trio.MemoryReceiveChannel[Event]

    async def posted(self) -> Event:
        with trio.fail_after(LIMIT_S):
            return await self.events.receive()

    async def place(self, what: ChunkKey) -> Event:
        """Fetch a chunk and put it in its place; how that ended."""
        self.actor.perform(Fetch(peer="b", key=what, timeout_s=LIMIT_S))
        assert isinstance(await self.posted(), Fetched)
        self.actor.perform(ImportChunk(peer="b", key=what))
        return await self.posted()


@asynccontextmanager
async def importing() -> AsyncIterator[Import]:
    network = MemoryNetwork(1)
    send, receive = trio.open_memory_channel[Event](20)
    async with network.open("a") as a, network.open("b") as b, trio.open_nursery() as nursery:
        offered, workload = ChunkStore(), Noting()
        b.serve(offered)
        a.dial("b", b.control_address, b.bulk_address)
        keeper = LedgerKeeper(None, Tensors(workload, 2), None)
        actor = CheckpointActor(a, keeper, nursery, send.send_nowait, lambda _: None)
        yield Import(workload, offered, actor, keeper, receive)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("data", [b"short", np.full(256, math.nan, np.float32).tobytes()])
async def test_a_chunk_that_the_workload_refuses_is_a_fetch_that_failed(data: bytes) -> None:
    """What is not finite would take the local progress with it."""
    async with importing() as bench:
        what = key("mean", 0)
        bench.offered.put(what, chunk_of(data))
        before = bench.workload.export_state(0)
        assert await bench.place(what) == FetchFailed(peer="b", key=what, fault="invalid")
        assert bench.workload.export_state(0) == before


async def test_an_import_that_ends_while_the_next_one_begins_makes_no_whole_state() -> None:
    """Defect: half of it was of another round, and it could be served, and saved."""
    async with importing() as bench:
        other = Noting(seed=2)
        for chunk in range(other.chunk_count):
            bench.offered.put(key("mean", chunk), chunk_of(other.export_state(chunk)))
        await bench.place(key("mean", 0))
        gate = threading.Event()
        bench.workload.import_gate = lambda: gate.wait(LIMIT_S)
        bench.actor.perform(EndImport(round=7))
        bench.actor.perform(Fetch(peer="b", key=key("mean", 1), timeout_s=LIMIT_S))
        assert isinstance(await bench.posted(), Fetched)
        bench.actor.perform(ImportChunk(peer="b", key=key("mean", 1)))
        gate.set()
        assert isinstance(await bench.posted(), Imported)
        assert await bench.posted() == ChunkImported(key=key("mean", 1))
        assert bench.keeper.served_round is None
        bench.actor.perform(EndImport(round=8))
        assert isinstance(await bench.posted(), Imported)
        assert bench.keeper.served_round == 8
