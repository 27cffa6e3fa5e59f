"""A network inside one process, for tests and simulations: the same planes, without sockets, threads or real time.

* All chance comes from ``seed``: each direction of each pair of nodes has a random generator of its own for each plane.
* Messages are encoded and decoded as on the wire. Each is delayed by a random latency; none overtakes another of the
  same direction and plane, as over one TCP connection.
* Control messages are lost with probability ``loss``. Bulk is not, as over TCP.
* A partition is silent: what is sent across it vanishes, and nobody is told, as when a router dies, until ``SILENCE_S``
  later the connections across it are given up. When it heals, they open again, and gets that wait are asked again.
* Nobody can dial a node behind NAT. Connections that it dials carry both ways, as over TCP.
* A node that closes is noticed by those that dialled it after one latency, as when the system resets a connection.
* A node's addresses are ``memory://ID/control`` and ``memory://ID/bulk``.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import trio

from prime_async.errors import AddressInUseError, LocalError
from prime_async.messages import ChunkKey, Message
from prime_async.transport.base import Chunk, Notice, Provider, Traffic, Transport
from prime_async.transport.bulk import BulkLimits, BulkPlane
from prime_async.transport.inbox import Inbox, encode_control
from prime_async.transport.links import Sent, bare_nursery
from prime_async.transport.reach import UNREACHABLE_S, Reach

PlaneName: TypeAlias = Literal["control", "bulk"]

PLANES: Final[tuple[PlaneName, PlaneName]] = ("control", "bulk")
QUEUE: Final = 256
"""Control messages on their way in one direction; more are dropped."""
RETRY_S: Final = 0.25
"""Between two attempts to connect."""
SILENCE_S: Final = 7.0
"""After so long without a sign of life a connection counts as lost; about what the real network takes."""


def everybody(_id: str) -> bool:
    """Lets any node in."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """One node's settings for the network in memory."""

    allow: Callable[[str], bool] = everybody
    window: int = 16
    max_payload_bytes: int = 64 << 20
    max_violations: int = 3
    unreachable_s: float = UNREACHABLE_S  # without the connections that were dialled; see Reachable


class MemoryNetwork:
    """What joins the nodes. ``latency_s`` are the bounds of the one-way delay, ``loss`` is a probability."""

    def __init__(self, seed: int, latency_s: tuple[float, float] = (0.001, 0.005), loss: float = 0.0) -> None:
        self._seed = seed
        self._latency_s = latency_s
        self._loss = loss
        self._nodes: dict[str, MemoryTransport] = {}
        self._severed: list[tuple[frozenset[str], frozenset[str]]] = []
        self._cut: set[str] = set()
        self._behind_nat: set[str] = set()
        self._chances: dict[tuple[str, str, PlaneName], random.Random] = {}

    def open(self, id: str, settings: MemorySettings | None = None) -> AbstractAsyncContextManager[Transport]:
        """The transport of a node called ``id``. Raises :class:`AddressInUseError` if there is one."""
        return self._open(id, settings or MemorySettings())

    def partition(self, one: Iterable[str], other: Iterable[str]) -> None:
        """From now on nothing passes between the two groups."""
        self._severed.append((frozenset(one), frozenset(other)))
        self._sever()

    def cut(self, id: str) -> None:
        """From now on nothing passes to or from this node."""
        self._cut.add(id)
        self._sever()

    def put_behind_nat(self, id: str) -> None:
        """From now on nobody can open a connection to this node; those that stand stay."""
        self._behind_nat.add(id)

    def heal(self) -> None:
        """Undo every partition and cut."""
        for node in self._nodes.values():
            node.lose(lambda wire: not self.joined(*wire.ends))
        self._severed.clear()
        self._cut.clear()

    def joined(self, one: str, other: str) -> bool:
        """Whether messages pass between two nodes."""
        if one in self._cut or other in self._cut:
            return False
        return not any((one in a and other in b) or (one in b and other in a) for a, b in self._severed)

    def may_connect(self, dialler: str, acceptor: str) -> bool:
        """Whether a connection from one to the other can be opened."""
        return acceptor not in self._behind_nat and self.joined(dialler, acceptor)

    def inject(self, sender: str, receiver: str, plane: PlaneName, frames: Sequence[bytes]) -> None:
        """Deliver raw frames to ``receiver``, at once, as if ``sender`` had sent them over a connection of its own."""
        back = _Link(self, receiver, sender, plane, inbound=True)
        self._nodes[receiver].arrived(sender, plane, [memoryview(f) for f in frames], back)

    def node(self, id: str) -> MemoryTransport | None:
        return self._nodes.get(id)

    def latency_s(self, sender: str, receiver: str, plane: PlaneName) -> float:
        return self._chance(sender, receiver, plane).uniform(*self._latency_s)

    def loses(self, sender: str, receiver: str, plane: PlaneName) -> bool:
        return plane == "control" and self._loss > 0 and self._chance(sender, receiver, plane).random() < self._loss

    def _sever(self) -> None:
        for node in self._nodes.values():
            node.sever(lambda wire: not self.joined(*wire.ends))

    def _chance(self, sender: str, receiver: str, plane: PlaneName) -> random.Random:
        key = (sender, receiver, plane)
        if key not in self._chances:
            self._chances[key] = random.Random(f"{self._seed} {sender} {receiver} {plane}")
        return self._chances[key]

    @asynccontextmanager
    async def _open(self, id: str, settings: MemorySettings) -> AsyncIterator[Transport]:
        if id in self._nodes:
            raise AddressInUseError(f"memory://{id} is open already: close it, or choose another id")
        async with bare_nursery() as nursery:
            node = self._nodes[id] = MemoryTransport(self, id, settings, nursery)
            try:
                yield node
            finally:
                del self._nodes[id]
                node.close()


class _Link:
    """One direction of a wire. For bulk it is the :class:`~prime_async.transport.links.Link` of its sender."""

    def __init__(self, network: MemoryNetwork, sender: str, receiver: str, plane: PlaneName, inbound: bool) -> None:
        self.inbound = inbound
        self.is_up = False
        self.back: _Link | None = None
        self._network = network
        self._names = (sender, receiver, plane)
        self._queue: deque[tuple[float, list[memoryview]]] = deque()  # (when it arrives, what)
        self._held: deque[list[memoryview]] = deque()  # control messages from before it was up
        self._more = trio.Event()

    def send(self, header: bytes, payload: memoryview | None = None) -> Sent:
        """Queue one message. The dialler's are held until the wire is up, as ZeroMQ does."""
        _, _, plane = self._names
        if plane == "control" and len(self._queue) + len(self._held) >= QUEUE:
            return Sent.FULL
        frames = [memoryview(header)] if payload is None else [memoryview(header), payload.toreadonly()]
        if self.is_up:
            self._enqueue(frames)
        elif self.inbound:
            return Sent.NO_ROUTE
        else:
            self._held.append(frames)
        return Sent.YES

    def up(self) -> None:
        self.is_up = True
        while self._held:
            self._enqueue(self._held.popleft())

    def down(self) -> None:
        """What is on its way is lost."""
        self.is_up = False
        self._queue.clear()

    async def carry(self) -> None:
        """Deliver each message when its time has come."""
        while True:
            if not self._queue:
                self._more = trio.Event()
                await self._more.wait()
            await trio.sleep_until(self._queue[0][0])
            self._deliver(self._queue.popleft()[1])

    def _enqueue(self, frames: list[memoryview]) -> None:
        arrival_s = trio.current_time() + self._network.latency_s(*self._names)
        if not self._network.loses(*self._names):
            self._queue.append((max(arrival_s, self._queue[-1][0] if self._queue else 0.0), frames))
            self._more.set()

    def _deliver(self, frames: list[memoryview]) -> None:
        sender, receiver, plane = self._names
        node = self._network.node(receiver)
        if node is not None and self.back is not None and self._network.joined(sender, receiver):
            node.arrived(sender, plane, frames, self.back)


class _Wire:
    """A connection of one plane, from the node that dialled it, made again whenever it is lost."""

    def __init__(self, network: MemoryNetwork, dialler: MemoryTransport, peer: str, plane: PlaneName) -> None:
        self.peer = peer
        self.plane: PlaneName = plane
        self.ends = (dialler.id, peer)
        self.out = _Link(network, dialler.id, peer, plane, inbound=False)
        self._network = network
        self._dialler = dialler
        self._life = trio.CancelScope()
        self._lost = trio.Event()
        self._severed = trio.Event()

    def close(self) -> None:
        self._life.cancel()

    def lose(self) -> None:
        """The connection breaks, and both sides notice."""
        self._lost.set()

    def sever(self) -> None:
        """From now on the connection carries nothing, and nobody knows."""
        self._severed.set()

    async def run(self) -> None:
        """Keep the connection until closed."""
        with self._life:
            while True:
                acceptor = await self._connect()
                await self._keep(acceptor)

    async def _connect(self) -> MemoryTransport:
        while True:
            await trio.sleep(self._network.latency_s(self._dialler.id, self.peer, self.plane))
            acceptor = self._network.node(self.peer)
            if acceptor is not None and self._network.may_connect(self._dialler.id, self.peer):
                if acceptor.may_enter(self._dialler.id):
                    return acceptor
                self._dialler.denied(self.peer, f"memory://{self.peer}/{self.plane}")
            await trio.sleep(RETRY_S)

    async def _keep(self, acceptor: MemoryTransport) -> None:
        back = _Link(self._network, self.peer, self._dialler.id, self.plane, inbound=True)
        self.out.back, back.back = back, self.out
        self._lost, self._severed = trio.Event(), trio.Event()
        ends = ((self._dialler, self.out, self.peer), (acceptor, back, self._dialler.id))
        for node, link, peer in ends:
            link.up()
            node.link_up(peer, self.plane, link, self)
        try:
            await self._carry(back)
        finally:
            for node, link, peer in ends:
                link.down()
                node.link_down(peer, self.plane, link, self)

    async def _carry(self, back: _Link) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.out.carry)
            nursery.start_soon(back.carry)
            nursery.start_soon(self._notice_silence)
            await self._lost.wait()
            nursery.cancel_scope.cancel()

    async def _notice_silence(self) -> None:
        await self._severed.wait()
        await trio.sleep(SILENCE_S)
        self.lose()


class MemoryTransport:
    """See :class:`prime_async.transport.base.Transport`."""

    def __init__(self, network: MemoryNetwork, id: str, settings: MemorySettings, nursery: trio.Nursery) -> None:
        self.id = id
        self.control_address = f"memory://{id}/control"
        self.bulk_address = f"memory://{id}/bulk"
        self._network = network
        self._settings = settings
        self._nursery = nursery
        self._closed = False
        self._inbox = Inbox(settings.max_violations, self._shut_out)
        self._reach = Reach(nursery, self._inbox.reachable, settings.unreachable_s)
        limits = BulkLimits(
            window=settings.window,
            max_payload_bytes=settings.max_payload_bytes,
            unreachable_s=settings.unreachable_s,
            hash_in_threads=False,
        )
        self._bulk = BulkPlane(nursery, self._inbox, limits)
        self._dialled: dict[tuple[str, PlaneName], _Wire] = {}
        self._addresses: dict[str, tuple[str, str]] = {}  # that were dialled
        self._entered: dict[str, list[_Link]] = {}  # control links that peers opened, the newest last
        self._wires: set[_Wire] = set()  # that are up, whoever dialled
        self._told_denied: set[str] = set()

    @property
    def traffic(self) -> Traffic:
        return self._inbox.traffic

    @property
    def notices(self) -> trio.MemoryReceiveChannel[Notice]:
        return self._inbox.notices

    def locate(self, peer: str, host: str, port: int) -> str:  # noqa: ARG002  (one process is one place)
        return f"memory://{peer}/control"

    def dial(self, peer: str, control: str, bulk: str) -> None:
        if self._closed:
            raise LocalError("this transport is closed: dial inside its `async with`")
        old = self._addresses.get(peer, ("", ""))
        new = (control, bulk or (old[1] if control == old[0] else ""))
        if new == old:
            return
        self._addresses[peer] = new
        if control == f"memory://{peer}/control":
            self._dial(peer, "control")
        if bulk == f"memory://{peer}/bulk":
            self._bulk.dialled(peer)
            self._dial(peer, "bulk")
        self._reach.dialled(peer)
        self._reach.changed(peer, self._stands(peer))

    def hang_up(self, peer: str) -> None:
        wires = [self._dialled.pop((peer, plane), None) for plane in PLANES]
        for wire in wires:
            if wire is not None:
                wire.close()
        self._told_denied.discard(peer)
        self._addresses.pop(peer, None)
        self._reach.hung_up(peer)
        self._bulk.hang_up(peer)

    def send(self, peer: str, message: Message) -> bool:
        data = encode_control(message)
        link = self._control_link(peer)
        if link is not None and not self._inbox.is_shut_out(peer) and link.send(data) is Sent.YES:
            self.traffic.control_sent += len(data)
            return True
        self.traffic.control_dropped += 1
        return False

    def accuse(self, peer: str, reason: str) -> None:
        self._inbox.violated(peer, "control", reason)

    def serve(self, provider: Provider) -> None:
        self._bulk.serve(provider)

    async def get(self, peer: str, key: ChunkKey, timeout_s: float) -> Chunk:
        return await self._bulk.get(peer, key, timeout_s)

    def close(self) -> None:
        for peer in list(self._addresses):
            self.hang_up(peer)
        self.lose(lambda _wire: True)
        self._inbox.close()
        self._closed = True

    # What the network calls.

    def may_enter(self, peer: str) -> bool:
        return not self._inbox.is_shut_out(peer) and self._settings.allow(peer)

    def denied(self, peer: str, address: str) -> None:
        if peer not in self._told_denied:
            self._told_denied.add(peer)
            self._inbox.denied(peer, address)

    def lose(self, which: Callable[[_Wire], bool]) -> None:
        """Break the connections for which ``which`` is true."""
        for wire in self._wires:
            if which(wire):
                wire.lose()

    def sever(self, which: Callable[[_Wire], bool]) -> None:
        """From now on the connections for which ``which`` is true carry nothing."""
        for wire in self._wires:
            if which(wire):
                wire.sever()

    def link_up(self, peer: str, plane: PlaneName, link: _Link, wire: _Wire) -> None:
        self._wires.add(wire)
        if not link.inbound:
            self._told_denied.discard(peer)
            self._reach.changed(peer, self._stands(peer))
        if plane == "bulk":
            self._bulk.link_up(peer, link)
        elif link.inbound:
            self._entered.setdefault(peer, []).append(link)

    def link_down(self, peer: str, plane: PlaneName, link: _Link, wire: _Wire) -> None:
        self._wires.discard(wire)
        if not link.inbound:
            self._reach.changed(peer, self._stands(peer))
        if plane == "bulk":
            self._bulk.link_down(peer, link)
        elif link.inbound:
            self._entered[peer].remove(link)

    def arrived(self, peer: str, plane: PlaneName, frames: Sequence[memoryview], back: _Link) -> None:
        if plane == "control":
            self._inbox.received(peer, frames)
        else:
            self._bulk.received(peer, back, frames)

    def _dial(self, peer: str, plane: PlaneName) -> None:
        if (peer, plane) not in self._dialled:
            wire = self._dialled[peer, plane] = _Wire(self._network, self, peer, plane)
            self._nursery.start_soon(wire.run)

    def _control_link(self, peer: str) -> _Link | None:
        wire = self._dialled.get((peer, "control"))
        if wire is not None and wire.out.is_up:
            return wire.out
        entered = self._entered.get(peer)
        if entered:
            return entered[-1]
        return None if wire is None or self._reach.is_lost(peer) else wire.out

    def _stands(self, peer: str) -> bool:
        """Whether all that was dialled does."""
        wires = [self._dialled.get((peer, plane)) for plane in self._planes(peer)]
        return all(wire is not None and wire.out.is_up for wire in wires)

    def _planes(self, peer: str) -> tuple[PlaneName, ...]:
        _, bulk = self._addresses.get(peer, ("", ""))
        return PLANES if bulk else ("control",)

    def _shut_out(self, peer: str) -> None:
        self._bulk.shut_out(peer)
