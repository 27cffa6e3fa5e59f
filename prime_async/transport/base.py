"""What the rest of the program knows of a network: one small interface with two implementations.

:mod:`prime_async.transport.zeromq` is the real one, :mod:`prime_async.transport.memory` joins nodes inside one
process. ``tests/test_transport.py`` is the conformance suite of both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import trio

from prime_async.messages import ChunkInfo, ChunkKey, Message


@dataclass(frozen=True, slots=True)
class Chunk:
    """Immutable bytes and what is known of them. ``payload`` is contiguous and may be read-only."""

    info: ChunkInfo
    payload: memoryview


class Provider(Protocol):
    """Where the bulk plane's server finds what peers ask for."""

    async def provide(self, peer: str, key: ChunkKey) -> Chunk:
        """The chunk, as soon as it is there; the caller bounds the wait by cancelling.

        Raises :class:`~prime_async.errors.ChunkUnavailableError` if it will never be there.
        """
        ...


@dataclass(frozen=True, slots=True)
class Received:
    """A message from a peer. Over CURVE ``peer`` is authenticated; in the clear it is what the peer says."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Denied:
    """The peer at ``address`` closed its door on our key."""

    peer: str
    address: str


@dataclass(frozen=True, slots=True)
class Violation:
    """A peer broke the protocol and was dropped for it, ``count`` times so far. ``shut_out``: not heard again."""

    peer: str
    plane: str
    reason: str
    count: int
    shut_out: bool


@dataclass(frozen=True, slots=True)
class Reachable:
    """Whether we can dial ``peer``: told when it is known, and again whenever it is otherwise.

    True: the connections that *we* dialled to it, control and, if its bulk address was dialled, bulk, have completed
    their handshakes. False: for some seconds since they were dialled or lost, they have not. Connections that the peer
    dialled say nothing about this, and go on working. Who is dialled at other addresses is told of again.
    """

    peer: str
    reachable: bool


Notice: TypeAlias = Received | Denied | Violation | Reachable


@dataclass(slots=True)
class Traffic:
    """Bytes of all frames (headers and payloads) handed to, and taken from, the sockets since they opened."""

    control_sent: int = 0
    control_received: int = 0
    bulk_sent: int = 0
    bulk_received: int = 0
    control_dropped: int = 0  # messages: no way to the peer, its queue was full, or our inbox was
    violations: dict[str, int] = field(default_factory=dict)  # peer -> times it broke the protocol

    @property
    def sent(self) -> int:
        return self.control_sent + self.bulk_sent

    @property
    def received(self) -> int:
        return self.control_received + self.bulk_received


class Transport(Protocol):
    """The two planes of one node. Open one with an ``async with``; leaving it closes every socket."""

    @property
    def id(self) -> str:
        """This node's identity."""
        ...

    @property
    def control_address(self) -> str:
        """Where others dial this node's control plane, for example ``tcp://192.168.1.5:7700``."""
        ...

    @property
    def bulk_address(self) -> str:
        """Where others dial this node's bulk plane."""
        ...

    @property
    def traffic(self) -> Traffic:
        """The counters, alive: read, do not change."""
        ...

    @property
    def notices(self) -> trio.MemoryReceiveChannel[Notice]:
        """What peers said and did. Bounded: when it is full, messages are dropped and counted, never queued.

        It ends when the transport closes.
        """
        ...

    def locate(self, peer: str, host: str, port: int) -> str:
        """The control address of a node that the configuration names as ``PEER@HOST:PORT``."""
        ...

    def dial(self, peer: str, control: str, bulk: str) -> None:
        """From now on keep connections to ``peer``; ``bulk`` may be "" while it is not known. Idempotent.

        Connecting, and connecting again after a loss, happen in the background. A changed address replaces the old,
        and pending gets move there; "" leaves a known ``bulk`` as it is if ``control`` is the same. What is not an
        address of this transport is logged and ignored, since addresses come from other nodes.
        Raises :class:`~prime_async.errors.LocalError` if the transport is closed.
        """
        ...

    def hang_up(self, peer: str) -> None:
        """Close the connections that were dialled to ``peer``; its pending gets fail. Idempotent."""
        ...

    def send(self, peer: str, message: Message) -> bool:
        """Queue a control message; never waits.

        Over the connection we dialled if it is up, else over one the peer dialled, else into the queue of our own,
        which is bounded, and closed while the peer is known to be unreachable. ``False``: dropped and counted (no
        connection is known, its queue is full or closed, or the peer is shut out). ``True`` promises nothing about
        arrival: control messages may be lost, and their senders repeat them.
        Raises :class:`~prime_async.errors.LocalError` if the message is larger than the protocol allows.
        """
        ...

    def accuse(self, peer: str, reason: str) -> None:
        """A message that came from ``peer`` breaks a rule that this transport cannot know: it is a violation."""
        ...

    def serve(self, provider: Provider) -> None:
        """Answer the gets of peers from ``provider``. Before this call, gets wait."""
        ...

    async def get(self, peer: str, key: ChunkKey, timeout_s: float) -> Chunk:
        """Fetch a chunk from ``peer``, which was dialled with its bulk address, or dialled us; its digest is verified.

        At most a fixed number of gets per peer is under way; further ones wait for their turn, first come first
        served. Raises :class:`ChunkUnavailableError` if the peer says it is gone, :class:`DeadlineError` after
        ``timeout_s`` seconds, :class:`PeerUnreachableError` if there is no connection to wait for, if none has stood
        for some seconds, whoever dialled, or if the peer is hung up meanwhile, and :class:`ProtocolError` if what came
        is not what was asked for, or if the peer is shut out.
        A connection that is lost and soon made again is no failure: the get is asked again. Cancellation abandons the
        request; a late answer is discarded.
        """
        ...
