"""The real network: two planes over ZeroMQ, CURVE-encrypted unless told otherwise.

Each plane of a node has a bound ROUTER, its door, and DEALERs that dial other nodes' doors: one to each peer for
control, several for bulk, since one TCP stream does not fill a long link. Messages go either way over a connection,
so a node behind NAT, which nobody can dial, takes part over those that it dialled.

Bounds, per peer: ``CONTROL.queue`` control messages, ``window`` gets asked, sixteen windows of gets answered.
One bound is missing in ZeroMQ itself: a peer that was let in may send a message of endlessly many frames, and ZeroMQ
keeps them until the last. Hence the list of keys.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog
import trio
import zmq

from prime_async.errors import AddressInUseError, LocalError
from prime_async.messages import ChunkKey, Message
from prime_async.transport.base import Chunk, Notice, Provider, Traffic, Transport
from prime_async.transport.bulk import BulkLimits, BulkPlane
from prime_async.transport.inbox import Inbox, encode_control
from prime_async.transport.keys import KeyPair, is_id
from prime_async.transport.links import Link, Sent, bare_nursery
from prime_async.transport.reach import UNREACHABLE_S, Reach
from prime_async.transport.zeromq_peers import Dialled, Door, Plane
from prime_async.transport.zeromq_sockets import CONTROL, SocketFactory, allow_ipv6, bulk_options
from prime_async.transport.zeromq_zap import Doorkeeper

MAX_SOCKETS: Final = 32768  # three and three monitors for each peer
MAX_IO_THREADS: Final = 8

_ADDRESS: Final = re.compile(r"tcp://(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(\d{1,5})")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZmqSettings:
    """One node's settings for the network."""

    key: KeyPair
    advertise: str  # the host name or address that others dial
    allow: Callable[[str], bool]  # whether this id may connect; asked at each handshake, must be quick
    host: str = "0.0.0.0"  # the local address to listen on
    control_port: int = 0  # 0: any free one
    bulk_port: int = 0
    encrypt: bool = True
    streams: int = 2  # bulk connections to each peer
    window: int = 16  # gets under way to each peer
    max_payload_bytes: int = 64 << 20
    io_threads: int | None = None  # None: as many as there are cores, since CURVE passes 0.25 GB/s per thread
    max_violations: int = 3
    unreachable_s: float = UNREACHABLE_S  # without the connections that were dialled; see Reachable


def open_zmq(settings: ZmqSettings) -> AbstractAsyncContextManager[Transport]:
    """The two planes of a node, listening. Leaving closes every socket; queued control messages get half a second.

    Raises :class:`AddressInUseError` if an address cannot be listened on.
    """
    return _open(settings)


@asynccontextmanager
async def _open(settings: ZmqSettings) -> AsyncIterator[Transport]:
    context = _context(settings.io_threads)
    try:
        async with bare_nursery() as nursery:
            transport = ZmqTransport(settings, SocketFactory(context, settings.key, settings.encrypt), nursery)
            try:
                transport.open()
                yield transport
            finally:
                transport.close()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(context.term)


class ZmqTransport:
    """See :class:`prime_async.transport.base.Transport`."""

    def __init__(self, settings: ZmqSettings, sockets: SocketFactory, nursery: trio.Nursery) -> None:
        self.control_address = ""
        self.bulk_address = ""
        self._settings = settings
        self._sockets = sockets
        self._nursery = nursery
        self._closed = False
        self._peers: dict[str, _Peer] = {}
        self._inbox = Inbox(settings.max_violations, self._shut_out)
        self._reach = Reach(nursery, self._inbox.reachable, settings.unreachable_s)
        limits = BulkLimits(
            window=settings.window,
            max_payload_bytes=settings.max_payload_bytes,
            unreachable_s=settings.unreachable_s,
        )
        self._bulk = BulkPlane(nursery, self._inbox, limits)
        self._control_plane = Plane(
            name="control",
            options=CONTROL,
            sockets=sockets,
            inbox=self._inbox,
            heard=lambda peer, _link, frames: self._inbox.received(peer, frames),
            up=self._up,
            down=self._down,
        )
        self._bulk_plane = Plane(
            name="bulk",
            options=bulk_options(settings.max_payload_bytes),
            sockets=sockets,
            inbox=self._inbox,
            heard=self._bulk.received,
            up=self._bulk_up,
            down=self._bulk_down,
        )
        self._door: Door | None = None

    @property
    def id(self) -> str:
        return self._settings.key.id

    @property
    def traffic(self) -> Traffic:
        return self._inbox.traffic

    @property
    def notices(self) -> trio.MemoryReceiveChannel[Notice]:
        return self._inbox.notices

    def open(self) -> None:
        """Listen. Sockets that are made here are closed by tasks of the nursery."""
        if self._settings.encrypt:
            self._nursery.start_soon(Doorkeeper(self._sockets, self._may_enter).run)
        self._door, self.control_address = self._listen(self._control_plane, self._settings.control_port, "node.port")
        _, self.bulk_address = self._listen(self._bulk_plane, self._settings.bulk_port, "node.bulk_port")

    def close(self) -> None:
        for peer in list(self._peers):
            self.hang_up(peer)
        self._inbox.close()
        self._closed = True

    def locate(self, peer: str, host: str, port: int) -> str:  # noqa: ARG002  (the key is checked when it is dialled)
        return f"tcp://{_bracketed(host)}:{port}"

    def dial(self, peer: str, control: str, bulk: str) -> None:
        if self._closed:
            raise LocalError("this transport is closed: dial inside its `async with`")
        known = self._peers.setdefault(peer, _Peer())
        if control != known.control_address:
            self._dial_control(peer, known, control)
            if not bulk and known.bulk_address:
                self._bulk.hang_up(peer)
                known.close_bulk()
        elif not bulk or bulk == known.bulk_address:
            return
        if bulk and bulk != known.bulk_address:
            self._dial_bulk(peer, known, bulk)
        self._reach.dialled(peer)
        self._reach.changed(peer, known.is_up)

    def hang_up(self, peer: str) -> None:
        old = self._peers.pop(peer, None)
        if old is not None:
            self._reach.hung_up(peer)
            self._bulk.hang_up(peer)
            old.close_control()
            old.close_bulk()

    def send(self, peer: str, message: Message) -> bool:
        data = encode_control(message)
        if not self._inbox.is_shut_out(peer) and self._send(peer, data) is Sent.YES:
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

    def _dial_control(self, peer: str, known: _Peer, address: str) -> None:
        known.close_control()
        known.control_address = address
        known.control = self._connect(self._control_plane, peer, address)

    def _dial_bulk(self, peer: str, known: _Peer, address: str) -> None:
        known.close_bulk()
        known.bulk_address = address
        self._bulk.dialled(peer)
        streams = [self._connect(self._bulk_plane, peer, address) for _ in range(self._settings.streams)]
        known.streams = [s for s in streams if s is not None]

    def _send(self, peer: str, data: bytes) -> Sent:
        """Over our own connection if it is up, else over one that the peer dialled, else into the queue of our own.

        The queue is for the moments until it is up. What waits there for longer is out of date before it leaves.
        """
        dialled = self._peers[peer].control if peer in self._peers else None
        if dialled is not None and dialled.is_up:
            return dialled.send(data)
        sent = Sent.NO_ROUTE if self._door is None else self._door.send(peer, data)
        if sent is Sent.NO_ROUTE and dialled is not None and not self._reach.is_lost(peer):
            return dialled.send(data)
        return sent

    def _up(self, peer: str, link: Link) -> None:
        if peer in self._peers and not link.inbound:
            self._peers[peer].told_denied = False
            self._reach.changed(peer, self._peers[peer].is_up)

    def _down(self, peer: str, link: Link) -> None:
        if peer in self._peers and not link.inbound:
            self._reach.changed(peer, self._peers[peer].is_up)

    def _bulk_up(self, peer: str, link: Link) -> None:
        self._up(peer, link)
        self._bulk.link_up(peer, link)

    def _bulk_down(self, peer: str, link: Link) -> None:
        self._down(peer, link)
        self._bulk.link_down(peer, link)

    def _may_enter(self, peer: str) -> bool:
        return not self._inbox.is_shut_out(peer) and self._settings.allow(peer)

    def _shut_out(self, peer: str) -> None:
        self._bulk.shut_out(peer)

    def _listen(self, plane: Plane, port: int, setting: str) -> tuple[Door, str]:
        socket = self._sockets.router(plane.options)
        door = Door(plane, socket, self._settings.encrypt, self._may_enter)
        self._nursery.start_soon(door.run)
        bound = _bind(socket, self._settings.host, port, setting)
        return door, f"tcp://{_bracketed(self._settings.advertise)}:{bound}"

    def _connect(self, plane: Plane, peer: str, address: str) -> Dialled | None:
        if not _ADDRESS.fullmatch(address) or (self._settings.encrypt and not is_id(peer)):
            # Addresses come from other nodes: a wrong one must not stop this node.
            log.warning("peer_cannot_be_dialled", peer=peer, address=address, expected="tcp://HOST:PORT of a node's id")
            return None
        try:
            connection = Dialled(plane, self.id, peer, address, partial(self._denied, peer, address))
        except zmq.ZMQError as error:
            log.warning("peer_cannot_be_dialled", peer=peer, address=address, reason=str(error))
            return None
        self._nursery.start_soon(connection.run)
        return connection

    def _denied(self, peer: str, address: str) -> None:
        known = self._peers.get(peer)
        if known is not None and not known.told_denied:
            known.told_denied = True
            self._inbox.denied(peer, address)


@dataclass(slots=True)
class _Peer:
    """A peer that we dial."""

    control_address: str = ""
    bulk_address: str = ""
    control: Dialled | None = None
    streams: list[Dialled] = field(default_factory=list)
    told_denied: bool = False  # since the connection was last up

    @property
    def is_up(self) -> bool:
        """Whether what was dialled stands. One bulk stream will do."""
        control = self.control is not None and self.control.is_up
        return control and (not self.bulk_address or any(s.is_up for s in self.streams))

    def close_control(self) -> None:
        if self.control is not None:
            self.control.close()
        self.control, self.control_address, self.told_denied = None, "", False

    def close_bulk(self) -> None:
        for stream in self.streams:
            stream.close()
        self.streams, self.bulk_address = [], ""


def _context(io_threads: int | None) -> zmq.Context[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads or min(_cores(), MAX_IO_THREADS))
    context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    return context


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _bind(socket: zmq.Socket[bytes], host: str, port: int, setting: str) -> int:
    """The port that the socket listens on now."""
    where = f"{_bracketed(host)}:{port or '*'}"
    try:
        allow_ipv6(socket, where)
        socket.bind(f"tcp://{where}")
    except zmq.ZMQError as error:
        raise AddressInUseError(_bind_failure(error, where, setting)) from error
    return int(socket.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def _bind_failure(error: zmq.ZMQError, where: str, setting: str) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            fix = f"set {setting} in the TOML to a free port, or stop the process that uses it"
            return f"{where} belongs to another process: {fix}"
        case errno.EADDRNOTAVAIL | errno.ENODEV | errno.EINVAL:
            return f"{where} is not an address of this machine: set node.host in the TOML to one that is, or to 0.0.0.0"
        case _:
            return f"cannot listen on {where} ({error.strerror}): set node.host and {setting} in the TOML to others"
