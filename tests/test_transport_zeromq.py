"""What only the ZeroMQ transport can get wrong: ports, TCP, handshakes, and what it must give back to the system."""

from __future__ import annotations

import gc
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
import zmq

from prime_async.errors import AddressInUseError, DeadlineError, PeerUnreachableError
from prime_async.messages import MAX_CONTROL_BYTES, Get, encode
from prime_async.transport import keys
from prime_async.transport.base import Received, Transport, Violation
from prime_async.transport.inbox import UNKNOWN
from prime_async.transport.zeromq import ZmqSettings, open_zmq
from tests.transport_harness import (
    PATIENCE_S,
    Harness,
    Options,
    RawSockets,
    Shelf,
    ZeroMQ,
    chunk_key,
    dial,
    everybody,
    hear,
    next_notice,
    note,
    port_of,
    until,
)

pytestmark = pytest.mark.xdist_group("real time")


@pytest.fixture(params=["in the clear", "over curve"])
def network(request: pytest.FixtureRequest) -> ZeroMQ:
    return ZeroMQ(encrypt=request.param == "over curve")


@pytest.fixture
async def net(network: ZeroMQ) -> AsyncIterator[Harness]:
    async with trio.open_nursery() as nursery:
        harness = Harness(network, nursery)
        yield harness
        await harness.close_all()


@pytest.fixture
def raw(network: ZeroMQ) -> Iterator[RawSockets]:
    sockets = RawSockets(network.checks_keys)
    yield sockets
    sockets.close()


async def two(net: Harness) -> tuple[Transport, Transport]:
    a, b = await net.open("a"), await net.open("b")
    dial(a, b)
    return a, b


async def assert_all_is_well(a: Transport, b: Transport) -> None:
    """``a``, which dialled ``b``, is heard and served."""
    a.send(b.id, note("all is well"))
    assert await hear(b) == (a.id, "all is well")
    shelf = Shelf()
    shelf.put(chunk_key(), b"x" * 100)
    b.serve(shelf)
    assert bytes((await a.get(b.id, chunk_key(), PATIENCE_S)).payload) == b"x" * 100


def settings(**changes: object) -> ZmqSettings:
    base: dict[str, object] = {
        "key": keys.generate(),
        "host": "127.0.0.1",
        "advertise": "127.0.0.1",
        "allow": everybody,
        "io_threads": 1,
    }
    return ZmqSettings(**{**base, **changes})  # type: ignore[arg-type]


# Listening


@pytest.mark.parametrize("port", ["control_port", "bulk_port"])
async def test_a_taken_port_is_named_with_what_to_do(port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(AddressInUseError) as caught:
            async with open_zmq(settings(**{port: number})):
                pass
    setting = {"control_port": "node.port", "bulk_port": "node.bulk_port"}[port]
    assert str(caught.value) == (
        f"127.0.0.1:{number} belongs to another process: set {setting} in the TOML to a free port, "
        "or stop the process that uses it"
    )


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host", "nowhere.invalid"])
async def test_a_foreign_address_is_named_with_what_to_do(host: str) -> None:
    with pytest.raises(AddressInUseError, match=r"is not an address of this machine: set node\.host"):
        async with open_zmq(settings(host=host)):
            pass


async def test_others_are_told_the_advertised_host_and_the_ports_in_use() -> None:
    async with open_zmq(settings(advertise="node.example.org")) as transport:
        assert transport.control_address.startswith("tcp://node.example.org:")
        assert 0 < port_of(transport.control_address) != port_of(transport.bulk_address) > 0


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "localhost"])
async def test_a_node_is_reached_by_name_and_by_address(host: str) -> None:
    for advertised in ("localhost", "127.0.0.1"):
        async with open_zmq(settings(host=host, advertise=advertised)) as b, open_zmq(settings()) as a:
            dial(a, b)
            await assert_all_is_well(a, b)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
async def test_ipv6_addresses_work() -> None:
    async with (
        open_zmq(settings(host="::1", advertise="::1")) as b,
        open_zmq(settings(host="::1", advertise="::1")) as a,
    ):
        assert b.control_address.startswith("tcp://[::1]:")
        dial(a, b)
        await assert_all_is_well(a, b)


# Bytes that are not ours


@pytest.mark.parametrize("plane", ["control", "bulk"])
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        random.Random(0).randbytes(4096),
        b"\xff" + bytes(8) + b"\x7f",
        b"\xff\0\0\0\0\0\0\0\0\x7f\x03\0CURVE" + bytes(200),
    ],
    ids=["http", "random", "half a greeting", "a greeting and zeros"],
)
async def test_what_is_not_zeromq_does_no_harm(net: Harness, plane: str, data: bytes) -> None:
    a, b = await two(net)
    address = b.control_address if plane == "control" else b.bulk_address
    stream = await trio.open_tcp_stream("127.0.0.1", port_of(address))
    async with stream:
        await stream.send_all(data)
        await assert_all_is_well(a, b)
    await assert_all_is_well(a, b)
    # In the clear, random bytes may pass for a message of ZeroMQ's oldest protocol, which nobody has signed.
    assert set(b.traffic.violations) <= (set() if net.network.checks_keys else {UNKNOWN})


async def test_a_control_message_that_is_a_little_too_large_is_a_violation(net: Harness) -> None:
    a, b = await two(net)
    net.network.inject("mallory", b, "control", [bytes(MAX_CONTROL_BYTES + 1)])
    assert "at most" in (await next_notice(b, Violation)).reason
    await assert_all_is_well(a, b)


@pytest.mark.parametrize("plane", ["control", "bulk"])
async def test_a_frame_that_is_far_too_large_never_comes_in(net: Harness, raw: RawSockets, plane: str) -> None:
    a, b = await two(net)
    address = b.control_address if plane == "control" else b.bulk_address
    mallory = raw.dealer(keys.generate(), b.id, address)
    dropped = mallory.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    mallory.send(bytes(9 << 20))
    try:
        await until(lambda: bool(dropped.poll(0)))
    finally:
        mallory.disable_monitor()
        dropped.close()
    await assert_all_is_well(a, b)
    assert b.traffic.received < 1 << 20


@pytest.mark.parametrize("plane", ["control", "bulk"])
async def test_a_message_that_breaks_off_never_comes_in(net: Harness, raw: RawSockets, plane: str) -> None:
    a, b = await two(net)
    address = b.control_address if plane == "control" else b.bulk_address
    mallory = raw.dealer(keys.generate(), b.id, address)
    mallory.send(encode(note("half of a message")), zmq.SNDMORE)
    mallory.close()
    await assert_all_is_well(a, b)
    assert b.traffic.violations == {}


@pytest.mark.parametrize("route", [b"x" * 255, b"no slash", b"/x", b"id/", b"\xff/x", b"a" * 65 + b"/x"])
async def test_a_connection_with_a_name_of_another_form_is_a_violation(
    net: Harness, network: ZeroMQ, raw: RawSockets, route: bytes
) -> None:
    a, b = await two(net)
    raw.dealer(network.key("mallory"), b.id, b.control_address, route).send(encode(note("hello")))
    violation = await next_notice(b, Violation)
    assert violation.peer == (network.id("mallory") if network.checks_keys else UNKNOWN)
    await assert_all_is_well(a, b)


async def test_what_is_left_to_read_of_a_connection_that_another_took_over_is_nobodys_violation(
    net: Harness, network: ZeroMQ, raw: RawSockets
) -> None:
    """Defect: a node that stood still for some seconds read what had queued up, and shut its peers out for good.

    ZeroMQ gives the old connection a name of its own, which is none of ours.
    """
    a, b = await two(net)
    peer, route = network.key("peer"), f"{network.id('peer')}/0123".encode()
    before = raw.dealer(peer, b.id, b.control_address, route)
    before.send(encode(note("first")))
    assert await hear(b) == (network.id("peer"), "first")
    for _ in range(20):
        before.send(encode(note("late")))
    # Nobody reads meanwhile: this stops the event loop, and ZeroMQ's own threads go on.
    time.sleep(0.2)  # noqa: ASYNC251
    before.close(linger=1000)
    time.sleep(0.2)  # noqa: ASYNC251
    raw.dealer(peer, b.id, b.control_address, route).send(encode(note("of the new connection")))
    time.sleep(0.3)  # noqa: ASYNC251
    with trio.fail_after(PATIENCE_S):
        while (await hear(b))[1] != "of the new connection":
            pass
    assert b.traffic.violations == {}
    await assert_all_is_well(a, b)


# Keys


@pytest.mark.parametrize("plane", ["control", "bulk"])
async def test_over_curve_nobody_speaks_in_the_name_of_another(net: Harness, network: ZeroMQ, plane: str) -> None:
    if not network.checks_keys:
        pytest.skip("in the clear a peer is who it says it is")
    raw = RawSockets(encrypt=True)
    a, b = await two(net)
    address = b.control_address if plane == "control" else b.bulk_address
    mallory = network.key("mallory")
    raw.dealer(mallory, b.id, address, f"{a.id}/0123".encode()).send(encode(note("I am a")))
    violation = await next_notice(b, Violation)
    assert (violation.peer, violation.plane) == (mallory.id, plane)
    await assert_all_is_well(a, b)
    assert a.id not in b.traffic.violations
    raw.close()


async def test_in_the_clear_a_name_that_is_not_allowed_is_not_heard() -> None:
    allowed, other = keys.generate(), keys.generate()
    sockets = RawSockets(encrypt=False)
    async with open_zmq(settings(encrypt=False, allow=lambda id: id == allowed.id)) as b:
        sockets.dealer(other, b.id, b.control_address).send(encode(note("from another")))
        sockets.dealer(allowed, b.id, b.control_address).send(encode(note("from a friend")))
        assert await hear(b) == (allowed.id, "from a friend")
    sockets.close()


async def test_a_server_with_another_key_than_expected_is_not_talked_to() -> None:
    expected = keys.generate()
    async with open_zmq(settings()) as impostor, open_zmq(settings()) as a:
        shelf = Shelf()
        shelf.put(chunk_key(), b"false")
        impostor.serve(shelf)
        a.dial(expected.id, impostor.control_address, impostor.bulk_address)
        a.send(expected.id, note("a secret"))
        with pytest.raises(DeadlineError):
            await a.get(expected.id, chunk_key(), 0.5)
        assert impostor.traffic.received == 0
        assert shelf.asked == []


@pytest.mark.parametrize("listener_encrypts", [True, False])
async def test_a_plain_and_an_encrypted_node_do_not_talk(listener_encrypts: bool) -> None:
    async with (
        open_zmq(settings(encrypt=listener_encrypts)) as b,
        open_zmq(settings(encrypt=not listener_encrypts)) as a,
    ):
        dial(a, b)
        a.send(b.id, note("hello"))
        with pytest.raises(DeadlineError):
            await a.get(b.id, chunk_key(), 0.5)
        assert b.traffic.received == 0


async def test_over_curve_only_an_id_can_be_dialled() -> None:
    async with open_zmq(settings()) as b, open_zmq(settings()) as a:
        a.dial("somebody", b.control_address, b.bulk_address)
        assert not a.send("somebody", note("hello"))


# Connections that die


class Cable:
    """Forwards TCP to a port. ``cut`` ends the diallers' side only, so that the other side does not notice."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._near: list[trio.SocketStream] = []

    async def run(self, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            task_status.started(listeners[0].socket.getsockname()[1])
            await trio.serve_listeners(self._join, listeners, handler_nursery=nursery)

    async def cut(self) -> None:
        for stream in self._near:
            await stream.aclose()
        self._near.clear()

    async def _join(self, near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", self._port)
        self._near.append(near)
        async with far, trio.open_nursery() as nursery:
            nursery.start_soon(self._forward, near, far)
            nursery.start_soon(self._forward, far, near)

    async def _forward(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        try:
            async for data in source:
                await target.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


async def test_a_connection_that_died_at_one_end_only_is_made_anew(net: Harness, nursery: trio.Nursery) -> None:
    a, b = await net.open("a"), await net.open("b")
    cables = [Cable(port_of(b.control_address)), Cable(port_of(b.bulk_address))]
    ports: list[int] = [await nursery.start(cable.run) for cable in cables]
    a.dial(b.id, f"tcp://127.0.0.1:{ports[0]}", f"tcp://127.0.0.1:{ports[1]}")
    await assert_all_is_well(a, b)
    shelf = Shelf()
    b.serve(shelf)
    fetched: list[bytes] = []

    async def fetch() -> None:
        fetched.append(bytes((await a.get(b.id, chunk_key(), PATIENCE_S)).payload))

    async with trio.open_nursery() as inner:
        inner.start_soon(fetch)
        await shelf.until(lambda: shelf.waiting == 1)
        for cable in cables:
            await cable.cut()
        await shelf.until(lambda: len(shelf.asked) >= 2)
        shelf.put(chunk_key(), b"after the cut")
    assert fetched == [b"after the cut"]
    a.send(b.id, note("and control"))
    assert await hear(b) == (a.id, "and control")
    b.send(a.id, note("both ways"))
    assert await hear(a) == (b.id, "both ways")


# What is given back


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def system_threads() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())


async def talk_and_close(encrypt: bool) -> None:
    async with open_zmq(settings(encrypt=encrypt)) as b, open_zmq(settings(encrypt=encrypt)) as a:
        dial(a, b)
        await assert_all_is_well(a, b)
        a.dial(keys.generate().id, "tcp://127.0.0.1:9", "tcp://127.0.0.1:9")
        a.hang_up(b.id)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts by /proc")
async def test_twenty_transports_leave_no_descriptor_thread_or_task() -> None:
    await talk_and_close(encrypt=True)  # once, so that the threads that trio and pyzmq keep are there
    gc.collect()
    before = (descriptors(), threading.active_count(), trio.lowlevel.current_statistics().tasks_living)
    threads = system_threads()
    for i in range(10):
        await talk_and_close(encrypt=i % 2 == 0)
    assert (descriptors(), threading.active_count(), trio.lowlevel.current_statistics().tasks_living) == before
    assert system_threads() <= threads


async def test_a_last_message_leaves_before_the_transport_closes() -> None:
    async with open_zmq(settings()) as b:
        async with open_zmq(settings()) as a:
            dial(a, b)
            a.send(b.id, note("goodbye"))
        assert await hear(b) == (a.id, "goodbye")


async def test_closing_does_not_wait_long_for_who_is_not_there() -> None:
    with trio.fail_after(5):
        async with open_zmq(settings()) as a:
            a.dial(keys.generate().id, "tcp://127.0.0.1:9", "tcp://127.0.0.1:9")


async def test_cancelling_the_body_closes_the_transport() -> None:
    with trio.fail_after(5):
        with trio.move_on_after(0) as scope:
            async with open_zmq(settings()):
                await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_pending_gets_fail_when_the_transport_closes() -> None:
    failed: list[Exception] = []

    async def fetch(node: Transport, peer: str) -> None:
        try:
            await node.get(peer, chunk_key(), 60)
        except PeerUnreachableError as error:
            failed.append(error)

    with trio.fail_after(PATIENCE_S):
        async with open_zmq(settings()) as b, trio.open_nursery() as nursery:
            shelf = Shelf()
            b.serve(shelf)
            async with open_zmq(settings()) as a:
                dial(a, b)
                nursery.start_soon(fetch, a, b.id)
                await shelf.until(lambda: shelf.waiting == 1)
    assert len(failed) == 1


async def test_a_peer_that_asks_and_does_not_read_keeps_nobody_waiting(
    net: Harness, network: ZeroMQ, raw: RawSockets
) -> None:
    a, b = await two(net)
    shelf = Shelf()
    b.serve(shelf)
    shelf.put(chunk_key(), bytes(4 << 20))
    mallory = raw.dealer(network.key("mallory"), b.id, b.bulk_address)
    mallory.set(zmq.RCVHWM, 1)
    for id in range(1, 101):
        mallory.send(encode(Get(id=id, key=chunk_key(), wait_ms=1000)))
    await shelf.until(lambda: len(shelf.asked) == 100)
    assert (await a.get(b.id, chunk_key(), PATIENCE_S)).payload.nbytes == 4 << 20
    await assert_all_is_well(a, b)


async def test_a_flood_from_one_peer_does_not_starve_another(net: Harness) -> None:
    a, b = await two(net)
    c = await net.open("c", Options())
    dial(c, b)
    for i in range(200):
        c.send(b.id, note(str(i)))
    a.send(b.id, note("one word"))
    with trio.fail_after(PATIENCE_S):
        while True:
            if await b.notices.receive() == Received(a.id, note("one word")):
                return
