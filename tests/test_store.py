"""The chunks that a node holds for itself and its peers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from prime_async.actors.store import ChunkStore
from prime_async.errors import ChunkUnavailableError
from prime_async.messages import ChunkKey
from prime_async.transport.base import Chunk
from tests.machine_harness import info, key


def chunk(fill: int = 1) -> Chunk:
    return Chunk(info=info(fill), payload=memoryview(bytes([fill])))


async def test_what_is_here_is_given_at_once() -> None:
    store = ChunkStore()
    store.put(key("mean", 1), chunk(7))
    assert (await store.provide("n1", key("mean", 1))).info == info(7)
    assert store.find(key("mean", 1)) == chunk(7)
    assert store.find(key("mean", 2)) is None


class Asked:
    """What became of a get."""

    def __init__(self) -> None:
        self.answer: Chunk | str | None = None

    async def ask(self, store: ChunkStore, what: ChunkKey) -> None:
        try:
            self.answer = await store.provide("n1", what)
        except ChunkUnavailableError as error:
            self.answer = str(error)


@asynccontextmanager
async def waiting(store: ChunkStore, *keys: ChunkKey) -> AsyncIterator[list[Asked]]:
    gets = [Asked() for _ in keys]
    async with trio.open_nursery() as nursery:
        for get, what in zip(gets, keys, strict=True):
            nursery.start_soon(get.ask, store, what)
        await trio.testing.wait_all_tasks_blocked()
        yield gets
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_what_is_not_here_yet_is_waited_for_by_all_who_ask() -> None:
    store = ChunkStore()
    async with waiting(store, key("mean", 1), key("mean", 1), key("mean", 2)) as gets:
        assert [g.answer for g in gets] == [None, None, None]
        store.put(key("mean", 1), chunk(7))
    assert [g.answer for g in gets] == [chunk(7), chunk(7), None]


async def test_attempts_do_not_mix() -> None:
    store = ChunkStore()
    store.put(key("mean", 1, attempt=1), chunk())
    async with waiting(store, key("mean", 1), key("mean", 1, epoch=1, attempt=1)) as gets:
        pass
    assert [g.answer for g in gets] == [None, None]


async def test_what_was_forgotten_is_gone_and_who_waits_for_it_is_told() -> None:
    store = ChunkStore()
    store.put(key("mean", 1, round=2), chunk())
    store.put(key("mean", 1, round=3), chunk())
    async with waiting(store, key("contribution", 0, round=3), key("contribution", 0, round=4)) as gets:
        store.forget(means_before=3, contributions_before=4)
    assert isinstance(gets[0].answer, str)
    assert "over" in gets[0].answer
    assert gets[1].answer is None
    with pytest.raises(ChunkUnavailableError):
        await store.provide("n1", key("mean", 1, round=2))
    assert (await store.provide("n1", key("mean", 1, round=3))) == chunk()


def test_what_comes_too_late_is_not_kept() -> None:
    store = ChunkStore()
    store.forget(means_before=3, contributions_before=4)
    store.put(key("mean", 1, round=2), chunk())
    assert store.find(key("mean", 1, round=2)) is None


async def test_gets_that_are_given_up_leave_nothing_behind() -> None:
    """Defect: a peer could fill the memory by asking for chunks of rounds that never come."""
    store = ChunkStore()
    async with waiting(store, *(key("mean", i, round=10**9) for i in range(50)), key("mean", 0, round=10**9)):
        assert len(store._waiting) == 50
    assert store._waiting == {}


async def test_one_that_gives_up_does_not_take_the_others_with_it() -> None:
    store = ChunkStore()
    async with waiting(store, key("mean", 1)) as gets:
        with trio.move_on_after(0):
            await store.provide("n2", key("mean", 1))
        store.put(key("mean", 1), chunk(7))
    assert gets[0].answer == chunk(7)


async def test_the_outer_state_is_asked_of_whoever_reads_it() -> None:
    store = ChunkStore()
    with pytest.raises(ChunkUnavailableError):
        await store.provide("n1", key("state", 0))

    async def read(what: ChunkKey) -> Chunk:
        return chunk(what.chunk)

    store.read_ledger = read
    assert await store.provide("n1", key("state", 5)) == chunk(5)


async def test_a_settled_mean_is_read_from_disk_if_the_round_is_there_and_else_waited_for() -> None:
    """Defect: who was behind had what others lacked on its disk, of rounds that it had not come to, and kept it."""
    store = ChunkStore()

    async def read(what: ChunkKey) -> Chunk:
        return chunk(what.chunk)

    store.read_ledger, store.has_committed = read, lambda round: round == 7
    settled = key("mean", 5, round=7, epoch=0, attempt=0)
    assert await store.provide("n1", settled) == chunk(5)
    others = key("mean", 5, round=8, epoch=0, attempt=0), key("mean", 5, round=7, epoch=1, attempt=0)
    async with waiting(store, *others) as gets:
        pass
    assert [g.answer for g in gets] == [None, None]
    store.put(settled, chunk(9))
    assert await store.provide("n1", settled) == chunk(9), "what is in memory costs no read"


async def test_that_a_contribution_is_used_is_told_once_a_round_and_before_the_peer_has_it() -> None:
    store, told = ChunkStore(), list[int]()
    store.on_taken = told.append
    store.put(key("mean", 0), chunk())
    await store.provide("n1", key("mean", 0))
    async with waiting(store, key("contribution", 0, round=3), key("contribution", 1, round=3)) as gets:
        store.put(key("contribution", 0, round=3), chunk())
        assert store.find(key("contribution", 0, round=3)) == chunk()
        assert told == []
    assert [g.answer for g in gets] == [chunk(), None]
    assert told == [3]
    assert store.use(key("contribution", 0, round=3)) == chunk()
    assert told == [3]
    store.put(key("contribution", 0, round=4), chunk())
    store.use(key("contribution", 0, round=4))
    assert told == [3, 4]
