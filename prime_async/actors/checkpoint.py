"""The checkpoint actor: what a node that is behind gets onto its disk, and how it makes that its outer state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from blake3 import blake3

from prime_async.actors.fetcher import Fetcher
from prime_async.actors.ledger import LedgerKeeper
from prime_async.errors import ChunkUnavailableError, ProtocolError, StorageError
from prime_async.ledger import DamagedError, Ledger, SnapshotJob
from prime_async.machines.vocabulary import (
    AdoptRound,
    Advance,
    CancelFetch,
    CancelFetches,
    ChunkImported,
    ChunkStored,
    DiskWork,
    Effect,
    EndImport,
    Event,
    Fetch,
    FetchFailed,
    FindRecord,
    FinishSnapshot,
    ImportChunk,
    Imported,
    Keep,
    LedgerFailed,
    LoadSnapshot,
    ManifestRead,
    OpenRound,
    OpenSnapshot,
    ReadManifest,
    ReadRecord,
    RecordRead,
    RoundOpened,
    RoundStored,
    Send,
    SnapshotOpened,
    SnapshotStored,
    StoreChunk,
    StoreRecord,
    WriteSnapshot,
)
from prime_async.messages import DIGEST_BYTES, Commit, Manifest, Payload, Record, decode, state_digest
from prime_async.transport.base import Chunk, Transport


class CheckpointActor:
    """Performs the effects of a checkpoint machine.

    What changes the outer state, or the disk, does so one after the other, in the order in which it was asked for.
    """

    def __init__(
        self,
        transport: Transport,
        keeper: LedgerKeeper,
        nursery: trio.Nursery,
        post: Callable[[Event], None],
        retract: Callable[[Callable[[Event], bool]], None],
    ) -> None:
        self._transport = transport
        self._keeper = keeper
        self._tensors = keeper.tensors
        self._nursery = nursery
        self._post = post
        self._fetcher = Fetcher(transport, nursery, post, retract)
        self._imports = 0  # chunks asked to be put in their places since the start
        self._manifest: Manifest | None = None  # that was read last
        self._records: dict[int, Record] = {}  # of the rounds that are being fetched
        self._applied: set[int] = set()  # chunks that an Advance which failed has moved already
        self._commits: dict[int, Commit] = {}  # of the rounds that are on disk

    def perform(self, effect: Effect) -> None:
        match effect:
            case Send(peer=peer, message=message):
                self._transport.send(peer, message)
            case Fetch() | CancelFetch() | CancelFetches():
                self._fetcher.perform(effect)
            case ImportChunk():
                self._keeper.served_round = None
                self._imports += 1
                chunk = self._fetcher.take(effect.peer, effect.key)
                self._nursery.start_soon(self._import_chunk, effect, chunk)
            case EndImport(round=round):
                self._nursery.start_soon(self._end_import, round, self._imports)
            case ReadRecord():
                self._read_record(effect)
            case FindRecord(round=round):
                self._nursery.start_soon(self._find_record, round)
            case ReadManifest():
                self._read_manifest(effect)
            case WriteSnapshot(round=round):
                self._write_snapshot(round)
            case StoreChunk(peer=peer, key=key):
                self._nursery.start_soon(self._store_chunk, effect, self._fetcher.take(peer, key))
            case _:
                self._perform_in_turn(effect)

    def _perform_in_turn(self, effect: Effect) -> None:
        start = self._nursery.start_soon
        match effect:
            case OpenRound(record=record):
                self._keeper.fetch_round(record.commit.round)
                self._records[record.commit.round] = record
                start(self._in_turn, "open_round", record.commit.round, self._open_round, record)
            case StoreRecord(record=record):
                start(self._in_turn, "store_record", record.commit.round, self._store_record, record)
            case AdoptRound(commit=commit):
                start(self._in_turn, "adopt_round", commit.round, self._adopt_round, effect)
            case OpenSnapshot(round=round):
                start(self._in_turn, "open_snapshot", round, self._open_snapshot, self._manifest)
            case FinishSnapshot(round=round):
                start(self._in_turn, "finish_snapshot", round, self._finish_snapshot, round)
            case LoadSnapshot(round=round):
                self._keeper.served_round = None
                start(self._in_turn, "load_snapshot", round, self._load_snapshot, round)
            case Advance(round=round):
                self._keeper.served_round = None
                start(self._in_turn, "advance", round, self._advance, round)
            case Keep(means_from=means_from):
                start(self._in_turn, "keep", means_from, self._keep, effect)
            case _:
                raise TypeError(f"checkpoint does not perform {type(effect).__name__}")

    async def _in_turn(
        self, of: DiskWork, round: int, function: Callable[..., Awaitable[None]], argument: object
    ) -> None:
        """What goes wrong on disk is told to the machine, and ends nothing else."""
        try:
            async with self._keeper.writing() as ledger:
                await function(ledger, argument)
        except StorageError as error:
            self._keeper.failed(of, round, error)

    # --- what came ----------------------------------------------------------------------------------------------

    def _read_record(self, effect: ReadRecord) -> None:
        data = self._fetcher.take(effect.peer, effect.key).payload
        try:
            record = decode(bytes(data), Payload, limit=data.nbytes)
            if not isinstance(record, Record) or record.commit.round != effect.key.round:
                raise ProtocolError("it is not the record of that round")
        except ProtocolError:
            self._post(FetchFailed(peer=effect.peer, key=effect.key, fault="invalid"))
        else:
            self._post(RecordRead(peer=effect.peer, record=record))

    async def _find_record(self, round: int) -> None:
        ledger = self._keeper.ledger
        if ledger is None:
            return
        try:
            data = await self._tensors.run(ledger.read_record, round)
        except ChunkUnavailableError:
            return
        self._post(RecordRead(peer="", record=decode(data, Record)))

    def _read_manifest(self, effect: ReadManifest) -> None:
        data, key = self._fetcher.take(effect.peer, effect.key).payload, effect.key
        try:
            manifest = decode(bytes(data), Payload, limit=data.nbytes)
            if not isinstance(manifest, Manifest) or manifest.round != key.round:
                raise ProtocolError("it is not the manifest of that round")
            if len(manifest.chunks) != DIGEST_BYTES * self._count:
                raise ProtocolError("it is the manifest of another model")
        except ProtocolError:
            self._post(FetchFailed(peer=effect.peer, key=key, fault="invalid"))
            return
        self._manifest = manifest
        ours = self._tensors.workload.chunk_digests()
        read = ManifestRead(
            peer=effect.peer,
            round=manifest.round,
            digest=state_digest(manifest.round, manifest.chunks),
            commit=manifest.commit,
            differing=tuple(c for c in range(self._count) if _part(ours, c) != _part(manifest.chunks, c)),
        )
        self._post(read)

    def _chunks(self, round: int) -> range:
        return self._tensors.workload.fragments.chunks(round)

    @property
    def _count(self) -> int:
        return self._tensors.workload.chunk_count

    # --- onto the disk ------------------------------------------------------------------------------------------

    async def _store_chunk(self, effect: StoreChunk, chunk: Chunk) -> None:
        """Several at once."""
        try:
            await self._tensors.run(self._put, effect, chunk)
        except ProtocolError:
            self._post(FetchFailed(peer=effect.peer, key=effect.key, fault="invalid"))
        except StorageError as error:
            self._keeper.failed("store_chunk", effect.key.round, error)
        else:
            self._post(ChunkStored(key=effect.key))

    def _put(self, effect: StoreChunk, chunk: Chunk) -> None:
        ledger, key = self._keeper.ledger, effect.key
        assert ledger is not None
        if key.kind == "state":
            ledger.put_state(key.round, key.chunk, chunk.payload)
        elif key.round in self._records:
            ledger.put_committed(self._records[key.round], key.chunk, chunk.payload)

    async def _open_round(self, ledger: Ledger, record: Record) -> None:
        missing = await self._tensors.run(ledger.missing_means, record)
        self._post(RoundOpened(round=record.commit.round, missing=missing))

    async def _store_record(self, ledger: Ledger, record: Record) -> None:
        await self._tensors.run(ledger.save_record, record)
        self._records.pop(record.commit.round, None)
        self._stored(record.commit)

    async def _adopt_round(self, ledger: Ledger, effect: AdoptRound) -> None:
        round = effect.commit.round
        infos = ledger.infos(round)
        digests = b"".join(i.digest for i in infos or ())
        present = await self._tensors.run(ledger.means.present, round, digests) if infos else set()
        if (
            len(present) < len(self._chunks(round)) or blake3(digests).digest() != effect.commit.digest
        ):  # a loss of power may have left what was closed, and not all that was in it
            raise StorageError(f"{ledger.means.path(round)}: means are damaged that were safe")
        await self._tensors.run(ledger.commit_means, round, effect.commit, effect.previous)
        self._stored(effect.commit)

    def _stored(self, commit: Commit) -> None:
        self._post(RoundStored(round=commit.round))
        self._keeper.announce()

    async def _open_snapshot(self, ledger: Ledger, manifest: Manifest) -> None:
        missing = await self._tensors.run(ledger.open_snapshot, manifest)
        self._post(SnapshotOpened(round=manifest.round, missing=missing))

    async def _finish_snapshot(self, ledger: Ledger, round: int) -> None:
        await self._tensors.run(ledger.finish_snapshot, round)
        self._post(SnapshotStored(round=round))
        self._keeper.announce()

    def _write_snapshot(self, round: int) -> None:
        job = self._keeper.begin_snapshot(round)
        if job is None:
            text = "the outer state had gone on before a snapshot of it was begun; the next one will be written"
            self._post(LedgerFailed(of="write_snapshot", round=round, damaged=False, text=text))
        else:
            self._nursery.start_soon(self._write, job)

    async def _write(self, job: SnapshotJob) -> None:
        if await self._keeper.write_snapshot(job):
            self._post(SnapshotStored(round=job.info.round))

    async def _keep(self, ledger: Ledger, keep: Keep) -> None:
        await self._tensors.run(ledger.keep, keep.snapshots, keep.means_from)
        self._keeper.announce()

    # --- into the outer state -----------------------------------------------------------------------------------

    async def _load_snapshot(self, ledger: Ledger, round: int) -> None:
        def load(chunk: int) -> None:
            self._keeper.before_change(chunk)
            ledger.load_chunk(round, chunk)

        async with self._tensors.state_lock:
            self._applied.clear()
            try:
                await self._tensors.for_each(load, range(self._count))
            except DamagedError:
                await self._tensors.run(ledger.snapshots.demote, round)
                raise
            digest = await self._tensors.run(self._tensors.workload.end_import, round)
        info = await self._tensors.run(ledger.snapshots.info, round)
        self._imported(round, digest, info.commit)

    async def _advance(self, ledger: Ledger, round: int) -> None:
        """If it fails half-way, the next try goes on from there: a chunk is moved once."""

        def advance(chunk: int) -> None:
            if chunk not in self._applied:
                self._keeper.before_change(chunk)
                ledger.advance_chunk(round, chunk)
                self._applied.add(chunk)

        async with self._tensors.state_lock:
            await self._tensors.for_each(advance, self._chunks(round))
            digest = await self._tensors.run(self._tensors.workload.end_round)
            self._applied.clear()
        self._imported(round + 1, digest, ledger.find_commit(round))

    def _imported(self, round: int, digest: bytes, tip: Commit | None) -> None:
        self._keeper.tip, self._keeper.served_round = tip, round
        self._post(Imported(round=round, digest=digest))

    async def _import_chunk(self, effect: ImportChunk, chunk: Chunk) -> None:
        key = effect.key
        try:
            async with self._tensors.state_lock:
                await self._tensors.run(self._import, key.chunk, chunk)
        except ProtocolError:
            self._post(FetchFailed(peer=effect.peer, key=key, fault="invalid"))
        else:
            self._post(ChunkImported(key=key))

    def _import(self, number: int, chunk: Chunk) -> None:
        self._keeper.before_change(number)
        self._tensors.workload.import_state(number, chunk.payload)

    async def _end_import(self, round: int, imports: int) -> None:
        async with self._tensors.state_lock:
            digest = await self._tensors.run(self._tensors.workload.end_import, round)
        if imports == self._imports:  # else another state is being put in its place already
            self._keeper.served_round = round
        self._post(Imported(round=round, digest=digest))


def _part(digests: bytes, chunk: int) -> bytes:
    return digests[chunk * DIGEST_BYTES : (chunk + 1) * DIGEST_BYTES]
