"""The string with which somebody joins a run: ``prime-async join STRING``.

``prime-async:`` and the base64url (RFC 4648, section 5, without padding) of the deterministic CBOR of a map, and the
first four bytes of its BLAKE3, so that a string which lost a character is told from one that is wrong. The map::

    "v"  1
    "n"  name of the run
    "r"  run id, 32 bytes: what members say the run is must have this digest
    "m"  members to ask: [key (32 bytes), host, port of the control plane], at least one
    "c"  whether the planes are encrypted
    "t"  secret key of the invitation, 32 bytes; missing: the joiner's key must be let in otherwise
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from typing import Annotated, Final

from blake3 import blake3
from msgspec import Meta, Struct

from prime_async.config.contact import Contact, is_host
from prime_async.errors import ConfigError, ProtocolError
from prime_async.messages import Digest, Name, decode, encode

PREFIX: Final = "prime-async:"
VERSION: Final = 1
MAX_CHARACTERS: Final = 8192
CHECK_BYTES: Final = 4
_Key = Annotated[bytes, Meta(min_length=32, max_length=32)]


class _Fields(Struct, frozen=True, kw_only=True):
    v: int
    n: Name
    r: Digest
    m: Annotated[tuple[tuple[_Key, str, Annotated[int, Meta(ge=1, le=65535)]], ...], Meta(min_length=1, max_length=64)]
    c: bool
    t: _Key | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What a join string says. ``token``: the invitation's secret key, which ``repr`` does not show."""

    name: str
    run_id: bytes
    members: tuple[Contact, ...]
    encrypt: bool = True
    token: bytes | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """The string. Who has it can use the token in it."""
        fields = {
            "v": VERSION,
            "n": self.name,
            "r": self.run_id,
            "m": [[bytes.fromhex(c.id), c.host, c.port] for c in self.members],
            "c": self.encrypt,
        }
        data = encode(fields if self.token is None else {**fields, "t": self.token})
        return PREFIX + base64.urlsafe_b64encode(data + _check(data)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """Read what ``str`` gives; white space in it, as mail programs add it, is left out.

        Raises :class:`ConfigError`, which says what is wrong with it.
        """
        data = _bytes(re.sub(r"\s", "", text))
        try:
            fields: _Fields = decode(data, _Fields, limit=MAX_CHARACTERS)
        except ProtocolError as error:
            raise ConfigError([f"the join string cannot be read ({error}): is it of a newer version?"]) from error
        if fields.v != VERSION:
            raise ConfigError([f"the join string is of version {fields.v}, this program reads {VERSION}: update it"])
        for _, host, _ in fields.m:
            if not is_host(host):
                raise ConfigError([f'the join string names "{host[:80]}", which is no host: ask for a new one'])
        members = tuple(Contact(key.hex(), host, port) for key, host, port in fields.m)
        return cls(name=fields.n, run_id=fields.r, members=members, encrypt=fields.c, token=fields.t)


def _bytes(text: str) -> bytes:
    """What is encoded, its check taken off."""
    if not text.startswith(PREFIX):
        raise ConfigError([f'a join string begins with "{PREFIX}", this one with "{text[:24]}": copy all of it'])
    body = text.removeprefix(PREFIX)
    if len(body) > MAX_CHARACTERS:
        raise ConfigError([f"a join string has at most {MAX_CHARACTERS} characters, this one {len(body)}"])
    if strange := re.search(r"[^A-Za-z0-9_-]", body):
        raise ConfigError([f"the join string has {strange[0]!r} in it, a character that none has: copy it again"])
    try:
        data = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    except binascii.Error:  # of a length that none has
        data = b""
    if _check(data[:-CHECK_BYTES]) != data[-CHECK_BYTES:]:
        raise ConfigError(["the join string is not whole: copy all of it, from the first character to the last"])
    return data[:-CHECK_BYTES]


def _check(data: bytes) -> bytes:
    return blake3(data).digest(length=CHECK_BYTES)
