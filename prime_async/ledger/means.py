"""The means of the rounds, a file each, and which of them are committed (:mod:`prime_async.ledger.means_format`).

A file whose header is torn, or of another run or model, is as if it were not there, and is begun anew by who writes to
it. An item that is cut off, or does not have its digest, is as if it were not there; so is an A of another format, run
or round, or for other slots, and a B that names another A, since A was written anew after it. Slots are checked against
A, or against what the reader knows, whenever they are read: one that was never written is wrong bytes. So a crash at
any point leaves what was there, or what was to be there, or less; never something else.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Final

from blake3 import blake3

from prime_async.errors import LocalError, ProtocolError
from prime_async.ledger.errors import DamagedError, translated
from prime_async.ledger.files import LOCAL_FILES, File, Files, list_rounds
from prime_async.ledger.means_format import (
    FORMAT,
    SIZE_BYTES,
    SLOTS_START,
    Contents,
    MeansHeader,
    Tail,
    decode_contents,
    encode_item,
    encode_means_header,
    encode_settled,
    read_means_header,
    read_slot,
    read_tail,
    slots,
)
from prime_async.machines.fragments import Fragments
from prime_async.messages import DIGEST_BYTES, ChunkInfo, Commit, Included, Record
from prime_async.transport.base import Chunk

DIRECTORY: Final = "means"
ENDING: Final = ".means"


@dataclass(frozen=True, slots=True)
class StoredMeans:
    """What a file says of its means; of each of the round's chunks in ``infos``.

    Without a commit, ``previous`` is unknown too.
    """

    infos: tuple[ChunkInfo, ...]
    commit: Commit | None
    previous: bytes | None


class _Layout:
    """Where the payloads of the chunks of a round lie: those of one fragment."""

    def __init__(self, run_id: bytes, chunks: range, payload_bytes: Sequence[int]) -> None:
        self.chunks = chunks
        self._sizes = tuple(SIZE_BYTES + payload_bytes[c] for c in chunks)
        self.slots = slots(self._sizes)
        *self._starts, end = accumulate(self._sizes, initial=SLOTS_START)
        self.header = MeansHeader(run_id, end - SLOTS_START)

    def place(self, chunk: int) -> int:
        """Which of the round's chunks it is. Raises :class:`LocalError` if it is none of them."""
        if chunk not in self.chunks:
            raise LocalError(f"chunk {chunk} is none of those of its round, {self.chunks}")
        return chunk - self.chunks.start

    def slot(self, chunk: int) -> tuple[int, int]:
        """Where it begins, and how long its payload may be."""
        place = self.place(chunk)
        return self._starts[place], self._sizes[place] - SIZE_BYTES


class MeansFiles:
    """The means of one run in a node's directory.

    Methods may be called from any thread, those that write for different rounds or (:meth:`put`) different chunks.
    All raise :class:`StorageError` if the file system fails, and :class:`DiskFullError`, one of those, if it is full.
    """

    def __init__(
        self,
        directory: Path,
        run_id: bytes,
        payload_bytes: Sequence[int],
        files: Files = LOCAL_FILES,
        fragments: int = 1,
    ) -> None:
        """``directory``: the node's. ``payload_bytes``: of the mean of each chunk, at most."""
        self.directory = directory / DIRECTORY
        self._run_id = run_id
        parts = self._fragments = Fragments(len(payload_bytes), fragments)
        self._layouts = [_Layout(run_id, parts.chunks(f), payload_bytes) for f in range(fragments)]
        self._files = files
        self._beginning = threading.Lock()  # else one thread would cut off what another has just put
        self._decoded: tuple[bytes, Contents] | None = None  # the newest A: each chunk that is read wants it

    def _layout(self, round: int) -> _Layout:
        return self._layouts[self._fragments.of(round)]

    def path(self, round: int) -> Path:
        return self.directory / f"{round:012d}{ENDING}"

    def put(self, round: int, chunk: int, payload: bytes | memoryview) -> None:
        """Write the mean of ``chunk`` into its slot; it is safe after :meth:`close`.

        If A tells of another mean, the chunk is damaged until A is written anew. Raises :class:`LocalError` if the
        payload is too long for it.
        """
        view = memoryview(payload).cast("B")
        start, most = self._layout(round).slot(chunk)
        if view.nbytes > most:
            raise LocalError(f"the mean of chunk {chunk} has {view.nbytes} bytes instead of at most {most}")
        failure = f"the mean of chunk {chunk} could not be written"
        with translated(self.path(round), failure), self._open_to_write(round) as file:
            file.write_at(start, view.nbytes.to_bytes(SIZE_BYTES, "little"))
            file.write_at(start + SIZE_BYTES, view)

    def close(self, round: int, infos: Sequence[ChunkInfo]) -> None:
        """The slots hold the means of these ``infos``: what was put before this is on disk when it returns.

        A commit that is there stays if the infos are the same, and goes if they are others.
        """
        a = encode_item(self._contents(round, b"".join(i.digest for i in infos), included(infos)))
        self._write(round, a, None, "the means could not be closed", sync=True)

    def commit(self, round: int, commit: Commit, previous: bytes) -> None:
        """The means that A tells of are those of ``round``. Not safe from a loss of power at once: others know it too.

        Raises :class:`LocalError` if the means were not closed.
        """
        tail = self._read_tail(round)
        if tail is None:
            raise LocalError(f"the means of round {round} are not on disk: close them before their commit")
        b = encode_settled(tail.a, commit, previous)
        self._write(round, tail.a, b, "the commit could not be written", sync=False)

    def save_record(self, round: int, record: Record) -> None:
        """Write A and B as another member has them. The means may be put before or after, and then closed.

        Raises :class:`ProtocolError` if it is of another round, or not of these chunks.
        """
        if record.commit.round != round or not self._fits(round, record.means, record.included):
            raise ProtocolError(f"the record of round {round} is another's: fetch it from another member")
        a = encode_item(self._contents(round, record.means, record.included))
        b = encode_settled(a, record.commit, record.previous)
        self._write(round, a, b, "the record could not be written", sync=True)

    def rounds(self) -> list[int]:
        """Those of which there is a file, ascending, whatever is in it."""
        with translated(self.directory, "the means could not be listed"):
            return list_rounds(self._files, self.directory, ENDING)

    def stored(self, round: int) -> StoredMeans | None:
        """What the file says; ``None`` if there is none, or no A in it that can be relied on."""
        tail = self._read_tail(round)
        if tail is None:
            return None
        commit, previous = (tail.settled.commit, tail.settled.previous) if tail.settled else (None, None)
        return StoredMeans(_infos(tail.contents), commit, previous)

    def record(self, round: int) -> Record | None:
        """For a member that fetches it; ``None`` if the file does not tell of a commit."""
        tail = self._read_tail(round)
        if tail is None or tail.settled is None:
            return None
        means, runs = tail.contents.means, tail.contents.included
        return Record(commit=tail.settled.commit, previous=tail.settled.previous, means=means, included=runs)

    def read(self, round: int, chunk: int) -> Chunk:
        """The mean of ``chunk`` that A tells of.

        Raises :class:`DamagedError`, with the chunk if another payload is in its slot, without if there is no A.
        """
        path = self.path(round)
        failure = f"the mean of chunk {chunk} could not be read"
        with translated(path, failure), self._files.open(path, create=False) as file:
            tail = self._tail_of(file, round)
            if tail is None:
                raise DamagedError(path, None, "it does not say what is in it")
            info = _info(tail.contents, self._layout(round).place(chunk))
            payload = self._slot(file, round, chunk, info.digest)
        if payload is None:
            raise DamagedError(path, chunk, "it does not have its digest, or the disk cannot read it")
        return Chunk(info, memoryview(payload))

    def present(self, round: int, digests: bytes) -> set[int]:
        """The round's chunks whose slots hold payloads with these ``digests``, 32 bytes each, in chunk order."""
        wanted = [digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)]
        chunks = self._layout(round).chunks
        if len(wanted) != len(chunks):
            raise LocalError(f"{len(digests)} bytes of digests for {len(chunks)} chunks")
        path = self.path(round)
        with translated(path, "the means could not be read"):
            try:
                with self._files.open(path, create=False) as file:
                    if not self._is_begun(file, round):
                        return set()
                    pairs = zip(chunks, wanted, strict=True)
                    return {c for c, digest in pairs if self._slot(file, round, c, digest) is not None}
            except FileNotFoundError:
                return set()

    def remove(self, round: int) -> None:
        """Nothing if there is no file. After a loss of power it may be back."""
        with translated(self.path(round), "the means could not be removed"):
            self._files.remove(self.path(round))

    def _open_to_write(self, round: int) -> File:
        self._files.make_directory(self.directory)
        file = self._files.open(self.path(round), create=True)
        try:
            with self._beginning:
                if not self._is_begun(file, round):
                    file.truncate(0)
                    file.write_at(0, encode_means_header(self._layout(round).header))
        except BaseException:
            file.close()
            raise
        return file

    def _is_begun(self, file: File, round: int) -> bool:
        """Whether it has the header of this run's means."""
        try:
            return read_means_header(file) == self._layout(round).header
        except OSError as error:
            if error.errno != errno.EIO:  # what the disk has lost is fetched again
                raise
            return False

    def _contents(self, round: int, means: bytes, runs: tuple[Included, ...]) -> Contents:
        layout = self._layout(round)
        if not self._fits(round, means, runs):
            raise LocalError(f"{len(means) // DIGEST_BYTES} infos for the means of {len(layout.chunks)} chunks")
        return Contents(format=FORMAT, run_id=self._run_id, round=round, slots=layout.slots, means=means, included=runs)

    def _fits(self, round: int, means: bytes, runs: Iterable[Included]) -> bool:
        count = len(self._layout(round).chunks)
        return len(means) == count * DIGEST_BYTES and sum(run.chunks for run in runs) == count

    def _write(self, round: int, a: bytes, b: bytes | None, failure: str, *, sync: bool) -> None:
        """Make the items ``a`` and ``b``, leaving alone what is there; ``None``: the B of that A, if it is there.

        Even if all is there it is synced: a crash, or a failure, may have come between the writing and the sync.
        """
        items_start = self._layout(round).header.items_start
        with translated(self.path(round), failure), self._open_to_write(round) as file:
            before = self._tail_of(file, round)
            same_a = before is not None and before.a == a
            b_before = before.b if before is not None and same_a else b""
            if not same_a:
                self._overwrite(file, items_start, a + (b or b""))
            elif b is not None and b != b_before:
                self._overwrite(file, items_start + len(a), b)
            if sync:
                file.sync()
                self._files.sync_directory(self.directory)

    def _overwrite(self, file: File, start: int, data: bytes) -> None:
        """Replace what is behind ``start``. If there is no room for it, what was there is put back."""
        size = file.size()
        before = file.read_at(start, size - start) if size > start else b""
        try:
            file.write_at(start, data)
        except OSError:
            with suppress(OSError):
                file.write_at(start, before)  # it has its room already
                file.truncate(size)
            raise
        file.truncate(start + len(data))

    def _read_tail(self, round: int) -> Tail | None:
        with translated(self.path(round), "the means could not be read"):
            try:
                with self._files.open(self.path(round), create=False) as file:
                    return self._tail_of(file, round)
            except FileNotFoundError:
                return None

    def _tail_of(self, file: File, round: int) -> Tail | None:
        header = self._layout(round).header
        if read_means_header(file) != header:
            return None
        return read_tail(file, header, lambda a: self._understand(a, round))

    def _understand(self, a: bytes, round: int) -> Contents | None:
        decoded = self._decoded
        contents = decoded[1] if decoded and decoded[0] == a else decode_contents(a)
        if contents is None or contents.round != round or contents.slots != self._layout(round).slots:
            return None
        self._decoded = a, contents
        return contents

    def _slot(self, file: File, round: int, chunk: int, digest: bytes) -> bytes | None:
        start, most = self._layout(round).slot(chunk)
        try:
            payload = read_slot(file, start, most)
        except OSError as error:
            if error.errno != errno.EIO:  # what the disk has lost is fetched again
                raise
            return None
        return payload if payload is not None and blake3(payload).digest() == digest else None


def included(infos: Sequence[ChunkInfo]) -> tuple[Included, ...]:
    """Who is in the means of these ``infos``, run by run."""
    runs = groupby((info.contributors, info.total_weight) for info in infos)
    return tuple(
        Included(chunks=len(list(run)), contributors=contributors, total_weight=weight)
        for (contributors, weight), run in runs
    )


def _infos(contents: Contents) -> tuple[ChunkInfo, ...]:
    who = (run for run in contents.included for _ in range(run.chunks))
    return tuple(_info_of(contents, place, run) for place, run in enumerate(who))


def _info(contents: Contents, place: int) -> ChunkInfo:
    ends = list(accumulate(run.chunks for run in contents.included))
    return _info_of(contents, place, contents.included[bisect_right(ends, place)])


def _info_of(contents: Contents, place: int, run: Included) -> ChunkInfo:
    digest = contents.means[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES]
    return ChunkInfo(digest=digest, contributors=run.contributors, total_weight=run.total_weight)
