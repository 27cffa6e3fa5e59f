"""What can go wrong with what a node keeps on disk, beside :class:`~prime_async.errors.ConfigError`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prime_async.errors import StorageError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class DiskFullError(StorageError):
    """There was no room for what was to be written; what was there before is still there."""


class DamagedError(StorageError):
    """Bytes on disk are not those that were written: fetch them from another member.

    ``chunk``: whose bytes, if the rest of the file may be whole; ``None``: the file is of no use.
    """

    def __init__(self, path: Path, chunk: int | None, reason: str) -> None:
        self.path = path
        self.chunk = chunk
        where = f"{path}: chunk {chunk}" if chunk is not None else f"{path}: the file"
        super().__init__(f"{where} is damaged ({reason}): fetch it from another member, or move the file away")


def is_full(error: OSError) -> bool:
    """Whether the disk, or what this user may have of it, is full."""
    return error.errno in FULL


@contextmanager
def translated(path: Path, failure: str, place: str = "node.directory") -> Iterator[None]:
    """Inside, the file system's errors become :class:`StorageError`: "PATH: ``failure``: the reason".

    ``place``: what the user has chosen, and may choose otherwise.
    """
    try:
        yield
    except OSError as error:
        reason = f"{path}: {failure}: {error.strerror or error}"
        if is_full(error):
            raise DiskFullError(f"{reason}; make room, or choose a {place} on another disk") from error
        raise StorageError(f"{reason}; look after the disk and the rights on {place}") from error
