"""Which of this machine's addresses others can dial."""

from __future__ import annotations

import socket

WILDCARDS = ("0.0.0.0", "::", "*")


def address_towards(host: str, port: int) -> str | None:
    """The local address from which packets to ``host`` would leave, or ``None`` if there is no route or no such host.

    Connecting a datagram socket picks the route and sends nothing.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
    except OSError:
        return None
    return None
