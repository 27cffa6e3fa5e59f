"""Files that a group shares: what is given of one, chunk by chunk, and what one comes into. Synchronous, for threads.

A chunk is checked against the manifest's digest whenever it is read or written. A file that is coming is
``NAME.DIGEST.part`` beside its place, with the first 16 digits of its digest: chunks that are there already are found
by their digests, so that one which was broken off goes on; it gets its name when it is whole and on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from blake3 import blake3

from prime_async.errors import LocalError, ProtocolError, StorageError
from prime_async.ledger.errors import DamagedError, translated
from prime_async.ledger.files import LOCAL_FILES, File, Files
from prime_async.messages import DIGEST_BYTES, FileManifest, Payload, decode, encode

MAX_MANIFEST_BYTES: Final = 16 << 20
MAX_CHUNKS: Final = (MAX_MANIFEST_BYTES - 1024) // DIGEST_BYTES
PLACE: Final = "path"
"""What a user chooses, and may choose otherwise."""


# --- manifests ------------------------------------------------------------------------------------------------------


def manifest_digest(manifest: FileManifest) -> bytes:
    """What names the file: BLAKE3 of the manifest's encoding."""
    return blake3(encode(manifest)).digest()


def _go_on() -> None:
    """Nobody wants it to end before its end."""


def make_manifest(
    name: object,
    read: Callable[[int, int], bytes | memoryview],
    size: int,
    chunk_bytes: int,
    step: Callable[[], None] = _go_on,
) -> FileManifest:
    """Of ``size`` bytes that ``read(offset, size)`` gives. ``name``: for what is told.

    ``step`` is called before each chunk, and may raise to end it.

    Raises :class:`LocalError` if they are too many for one manifest, or fewer come.
    """
    count = -(-size // chunk_bytes)
    if count > MAX_CHUNKS:
        raise LocalError(
            f"{name}: {size} bytes in chunks of {chunk_bytes} are more than {MAX_CHUNKS} chunks: choose a larger "
            "run.exchange.chunk_elements"
        )
    digests = []
    for chunk in range(count):
        step()
        offset = chunk * chunk_bytes
        data = memoryview(read(offset, min(chunk_bytes, size - offset)))
        if data.nbytes != min(chunk_bytes, size - offset):
            raise LocalError(f"{name}: it became shorter while it was read: share it when nobody writes to it")
        digests.append(blake3(data).digest())
    return FileManifest(size=size, chunk_bytes=chunk_bytes, chunks=b"".join(digests))


def read_manifest(data: bytes, digest: bytes, chunk_bytes: int) -> FileManifest:
    """The manifest that ``data`` encodes, of the file with this digest, in chunks as the group's are.

    Raises :class:`ProtocolError` if it is not that.
    """
    if blake3(data).digest() != digest:
        raise ProtocolError("the manifest does not have the digest that names its file")
    manifest = decode(data, Payload, limit=MAX_MANIFEST_BYTES)
    if not isinstance(manifest, FileManifest) or manifest.chunk_bytes != chunk_bytes:
        raise ProtocolError(f"the manifest is not of a file in chunks of {chunk_bytes} bytes")
    if len(manifest.chunks) != DIGEST_BYTES * -(-manifest.size // chunk_bytes):
        raise ProtocolError("the manifest has another number of digests than its file has chunks")
    return manifest


def chunk_count(manifest: FileManifest) -> int:
    return len(manifest.chunks) // DIGEST_BYTES


def place_of(manifest: FileManifest, chunk: int) -> tuple[int, int]:
    """Where a chunk begins, and how long it is."""
    offset = chunk * manifest.chunk_bytes
    return offset, min(manifest.chunk_bytes, manifest.size - offset)


def is_right(manifest: FileManifest, chunk: int, data: bytes | memoryview) -> bool:
    """Whether these are the bytes of the chunk."""
    start = chunk * DIGEST_BYTES
    length = memoryview(data).nbytes
    return (
        length == place_of(manifest, chunk)[1]
        and blake3(data).digest() == manifest.chunks[start : start + DIGEST_BYTES]
    )


# --- what is given --------------------------------------------------------------------------------------------------


class Content(Protocol):
    """A whole file, that is given to others."""

    @property
    def manifest(self) -> FileManifest: ...

    def read(self, chunk: int) -> bytes | memoryview:
        """Raises :class:`DamagedError` if it is not what it was, :class:`StorageError` if it cannot be read."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class BytesContent:
    """In memory."""

    def __init__(self, data: bytes, chunk_bytes: int, manifest: FileManifest | None = None) -> None:
        view = self._view = memoryview(data)
        self.data = data
        self.manifest = manifest or make_manifest("bytes", lambda at, n: view[at : at + n], view.nbytes, chunk_bytes)

    def read(self, chunk: int) -> memoryview:
        offset, size = place_of(self.manifest, chunk)
        return self._view[offset : offset + size]

    def close(self) -> None:
        pass


class FileContent:
    """On disk. It is held open: what takes the place of the file at its path makes no difference."""

    def __init__(self, path: Path, file: File, manifest: FileManifest) -> None:
        self.manifest = manifest
        self._path = path
        self._file: File | None = file

    @classmethod
    def open(
        cls, path: Path, chunk_bytes: int, step: Callable[[], None] = _go_on, files: Files = LOCAL_FILES
    ) -> FileContent:
        """Reads all of it. Raises :class:`StorageError` if it cannot be read, or is no file.

        ``step``: as of :func:`make_manifest`.
        """
        if path.is_dir():
            raise StorageError(f"{path}: a directory cannot be shared: share its files, one by one")
        with translated(path, "the file cannot be read", PLACE):
            file = files.open(path, create=False)
            try:
                return cls(path, file, make_manifest(path, file.read_at, file.size(), chunk_bytes, step))
            except BaseException:
                file.close()
                raise

    def read(self, chunk: int) -> bytes:
        file = self._file  # another thread may close it: then what is read is refused, if anything is
        if file is None:
            raise StorageError(f"{self._path}: it is not shared any more")
        with translated(self._path, f"chunk {chunk} cannot be read", PLACE):
            data = file.read_at(*place_of(self.manifest, chunk))
        if not is_right(self.manifest, chunk, data):
            raise DamagedError(self._path, chunk, "its bytes are not what they were when it was shared")
        return data

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


# --- what comes -----------------------------------------------------------------------------------------------------


class Coming(Protocol):
    """A file that is coming. Several threads may ``write`` at once."""

    def begin(self, manifest: FileManifest, step: Callable[[], None] = _go_on) -> tuple[int, ...]:
        """The chunks that are not here yet. ``step``: as of :func:`make_manifest`."""
        ...

    def write(self, chunk: int, data: bytes | memoryview) -> None:
        """Raises :class:`ProtocolError` if these are not the chunk's bytes, :class:`StorageError`."""
        ...

    def finish(self) -> Content:
        """All chunks are here: the file is whole, and safe, when this returns."""
        ...

    def leave(self) -> None:
        """It is not wanted any more; what has come may be of use later."""
        ...


class ComingBytes:
    """Into memory, which is taken as soon as the size is known."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._manifest: FileManifest | None = None

    def begin(self, manifest: FileManifest, step: Callable[[], None] = _go_on) -> tuple[int, ...]:
        step()
        try:
            self._data = bytearray(manifest.size)
        except MemoryError as error:
            raise StorageError(f"{manifest.size} bytes do not fit into memory: fetch them to a path") from error
        self._manifest = manifest
        return tuple(range(chunk_count(manifest)))

    def write(self, chunk: int, data: bytes | memoryview) -> None:
        assert self._manifest is not None
        _check(self._manifest, chunk, data)
        offset, size = place_of(self._manifest, chunk)
        self._data[offset : offset + size] = data

    def finish(self) -> BytesContent:
        assert self._manifest is not None
        return BytesContent(bytes(self._data), self._manifest.chunk_bytes, self._manifest)

    def leave(self) -> None:
        self._data = bytearray()


class ComingFile:
    """To ``path``. What is there is replaced when all has come.

    Raises :class:`StorageError` if there is no place to write to.
    """

    def __init__(self, path: Path, digest: bytes, files: Files = LOCAL_FILES) -> None:
        if path.is_dir():
            raise StorageError(f"{path}: this is a directory: give the path of a file in it")
        self._path = path
        self._part = path.with_name(f"{path.name}.{digest.hex()[:16]}.part")
        self._files = files
        self._manifest: FileManifest | None = None
        with translated(self._part, "nothing can be written there", PLACE):
            self._file = files.open(self._part, create=True)

    def begin(self, manifest: FileManifest, step: Callable[[], None] = _go_on) -> tuple[int, ...]:
        self._manifest = manifest
        with translated(self._part, "what is there cannot be read", PLACE):
            end = self._file.size()
            return tuple(c for c in range(chunk_count(manifest)) if not self._has(manifest, c, end, step))

    def _has(self, manifest: FileManifest, chunk: int, end: int, step: Callable[[], None]) -> bool:
        step()
        offset, size = place_of(manifest, chunk)
        return offset + size <= end and is_right(manifest, chunk, self._file.read_at(offset, size))

    def write(self, chunk: int, data: bytes | memoryview) -> None:
        assert self._manifest is not None
        _check(self._manifest, chunk, data)
        with translated(self._part, f"chunk {chunk} could not be written", PLACE):
            self._file.write_at(place_of(self._manifest, chunk)[0], data)

    def finish(self) -> FileContent:
        assert self._manifest is not None
        with translated(self._path, "the file could not be finished", PLACE):
            self._file.truncate(self._manifest.size)
            self._file.sync()
            self._files.replace(self._part, self._path)
            self._files.sync_directory(self._path.parent)
        return FileContent(self._path, self._file, self._manifest)

    def leave(self) -> None:
        with translated(self._part, "the part that has come cannot be left", PLACE):
            empty = self._file.size() == 0
            self._file.close()
            if empty:
                self._files.remove(self._part)


def _check(manifest: FileManifest, chunk: int, data: bytes | memoryview) -> None:
    if not is_right(manifest, chunk, data):
        raise ProtocolError(f"chunk {chunk} is not what the manifest says")
