"""Opens nodes on one kind of network, for tests that must hold on every kind."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import trio
import zmq
from blake3 import blake3

from prime_async.errors import ChunkUnavailableError
from prime_async.messages import ChunkInfo, ChunkKey, Goodbye
from prime_async.transport import keys
from prime_async.transport.base import Chunk, Notice, Received, Transport
from prime_async.transport.memory import MemoryNetwork, MemorySettings
from prime_async.transport.zeromq import ZmqSettings, open_zmq

PATIENCE_S = 10.0
"""How long a test waits for what must happen. It never waits so long for what must not."""

PlaneName = Literal["control", "bulk"]
N = TypeVar("N", bound=Notice)


def everybody(_id: str) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a test may set of a node, on any network."""

    allow: Callable[[str], bool] = everybody
    window: int = 16
    max_violations: int = 3
    max_payload_bytes: int = 8 << 20
    unreachable_s: float = 1.0


class Network(Protocol):
    """One kind of network."""

    checks_keys: bool

    def id(self, name: str) -> str: ...

    def node(self, name: str, options: Options, *, same_port: bool) -> AbstractAsyncContextManager[Transport]: ...

    def inject(self, sender: str, receiver: Transport, plane: PlaneName, frames: Sequence[bytes]) -> None: ...

    def nowhere(self) -> tuple[str, str, str]:
        """Id and addresses of a node that is not there."""
        ...

    def put_behind_nat(self, node: Transport) -> tuple[str, str]:
        """From now on nobody can dial ``node``; gives the addresses at which others try."""
        ...

    def close(self) -> None: ...


class Memory:
    """Nodes inside this process."""

    checks_keys = True

    def __init__(self) -> None:
        self.network = MemoryNetwork(seed=0, latency_s=(0.0001, 0.001))

    def id(self, name: str) -> str:
        return name

    def node(self, name: str, options: Options, *, same_port: bool) -> AbstractAsyncContextManager[Transport]:  # noqa: ARG002
        settings = MemorySettings(
            allow=options.allow,
            window=options.window,
            max_violations=options.max_violations,
            max_payload_bytes=options.max_payload_bytes,
            unreachable_s=options.unreachable_s,
        )
        return self.network.open(name, settings)

    def inject(self, sender: str, receiver: Transport, plane: PlaneName, frames: Sequence[bytes]) -> None:
        self.network.inject(sender, receiver.id, plane, frames)

    def nowhere(self) -> tuple[str, str, str]:
        return "nobody", "memory://nobody/control", "memory://nobody/bulk"

    def put_behind_nat(self, node: Transport) -> tuple[str, str]:
        self.network.put_behind_nat(node.id)
        return node.control_address, node.bulk_address

    def close(self) -> None:
        pass


class ZeroMQ:
    """Nodes over TCP on this machine."""

    def __init__(self, encrypt: bool) -> None:
        self.checks_keys = encrypt
        self.pairs: dict[str, keys.KeyPair] = {}
        self._ports: dict[str, tuple[int, int]] = {}
        self._raw = RawSockets(encrypt)
        self._injectors: dict[tuple[str, str], zmq.Socket[bytes]] = {}

    def key(self, name: str) -> keys.KeyPair:
        if name not in self.pairs:
            self.pairs[name] = keys.generate()
        return self.pairs[name]

    def id(self, name: str) -> str:
        return self.key(name).id

    @asynccontextmanager
    async def node(self, name: str, options: Options, *, same_port: bool) -> AsyncIterator[Transport]:
        control, bulk = self._ports.get(name, (0, 0)) if same_port else (0, 0)
        settings = ZmqSettings(
            key=self.key(name),
            host="127.0.0.1",
            advertise="127.0.0.1",
            control_port=control,
            bulk_port=bulk,
            encrypt=self.checks_keys,
            io_threads=1,
            allow=options.allow,
            window=options.window,
            max_violations=options.max_violations,
            max_payload_bytes=options.max_payload_bytes,
            unreachable_s=options.unreachable_s,
        )
        async with open_zmq(settings) as transport:
            self._ports[name] = (port_of(transport.control_address), port_of(transport.bulk_address))
            yield transport

    def inject(self, sender: str, receiver: Transport, plane: PlaneName, frames: Sequence[bytes]) -> None:
        address = receiver.control_address if plane == "control" else receiver.bulk_address
        if (sender, address) not in self._injectors:
            self._injectors[sender, address] = self._raw.dealer(self.key(sender), receiver.id, address)
        self._injectors[sender, address].send_multipart(frames)

    def nowhere(self) -> tuple[str, str, str]:
        return keys.generate().id, "tcp://127.0.0.1:9", "tcp://127.0.0.1:9"

    def put_behind_nat(self, node: Transport) -> tuple[str, str]:  # noqa: ARG002  (nobody is told its real address)
        return "tcp://127.0.0.1:9", "tcp://127.0.0.1:9"

    def close(self) -> None:
        self._raw.close()


class RawSockets:
    """ZeroMQ sockets without any of our rules, for peers that behave badly."""

    def __init__(self, encrypt: bool) -> None:
        self._encrypt = encrypt
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._sockets: list[zmq.Socket[bytes]] = []

    def dealer(self, key: keys.KeyPair, server: str, address: str, route: bytes | None = None) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.ROUTING_ID, route or f"{key.id}/{secrets.token_hex(8)}".encode())
        if self._encrypt:
            socket.set(zmq.CURVE_SERVERKEY, bytes.fromhex(server))
            socket.set(zmq.CURVE_PUBLICKEY, key.public)
            socket.set(zmq.CURVE_SECRETKEY, key.secret)
        socket.connect(address)
        self._sockets.append(socket)
        return socket

    def close(self) -> None:
        for socket in self._sockets:
            socket.close(linger=0)
        self._context.term()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


class Harness:
    """Opens and closes nodes by name, in any order."""

    def __init__(self, network: Network, nursery: trio.Nursery) -> None:
        self.network = network
        self._nursery = nursery
        self._running: dict[str, tuple[trio.Event, trio.Event]] = {}

    async def open(self, name: str, options: Options | None = None, *, same_port: bool = True) -> Transport:
        with trio.fail_after(PATIENCE_S):
            transport: Transport = await self._nursery.start(self._run, name, options or Options(), same_port)
        return transport

    async def close(self, name: str) -> None:
        stop, stopped = self._running.pop(name)
        stop.set()
        with trio.fail_after(PATIENCE_S):
            await stopped.wait()

    async def close_all(self) -> None:
        for name in list(self._running):
            await self.close(name)
        self.network.close()

    async def _run(
        self,
        name: str,
        options: Options,
        same_port: bool,
        task_status: trio.TaskStatus[Transport] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        stop, stopped = self._running[name] = (trio.Event(), trio.Event())
        try:
            async with self.network.node(name, options, same_port=same_port) as transport:
                task_status.started(transport)
                await stop.wait()
        finally:
            stopped.set()


@dataclass
class Shelf:
    """A provider whose chunks a test puts there when it likes, and which shows what it is asked."""

    chunks: dict[ChunkKey, Chunk] = field(default_factory=dict)
    gone: set[ChunkKey] = field(default_factory=set)
    asked: list[ChunkKey] = field(default_factory=list)
    given_up: list[ChunkKey] = field(default_factory=list)
    waiting: int = 0
    most_waiting: int = 0
    ignores_cancellation: bool = False
    changed: trio.Event = field(default_factory=trio.Event)

    async def provide(self, peer: str, key: ChunkKey) -> Chunk:  # noqa: ARG002
        self.asked.append(key)
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        self._tell()
        try:
            with trio.CancelScope(shield=self.ignores_cancellation):
                chunk = await self._wait(key)
            return chunk  # noqa: RET504  mypy takes a scope for something that swallows exceptions
        except trio.Cancelled:
            self.given_up.append(key)
            raise
        finally:
            self.waiting -= 1
            self._tell()

    def put(self, key: ChunkKey, payload: bytes, digest: bytes | None = None) -> None:
        info = ChunkInfo(digest=digest or blake3(payload).digest(), contributors=b"\x05", total_weight=7)
        self.chunks[key] = Chunk(info, memoryview(payload))
        self._tell()

    def lose(self, key: ChunkKey) -> None:
        self.gone.add(key)
        self._tell()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds, which is looked at whenever something changes here."""
        with trio.fail_after(PATIENCE_S):
            while not condition():
                await self.changed.wait()

    async def _wait(self, key: ChunkKey) -> Chunk:
        while key not in self.chunks:
            if key in self.gone:
                raise ChunkUnavailableError(f"{key} was thrown away")
            await self.changed.wait()
        return self.chunks[key]

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


async def next_notice(transport: Transport, kind: type[N]) -> N:
    """The next notice of one kind; others are passed over."""
    with trio.fail_after(PATIENCE_S):
        while True:
            notice = await transport.notices.receive()
            if isinstance(notice, kind):
                return notice


def note(text: str) -> Goodbye:
    """A message that can be told from others."""
    return Goodbye(incarnation=1, text=text)


async def hear(transport: Transport) -> tuple[str, str]:
    """(peer, text) of the next :func:`note`."""
    received = await next_notice(transport, Received)
    assert isinstance(received.message, Goodbye)
    return received.peer, received.message.text


def chunk_key(chunk: int = 0) -> ChunkKey:
    return ChunkKey(kind="mean", round=3, chunk=chunk)


def dial(one: Transport, other: Transport) -> None:
    one.dial(other.id, other.control_address, other.bulk_address)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until ``condition()`` holds; for what has no event to wait for, such as a counter."""
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)
