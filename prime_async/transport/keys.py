"""Node keys. A node's identity is its CURVE public key, as 64 lower-case hexadecimal digits.

A key file is text: comment lines, and one line with the secret key as 64 hexadecimal digits.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
import zmq
from zmq.utils import z85

from prime_async.errors import ConfigError, LocalError, StorageError

KEY_BYTES: Final = 32
_HEX_KEY: Final = re.compile(r"[0-9a-f]{64}")
_MAX_FILE_BYTES: Final = 4096

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A Curve25519 key pair, 32 bytes each. ``repr`` does not show the secret."""

    secret: bytes = field(repr=False)
    public: bytes

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES or len(self.public) != KEY_BYTES:
            raise LocalError(f"a key has {KEY_BYTES} bytes; take one from generate() or read_key_file()")

    @property
    def id(self) -> str:
        """The identity of the node that holds this key: 64 lower-case hexadecimal digits."""
        return self.public.hex()


def generate() -> KeyPair:
    """A new key pair, from the system's randomness."""
    _, secret = zmq.curve_keypair()
    return key_from_secret(_from_z85(secret))


def is_id(text: str) -> bool:
    """Whether ``text`` has the form of a node's identity."""
    return _HEX_KEY.fullmatch(text) is not None


def write_key_file(path: Path) -> KeyPair:
    """Make a new key and write it to ``path``, readable by its owner only. The file appears whole or not at all.

    Raises :class:`LocalError` if there is a file already, :class:`StorageError` if it cannot be written.
    """
    pair = generate()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _write_private(temporary, _file_text(pair))
        # A link, unlike a rename, fails if the name is taken: an identity is never overwritten.
        os.link(temporary, path)
    except FileExistsError:
        raise LocalError(f"{path} exists and is not overwritten: choose another name, or move the file away") from None
    except OSError as error:
        raise StorageError(
            f"the key file {path} could not be written ({error.strerror}): choose a directory that exists, is "
            "writable, and is on a file system with hard links"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return pair


def read_key_file(path: Path) -> KeyPair:
    """The key in ``path``. Logs a warning if others may read the file.

    Raises :class:`ConfigError` if the file is missing, cannot be read, or is not a key file.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError([f"key file {path}: there is no such file; make one with `prime-async init`"]) from None
    except OSError as error:
        raise ConfigError([f"key file {path}: cannot be read ({error.strerror}); mend its path or rights"]) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning("key_file_readable_by_others", path=str(path), mode=oct(mode & 0o777), fix=f"chmod 600 {path}")
    return key_from_secret(_parse(path, content))


def _parse(path: Path, content: bytes) -> bytes:
    lines = [line.strip() for line in content.decode("utf-8", errors="replace").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if len(content) <= _MAX_FILE_BYTES and len(keys) == 1 and _HEX_KEY.fullmatch(keys[0]):
        return bytes.fromhex(keys[0])
    # What was found is not shown: it may be a secret of another kind.
    raise ConfigError(
        [
            f"key file {path}: expected comment lines and one line with 64 lower-case hexadecimal digits, found "
            "something else; name the right file, or make a new key with `prime-async init`"
        ]
    )


def _file_text(pair: KeyPair) -> str:
    return (
        "# The secret key of a prime-async node. Who has it can act as this node: keep it to yourself.\n"
        f"# The node's public id is {pair.id}\n"
        f"{pair.secret.hex()}\n"
    )


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def key_from_secret(secret: bytes) -> KeyPair:
    """The pair that a secret key of 32 bytes belongs to."""
    return KeyPair(secret=secret, public=_from_z85(zmq.curve_public(z85.encode(secret))))


def _from_z85(text: bytes) -> bytes:
    return z85.decode(text)
