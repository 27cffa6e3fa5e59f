"""What only the network in memory can do: virtual time, chance from a seed, partitions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from prime_async.errors import AddressInUseError, DeadlineError, PeerUnreachableError
from prime_async.transport.base import Reachable, Received, Transport
from prime_async.transport.memory import SILENCE_S, MemoryNetwork
from prime_async.transport.reach import UNREACHABLE_S
from tests.transport_harness import Shelf, chunk_key, dial, hear, next_notice, note


@asynccontextmanager
async def two(network: MemoryNetwork) -> AsyncIterator[tuple[Transport, Transport]]:
    async with network.open("a") as a, network.open("b") as b:
        dial(a, b)
        yield a, b


async def arrivals(seed: int, loss: float, count: int = 200) -> list[tuple[float, str]]:
    """When each of ``count`` messages arrived, sent 0.1 s apart: (seconds, text)."""
    heard: list[tuple[float, str]] = []
    started = trio.current_time()
    async with two(MemoryNetwork(seed, (0.01, 0.09), loss)) as (a, b):
        for i in range(count):
            a.send(b.id, note(str(i)))
            await trio.sleep(0.1)
            while b.notices.statistics().current_buffer_used:
                _, text = await hear(b)
                heard.append((round(trio.current_time() - started, 6), text))
    return heard


async def test_the_same_seed_gives_the_same_losses(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    first, second = await arrivals(1, 0.3), await arrivals(1, 0.3)
    assert [text for _, text in first] == [text for _, text in second]
    assert first != await arrivals(2, 0.3)


async def test_control_messages_are_lost_at_the_given_rate(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    assert 110 <= len(await arrivals(3, 0.3)) <= 170
    assert len(await arrivals(3, 0.0)) == 200


async def test_a_message_takes_a_latency_within_the_bounds(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    async with two(MemoryNetwork(5, (2.0, 3.0))) as (a, b):
        await trio.sleep(10)
        for _ in range(20):
            sent_at = trio.current_time()
            a.send(b.id, note("x"))
            with trio.fail_after(20):
                await b.notices.receive()
            assert 2.0 <= trio.current_time() - sent_at <= 3.0


async def test_bulk_is_never_lost(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    async with two(MemoryNetwork(6, loss=0.9)) as (a, b):
        shelf = Shelf()
        b.serve(shelf)
        for chunk in range(50):
            shelf.put(chunk_key(chunk), b"x")
            await a.get(b.id, chunk_key(chunk), 1.0)


async def test_a_partition_is_silent_and_heals(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    network = MemoryNetwork(7)
    async with two(network) as (a, b):
        shelf = Shelf()
        b.serve(shelf)
        shelf.put(chunk_key(), b"x")
        await a.get(b.id, chunk_key(), 1.0)
        network.partition(["a"], ["b"])
        assert a.send(b.id, note("lost"))
        with pytest.raises(DeadlineError):
            await a.get(b.id, chunk_key(), 5.0)
        network.heal()
        await a.get(b.id, chunk_key(), 1.0)
        a.send(b.id, note("heard"))
        assert await hear(b) == ("a", "heard")


async def test_a_partition_is_noticed_after_a_while(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    network = MemoryNetwork(7)
    async with two(network) as (a, b):
        assert await next_notice(a, Reachable) == Reachable("b", True)
        network.partition(["a"], ["b"])
        since = trio.current_time()
        with pytest.raises(PeerUnreachableError):
            await a.get(b.id, chunk_key(), 100.0)
        assert trio.current_time() - since == pytest.approx(SILENCE_S + UNREACHABLE_S)
        assert await next_notice(a, Reachable) == Reachable("b", False)
        network.heal()
        with trio.fail_after(1.0):
            assert await next_notice(a, Reachable) == Reachable("b", True)


async def test_a_get_that_waits_through_a_partition_is_answered_after_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    network = MemoryNetwork(8)
    async with two(network) as (a, b), trio.open_nursery() as nursery:
        shelf = Shelf()
        b.serve(shelf)
        nursery.start_soon(a.get, b.id, chunk_key(), 100.0)
        await shelf.until(lambda: shelf.waiting == 1)
        network.cut("b")
        shelf.put(chunk_key(), b"the answer is lost")
        await trio.sleep(10)
        network.heal()
        await shelf.until(lambda: len(shelf.asked) == 2)


async def test_a_partition_divides_groups_only(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    network = MemoryNetwork(9)
    async with two(network) as (a, b), network.open("c") as c:
        dial(a, c)
        network.partition(["a"], ["b"])
        a.send(b.id, note("lost"))
        a.send(c.id, note("heard"))
        assert await hear(c) == ("a", "heard")
        await trio.sleep(10)
        assert b.notices.statistics().current_buffer_used == 0


async def test_a_node_that_is_cut_off_from_the_start_is_reached_when_it_is_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    network = MemoryNetwork(10)
    network.cut("b")
    async with two(network) as (a, b):
        a.send(b.id, note("patience"))
        await trio.sleep(100)
        assert b.notices.statistics().current_buffer_used == 0
        network.heal()
        assert await next_notice(b, Received) == Received("a", note("patience"))


async def test_an_hour_of_waiting_takes_no_time(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    async with two(MemoryNetwork(11)) as (a, b):
        b.serve(Shelf())
        before = trio.current_time()
        with pytest.raises(DeadlineError):
            await a.get(b.id, chunk_key(), 3600.0)
        assert trio.current_time() - before == pytest.approx(3600.0)


async def test_two_nodes_cannot_have_one_id() -> None:
    network = MemoryNetwork(12)
    async with network.open("a"):
        with pytest.raises(AddressInUseError, match="memory://a is open already"):
            async with network.open("a"):
                pass
