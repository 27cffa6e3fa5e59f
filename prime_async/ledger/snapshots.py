"""The outer state after some rounds, each a safetensors file that any program for such files can open.

``snapshots/ROUND.safetensors`` (12 digits) holds the weights under the parameters' names, fp32, in the order of the
flat vector, and then the momentum under ``momentum.`` and the names: the data are the flat weights, then the flat
momentum, and a chunk lies in two ranges of it. The metadata, all strings: ``format``, ``run_id``, ``run`` (a JSON
object of the settings), ``round``, ``chunk_elements``, ``state_digest``, ``chunk_digests`` (joined), ``commit``
(encoded; empty if there is none) and ``header_digest`` (:mod:`prime_async.ledger.tensors`); bytes in hexadecimal.

A file that is being filled is ``ROUND.part``: the same file, with wrong bytes where chunks are missing. What holds
always: a chunk is checked against its digest whenever it is read, and the digests against the header's, so a crash
loses chunks at most. A file gets its final name only when all its chunks are on disk.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from prime_async.errors import ConfigError, LocalError, ProtocolError, StorageError
from prime_async.ledger.errors import DamagedError, translated
from prime_async.ledger.files import LOCAL_FILES, File, Files, list_rounds
from prime_async.ledger.snapshot_format import Layout, SnapshotFormat, SnapshotInfo
from prime_async.ledger.tensors import HeaderError, read_header, read_header_alone
from prime_async.work.chunks import Chunks
from prime_async.work.inner import Span
from prime_async.work.outer import MOMENTUM_PREFIX

DIRECTORY: Final = "snapshots"
WHOLE: Final = ".safetensors"
PARTIAL: Final = ".part"


class Snapshots:
    """The snapshots of one run in a node's directory.

    Methods may be called from any thread; but a round's files are not removed, renamed or begun while others use them.
    All raise :class:`StorageError` if the file system fails, and :class:`DiskFullError`, one of those, if it is full.
    """

    def __init__(
        self,
        directory: Path,
        run_id: bytes,
        settings: Mapping[str, str],
        spans: Sequence[Span],
        chunks: Chunks,
        files: Files = LOCAL_FILES,
        prefixes: Sequence[str] = ("", MOMENTUM_PREFIX),
    ) -> None:
        """``directory``: the node's. ``settings``: the run's, flat, for people who find a file.

        ``prefixes``: of the spans' names, one for each of the vectors that an outer state has.
        """
        self.directory = directory / DIRECTORY
        self._format = SnapshotFormat(run_id, settings, spans, chunks, prefixes)
        self._files = files
        self._known: dict[int, Layout] = {}  # of whole files, which do not change: a long header is read once

    def path(self, round: int) -> Path:
        """Of the whole file."""
        return self.directory / f"{round:012d}{WHOLE}"

    def partial_path(self, round: int) -> Path:
        return self.directory / f"{round:012d}{PARTIAL}"

    def rounds(self) -> list[int]:
        """Those of which there is a whole file, ascending."""
        return self._list(WHOLE)

    def partials(self) -> list[int]:
        """Those of which there is a partial, ascending; it may be damaged."""
        return self._list(PARTIAL)

    def info(self, round: int) -> SnapshotInfo:
        """What the whole file of ``round`` says.

        Raises :class:`ConfigError` if it is of another run, :class:`DamagedError` if it is damaged, and
        :class:`StorageError` if there is none, or it is of a model or version that this is not.
        """
        return self._open_whole(round).info

    def read(self, round: int, chunk: int) -> bytes:
        """The weights of ``chunk`` and then its momentum, fp32 little-endian, as they were written.

        Raises as :meth:`info`, and :class:`DamagedError` with the chunk if its bytes do not have their digest.
        """
        path = self.path(round)
        layout = self._known.get(round) or self._open_whole(round)
        with translated(path, f"chunk {chunk} could not be read"), self._files.open(path, create=False) as file:
            halves = _read(layout, file, chunk)
        if halves is None:
            raise DamagedError(path, chunk, "it does not have its digest, or the disk cannot read it")
        return b"".join(halves)

    def partial_info(self, round: int) -> SnapshotInfo | None:
        """What the partial of ``round`` is to become; ``None`` if there is none that could be gone on with."""
        layout = self._partial_layout(round)
        return layout.info if layout else None

    def open_partial(self, info: SnapshotInfo) -> PartialSnapshot:
        """Begin a snapshot, or go on with one: the chunks that are there are read, and the good ones kept.

        A partial of another ``info`` is overwritten. If the snapshot is whole already, no chunk is missing.
        Raises :class:`LocalError` if ``info`` does not fit the model, or its digests do not fit each other.
        """
        header = self._format.encode(info)
        if self._is_whole(info):
            return PartialSnapshot(self, self._files, self._known[info.round], None, range(self._format.chunks.count))
        path = self.partial_path(info.round)
        found = self._partial_layout(info.round)
        with translated(path, "the snapshot could not be begun"):
            self._files.make_directory(self.directory)
            file = self._files.open(path, create=True)
            try:
                if found is not None and found.info == info:
                    present = [c for c in range(found.chunks.count) if _read(found, file, c) is not None]
                    return PartialSnapshot(self, self._files, found, file, present)
                layout = self._format.layout(info, len(header))
                self._begin(file, header, layout)
                return PartialSnapshot(self, self._files, layout, file, ())
            except BaseException:
                file.close()
                raise

    def demote(self, round: int) -> None:
        """Make a damaged whole file a partial, in place of one that is there: what is good of it will be kept."""
        self._known.pop(round, None)
        with translated(self.path(round), "the snapshot could not be renamed"):
            self._files.replace(self.path(round), self.partial_path(round))
            self._files.sync_directory(self.directory)

    def remove(self, round: int) -> None:
        """The whole file; nothing if there is none. After a loss of power it may be back."""
        self._known.pop(round, None)
        with translated(self.path(round), "the snapshot could not be removed"):
            self._files.remove(self.path(round))

    def remove_partial(self, round: int) -> None:
        """As :meth:`remove`."""
        with translated(self.partial_path(round), "the snapshot could not be removed"):
            self._files.remove(self.partial_path(round))

    def forget(self, round: int) -> None:
        """Another file has the name of the whole one now."""
        self._known.pop(round, None)

    def _list(self, ending: str) -> list[int]:
        with translated(self.directory, "the snapshots could not be listed"):
            return list_rounds(self._files, self.directory, ending)

    def _open_whole(self, round: int) -> Layout:
        path = self.path(round)
        with translated(path, "the snapshot could not be read"), self._files.open(path, create=False) as file:
            try:
                header = read_header(file)
            except HeaderError as error:
                raise DamagedError(path, None, str(error)) from error
        self._known[round] = self._format.understand(header, path, round)
        return self._known[round]

    def _is_whole(self, info: SnapshotInfo) -> bool:
        try:
            return self.info(info.round) == info
        except (StorageError, ConfigError):
            return False

    def _partial_layout(self, round: int) -> Layout | None:
        path = self.partial_path(round)
        with translated(path, "the snapshot could not be read"):
            try:
                with self._files.open(path, create=False) as file:
                    header = read_header_alone(file)
            except (FileNotFoundError, HeaderError):
                return None
        try:
            return self._format.understand(header, path, round)
        except (StorageError, ConfigError):
            return None

    def _begin(self, file: File, header: bytes, layout: Layout) -> None:
        """The header is on disk before the first chunk: without it all that came later would be lost."""
        file.truncate(0)
        file.write_at(0, header)
        file.truncate(layout.file_bytes)
        file.sync()
        self._files.sync_directory(self.directory)


class PartialSnapshot:
    """A snapshot that is being filled. ``write`` may run in several threads, for different chunks; the rest in one."""

    def __init__(
        self, owner: Snapshots, files: Files, layout: Layout, file: File | None, present: Iterable[int]
    ) -> None:
        """``file``, of which ``layout`` tells, is taken over; ``None``: the snapshot is whole."""
        self._owner = owner
        self._files = files
        self._layout = layout
        self._file = file
        self._lock = threading.Lock()  # of _written alone
        self.present = frozenset(present)
        """Chunks that were there when it was opened."""
        self._written = set(self.present)

    @property
    def info(self) -> SnapshotInfo:
        return self._layout.info

    def write(self, chunk: int, data: bytes | memoryview) -> None:
        """Put the weights and momentum of ``chunk`` in their place; nothing if they are there.

        Raises :class:`ProtocolError` if they are not what the snapshot is to hold, :class:`LocalError` if it is closed,
        and :class:`StorageError` if they cannot be written: the chunk is then still missing.
        """
        view = memoryview(data).cast("B")
        if view.nbytes != self._layout.chunk_bytes(chunk) or not self._layout.is_right(chunk, view):
            raise ProtocolError(
                f"the state of chunk {chunk} after round {self.info.round} does not have its digest: "
                "fetch it from another member"
            )
        with self._lock:
            if chunk in self._written:
                return
        if self._file is None:
            raise LocalError(f"the snapshot of round {self.info.round} was closed: open it again")
        path = self._owner.partial_path(self.info.round)
        with translated(path, f"chunk {chunk} could not be written"):
            self._layout.write(self._file, chunk, view)
        with self._lock:
            self._written.add(chunk)

    def finish(self) -> None:
        """The snapshot is whole, and on disk, when this returns. Closes it.

        Raises :class:`LocalError` if chunks are missing, and :class:`StorageError` if it cannot be made safe: what was
        written stays a partial, or has its name and may lose it again. It can be tried again.
        """
        missing = self._layout.chunks.count - len(self._written)
        if missing:
            raise LocalError(f"{missing} of {self._layout.chunks.count} chunks are missing: write all of them first")
        round, owner = self.info.round, self._owner
        with translated(owner.path(round), "the snapshot could not be finished"):
            if self._file is not None:
                self._file.truncate(self._layout.file_bytes)  # a damaged one may have been longer
                self._file.sync()
                self._files.replace(owner.partial_path(round), owner.path(round))
                owner.forget(round)
                self.close()
            self._files.sync_directory(owner.directory)  # a crash may have come between, so even if it was whole

    def close(self) -> None:
        """Leave the partial for later. Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _read(layout: Layout, file: File, chunk: int) -> tuple[bytes, ...] | None:
    """Weights and momentum; ``None`` if the bytes are not the chunk's, or the disk has lost them."""
    try:
        halves = layout.read(file, chunk)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None
    return halves if layout.is_right(chunk, *halves) else None
