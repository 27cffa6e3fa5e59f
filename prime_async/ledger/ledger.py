"""The ledger of a node: the outer state as a snapshot and the means since, in its directory.

    snapshots/000000000040.safetensors   the outer state after 40 rounds (:mod:`prime_async.ledger.snapshots`)
    snapshots/000000000050.part          one that is being written, or fetched
    means/000000000040.means             the means of round 40, and its commit (:mod:`prime_async.ledger.means`)
    inner.safetensors                    the inner optimiser's state (:mod:`prime_async.ledger.inner`)
    ballot.cbor                          what the node has promised (:mod:`prime_async.ledger.ballots`)

What it does is decided elsewhere (:mod:`prime_async.machines.checkpoint`); here is how.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import structlog
from blake3 import blake3

from prime_async.errors import ChunkUnavailableError, LocalError, ProtocolError, StorageError
from prime_async.ledger.errors import DamagedError
from prime_async.ledger.files import LOCAL_FILES, Files
from prime_async.ledger.inner import InnerFile
from prime_async.ledger.means import MeansFiles, StoredMeans
from prime_async.ledger.snapshot_format import SnapshotInfo
from prime_async.ledger.snapshots import PartialSnapshot, Snapshots
from prime_async.machines.vocabulary import LedgerAt
from prime_async.messages import (
    DIGEST_BYTES,
    FIRST_CHAIN,
    ChunkInfo,
    Commit,
    Manifest,
    Record,
    encode,
    next_chain,
    state_digest,
)
from prime_async.transport.base import Chunk
from prime_async.work.chunks import Chunks
from prime_async.work.device import usable_cores
from prime_async.work.workload import Workload

log = structlog.get_logger(__name__)

MAX_THREADS = 4
Each: TypeAlias = Callable[[Callable[[int], None], Iterable[int]], None]
"""Calls a function of every chunk, perhaps in several threads; the first error comes out."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What a directory led to. ``snapshot``: the round of the one it began with, 0: the initial weights.

    ``tip``: the last of the commits that led to the state, ``None`` if there was none.
    """

    round: int
    digest: bytes
    snapshot: int
    tip: Commit | None
    inner: bool = False

    @property
    def chain(self) -> bytes:
        return self.tip.chain if self.tip is not None else FIRST_CHAIN


class Ledger:
    """What one node keeps of one run on disk. Synchronous, for worker threads.

    Methods that name one chunk may run in several threads, for different chunks; of the others one at a time, while
    chunks of other rounds are read and written. All raise :class:`StorageError` if the disk fails or is full, and
    :class:`DamagedError`, one of those, if what is read is not what was written.
    """

    def __init__(
        self,
        directory: Path,
        run_id: bytes,
        settings: Mapping[str, str],
        workload: Workload,
        chunk_elements: int,
        files: Files = LOCAL_FILES,
    ) -> None:
        """``settings``: the run's, flat. ``workload`` is what this is the ledger of; some methods change it."""
        self.directory = directory
        self._workload = workload
        self._chunks = Chunks(workload.elements, chunk_elements)
        sizes = [workload.mean_bytes(c) for c in range(workload.chunk_count)]
        self.snapshots = Snapshots(
            directory, run_id, settings, workload.spans, self._chunks, files, workload.state_prefixes
        )
        self.means = MeansFiles(directory, run_id, sizes, files, workload.fragments.count)
        self.inner = InnerFile(directory, run_id, files)
        self._lock = threading.Lock()
        self._known: dict[int, StoredMeans] = {}  # of the rounds whose means are on disk, whole as far as is known
        self._partials: dict[int, PartialSnapshot] = {}
        self._bad: set[int] = set()  # rounds in whose means a chunk was found to be damaged

    # --- what is there ------------------------------------------------------------------------------------------

    def scan(self, *, mend: bool = True) -> None:
        """See what is there. Snapshots of another run raise :class:`ConfigError`; damage is for the reader to find.

        With ``mend`` a snapshot that does not even say what it is of is removed.
        """
        for round in self.snapshots.rounds():
            try:
                self.snapshots.info(round)
            except DamagedError as error:
                log.warning("snapshot_damaged", path=str(error.path), reason=str(error))
                if mend:
                    self.snapshots.remove(round)
        for round in self.means.rounds():
            stored = self.means.stored(round)
            if stored is not None:
                self._known[round] = stored

    @property
    def holdings(self) -> LedgerAt:
        """For the checkpoint machine."""
        with self._lock:
            known = {r: s for r, s in self._known.items() if r not in self._bad}
        pending = max((r for r, s in known.items() if s.commit is None), default=-1)
        return LedgerAt(
            snapshots=tuple(self.snapshots.rounds()),
            means=tuple(sorted(r for r, s in known.items() if s.commit is not None)),
            partials=tuple(self.snapshots.partials()),
            pending=pending,
            pending_digest=digest_of_means(known[pending].infos) if pending >= 0 else b"",
        )

    def find_commit(self, round: int) -> Commit | None:
        """That of ``round``, if its means are on disk."""
        stored = self._known.get(round)
        return stored.commit if stored is not None else None

    # --- beginning with it --------------------------------------------------------------------------------------

    def tip(self) -> tuple[int, Commit | None]:
        """The newest state that the directory leads to, as far as can be told without reading all: round and commit.

        Raises as ``scan``, which it does.
        """
        self.scan()
        rounds = self.snapshots.rounds()
        round = rounds[-1] if rounds else 0
        tip = self.snapshots.info(round).commit if rounds else None
        for commit in self._commits_after(round, tip.chain if tip is not None else FIRST_CHAIN):
            round, tip = commit.round + 1, commit
        return round, tip

    def restore(self, each: Each | None = None, *, mend: bool = True) -> Restored:
        """Make the outer state of the workload the newest that the directory leads to.

        The newest snapshot that is whole, and the means since; a damaged one becomes a partial, of which the good
        chunks are kept. If there is nothing, the workload stays as it is. Raises :class:`ConfigError` if the directory
        is of another run. Without ``mend`` nothing on disk is changed: the directory may be that of a running node.
        """
        if not self._workload.spans:
            return Restored(self._workload.round, self._workload.state_digest(), 0, None)
        self.scan(mend=mend)
        each = each or in_threads
        tip = None
        for round in reversed(self.snapshots.rounds()):
            if self._is_sound(round, each, mend):
                tip = self.snapshots.info(round).commit
                self.load(round, each)
                break
        snapshot = self._workload.round
        chain = tip.chain if tip is not None else FIRST_CHAIN
        for commit in list(self._commits_after(snapshot, chain)):
            if commit.state != self._workload.state_digest() or not self._advance_if_sound(commit.round, each):
                break
            tip = commit
        return Restored(self._workload.round, self._workload.state_digest(), snapshot, tip)

    def restore_inner(self, restored: Restored) -> bool:
        """Give the workload the inner optimiser's state, if one of the same round is there."""
        tip = restored.tip
        tensors = self.inner.load(tip.round, tip.state) if tip is not None else None
        return tensors is not None and self._workload.load_inner_state(tensors)

    def _commits_after(self, round: int, chain: bytes) -> Iterable[Commit]:
        """Those whose means are here, from ``round`` on, as far as they form a chain."""
        while (stored := self._known.get(round)) is not None and stored.commit is not None:
            commit = stored.commit
            if stored.previous != chain or next_chain(chain, commit.state, commit.digest) != commit.chain:
                return
            if digest_of_means(stored.infos) != commit.digest:
                return
            yield commit
            round, chain = round + 1, commit.chain

    def _is_sound(self, round: int, each: Each, mend: bool) -> bool:
        """Whether every chunk of the snapshot can be read: before the first one replaces what is there."""
        try:
            each(lambda chunk: self._check_state(round, chunk), range(self._chunks.count))
        except DamagedError as error:
            log.warning("snapshot_damaged", path=str(error.path), chunk=error.chunk, reason=str(error))
            if mend:
                self.snapshots.demote(round)
            return False
        return True

    def _check_state(self, round: int, chunk: int) -> None:
        self.snapshots.read(round, chunk)

    def _advance_if_sound(self, round: int, each: Each) -> bool:
        digests = b"".join(i.digest for i in self._known[round].infos)
        if len(self.means.present(round, digests)) < len(self._workload.fragments.chunks(round)):
            log.warning("means_damaged", round=round, path=str(self.means.path(round)))
            self._bad.add(round)
            return False
        self.advance(round, each)
        return True

    def load(self, round: int, each: Each) -> bytes:
        """Make the snapshot the workload's outer state. Returns the digest."""
        each(lambda chunk: self.load_chunk(round, chunk), range(self._chunks.count))
        return self._workload.end_import(round)

    def load_chunk(self, round: int, chunk: int) -> None:
        self._workload.import_state(chunk, memoryview(self.snapshots.read(round, chunk)))

    def advance(self, round: int, each: Each) -> bytes:
        """Take the outer step of ``round`` with its means. Returns the digest."""
        each(lambda chunk: self.advance_chunk(round, chunk), self._workload.fragments.chunks(round))
        return self._workload.end_round()

    def advance_chunk(self, round: int, chunk: int) -> None:
        """Raises :class:`DamagedError`, :class:`StorageError`; then the chunk is as it was."""
        mean = self.means.read(round, chunk)
        if not self._workload.check(chunk, mean.payload):  # its digest is right, but who knows who wrote the file
            raise StorageError(f"{self.means.path(round)}: the mean of chunk {chunk} cannot be applied")
        self._workload.apply(chunk, mean.payload, False)

    # --- means --------------------------------------------------------------------------------------------------

    def put_mean(self, round: int, chunk: int, payload: memoryview) -> None:
        self.means.put(round, chunk, payload)

    def close_means(self, round: int, infos: Sequence[ChunkInfo]) -> None:
        """They are all there, and safe from a crash when this returns; so is the commit of the round before."""
        before = self._known.get(round - 1)
        if before is not None and before.commit is not None:
            self.means.close(round - 1, before.infos)
        self.means.close(round, infos)
        self._learn(round)

    def commit_means(self, round: int, commit: Commit, previous: bytes) -> None:
        """The means that are there are those of the round."""
        self.means.commit(round, commit, previous)
        self._learn(round)

    def infos(self, round: int) -> tuple[ChunkInfo, ...] | None:
        """Of the means that are there, if they are all there."""
        stored = self._known.get(round)
        return stored.infos if stored is not None else None

    def missing_means(self, record: Record) -> tuple[int, ...]:
        """The chunks of a committed round that are not there."""
        present = self.means.present(record.commit.round, record.means)
        return tuple(c for c in self._workload.fragments.chunks(record.commit.round) if c not in present)

    def put_committed(self, record: Record, chunk: int, payload: memoryview) -> None:
        """Raises :class:`ProtocolError` if it is not the mean that the record tells of."""
        place = self._workload.fragments.chunks(record.commit.round).index(chunk)
        wanted = record.means[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES]
        if payload.nbytes > self._workload.mean_bytes(chunk) or blake3(payload).digest() != wanted:
            raise ProtocolError(f"not the mean of chunk {chunk} that round {record.commit.round} committed")
        if not self._workload.check(chunk, payload):
            raise ProtocolError(f"the mean of chunk {chunk} of round {record.commit.round} cannot be applied")
        self.means.put(record.commit.round, chunk, payload)

    def save_record(self, record: Record) -> None:
        """All its means are there."""
        self.means.save_record(record.commit.round, record)
        self._learn(record.commit.round)

    def _learn(self, round: int) -> None:
        stored = self.means.stored(round)
        with self._lock:
            self._bad.discard(round)
            if stored is not None:
                self._known[round] = stored

    # --- snapshots ----------------------------------------------------------------------------------------------

    def begin_snapshot(self, tip: Commit | None) -> SnapshotJob:
        """Of the workload's outer state as it is now. Nothing may change it during this call, which touches no disk."""
        digests, round = self._workload.chunk_digests(), self._workload.round
        info = SnapshotInfo(round=round, state_digest=state_digest(round, digests), chunk_digests=digests, commit=tip)
        return SnapshotJob(self._workload, self.snapshots, info)

    def open_snapshot(self, manifest: Manifest) -> tuple[int, ...]:
        """Make room for one that is fetched. Returns the chunks that are not there."""
        info = SnapshotInfo(
            round=manifest.round,
            state_digest=state_digest(manifest.round, manifest.chunks),
            chunk_digests=manifest.chunks,
            commit=manifest.commit,
        )
        self.close_partial(manifest.round)
        partial = self._partials[manifest.round] = self.snapshots.open_partial(info)
        return tuple(c for c in range(self._chunks.count) if c not in partial.present)

    def put_state(self, round: int, chunk: int, payload: memoryview) -> None:
        """Raises :class:`ProtocolError` if it is another than the manifest tells of."""
        partial = self._partials.get(round)
        if partial is None:
            raise LocalError(f"no snapshot of round {round} is being fetched")
        partial.write(chunk, payload)

    def finish_snapshot(self, round: int) -> None:
        self._partials.pop(round).finish()

    def close_partial(self, round: int) -> None:
        """What came of it stays."""
        partial = self._partials.pop(round, None)
        if partial is not None:
            partial.close()

    # --- for members --------------------------------------------------------------------------------------------

    def read_mean(self, round: int, chunk: int) -> Chunk:
        """A committed one. Raises :class:`ChunkUnavailableError` if it is not here, or damaged: then it is noted."""
        stored = self._known.get(round)
        if stored is None or stored.commit is None or chunk not in self._workload.fragments.chunks(round):
            raise ChunkUnavailableError(f"the means of round {round} are not here")
        try:
            return self.means.read(round, chunk)
        except FileNotFoundError as error:
            raise ChunkUnavailableError(f"the means of round {round} are gone") from error
        except DamagedError as error:
            self._note_damage(error)
            with self._lock:
                self._bad.add(round)
            raise ChunkUnavailableError(f"the mean of chunk {chunk} of round {round} is damaged here") from error
        except StorageError as error:
            raise ChunkUnavailableError(f"the means of round {round} cannot be read here") from error

    def read_state(self, round: int, chunk: int) -> bytes:
        """Of a snapshot. Raises as :meth:`read_mean`."""
        try:
            return self.snapshots.read(round, chunk)
        except DamagedError as error:
            self._note_damage(error)
            raise ChunkUnavailableError(f"chunk {chunk} of the snapshot of round {round} is damaged here") from error
        except (StorageError, IndexError) as error:
            raise ChunkUnavailableError(f"no snapshot of round {round} is here") from error

    def read_record(self, round: int) -> bytes:
        """Encoded. Raises :class:`ChunkUnavailableError` if the round is not here."""
        try:
            record = self.means.record(round)
        except StorageError as error:
            raise ChunkUnavailableError(f"the record of round {round} cannot be read here") from error
        if record is None:
            raise ChunkUnavailableError(f"the record of round {round} is not here")
        return encode(record)

    def read_manifest(self, round: int) -> bytes:
        """Of a snapshot, encoded. Raises :class:`ChunkUnavailableError` if there is none."""
        try:
            info = self.snapshots.info(round)
        except StorageError as error:
            raise ChunkUnavailableError(f"no snapshot of round {round} is here") from error
        return encode(Manifest(round=round, chunks=info.chunk_digests, commit=info.commit))

    @staticmethod
    def _note_damage(error: DamagedError) -> None:
        log.warning("ledger_damaged", path=str(error.path), chunk=error.chunk, reason=str(error))

    # --- what goes ----------------------------------------------------------------------------------------------

    def keep(self, snapshots: Iterable[int], means_from: int) -> None:
        """Delete the other snapshots, partial ones up to the newest, and the means of earlier rounds."""
        kept = set(snapshots)
        for round in self.snapshots.rounds():
            if round not in kept:
                self.snapshots.remove(round)
        for round in self.snapshots.partials():
            if round <= max(kept, default=0) and round not in self._partials:
                self.snapshots.remove_partial(round)
        for round in self.means.rounds():
            if round < means_from:
                with self._lock:
                    self._known.pop(round, None)
                    self._bad.discard(round)
                self.means.remove(round)


class SnapshotJob:
    """A snapshot of the outer state, which is written while that goes on to change.

    Whoever changes a chunk calls :meth:`before_change` first: if the chunk is not written yet, it is then. So no second
    copy of the state is needed, and nobody waits but for a chunk.
    """

    def __init__(self, workload: Workload, snapshots: Snapshots, info: SnapshotInfo) -> None:
        self.info = info
        self._workload = workload
        self._snapshots = snapshots
        self._partial: PartialSnapshot | None = None
        self._todo = set(range(workload.chunk_count))
        self._copying = threading.Lock()
        self._opening = threading.Lock()
        self._failure: StorageError | None = None

    def before_change(self, chunk: int) -> None:
        """Write the chunk if it is not yet. Never raises for the disk: the snapshot fails, and not the training."""
        with self._copying:  # who comes second goes on when the chunk is copied
            if chunk not in self._todo or self._failure is not None:
                return
            data = self._workload.export_state(chunk)
            self._todo.discard(chunk)
        try:
            self._open().write(chunk, data)
        except StorageError as error:
            self._failure = error

    def _open(self) -> PartialSnapshot:
        with self._opening:
            if self._partial is None:
                self._partial = self._snapshots.open_partial(self.info)
            return self._partial

    def finish(self) -> None:
        """All chunks are written: make it a snapshot. Raises :class:`StorageError`; a partial may stay then."""
        try:
            if self._failure is not None:
                raise self._failure
            self._open().finish()
        finally:
            if self._partial is not None:
                self._partial.close()


def digest_of_means(infos: Iterable[ChunkInfo]) -> bytes:
    """The common digest of a round's means, as a commit has it."""
    return blake3(b"".join(info.digest for info in infos)).digest()


def in_threads(function: Callable[[int], None], chunks: Iterable[int]) -> None:
    """Of every chunk, as many at once as there are cores. The first error comes out, when all have ended."""
    with ThreadPoolExecutor(min(MAX_THREADS, usable_cores())) as pool:
        for future in [pool.submit(function, chunk) for chunk in chunks]:
            future.result()
