"""What the ledger needs of a file system: one small interface, so that tests can put a disk that fails in its place.

``OSError`` comes out as it is; the classes that use this translate it once
(:func:`~prime_async.ledger.errors.translated`).
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

CANNOT_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})


class File(Protocol):
    """An open file. Reads and writes at different places may run in several threads at once."""

    def __enter__(self) -> File: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def size(self) -> int:
        """In bytes."""
        ...

    def read_at(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on, fewer only where the file ends."""
        ...

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """All of ``data``; the file grows if need be. If it raises, some of it may have been written."""
        ...

    def truncate(self, size: int) -> None:
        """Cut off, or lengthen with zeros that take no room, to ``size`` bytes."""
        ...

    def sync(self) -> None:
        """When this returns, what the file holds survives a loss of power."""
        ...

    def close(self) -> None:
        """Does not sync. Idempotent."""
        ...


class Files(Protocol):
    """A file system. What changes the entries of a directory survives a loss of power after ``sync_directory``."""

    def make_directory(self, path: Path) -> None:
        """With its parents, and so that they survive; nothing if it is there."""
        ...

    def list(self, directory: Path) -> list[str]:
        """The names in it, in any order; none if there is no such directory."""
        ...

    def open(self, path: Path, *, create: bool) -> File:
        """For reading, and with ``create`` for writing too, made empty if it is not there.

        Raises :class:`FileNotFoundError` without ``create``.
        """
        ...

    def replace(self, source: Path, target: Path) -> None:
        """Rename within a directory; what was at ``target`` is gone."""
        ...

    def remove(self, path: Path) -> None:
        """Nothing if it is not there."""
        ...

    def sync_directory(self, path: Path) -> None:
        """When this returns, the directory's entries survive a loss of power."""
        ...

    def exists(self, path: Path) -> bool: ...


class LocalFile:
    """A file of this machine."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        if len(data) in (0, size):  # nearly always: one call reads at most 2 GiB, and may be interrupted
            return data
        parts, got = [data], len(data)
        while got < size and (data := os.pread(self._descriptor, size - got, offset + got)):
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest.nbytes:
            written = os.pwrite(self._descriptor, rest, offset)
            rest, offset = rest[written:], offset + written

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class LocalFiles:
    """The file system of this machine."""

    def make_directory(self, path: Path) -> None:
        missing = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for made in missing:
            self.sync_directory(made.parent)

    def list(self, directory: Path) -> list[str]:
        try:
            return os.listdir(directory)  # noqa: PTH208 - names are wanted, not paths
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open(self, path: Path, *, create: bool) -> LocalFile:
        flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
        return LocalFile(os.open(path, flags | os.O_CLOEXEC, 0o666))

    def replace(self, source: Path, target: Path) -> None:
        source.replace(target)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in CANNOT_SYNC:  # some network file systems cannot, and need not
                raise
        finally:
            os.close(descriptor)

    def exists(self, path: Path) -> bool:
        return path.exists()


LOCAL_FILES: Final = LocalFiles()
"""The default wherever :class:`Files` are asked for; it has no state."""


def list_rounds(files: Files, directory: Path, ending: str) -> list[int]:
    """The rounds after which files in ``directory`` are named: 12 digits or more, and ``ending``; ascending."""
    found = (re.fullmatch(rf"([0-9]{{12,19}}){re.escape(ending)}", name) for name in files.list(directory))
    return sorted(int(match[1]) for match in found if match and match[0] == f"{int(match[1]):012d}{ending}")
