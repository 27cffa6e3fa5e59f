"""The ballot on disk: what the node has promised and accepted (:mod:`prime_async.machines.ballot`), in CBOR.

A node that cannot store its ballot cannot vote, and a run whose disks are full must not stop for it: so room is kept in
a file beside the ballot, ``reserve``, and given up for the next ballot when there is no other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog
from blake3 import blake3
from msgspec import Struct

from prime_async.errors import ConfigError, ProtocolError, StorageError
from prime_async.ledger.errors import is_full, translated
from prime_async.ledger.files import LOCAL_FILES, Files
from prime_async.machines.ballot import Ballot
from prime_async.messages import decode, encode

BALLOT_FILE: Final = "ballot.cbor"
RESERVE_FILE: Final = "reserve"
MAX_BALLOT_BYTES: Final = 1 << 22
RESERVE_BYTES: Final = MAX_BALLOT_BYTES
RESERVE_AGAIN_S: Final = 60.0
WITHOUT_BALLOT: Final = "move it away, and the node joins as a new one"


class StoredBallot(Struct, frozen=True, kw_only=True, tag_field="t", tag="ballot"):
    """What the ballot file holds. ``digest``: BLAKE3 of the encoded ballot."""

    run_id: bytes
    ballot: Ballot
    digest: bytes


class BallotFile:
    """The ballot of one node of one run, in its directory. Used by one thread at a time."""

    def __init__(
        self,
        directory: Path,
        run_id: bytes,
        files: Files = LOCAL_FILES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``clock``, in seconds, says when the reserve may be tried again."""
        self.path = directory / BALLOT_FILE
        self.reserve = directory / RESERVE_FILE
        self._run_id = run_id
        self._files = files
        self._clock = clock
        self._reserved = False
        self._reserve_after_s = float("-inf")

    def save(self, ballot: Ballot) -> None:
        """Put ``ballot`` on disk in the place of the one before; it is there, whole, when this returns.

        Raises :class:`StorageError`: then the node must not answer for it.
        """
        data = encode(StoredBallot(run_id=self._run_id, ballot=ballot, digest=blake3(encode(ballot)).digest()))
        with translated(self.path, "the ballot could not be written"):
            try:
                self._replace(data)
            except OSError as error:
                if not is_full(error) or not self._files.exists(self.reserve):
                    raise
                self._give_up_reserve()
                self._replace(data)
        if not self._reserved and self._clock() >= self._reserve_after_s:
            self._make_reserve()

    def load(self) -> Ballot | None:
        """The ballot on disk; ``None`` if there is none.

        Raises :class:`ConfigError` if it is of another run, and :class:`StorageError` if it is damaged.
        """
        with translated(self.path, "the ballot cannot be read"):
            if not self._files.exists(self.path):
                return None
            with self._files.open(self.path, create=False) as file:
                data = file.read_at(0, MAX_BALLOT_BYTES + 1)
        try:
            stored: StoredBallot = decode(data, StoredBallot, limit=MAX_BALLOT_BYTES)
        except ProtocolError as error:
            raise StorageError(f"{self.path}: the ballot is damaged ({error}): {WITHOUT_BALLOT}") from error
        if blake3(encode(stored.ballot)).digest() != stored.digest:
            raise StorageError(f"{self.path}: the ballot is damaged: {WITHOUT_BALLOT}")
        if stored.run_id != self._run_id:
            raise ConfigError(
                [
                    f"{self.path}: node.directory holds the ballot of another run (or of this one before its [run] "
                    "table was changed): choose another directory, or move the file away"
                ]
            )
        return stored.ballot

    def _replace(self, data: bytes) -> None:
        partial = self.path.with_suffix(f".partial-{os.getpid()}")
        try:
            self._files.make_directory(self.path.parent)
            with self._files.open(partial, create=True) as file:
                file.truncate(0)
                file.write_at(0, data)
                file.sync()
            self._files.replace(partial, self.path)
            self._files.sync_directory(self.path.parent)
        except OSError:
            with suppress(OSError):
                self._files.remove(partial)
            raise

    def _give_up_reserve(self) -> None:
        structlog.get_logger().warning("disk_full_ballot_uses_reserve", path=str(self.reserve))
        self._reserved = False
        self._reserve_after_s = self._clock() + RESERVE_AGAIN_S
        self._files.remove(self.reserve)
        self._files.sync_directory(self.reserve.parent)

    def _make_reserve(self) -> None:
        """Really written: a file of zeros, or without contents, takes no room on some file systems.

        Without it the node goes on; a part of one would take room that others want.
        """
        try:
            with self._files.open(self.reserve, create=True) as file:
                if file.size() != RESERVE_BYTES:
                    file.truncate(0)
                    file.write_at(0, blake3(b"reserve").digest(length=RESERVE_BYTES))
                    file.sync()
            self._reserved = True
        except OSError as error:
            structlog.get_logger().warning("ballot_reserve_not_made", path=str(self.reserve), reason=str(error))
            self._reserve_after_s = self._clock() + RESERVE_AGAIN_S
            with suppress(OSError):
                self._files.remove(self.reserve)
