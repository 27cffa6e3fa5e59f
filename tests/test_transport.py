"""What holds on every transport: the conformance suite of :class:`prime_async.transport.base.Transport`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from blake3 import blake3

from prime_async.errors import ChunkUnavailableError, DeadlineError, LocalError, PeerUnreachableError, ProtocolError
from prime_async.messages import ChunkInfo, Found, Get, Member, Missing, Ready, View, ViewUpdate, encode
from prime_async.transport.base import Chunk, Denied, Reachable, Received, Transport, Violation
from prime_async.transport.bulk import UNANSWERED_PER_WINDOW
from prime_async.transport.inbox import MAX_NOTICES, Inbox
from prime_async.transport.reach import Reach
from tests.transport_harness import (
    PATIENCE_S,
    Harness,
    Memory,
    Network,
    Options,
    PlaneName,
    Shelf,
    ZeroMQ,
    chunk_key,
    dial,
    hear,
    next_notice,
    note,
    until,
)

FOREVER_S = 60.0
"""A timeout that no test lets run out."""


@pytest.fixture(params=["memory", "zeromq in the clear", "zeromq over curve"])
def network(request: pytest.FixtureRequest) -> Network:
    if request.param == "memory":
        return Memory()
    return ZeroMQ(encrypt=request.param.endswith("curve"))


@pytest.fixture
async def net(network: Network) -> AsyncIterator[Harness]:
    async with trio.open_nursery() as nursery:
        harness = Harness(network, nursery)
        yield harness
        await harness.close_all()


async def two(net: Harness, options: Options | None = None) -> tuple[Transport, Transport]:
    """Two nodes, of which the first has dialled the second."""
    a, b = await net.open("a", options), await net.open("b", options)
    dial(a, b)
    return a, b


async def two_with_shelf(net: Harness, options: Options | None = None) -> tuple[Transport, Transport, Shelf]:
    a, b = await two(net, options)
    shelf = Shelf()
    b.serve(shelf)
    return a, b, shelf


class Fetch:
    """A get in the background."""

    def __init__(self, nursery: trio.Nursery, node: Transport, peer: Transport, chunk: int = 0) -> None:
        self.result: Chunk | Exception | None = None
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        nursery.start_soon(self._run, node, peer.id, chunk)

    async def _run(self, node: Transport, peer: str, chunk: int) -> None:
        try:
            with self.scope:
                self.result = await node.get(peer, chunk_key(chunk), FOREVER_S)
        except Exception as error:
            self.result = error
        finally:
            self.done.set()

    async def outcome(self) -> Chunk | Exception | None:
        with trio.fail_after(PATIENCE_S):
            await self.done.wait()
        return self.result


# Control


async def test_a_message_arrives_with_the_id_of_its_sender(net: Harness) -> None:
    a, b = await two(net)
    assert a.send(b.id, Ready(round=4, weight=1000, incarnation=1))
    assert await next_notice(b, Received) == Received(net.network.id("a"), Ready(round=4, weight=1000, incarnation=1))


async def test_messages_of_one_peer_arrive_in_order(net: Harness) -> None:
    a, b = await two(net)
    sent = [str(i) for i in range(50)]
    assert all(a.send(b.id, note(text)) for text in sent)
    assert [await hear(b) for _ in sent] == [(a.id, text) for text in sent]


async def test_a_peer_that_dialled_us_is_answered_without_dialling_back(net: Harness) -> None:
    a, b = await two(net)
    a.send(b.id, note("question"))
    await hear(b)
    assert b.send(a.id, note("answer"))
    assert await hear(a) == (b.id, "answer")


async def test_a_peer_that_cannot_be_dialled_is_answered_over_its_own_connection(net: Harness) -> None:
    a, b = await two(net)
    _, control, bulk = net.network.nowhere()
    b.dial(a.id, control, bulk)
    a.send(b.id, note("question"))
    await hear(b)
    assert b.send(a.id, note("answer"))
    assert await hear(a) == (b.id, "answer")


async def test_two_nodes_that_dialled_each_other_hear_each_message_once(net: Harness) -> None:
    a, b = await two(net)
    dial(b, a)
    for text in ("one", "two"):
        a.send(b.id, note(text))
        assert await hear(b) == (a.id, text)
        b.send(a.id, note(text))
        assert await hear(a) == (b.id, text)


async def test_a_message_to_an_unknown_peer_is_dropped_and_counted(net: Harness) -> None:
    a = await net.open("a")
    assert not a.send(net.network.id("stranger"), note("hello?"))
    assert a.traffic.control_dropped == 1
    assert a.traffic.control_sent == 0


async def test_a_full_queue_drops_and_counts_and_never_waits(net: Harness) -> None:
    a = await net.open("a")
    nobody, control, bulk = net.network.nowhere()
    a.dial(nobody, control, bulk)
    sent = [a.send(nobody, note(str(i))) for i in range(3000)]
    assert sent[0]
    assert not sent[-1]
    assert a.traffic.control_dropped == sent.count(False)


async def test_a_message_that_its_receiver_would_refuse_is_not_sent(net: Harness) -> None:
    a, b = await two(net)
    member = Member(id="m", name="n" * 64, incarnation=0, control="c" * 256, bulk="b" * 256)
    view = View(lineage=bytes(32), previous=bytes(32), epoch=0, number=0, leader="m", members=(member,) * 2000)
    with pytest.raises(LocalError, match=r"ViewUpdate takes .* bytes, and a control message at most 1048576"):
        a.send(b.id, ViewUpdate(epoch=0, decided=True, view=view))


async def test_after_hanging_up_nothing_is_sent(net: Harness) -> None:
    a, b = await two(net)
    a.send(b.id, note("one"))
    await hear(b)
    a.hang_up(b.id)
    a.hang_up(b.id)
    assert not a.send(b.id, note("two"))


async def test_dialling_again_with_the_same_addresses_changes_nothing(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    async with trio.open_nursery() as nursery:
        fetch = Fetch(nursery, a, b)
        await shelf.until(lambda: shelf.waiting == 1)
        dial(a, b)
        a.dial(b.id, b.control_address, "")
        shelf.put(chunk_key(), b"there")
        assert isinstance(await fetch.outcome(), Chunk)
    assert len(shelf.asked) == 1


async def test_a_bad_address_stops_nobody(net: Harness) -> None:
    a, b = await two(net)
    for address in ("", "tcp://", "ipc:///tmp/x", "tcp://host:port", "inproc://y", "tcp://a b:1", "x" * 256):
        a.dial(net.network.id("c"), address, address)
        a.hang_up(net.network.id("c"))
    a.send(b.id, note("fine"))
    assert await hear(b) == (a.id, "fine")


# Bulk


async def test_a_chunk_comes_with_what_is_known_of_it(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    shelf.put(chunk_key(), b"payload")
    chunk = await a.get(b.id, chunk_key(), FOREVER_S)
    assert bytes(chunk.payload) == b"payload"
    assert chunk.info == ChunkInfo(digest=blake3(b"payload").digest(), contributors=b"\x05", total_weight=7)


@pytest.mark.parametrize("size", [0, 1, 65_536, 4 << 20])
async def test_a_payload_of_any_size_comes_intact(net: Harness, size: int) -> None:
    a, b, shelf = await two_with_shelf(net)
    payload = bytes(range(256)) * (size // 256) + b"\x07" * (size % 256)
    shelf.put(chunk_key(), payload)
    chunk = await a.get(b.id, chunk_key(), FOREVER_S)
    assert chunk.payload.nbytes == size
    assert chunk.payload == payload


async def test_a_get_waits_until_the_chunk_is_there(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    async with trio.open_nursery() as nursery:
        fetch = Fetch(nursery, a, b)
        await shelf.until(lambda: shelf.waiting == 1)
        shelf.put(chunk_key(), b"late")
        result = await fetch.outcome()
    assert isinstance(result, Chunk)
    assert bytes(result.payload) == b"late"


async def test_a_get_waits_until_the_peer_serves(net: Harness) -> None:
    a, b = await two(net)
    shelf = Shelf()
    shelf.put(chunk_key(), b"at last")
    async with trio.open_nursery() as nursery:
        fetch = Fetch(nursery, a, b)
        await trio.testing.wait_all_tasks_blocked()
        b.serve(shelf)
        assert isinstance(await fetch.outcome(), Chunk)


async def test_a_chunk_that_is_gone_is_said_to_be_gone(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    shelf.lose(chunk_key())
    with pytest.raises(ChunkUnavailableError, match=r"mean/3/0/\(0, 0\) was thrown away"):
        await a.get(b.id, chunk_key(), FOREVER_S)


async def test_a_get_ends_at_its_deadline(net: Harness) -> None:
    a, b, _ = await two_with_shelf(net)
    with pytest.raises(DeadlineError, match=r"did not come from .* within 0\.2 s"):
        await a.get(b.id, chunk_key(), 0.2)


async def test_a_get_from_a_peer_that_was_not_dialled_fails_at_once(net: Harness) -> None:
    a = await net.open("a")
    with pytest.raises(PeerUnreachableError, match="dial its bulk address first"):
        await a.get(net.network.id("stranger"), chunk_key(), FOREVER_S)


async def test_a_get_from_a_peer_whose_bulk_address_is_not_known_fails_at_once(net: Harness) -> None:
    a, b = await net.open("a"), await net.open("b")
    a.dial(b.id, b.control_address, "")
    with pytest.raises(PeerUnreachableError, match="dial its bulk address first"):
        await a.get(b.id, chunk_key(), FOREVER_S)


async def test_hanging_up_fails_gets_that_wait_and_gets_that_are_queued(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net, Options(window=1))
    async with trio.open_nursery() as nursery:
        fetches = [Fetch(nursery, a, b, chunk) for chunk in range(3)]
        await shelf.until(lambda: shelf.waiting == 1)
        a.hang_up(b.id)
        for fetch in fetches:
            assert isinstance(await fetch.outcome(), PeerUnreachableError)


async def test_a_cancelled_get_is_withdrawn_from_the_peer(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    async with trio.open_nursery() as nursery:
        fetch = Fetch(nursery, a, b)
        await shelf.until(lambda: shelf.waiting == 1)
        fetch.scope.cancel()
        await shelf.until(lambda: shelf.given_up == [chunk_key()])
    shelf.put(chunk_key(1), b"next")
    assert bytes((await a.get(b.id, chunk_key(1), FOREVER_S)).payload) == b"next"


async def test_a_late_answer_to_a_cancelled_get_is_discarded(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    shelf.ignores_cancellation = True
    async with trio.open_nursery() as nursery:
        fetch = Fetch(nursery, a, b)
        await shelf.until(lambda: shelf.waiting == 1)
        fetch.scope.cancel()
        await fetch.outcome()
        shelf.put(chunk_key(), b"late")
        await shelf.until(lambda: shelf.waiting == 0)
    shelf.put(chunk_key(1), b"next")
    assert bytes((await a.get(b.id, chunk_key(1), FOREVER_S)).payload) == b"next"
    await until(lambda: a.traffic.bulk_received == b.traffic.bulk_sent)
    assert a.traffic.violations == {}


async def test_at_most_a_window_of_gets_is_under_way_and_they_are_served_in_order(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net, Options(window=3))
    async with trio.open_nursery() as nursery:
        fetches = []
        for chunk in range(9):
            fetches.append(Fetch(nursery, a, b, chunk))
            await trio.testing.wait_all_tasks_blocked()  # so that they stand in the queue in this order
        for chunk in range(9):
            await shelf.until(lambda chunk=chunk: chunk_key(chunk) in shelf.asked)  # type: ignore[misc]
            shelf.put(chunk_key(chunk), b"x")
            assert isinstance(await fetches[chunk].outcome(), Chunk)
    assert shelf.most_waiting <= 3


async def test_gets_go_either_way_over_a_connection(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    own = Shelf()
    a.serve(own)
    own.put(chunk_key(), b"from a")
    shelf.put(chunk_key(), b"from b")
    assert bytes((await a.get(b.id, chunk_key(), FOREVER_S)).payload) == b"from b"
    assert bytes((await b.get(a.id, chunk_key(), FOREVER_S)).payload) == b"from a"


async def test_bulk_does_not_keep_control_waiting(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    async with trio.open_nursery() as nursery:
        Fetch(nursery, a, b)
        await shelf.until(lambda: shelf.waiting == 1)
        a.send(b.id, note("heartbeat"))
        assert await hear(b) == (a.id, "heartbeat")
        shelf.put(chunk_key(), b"")


async def test_a_chunk_that_is_larger_than_agreed_is_not_sent(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net, Options(max_payload_bytes=1000))
    shelf.put(chunk_key(0), bytes(1001))
    shelf.put(chunk_key(1), bytes(1000))
    with pytest.raises(ChunkUnavailableError, match="raise max_payload_bytes"):
        await a.get(b.id, chunk_key(0), FOREVER_S)
    assert (await a.get(b.id, chunk_key(1), FOREVER_S)).payload.nbytes == 1000


async def test_traffic_both_ways_at_once_never_stalls(net: Harness) -> None:
    """A send can swallow the wake-up of a message that came in: without the look afterwards, this test fails."""
    a, b, shelf = await two_with_shelf(net)
    own = Shelf()
    a.serve(own)
    for chunk in range(8):
        shelf.put(chunk_key(chunk), bytes(100_000))
        own.put(chunk_key(chunk), bytes(100_000))
    await a.get(b.id, chunk_key(), FOREVER_S)

    async def fetch(one: Transport, other: Transport, chunk: int) -> None:
        for _ in range(50):
            await one.get(other.id, chunk_key(chunk), PATIENCE_S)
            one.send(other.id, note("thanks"))

    async with trio.open_nursery() as nursery:
        for chunk in range(8):
            nursery.start_soon(fetch, a, b, chunk)
            nursery.start_soon(fetch, b, a, chunk)


# Peers that come and go


@pytest.mark.parametrize("same_port", [True, False])
async def test_a_peer_that_starts_again_is_reached_again(net: Harness, same_port: bool) -> None:
    a, b, _ = await two_with_shelf(net)
    a.send(b.id, note("before"))
    await hear(b)
    await net.close("b")
    b = await net.open("b", same_port=same_port)
    dial(a, b)
    shelf = Shelf()
    b.serve(shelf)
    shelf.put(chunk_key(), b"again")
    assert bytes((await a.get(b.id, chunk_key(), FOREVER_S)).payload) == b"again"
    await say_until_heard(a, b, "after")


async def test_a_get_that_waits_at_a_peer_which_starts_again_is_asked_again(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    async with trio.open_nursery() as nursery:
        fetch = Fetch(nursery, a, b)
        await shelf.until(lambda: shelf.waiting == 1)
        await net.close("b")
        b = await net.open("b")
        again = Shelf()
        b.serve(again)
        again.put(chunk_key(), b"from the second life")
        result = await fetch.outcome()
    assert isinstance(result, Chunk)
    assert bytes(result.payload) == b"from the second life"


async def test_a_get_moves_to_a_new_address_of_its_peer(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    async with trio.open_nursery() as nursery:
        fetch = Fetch(nursery, a, b)
        await shelf.until(lambda: shelf.waiting == 1)
        await net.close("b")
        b = await net.open("b", same_port=False)
        dial(a, b)
        again = Shelf()
        b.serve(again)
        again.put(chunk_key(), b"there")
        assert isinstance(await fetch.outcome(), Chunk)


async def test_a_peer_may_be_dialled_before_it_is_there(net: Harness) -> None:
    a, b = await net.open("a"), await net.open("b")
    await net.close("b")
    dial(a, b)
    a.send(b.id, note("early"))
    b = await net.open("b")
    assert await hear(b) == (a.id, "early")


# Nodes behind NAT


async def behind_nat(net: Harness) -> tuple[Transport, Transport]:
    """A node behind NAT, and one in the open, that have dialled each other, the second in vain."""
    inner, outer = await net.open("inner"), await net.open("outer")
    addresses = net.network.put_behind_nat(inner)
    dial(inner, outer)
    outer.dial(inner.id, *addresses)
    return inner, outer


async def test_a_node_behind_nat_talks_both_ways_over_the_connections_that_it_dialled(net: Harness) -> None:
    inner, outer = await behind_nat(net)
    inner.send(outer.id, note("from inside"))
    assert await hear(outer) == (inner.id, "from inside")
    assert await next_notice(outer, Reachable) == Reachable(inner.id, False)
    for text in ("one", "two"):
        assert outer.send(inner.id, note(text))
        assert await hear(inner) == (outer.id, text)


async def test_a_node_behind_nat_gets_and_serves_over_the_connections_that_it_dialled(net: Harness) -> None:
    inner, outer = await behind_nat(net)
    shelves = {node.id: Shelf() for node in (inner, outer)}
    for node in (inner, outer):
        node.serve(shelves[node.id])
        shelves[node.id].put(chunk_key(), node.id.encode())
    assert await next_notice(inner, Reachable) == Reachable(outer.id, True)
    assert bytes((await inner.get(outer.id, chunk_key(), FOREVER_S)).payload) == outer.id.encode()
    assert bytes((await outer.get(inner.id, chunk_key(), FOREVER_S)).payload) == inner.id.encode()
    assert await next_notice(outer, Reachable) == Reachable(inner.id, False)
    assert bytes((await outer.get(inner.id, chunk_key(), FOREVER_S)).payload) == inner.id.encode()


async def test_two_nodes_behind_nat_learn_that_they_cannot_reach_each_other(net: Harness) -> None:
    a, b = await net.open("a"), await net.open("b")
    addresses = {node.id: net.network.put_behind_nat(node) for node in (a, b)}
    a.dial(b.id, *addresses[b.id])
    b.dial(a.id, *addresses[a.id])
    with trio.fail_after(PATIENCE_S), pytest.raises(PeerUnreachableError, match="whoever dialled"):
        await a.get(b.id, chunk_key(), FOREVER_S)
    for one, other in ((a, b), (b, a)):
        assert await next_notice(one, Reachable) == Reachable(other.id, False)
        assert not one.send(other.id, note("nobody hears this"))
    with trio.fail_after(PATIENCE_S), pytest.raises(PeerUnreachableError):
        await a.get(b.id, chunk_key(), FOREVER_S)


# Who can be dialled


async def test_it_is_told_once_that_a_peer_can_be_dialled(net: Harness) -> None:
    a, b = await two(net)
    assert await next_notice(a, Reachable) == Reachable(b.id, True)
    dial(a, b)
    await say_until_heard(a, b, "still here")
    for node in (a, b):
        with pytest.raises(trio.WouldBlock):
            node.notices.receive_nowait()


async def test_control_alone_is_enough_where_only_control_was_dialled(net: Harness) -> None:
    a, b = await net.open("a"), await net.open("b")
    a.dial(b.id, b.control_address, "")
    assert await next_notice(a, Reachable) == Reachable(b.id, True)


@pytest.mark.parametrize("bulk_is_there", [True, False])
async def test_a_peer_that_is_dialled_for_bulk_later_is_judged_anew_by_both(net: Harness, bulk_is_there: bool) -> None:
    a, b = await net.open("a"), await net.open("b")
    a.dial(b.id, b.control_address, "")
    assert await next_notice(a, Reachable) == Reachable(b.id, True)
    _, _, nowhere = net.network.nowhere()
    a.dial(b.id, b.control_address, b.bulk_address if bulk_is_there else nowhere)
    assert await next_notice(a, Reachable) == Reachable(b.id, bulk_is_there)
    assert a.send(b.id, note("control goes on"))
    assert await hear(b) == (a.id, "control goes on")


async def test_it_is_told_when_a_peer_is_lost_and_when_it_is_back(net: Harness) -> None:
    a, b = await two(net)
    assert await next_notice(a, Reachable) == Reachable(b.id, True)
    await net.close("b")
    assert await next_notice(a, Reachable) == Reachable(b.id, False)
    assert not a.send(b.id, note("into a queue that nobody empties"))
    await net.open("b")
    assert await next_notice(a, Reachable) == Reachable(b.id, True)
    assert a.send(b.id, note("welcome back"))


async def test_nothing_is_told_of_a_peer_that_is_soon_back(net: Harness) -> None:
    a, b = await two(net, Options(unreachable_s=PATIENCE_S))
    assert await next_notice(a, Reachable) == Reachable(b.id, True)
    await net.close("b")
    b = await net.open("b")
    await say_until_heard(a, b, "I am back")
    with pytest.raises(trio.WouldBlock):
        a.notices.receive_nowait()


async def test_what_is_no_address_is_told_as_not_reachable(net: Harness) -> None:
    a = await net.open("a")
    a.dial(net.network.id("b"), "no address", "nor this")
    assert await next_notice(a, Reachable) == Reachable(net.network.id("b"), False)


async def test_nothing_is_told_of_a_peer_that_was_hung_up_on(net: Harness) -> None:
    a = await net.open("a", Options(unreachable_s=0.05))
    for name in ("b", "c"):
        a.dial(net.network.id(name), *net.network.nowhere()[1:])
    a.hang_up(net.network.id("b"))
    assert await next_notice(a, Reachable) == Reachable(net.network.id("c"), False)
    with pytest.raises(trio.WouldBlock):
        a.notices.receive_nowait()


async def test_what_finds_no_room_among_the_notices_is_told_later(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    told: list[tuple[str, bool, float]] = []

    def tell(peer: str, reachable: bool) -> bool:
        told.append((peer, reachable, trio.current_time()))
        return len(told) > 2

    reach = Reach(nursery, tell, unreachable_s=5.0)
    reach.dialled("a")
    reach.changed("a", True)
    await trio.sleep(60)
    assert [(peer, reachable, round(at)) for peer, reachable, at in told] == [
        ("a", True, 0),
        ("a", True, 5),
        ("a", True, 10),
    ]


# Peers that misbehave


BAD_FRAMES: list[tuple[str, PlaneName, list[bytes]]] = [
    ("not cbor", "control", [b"\xff\x00 garbage"]),
    ("two frames", "control", [encode(note("x")), b""]),
    ("a header of the other plane", "control", [encode(Get(id=1, key=chunk_key(), wait_ms=0))]),
    ("a map without a type", "control", [b"\xa0"]),
    ("not cbor either", "bulk", [b"\xff\x00 garbage"]),
    ("a message of the other plane", "bulk", [encode(note("x"))]),
    ("a get with a payload", "bulk", [encode(Get(id=1, key=chunk_key(), wait_ms=0)), b"payload"]),
    ("a payload missing", "bulk", [encode(Found(id=1, info=ChunkInfo(digest=bytes(32)), size=4))]),
    ("an answer to nothing", "bulk", [encode(Found(id=1, info=ChunkInfo(digest=bytes(32)), size=1)), b"x"]),
    ("another answer to nothing", "bulk", [encode(Missing(id=77, gone=True))]),
    ("a long header", "bulk", [encode(Missing(id=1, gone=True, text="x" * 4096)) + bytes(1 << 17)]),
    ("three frames", "bulk", [b"a", b"b", b"c"]),
]


@pytest.mark.parametrize(("plane", "frames"), [b[1:] for b in BAD_FRAMES], ids=[b[0] for b in BAD_FRAMES])
async def test_a_malformed_message_is_a_violation_and_everything_else_goes_on(
    net: Harness, plane: PlaneName, frames: list[bytes]
) -> None:
    a, b, shelf = await two_with_shelf(net)
    net.network.inject("mallory", b, plane, frames)
    violation = await next_notice(b, Violation)
    assert (violation.peer, violation.plane, violation.count) == (net.network.id("mallory"), plane, 1)
    assert not violation.shut_out
    assert b.traffic.violations == {net.network.id("mallory"): 1}
    a.send(b.id, note("still here"))
    assert await hear(b) == (a.id, "still here")
    shelf.put(chunk_key(), b"still served")
    assert bytes((await a.get(b.id, chunk_key(), FOREVER_S)).payload) == b"still served"


async def test_a_peer_is_shut_out_after_its_last_allowed_violation(net: Harness) -> None:
    a, b = await two(net, Options(max_violations=2))
    mallory = net.network.id("mallory")
    for shut_out in (False, True):
        net.network.inject("mallory", b, "control", [b"garbage"])
        assert (await next_notice(b, Violation)).shut_out is shut_out
    net.network.inject("mallory", b, "control", [encode(note("I am good now"))])
    net.network.inject("mallory", b, "control", [b"garbage"])
    for text in ("one", "two"):
        a.send(b.id, note(text))
        assert await hear(b) == (a.id, text)
    assert b.traffic.violations == {mallory: 2}
    assert not b.send(mallory, note("go away"))


async def test_a_message_that_breaks_a_rule_of_its_receiver_is_a_violation_like_any_other(net: Harness) -> None:
    """What the transport took for good; ``accuse`` says what is wrong with it."""
    a, b, _ = await two_with_shelf(net, Options(max_violations=2))
    for shut_out in (False, True):
        a.accuse(b.id, "to the actor greeter: no message of its")
        violation = await next_notice(a, Violation)
        assert (violation.peer, violation.plane) == (b.id, "control")
        assert (violation.reason, violation.shut_out) == ("to the actor greeter: no message of its", shut_out)
    assert a.traffic.violations == {b.id: 2}
    assert not a.send(b.id, note("go away"))
    with pytest.raises(ProtocolError, match="shut out"):
        await a.get(b.id, chunk_key(), FOREVER_S)


async def test_a_peer_that_was_shut_out_is_denied_at_its_next_handshake(net: Harness) -> None:
    if not net.network.checks_keys:
        pytest.skip("in the clear there is no handshake that could be denied")
    b = await net.open("b", Options(max_violations=1))
    net.network.inject("mallory", b, "control", [b"garbage"])
    assert (await next_notice(b, Violation)).shut_out
    mallory = await net.open("mallory")
    dial(mallory, b)
    assert (await next_notice(mallory, Denied)).peer == b.id


async def test_gets_from_a_peer_are_in_vain_for_good_when_it_is_shut_out(net: Harness) -> None:
    """Defect: as from one that cannot be reached for a moment, so owners asked it again for ever."""
    a, b, shelf = await two_with_shelf(net, Options(max_violations=1))
    async with trio.open_nursery() as nursery:
        fetch = Fetch(nursery, a, b)
        await shelf.until(lambda: shelf.waiting == 1)
        shelf.put(chunk_key(1), b"altered", digest=bytes(32))
        with pytest.raises(ProtocolError):
            await a.get(b.id, chunk_key(1), FOREVER_S)
        assert isinstance(await fetch.outcome(), ProtocolError)
    with pytest.raises(ProtocolError, match="shut out"):
        await a.get(b.id, chunk_key(), FOREVER_S)


async def test_an_altered_payload_is_a_protocol_error_and_a_violation(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    shelf.put(chunk_key(), b"altered", digest=blake3(b"original").digest())
    with pytest.raises(ProtocolError, match="do not have the digest"):
        await a.get(b.id, chunk_key(), FOREVER_S)
    violation = await next_notice(a, Violation)
    assert (violation.peer, violation.plane) == (b.id, "bulk")


async def test_a_large_altered_payload_is_found_too(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    shelf.put(chunk_key(), bytes(3 << 20), digest=blake3(b"original").digest())
    with pytest.raises(ProtocolError, match="do not have the digest"):
        await a.get(b.id, chunk_key(), FOREVER_S)


async def test_too_many_unanswered_gets_are_a_violation(net: Harness) -> None:
    _, b, shelf = await two_with_shelf(net, Options(window=2))
    allowed = UNANSWERED_PER_WINDOW * 2
    for id in range(1, allowed + 2):
        net.network.inject("mallory", b, "bulk", [encode(Get(id=id, key=chunk_key(), wait_ms=60_000))])
    assert "unanswered" in (await next_notice(b, Violation)).reason
    await shelf.until(lambda: shelf.waiting == allowed)


async def test_a_denied_key_is_told_once_to_the_dialler_and_nothing_of_it_is_heard(net: Harness) -> None:
    if not net.network.checks_keys:
        pytest.skip("in the clear there is no handshake that could be denied")
    mallory = net.network.id("mallory")
    b = await net.open("b", Options(allow=lambda id: id != mallory))
    a, m = await net.open("a"), await net.open("mallory")
    dial(m, b)
    m.send(b.id, note("let me in"))
    denied = await next_notice(m, Denied)
    assert denied.peer == b.id
    assert denied.address in (b.control_address, b.bulk_address)
    dial(a, b)
    a.send(b.id, note("good day"))
    assert await hear(b) == (a.id, "good day")
    assert await next_notice(m, Reachable) == Reachable(b.id, False)
    with pytest.raises(trio.WouldBlock):
        m.notices.receive_nowait()


async def test_a_key_that_is_allowed_later_gets_in(net: Harness) -> None:
    allowed: set[str] = set()
    b = await net.open("b", Options(allow=lambda id: id in allowed))
    a = await net.open("a")
    dial(a, b)
    if net.network.checks_keys:
        await next_notice(a, Denied)
    allowed.add(a.id)
    await say_until_heard(a, b, "and now?")


# Counters


async def test_both_ends_count_the_same_bytes(net: Harness) -> None:
    a, b, shelf = await two_with_shelf(net)
    message = note("x" * 100)
    a.send(b.id, message)
    await hear(b)
    shelf.put(chunk_key(), bytes(100_000))
    await a.get(b.id, chunk_key(), FOREVER_S)
    assert a.traffic.control_sent == b.traffic.control_received == len(encode(message))
    assert a.traffic.bulk_sent == b.traffic.bulk_received
    assert 100_000 < b.traffic.bulk_sent == a.traffic.bulk_received < 100_200
    assert a.traffic.sent == a.traffic.control_sent + a.traffic.bulk_sent
    assert b.traffic.received == b.traffic.control_received + b.traffic.bulk_received


def test_a_full_inbox_drops_messages_and_counts_them() -> None:
    inbox = Inbox(max_violations=3, on_shut_out=lambda _peer: None)
    frame = memoryview(encode(note("x")))
    for _ in range(MAX_NOTICES + 3):
        inbox.received("a", [frame])
    assert inbox.traffic.control_dropped == 3


def test_what_comes_while_a_transport_is_being_closed_is_let_go() -> None:
    """Defect: a socket that was read to its end after that ended the node with an error."""
    inbox = Inbox(max_violations=3, on_shut_out=lambda _peer: None)
    inbox.close()
    inbox.received("a", [memoryview(encode(note("x")))])
    assert inbox.traffic.control_dropped == 0


async def test_a_closed_transport_dials_and_sends_no_more(net: Harness) -> None:
    a, b = await two(net)
    await net.close("a")
    with pytest.raises(LocalError, match="closed"):
        dial(a, b)
    assert not a.send(b.id, note("too late"))
    with pytest.raises(PeerUnreachableError):
        await a.get(b.id, chunk_key(), FOREVER_S)


async def test_an_exception_leaves_the_transport_as_it_is(network: Network) -> None:
    with pytest.raises(ZeroDivisionError):
        async with network.node("a", Options(), same_port=True):
            raise ZeroDivisionError
    network.close()


async def test_who_waits_for_notices_learns_that_the_transport_is_closed(net: Harness) -> None:
    a = await net.open("a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.close, "a")
        with trio.fail_after(PATIENCE_S), pytest.raises(trio.EndOfChannel):
            await a.notices.receive()


async def say_until_heard(sender: Transport, receiver: Transport, text: str) -> None:
    """Control messages may be lost while a connection is made, and their senders repeat them."""
    with trio.fail_after(PATIENCE_S):
        while True:
            sender.send(receiver.id, note(text))
            with trio.move_on_after(0.1):
                while True:
                    notice = await receiver.notices.receive()
                    if notice == Received(sender.id, note(text)):
                        return
