"""What the actors do with what peers send, between the transport and the machines."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing
from blake3 import blake3

from prime_async.actors.checkpoint import CheckpointActor
from prime_async.actors.exchange import ExchangeActor
from prime_async.actors.fetcher import Fetcher
from prime_async.actors.ledger import LedgerKeeper
from prime_async.actors.runner import Runner
from prime_async.actors.store import ChunkStore
from prime_async.actors.tensors import Tensors
from prime_async.actors.training import TrainingActor
from prime_async.errors import ChunkUnavailableError, NonFiniteError
from prime_async.machines.vocabulary import (
    AdoptMean,
    CancelFetch,
    CancelFetches,
    ChunkImported,
    Effect,
    EndImport,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    ImportChunk,
    Imported,
    Reduce,
    Reduced,
    Save,
    Settle,
)
from prime_async.messages import FIRST_CHAIN, ChunkInfo, ChunkKey, Commit, positions
from prime_async.transport.base import Chunk
from prime_async.transport.memory import MemoryNetwork
from prime_async.work.buffer_workload import BufferWorkload
from prime_async.work.codec import make_codec
from tests.machine_harness import key


@dataclass
class Noted:
    """A machine that only notes its events."""

    events: list[Event] = field(default_factory=list)

    def handle(self, now: float, event: Event) -> list[Effect]:
        del now
        self.events.append(event)
        return []


def runner(machine: Noted) -> Runner:
    return Runner("exchange", machine, tell=lambda *_: None, report=lambda _: None)


def workload(seed: int = 1) -> BufferWorkload:
    return BufferWorkload.random(1000, 256, make_codec("fp32"), seed)


COMMIT = Commit(round=0, epoch=1, attempt=0, state=bytes(32), digest=bytes(32), chain=bytes(32), view=1)


def keeper(tensors: Tensors) -> LedgerKeeper:
    """Without a disk."""
    return LedgerKeeper(None, tensors, None)


def chunk_of(data: bytes) -> Chunk:
    return Chunk(info=ChunkInfo(digest=blake3(data).digest()), payload=memoryview(data))


def fetch(peer: str, what: ChunkKey) -> Fetch:
    return Fetch(peer=peer, key=what, timeout_s=10.0)


async def handled(runner: Runner) -> None:
    """Let the machine have everything that waits."""
    with trio.move_on_after(10) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.run, lambda _: None)
            await trio.testing.wait_all_tasks_blocked(0.005)
            nursery.cancel_scope.cancel()
    assert not scope.cancelled_caught


async def settled(condition: trio.Event) -> None:
    with trio.fail_after(10):
        await condition.wait()


async def test_an_abandoned_fetch_has_no_outcome_even_if_it_waits_in_the_inbox() -> None:
    """Defect: it was taken for the outcome of the next attempt's fetch, which has the same key, and ended the node."""
    what, machine = key("contribution", 0), Noted()
    network = MemoryNetwork(1)
    async with network.open("a") as a, network.open("b") as b, trio.open_nursery() as nursery:
        store = ChunkStore()
        store.put(what, chunk_of(b"x"))
        b.serve(store)
        a.dial("b", b.control_address, b.bulk_address)
        inbox = runner(machine)
        posted = trio.Event()

        def post(event: Event) -> None:
            inbox.post(event)
            posted.set()

        fetcher = Fetcher(a, nursery, post, inbox.retract)
        fetcher.perform(fetch("b", what))
        await settled(posted)
        fetcher.perform(CancelFetches())
        posted = trio.Event()
        fetcher.perform(fetch("b", what))
        await settled(posted)
        await handled(inbox)
        assert machine.events == [Fetched(peer="b", key=what, info=chunk_of(b"x").info, size=1)]
        assert bytes(fetcher.take("b", what).payload) == b"x"
        nursery.cancel_scope.cancel()


async def test_a_mean_of_the_wrong_size_is_not_held() -> None:
    """Defect: it was committed with the others, and every node ended when it applied it."""
    what = key("mean", 0)
    network = MemoryNetwork(2)
    send, receive = trio.open_memory_channel[Event](10)
    async with network.open("a") as a, network.open("b") as b, trio.open_nursery() as nursery:
        served = ChunkStore()
        served.put(what, chunk_of(b"too short"))
        b.serve(served)
        a.dial("b", b.control_address, b.bulk_address)
        store = ChunkStore()
        actor = ExchangeActor(a, keeper(Tensors(workload(), 2)), store, nursery, send.send_nowait, lambda _: None)
        actor.perform(fetch("b", what))
        with trio.fail_after(10):
            assert await receive.receive() == FetchFailed(peer="b", key=what, fault="invalid")
        assert store.find(what) is None
        nursery.cancel_scope.cancel()


async def test_a_mean_is_made_of_what_is_valid_and_says_who_is_in_it() -> None:
    contribution, mean = key("contribution", 0), key("mean", 0)
    network = MemoryNetwork(3)
    send, receive = trio.open_memory_channel[Event](10)
    async with network.open("a") as a, network.open("b") as b, trio.open_nursery() as nursery:
        served = ChunkStore()
        served.put(contribution, chunk_of(b"no floats"))
        b.serve(served)
        a.dial("b", b.control_address, b.bulk_address)
        tensors, store = Tensors(workload(), 2), ChunkStore()
        payload, info = tensors.encode(0)
        store.put(contribution, Chunk(info=info, payload=payload))
        actor = ExchangeActor(a, keeper(tensors), store, nursery, send.send_nowait, lambda _: None)
        actor.perform(fetch("b", contribution))
        with trio.fail_after(10):
            await receive.receive()
            actor.perform(Reduce(key=mean, contributors=("b", "a"), weights=(5, 7), members=("x", "b", "a")))
            made = await receive.receive()
        assert isinstance(made, Reduced)
        assert made.left_out == ("b",)
        assert positions(made.info.contributors) == (2,)
        assert made.info.total_weight == 7
        held = store.find(mean)
        assert held is not None
        assert bytes(held.payload) == bytes(payload)  # the mean of one, in fp32
        nursery.cancel_scope.cancel()


async def test_a_fetch_that_is_cancelled_alone_has_no_outcome_and_the_others_have() -> None:
    network, machine = MemoryNetwork(6), Noted()
    async with network.open("a") as a, network.open("b") as b, trio.open_nursery() as nursery:
        served = ChunkStore()
        for chunk in range(2):
            served.put(key("contribution", chunk), chunk_of(b"x"))
        b.serve(served)
        a.dial("b", b.control_address, b.bulk_address)
        inbox = runner(machine)
        both, came = trio.Event(), list[Event]()

        def post(event: Event) -> None:
            inbox.post(event)
            came.append(event)
            if len(came) == 2:
                both.set()

        fetcher = Fetcher(a, nursery, post, inbox.retract)
        for chunk in range(2):
            fetcher.perform(fetch("b", key("contribution", chunk)))
        await settled(both)
        fetcher.perform(CancelFetch(peer="b", key=key("contribution", 0)))
        await handled(inbox)
        assert machine.events == [Fetched(peer="b", key=key("contribution", 1), info=chunk_of(b"x").info, size=1)]
        with pytest.raises(KeyError):
            fetcher.take("b", key("contribution", 0))
        nursery.cancel_scope.cancel()


async def test_means_are_adopted_and_settled_under_other_names_and_what_came_as_settled_only_then_served() -> None:
    send, receive = trio.open_memory_channel[Event](10)
    network = MemoryNetwork(7)
    async with network.open("a") as a, network.open("b") as b, trio.open_nursery() as nursery:
        tensors, store, served = Tensors(workload(), 2), ChunkStore(), ChunkStore()
        means = [Chunk(info=i, payload=p) for p, i in map(tensors.encode, range(tensors.workload.chunk_count))]
        b.serve(served)
        a.dial("b", b.control_address, b.bulk_address)
        actor = ExchangeActor(a, keeper(tensors), store, nursery, send.send_nowait, lambda _: None)
        for chunk, mean in enumerate(means[:-1]):
            store.put(key("mean", chunk, epoch=1), mean)
        actor.perform(AdoptMean(found=key("mean", 0, epoch=1), key=key("mean", 0, epoch=1, attempt=2)))
        assert store.find(key("mean", 0, epoch=1, attempt=2)) == means[0]
        last = key("mean", len(means) - 1)
        served.put(last, means[-1])
        actor.perform(fetch("b", last))
        with trio.fail_after(10):
            assert isinstance(await receive.receive(), Fetched)
        assert store.find(last) is None
        others = key("mean", 0, epoch=1, attempt=2), last
        actor.perform(Settle(round=0, epoch=1, attempt=0, commit=COMMIT, previous=FIRST_CHAIN, exceptions=others))
        assert [store.find(key("mean", c)) for c in range(len(means) - 1)] == means[:-1]
        assert store.find(last) is not None
        nursery.cancel_scope.cancel()


async def test_a_mean_of_nothing_is_made_known_and_not_held() -> None:
    send, receive = trio.open_memory_channel[Event](10)
    async with MemoryNetwork(8).open("a") as a, trio.open_nursery() as nursery:
        store = ChunkStore()
        actor = ExchangeActor(a, keeper(Tensors(workload(), 2)), store, nursery, send.send_nowait, lambda _: None)
        actor.perform(Reduce(key=key("mean", 0), contributors=("a",), weights=(5,), members=("a",)))
        with trio.fail_after(10):
            made = await receive.receive()
        assert isinstance(made, Reduced)
        assert made.left_out == ("a",)
        assert store.find(key("mean", 0)) is None
        nursery.cancel_scope.cancel()


async def test_a_state_that_is_being_replaced_is_not_served_and_whole_again_at_the_end() -> None:
    network = MemoryNetwork(4)
    send, receive = trio.open_memory_channel[Event](20)
    async with network.open("a") as a, network.open("b") as b, trio.open_nursery() as nursery:
        theirs, ours = workload(2), workload(1)
        theirs.end_import(7)
        served, store = ChunkStore(), ChunkStore()
        served.read_ledger = keeper(Tensors(theirs, 2)).provide
        b.serve(served)
        a.dial("b", b.control_address, b.bulk_address)
        kept = keeper(Tensors(ours, 2))
        store.read_ledger = kept.provide
        here = CheckpointActor(a, kept, nursery, send.send_nowait, lambda _: None)
        with trio.fail_after(10):
            for chunk in range(ours.chunk_count):
                what = key("state", chunk, round=7)
                here.perform(fetch("b", what))
                assert isinstance(await receive.receive(), Fetched)
                here.perform(ImportChunk(peer="b", key=what))
                assert kept.served_round is None
                with pytest.raises(ChunkUnavailableError):
                    await store.provide("b", key("state", 0, round=0))
                assert await receive.receive() == ChunkImported(key=what)
            here.perform(EndImport(round=7))
            assert await receive.receive() == Imported(round=7, digest=theirs.state_digest())
        assert kept.served_round == 7
        here.perform(CancelFetches())
        nursery.cancel_scope.cancel()


async def test_of_several_chunks_that_fail_at_once_the_first_error_comes_out_as_it_is() -> None:
    """Defect: the group of them was not what the caller handles, so a diverged contribution ended the node."""
    tensors = Tensors(workload(), workers=2)
    both = threading.Barrier(2)

    def fail(chunk: int) -> None:
        both.wait(10)
        raise NonFiniteError(str(chunk))

    with trio.fail_after(10), pytest.raises(NonFiniteError):
        await tensors.for_each(fail, range(2))


async def test_every_chunk_has_its_turn_once() -> None:
    tensors, seen = Tensors(workload(), workers=3), list[int]()
    await tensors.for_each(seen.append, range(100))
    assert sorted(seen) == list(range(100))


class Gated(BufferWorkload):
    """Its imports wait for a gate, and everything that touches the state is noted when it begins and ends."""

    def __init__(self) -> None:
        super().__init__(workload().values, 256, make_codec("fp32"))
        self.gate = threading.Event()
        self.journal: list[str] = []

    def import_state(self, chunk: int, data: memoryview) -> None:
        self.journal.append(f"import {chunk} begins")
        assert self.gate.wait(10)
        super().import_state(chunk, data)
        self.journal.append(f"import {chunk} ends")

    def end_import(self, round: int) -> bytes:
        if hasattr(self, "journal"):
            self.journal.append("end")
        return super().end_import(round)


class Journaled(LedgerKeeper):
    """Notes when the state is saved."""

    def __init__(self, journal: list[str], tensors: Tensors) -> None:
        super().__init__(None, tensors, None)
        self.journal = journal

    async def save(self) -> Path | None:
        self.journal.append("save")
        return None


async def test_imports_their_end_and_saving_wait_for_each_other_in_the_order_in_which_they_were_asked_for() -> None:
    """Defect: an import that had been given up could still write while the next one did, or while the file was made."""
    network = MemoryNetwork(5)
    send, receive = trio.open_memory_channel[Event](20)
    async with network.open("a") as a, network.open("b") as b, trio.open_nursery() as nursery:
        ours, theirs, served = Gated(), workload(2), ChunkStore()
        for chunk in range(2):
            served.put(key("mean", chunk), chunk_of(theirs.export_state(chunk)))
        b.serve(served)
        a.dial("b", b.control_address, b.bulk_address)
        tensors = Tensors(ours, 4)
        kept = Journaled(ours.journal, tensors)
        actor = CheckpointActor(a, kept, nursery, send.send_nowait, lambda _: None)
        training = TrainingActor(
            kept, ChunkStore(), nursery, send.send_nowait, report=lambda _: None, fail=lambda _: None
        )
        with trio.fail_after(10):
            for chunk in range(2):
                actor.perform(fetch("b", key("mean", chunk)))
                await receive.receive()
            wishes: list[tuple[Callable[[Effect], None], Effect]] = [
                (actor.perform, ImportChunk(peer="b", key=key("mean", 0))),
                (training.perform, Save()),
                (actor.perform, ImportChunk(peer="b", key=key("mean", 1))),
                (actor.perform, EndImport(round=7)),
            ]
            for perform, effect in wishes:
                perform(effect)
                await trio.testing.wait_all_tasks_blocked(0.005)
            assert ours.journal == ["import 0 begins"]
            ours.gate.set()
            for _ in wishes:
                await receive.receive()
        assert ours.journal == [
            "import 0 begins",
            "import 0 ends",
            "save",
            "import 1 begins",
            "import 1 ends",
            "end",
        ]
        nursery.cancel_scope.cancel()
