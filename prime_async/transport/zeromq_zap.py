"""The doorkeeper: answers ZeroMQ when it asks whether a key may connect (ZAP, https://rfc.zeromq.org/spec/27).

ZeroMQ asks during each CURVE handshake, over a socket inside the process. The answer names the peer, and that name
comes back, as "User-Id", with every frame of the connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import zmq

from prime_async.transport.keys import KEY_BYTES
from prime_async.transport.zeromq_sockets import OwnedSocket, SocketFactory

ZAP_VERSION: Final = b"1.0"


class Doorkeeper:
    """Lets in the keys for which ``allow(id)`` is true."""

    def __init__(self, sockets: SocketFactory, allow: Callable[[str], bool]) -> None:
        self._allow = allow
        self._socket = OwnedSocket(sockets.zap(), self._asked)

    async def run(self) -> None:
        """Answer until cancelled."""
        try:
            await self._socket.read()
        finally:
            self._socket.release()

    def _asked(self, frames: list[zmq.Frame]) -> None:
        parts = [f.bytes for f in frames]
        empty = parts.index(b"")
        envelope, request = parts[: empty + 1], parts[empty + 1 :]
        self._socket.send([*envelope, *self._answer(request)])

    def _answer(self, request: Sequence[bytes]) -> list[bytes]:
        version, number, _domain, _address, _routing_id, mechanism, *credentials = request
        peer = _curve_id(mechanism, credentials)
        if version == ZAP_VERSION and peer is not None and self._allow(peer):
            return [ZAP_VERSION, number, b"200", b"OK", peer.encode(), b""]
        return [ZAP_VERSION, number, b"400", b"key not allowed", b"", b""]


def _curve_id(mechanism: bytes, credentials: Sequence[bytes]) -> str | None:
    if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == KEY_BYTES:
        return credentials[0].hex()
    return None
