"""Where a member of the run is found and who it must be: ``KEY@HOST:PORT``."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from prime_async.errors import ConfigError

MAX_HOST_LENGTH: Final = 240
"""With ``tcp://``, brackets and a port it must fit into an address of the protocol, 256 characters."""

_KEY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")
_PORT = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Contact:
    """A member to dial. ``id`` is its public key in hexadecimal; ``host`` has no brackets, also if it is IPv6.

    The constructor checks nothing: the in-memory transport has ids of its own.
    """

    id: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Contact:
        """Read ``KEY@HOST:PORT``, an IPv6 host in brackets.

        Raises :class:`ConfigError`, which says which part is wrong.
        """
        key, at, rest = text.partition("@")
        host, colon, port = rest.rpartition(":")
        if not at or not colon:
            raise ConfigError([f'expected KEY@HOST:PORT, got "{text}"'])
        if not _KEY.fullmatch(key):
            raise ConfigError([f'expected 64 lower-case hexadecimal digits before the "@", got "{key}"'])
        if not _PORT.fullmatch(port) or not 0 < int(port) < 2**16:
            raise ConfigError([f'expected a port from 1 to 65535 after the last ":", got "{port}"'])
        if "//" in host:
            raise ConfigError(
                [f'expected KEY@HOST:PORT without "{host.partition("//")[0]}//", got "{rest}" after the "@"']
            )
        return cls(key, _unbracketed(host), int(port))

    def __str__(self) -> str:
        return f"{self.id}@{bracketed(self.host)}:{self.port}"


def is_host(text: str) -> bool:
    """Whether ``text`` is a host name, an IPv4 address, or an IPv6 address without brackets."""
    return len(text) <= MAX_HOST_LENGTH and (_NAME.fullmatch(text) is not None or _is_ipv6(text))


def bracketed(host: str) -> str:
    """``host`` as it stands before ``:PORT``."""
    return f"[{host}]" if ":" in host else host


def _unbracketed(host: str) -> str:
    inside = host[1:-1] if host.startswith("[") and host.endswith("]") else ""
    if inside and len(inside) <= MAX_HOST_LENGTH and _is_ipv6(inside):
        return inside
    if ":" in host and not inside:
        raise ConfigError([f'expected an IPv6 address in brackets, as in "[2001:db8::1]:7700", got "{host}"'])
    if ":" in host or not is_host(host):
        raise ConfigError([f'expected a host name or address between the "@" and the last ":", got "{host}"'])
    return host


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return _IPV6.fullmatch(text) is not None  # ipaddress takes anything behind the "%" of a zone
