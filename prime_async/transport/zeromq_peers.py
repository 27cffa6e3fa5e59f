"""The two ends of a ZeroMQ connection: the door where peers come in, and a connection that we dial.

The dialler chooses the name of its connection at the door: its id, a slash, and digits that nobody else knows. Over
CURVE the door compares that id with the key that was proved in the handshake; in the clear it has to believe it.
Each connection opens with one empty frame, again after each loss, so that the door knows the way back.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio
import zmq

from prime_async.transport.inbox import UNKNOWN, Inbox, is_announcement
from prime_async.transport.links import Link, Sent
from prime_async.transport.zeromq_sockets import OwnedSocket, SocketFactory, SocketOptions

MAX_ID: Final = 64
MAX_ROUTES_PER_PEER: Final = 16
MAX_ROUTES: Final = 16384

Heard: TypeAlias = Callable[[str, Link, Sequence[memoryview]], None]
"""Takes (peer, the link to answer over, the frames)."""

LinkChange: TypeAlias = Callable[[str, Link], None]

_MONITORED: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
)
REDIAL_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """What both ends of one plane share."""

    name: str
    options: SocketOptions
    sockets: SocketFactory
    inbox: Inbox
    heard: Heard
    up: LinkChange
    down: LinkChange


@dataclass(frozen=True, slots=True, eq=False)
class _Route:
    """The way back to a peer over a connection that it dialled."""

    socket: OwnedSocket
    name: bytes
    inbound: bool = True

    def send(self, header: bytes, payload: memoryview | None = None) -> Sent:
        return self.socket.send([self.name, header] if payload is None else [self.name, header, payload])


HANDED_OVER = b"\0"
"""How names begin that ZeroMQ gives: to a connection whose own name a later one has taken over (ROUTER_HANDOVER).

What was still to be read from it comes under that name. After a node stood still for some seconds, while its peers
gave up and dialled again, those are many messages, and nobody's fault. They are late; so they are dropped.
"""


class Door:
    """A plane's bound socket."""

    def __init__(self, plane: Plane, socket: zmq.Socket[bytes], encrypted: bool, allow: Callable[[str], bool]) -> None:
        self._plane = plane
        self._encrypted = encrypted
        self._allow = allow
        self._socket = OwnedSocket(socket, self._came)
        self._routes: dict[bytes, tuple[str, _Route]] = {}  # the longest unused first
        self._by_peer: dict[str, dict[bytes, _Route]] = {}

    async def run(self) -> None:
        """Hear peers until cancelled."""
        try:
            await self._socket.read()
        finally:
            self._socket.release()

    def send(self, peer: str, data: bytes) -> Sent:
        """Send over the connection that ``peer`` opened last, if it opened any that is still there."""
        for name, route in reversed(list(self._by_peer.get(peer, {}).items())):
            sent = route.send(data)
            if sent is not Sent.NO_ROUTE:
                return sent
            self._forget(name)
        return Sent.NO_ROUTE

    def _came(self, frames: list[zmq.Frame]) -> None:
        name, body = frames[0].bytes, frames[1:]
        peer = self._authenticated(name, frames[-1])
        if peer is None or self._plane.inbox.is_shut_out(peer):
            return
        route = self._route(peer, name)
        if route is None:
            return
        parts = [f.buffer for f in body]
        if is_announcement(parts):
            # What we asked over an earlier connection of this name was lost with it.
            self._plane.down(peer, route)
            self._plane.up(peer, route)
        self._plane.heard(peer, route, parts)

    def _authenticated(self, name: bytes, frame: zmq.Frame) -> str | None:
        if name.startswith(HANDED_OVER):
            return None
        claimed = _claimed_id(name)
        proved = str(frame.get("User-Id")) if self._encrypted else claimed
        if claimed is None or proved != claimed:
            reason = f"a connection named {name[:80]!r}, where the peer's id, a slash and digits are expected"
            self._plane.inbox.violated(proved or UNKNOWN, self._plane.name, reason)
            return None
        return claimed

    def _route(self, peer: str, name: bytes) -> _Route | None:
        known = self._routes.pop(name, None)
        if known is not None:
            self._routes[name] = known
            return known[1]
        # In the clear there is no handshake to refuse, so the first message stands for it.
        if not self._encrypted and not self._allow(peer):
            return None
        return self._learn(peer, name)

    def _learn(self, peer: str, name: bytes) -> _Route:
        route = _Route(self._socket, name)
        routes = self._by_peer.setdefault(peer, {})
        if len(routes) >= MAX_ROUTES_PER_PEER:
            self._forget(next(iter(routes)))
        elif len(self._routes) >= MAX_ROUTES:
            self._forget(next(iter(self._routes)))
        self._routes[name] = (peer, route)
        self._by_peer.setdefault(peer, {})[name] = route
        self._plane.up(peer, route)
        return route

    def _forget(self, name: bytes) -> None:
        peer, route = self._routes.pop(name)
        del self._by_peer[peer][name]
        if not self._by_peer[peer]:
            del self._by_peer[peer]
        self._plane.down(peer, route)


class Dialled:
    """One connection to a peer that ZeroMQ makes, and makes again, in the background. It is a :class:`Link`."""

    inbound: Final = False

    def __init__(self, plane: Plane, own_id: str, peer: str, address: str, denied: Callable[[], None]) -> None:
        self.is_up = False
        self._plane = plane
        self._peer = peer
        self._denied = denied
        route = f"{own_id}/{secrets.token_hex(16)}".encode()
        socket = plane.sockets.dealer(plane.options, peer, address, route)
        monitor = plane.sockets.monitor(socket, _MONITORED)
        self._monitored = socket
        self._socket = OwnedSocket(socket, self._came)
        self._monitor = OwnedSocket(monitor, self._changed)
        self._address = address
        self._retries = 0  # that ZeroMQ made on its own
        self._nursery: trio.Nursery | None = None
        socket.connect(address)

    async def run(self) -> None:
        """Keep the connection until closed."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._socket.read)
                nursery.start_soon(self._monitor.read)
        finally:
            self._nursery = None
            # In this order: ZeroMQ's own thread waits, for ever, for a reader of its events that has gone.
            self._monitored.monitor(None, 0)
            self._monitor.release()
            self._socket.release()

    def send(self, header: bytes, payload: memoryview | None = None) -> Sent:
        return self._socket.send([header] if payload is None else [header, payload])

    def close(self) -> None:
        self._set_up(False)
        self._monitor.close()
        self._socket.close()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def _came(self, frames: list[zmq.Frame]) -> None:
        self._plane.heard(self._peer, self, [f.buffer for f in frames])

    def _changed(self, frames: list[zmq.Frame]) -> None:
        (event,) = struct.unpack_from("=H", frames[0].bytes)
        match event:
            case zmq.EVENT_CONNECT_RETRIED:
                self._retries += 1
            case zmq.EVENT_DISCONNECTED if self._nursery is not None:
                self._nursery.start_soon(self._redial_if_given_up, self._retries)
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._denied()
        self._set_up(event == zmq.EVENT_HANDSHAKE_SUCCEEDED)

    async def _redial_if_given_up(self, retries: int) -> None:
        """After a refused key or a broken rule ZeroMQ does not try again, and says nothing either."""
        await trio.sleep(REDIAL_S)
        if retries == self._retries and not self.is_up:
            self._socket.connect_again(self._address)

    def _set_up(self, up: bool) -> None:
        if up == self.is_up:
            return
        self.is_up = up
        if up:
            self.send(b"")
            self._plane.up(self._peer, self)
        else:
            self._plane.down(self._peer, self)


def _claimed_id(name: bytes) -> str | None:
    id, slash, rest = name.partition(b"/")
    if 0 < len(id) <= MAX_ID and slash and rest and id.isascii():
        return id.decode("ascii")
    return None
