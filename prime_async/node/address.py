"""Which of this machine's addresses others can dial, and whom the node is to dial."""

from __future__ import annotations

import socket

from prime_async.config.contact import Contact
from prime_async.config.schema import NodeSettings

WILDCARDS = ("0.0.0.0", "::", "*")
SOMEWHERE = ("192.0.2.1", 9)
"""An address of TEST-NET (RFC 5737), to ask for the default route; nothing is sent there."""


def contacts_of(node: NodeSettings) -> list[Contact]:
    """The members to ask."""
    return [Contact.parse(text) for text in node.join]


def advertised_host(node: NodeSettings) -> str:
    """The host that others are told to dial."""
    if node.advertise:
        return node.advertise
    if node.host not in WILDCARDS:
        return node.host
    contacts = contacts_of(node)
    towards = (contacts[0].host, contacts[0].port) if contacts else SOMEWHERE
    return address_towards(*towards) or "127.0.0.1"


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
