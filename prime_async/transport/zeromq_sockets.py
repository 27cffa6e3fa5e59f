"""ZeroMQ sockets under trio: who may touch one, how one is read, and how each is configured.

A ZeroMQ descriptor is edge-triggered: it says "something happened", once, and any call on the socket, a send too, may
take that word away. Therefore one task reads a socket, until nothing is left, before it waits again; and whoever sends
looks afterwards whether a message came in, and if so wakes that task.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio
import zmq

from prime_async.transport.keys import KeyPair
from prime_async.transport.links import Sent

BATCH: Final = 64
"""Messages that one task reads before it lets others run."""

Handle: TypeAlias = Callable[[list[zmq.Frame]], None]
"""Takes a message's frames. It must not wait, and must not raise on anything that a peer can send."""


class OwnedSocket:
    """A socket and its only reader, the task that runs :meth:`read`."""

    def __init__(self, socket: zmq.Socket[bytes], handle: Handle) -> None:
        self._socket = socket
        self._handle = handle
        self._life = trio.CancelScope()
        self._parked: trio.CancelScope | None = None
        self._closed = False

    async def read(self) -> None:
        """Handle messages until closed."""
        with self._life:
            while True:
                if self._read_batch():
                    await trio.lowlevel.checkpoint()
                else:
                    await self._park()

    def send(self, frames: Sequence[bytes | memoryview]) -> Sent:
        """Queue a message, without a copy of its large frames."""
        if self._closed:
            return Sent.NO_ROUTE
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            sent = Sent.YES
        except zmq.Again:
            sent = Sent.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            sent = Sent.NO_ROUTE
        self._wake_if_readable()
        return sent

    def connect_again(self, address: str) -> None:
        """Replace the connection to ``address``. What is queued on it is lost."""
        with suppress(zmq.ZMQError):
            self._socket.disconnect(address)
        self._socket.connect(address)
        self._wake_if_readable()

    def close(self) -> None:
        """Nothing more is sent or handled, and the reader ends. After that the socket can be released."""
        self._closed = True
        self._life.cancel()

    def release(self) -> None:
        """Give the socket back to the system; for who ran the reader, when it has ended."""
        self._closed = True
        self._socket.close()

    def _read_batch(self) -> bool:
        """Whether there may be more. If not, the descriptor is silent until something new happens."""
        for _ in range(BATCH):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            if self._closed:
                return True
            self._handle(frames)
        return True

    async def _park(self) -> None:
        with trio.CancelScope() as self._parked:
            await trio.lowlevel.wait_readable(self._socket.FD)
        self._parked = None

    def _wake_if_readable(self) -> None:
        if self._parked is not None and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._parked.cancel()


UNACKED_S: Final = 6.0
"""After so long without an acknowledgement TCP gives a connection up.

A link that drops everything for 2 s stalls a connection for up to about 4 s, since TCP doubles its pauses, and must not
cost it. A longer cut must: otherwise TCP, whose pauses have grown with it, takes as long again once it has healed.
"""
CONNECT_S: Final = 3.0
"""For one attempt to connect: TCP's second try comes after 1 s, its third after 3 s, the next ones later and later."""
RECONNECT_S: Final = (0.1, 1.0)
"""The pause between two attempts, at first and at last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """What differs between the sockets of the two planes."""

    max_frame_bytes: int
    queue: int  # messages per connection, each way
    heartbeat_s: float
    silence_s: float  # after a heartbeat and so long without a sign of life a connection counts as lost
    linger_s: float  # for messages still queued when the socket closes


CONTROL: Final = SocketOptions(
    # Twice what is allowed: what is a little too large is answered with a violation, what is far too large with
    # the end of the connection, by ZeroMQ itself.
    max_frame_bytes=2 << 20,
    queue=256,
    heartbeat_s=1.0,
    silence_s=6.0,
    linger_s=0.5,  # a goodbye should leave
)


def bulk_options(max_payload_bytes: int) -> SocketOptions:
    """The bulk plane's: ZeroMQ's heartbeats wait behind whole payloads there, so their answers need patience.

    A dead line is found all the same: what TCP cannot deliver, a heartbeat at least, it gives up after ``UNACKED_S``.
    """
    return SocketOptions(
        max_frame_bytes=max_payload_bytes + (64 << 10), queue=1024, heartbeat_s=2.0, silence_s=60.0, linger_s=0.1
    )


def allow_ipv6(socket: zmq.Socket[bytes], address: str) -> None:
    """Let ``socket`` use a literal IPv6 address.

    Not for names: ZeroMQ tries only the first address that it finds for a name, and with IPv6 on, that is one on which
    most nodes do not listen.
    """
    socket.set(zmq.IPV6, int("[" in address))


class SocketFactory:
    """Makes the sockets of one node."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], key: KeyPair, encrypt: bool) -> None:
        self._context = context
        self._key = key
        self._encrypt = encrypt
        self._monitors = itertools.count()

    def router(self, options: SocketOptions) -> zmq.Socket[bytes]:
        """A socket to bind, that asks the context's ZAP handler about each key."""
        socket = self._socket(zmq.ROUTER, options)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        # A peer whose connection died unnoticed by us comes back under its old route: the new connection counts.
        # Nobody else can take the route, since nobody else knows its random part.
        socket.set(zmq.ROUTER_HANDOVER, 1)
        if self._encrypt:
            socket.set(zmq.CURVE_SERVER, 1)
            socket.set(zmq.CURVE_SECRETKEY, self._key.secret)
            socket.set_string(zmq.ZAP_DOMAIN, "prime-async")
        return socket

    def dealer(self, options: SocketOptions, server: str, address: str, route: bytes) -> zmq.Socket[bytes]:
        """A socket to connect to ``address`` of the node ``server``, where it is called ``route``."""
        socket = self._socket(zmq.DEALER, options)
        allow_ipv6(socket, address)
        socket.set(zmq.ROUTING_ID, route)
        socket.set(zmq.RECONNECT_IVL, round(RECONNECT_S[0] * 1000))
        socket.set(zmq.RECONNECT_IVL_MAX, round(RECONNECT_S[1] * 1000))
        socket.set(zmq.CONNECT_TIMEOUT, round(CONNECT_S * 1000))
        if self._encrypt:
            socket.set(zmq.CURVE_SERVERKEY, bytes.fromhex(server))
            socket.set(zmq.CURVE_PUBLICKEY, self._key.public)
            socket.set(zmq.CURVE_SECRETKEY, self._key.secret)
        return socket

    def zap(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.set(zmq.LINGER, 0)
        socket.bind("inproc://zeromq.zap.01")
        return socket

    def monitor(self, of: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
        """A socket from which ``events`` of another one can be read."""
        name = f"inproc://monitor-{next(self._monitors)}"
        of.monitor(name, events)
        socket = self._context.socket(zmq.PAIR)
        socket.set(zmq.LINGER, 0)
        socket.connect(name)
        return socket

    def _socket(self, kind: int, options: SocketOptions) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set(zmq.LINGER, round(options.linger_s * 1000))
        socket.set(zmq.SNDHWM, options.queue)
        socket.set(zmq.RCVHWM, options.queue)
        socket.set(zmq.MAXMSGSIZE, options.max_frame_bytes)
        socket.set(zmq.HEARTBEAT_IVL, round(options.heartbeat_s * 1000))
        socket.set(zmq.HEARTBEAT_TIMEOUT, round(options.silence_s * 1000))
        socket.set(zmq.TCP_MAXRT, round(UNACKED_S * 1000))
        socket.set(zmq.TCP_KEEPALIVE, 1)
        socket.set(zmq.TCP_KEEPALIVE_IDLE, 30)
        # What does not get through the handshake is not kept for long.
        socket.set(zmq.HANDSHAKE_IVL, 10_000)
        return socket
