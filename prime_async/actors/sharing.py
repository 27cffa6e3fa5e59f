"""The checkpoint actor of a group that shares files: what is given to others, and what comes from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
import trio
from blake3 import blake3

from prime_async.actors.fetcher import Fetcher
from prime_async.errors import ChunkUnavailableError, LocalError, ProtocolError, StorageError
from prime_async.ledger.contents import Coming, Content, chunk_count, read_manifest
from prime_async.ledger.errors import DamagedError
from prime_async.machines.vocabulary import (
    CancelFetch,
    CancelFetches,
    ChunkStored,
    DiskWork,
    Effect,
    Event,
    Fetch,
    FetchFailed,
    FetchFile,
    FinishSnapshot,
    LeaveFile,
    LedgerAt,
    LedgerFailed,
    ManifestRead,
    OpenSnapshot,
    ReadManifest,
    Send,
    SnapshotOpened,
    SnapshotStored,
    StoreChunk,
)
from prime_async.messages import ChunkInfo, ChunkKey, FileManifest, encode, file_number
from prime_async.transport.base import Chunk, Transport

log = structlog.get_logger(__name__)

MAX_FILES = 256
"""The numbers of more do not go into one message."""
THREADS = 4
"""That read and write chunks at once."""


@dataclass(slots=True, eq=False)
class _Job:
    """A file that is coming. ``under_way``: threads at work on it."""

    digest: bytes
    coming: Coming
    manifest: FileManifest | None = None
    content: Content | None = None
    failure: Exception | None = None
    done: trio.Event = field(default_factory=trio.Event)
    under_way: int = 0
    at_rest: trio.Event = field(default_factory=trio.Event)


class Contents:
    """The files that this node gives to others: a :class:`~prime_async.transport.base.Provider`.

    ``on_change`` is called when they are others. ``may_read``: whether a peer is given anything.
    """

    def __init__(self, may_read: Callable[[str], bool], on_change: Callable[[], None]) -> None:
        self._may_read = may_read
        self._on_change = on_change
        self._held: dict[int, tuple[bytes, Content]] = {}
        self._limiter = trio.CapacityLimiter(THREADS)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the files that are here, ascending."""
        return tuple(sorted(self._held))

    def find(self, digest: bytes) -> Content | None:
        known, content = self._held.get(file_number(digest), (b"", None))
        return content if known == digest else None

    def check_room(self, digest: bytes) -> None:
        """Raises :class:`LocalError` if no file of this digest can be added."""
        known, _ = self._held.get(file_number(digest), (None, None))
        if known not in (None, digest):
            raise LocalError(f"a file whose digest begins like {digest.hex()} is shared already: unshare it first")
        if known is None and len(self._held) >= MAX_FILES:
            raise LocalError(f"{MAX_FILES} files are shared already, which is the most: unshare one first")

    def add(self, digest: bytes, content: Content) -> None:
        """Give it from now on; instead of what was given under this digest. Raises :class:`LocalError`."""
        self.check_room(digest)
        before = self.find(digest)
        if before is not None:
            before.close()
        self._held[file_number(digest)] = digest, content
        self._on_change()

    def drop(self, digest: bytes) -> None:
        """Do not give it any more. Nothing if it was not given."""
        content = self.find(digest)
        if content is not None:
            del self._held[file_number(digest)]
            content.close()
            self._on_change()

    def close(self) -> None:
        for _, content in self._held.values():
            content.close()
        self._held.clear()

    async def provide(self, peer: str, key: ChunkKey) -> Chunk:
        """See :class:`~prime_async.transport.base.Provider`."""
        digest, content = self._held.get(key.round, (b"", None))
        if content is None or not self._may_read(peer):
            raise ChunkUnavailableError(f"{key} is not here: no such file is given to you")
        if key.kind == "manifest":
            return _chunk(encode(content.manifest))
        if key.kind != "state" or key.chunk >= chunk_count(content.manifest):
            raise ChunkUnavailableError(f"{key}: there is no such chunk of a file")
        try:
            return _chunk(await trio.to_thread.run_sync(content.read, key.chunk, limiter=self._limiter))
        except DamagedError as error:
            log.warning("shared_file_changed", file=digest.hex(), reason=str(error))
            if self.find(digest) is content:
                self.drop(digest)
            raise ChunkUnavailableError(f"{key} is not what it was any more") from error


class SharingActor:
    """Performs the effects of a sharing machine. ``chunk_bytes``: as in all manifests of the group."""

    def __init__(
        self,
        transport: Transport,
        contents: Contents,
        chunk_bytes: int,
        nursery: trio.Nursery,
        post: Callable[[Event], None],
        retract: Callable[[Callable[[Event], bool]], None],
    ) -> None:
        self._transport = transport
        self._contents = contents
        self._chunk_bytes = chunk_bytes
        self._nursery = nursery
        self._post = post
        self._retract = retract
        self._fetcher = Fetcher(transport, nursery, post, retract)
        self._limiter = trio.CapacityLimiter(THREADS)
        self._jobs: dict[int, _Job] = {}

    def announce(self) -> None:
        """Tell the machine which files are here."""
        self._post(LedgerAt(snapshots=self._contents.numbers))

    async def fetch(self, digest: bytes, coming: Coming) -> Content:
        """Get the file of this digest into ``coming``, however long that takes. One call for each file at a time.

        Cancelled, or if it raises :class:`StorageError`, what has come is left as ``coming`` leaves it.
        """
        number = file_number(digest)
        if number in self._jobs:
            await trio.to_thread.run_sync(coming.leave)
            raise LocalError(f"a file whose digest begins like {digest.hex()} is being fetched: wait for that")
        job = self._jobs[number] = _Job(digest, coming)
        self._post(FetchFile(digest=digest))
        is_taken = False
        try:
            await job.done.wait()
            if job.failure is not None:
                raise job.failure
            is_taken = True
        finally:
            if not is_taken:
                await self._leave(number, job)
        assert job.content is not None
        return job.content

    async def _leave(self, number: int, job: _Job) -> None:
        """What the machine has not heard of the file yet it does not hear: it may be wanted anew, in another place."""
        if self._jobs.get(number) is job:
            del self._jobs[number]
            self._retract(lambda event: _number_of(event) == number)
            self._post(LeaveFile(digest=job.digest))
        with trio.CancelScope(shield=True):
            while job.under_way:
                await job.at_rest.wait()
            leave = job.content.close if job.content is not None else job.coming.leave
            await trio.to_thread.run_sync(leave, limiter=self._limiter)

    def close(self) -> None:
        """This member leaves: who waits for a file learns it."""
        for job in self._jobs.values():
            job.failure = job.failure or LocalError("this member has left its group, and the file had not come")
            job.done.set()

    # --- effects ------------------------------------------------------------------------------------------------

    def perform(self, effect: Effect) -> None:
        match effect:
            case Send(peer=peer, message=message):
                self._transport.send(peer, message)
            case Fetch() | CancelFetch() | CancelFetches():
                self._fetcher.perform(effect)
            case ReadManifest(peer=peer, key=key):
                self._read_manifest(peer, key, self._fetcher.take(peer, key))
            case OpenSnapshot(round=number):
                self._start("open_snapshot", number, self._begin)
            case StoreChunk(peer=peer, key=key):
                chunk = self._fetcher.take(peer, key)
                self._start("store_chunk", key.round, lambda job: self._write(job, peer, key, chunk))
            case FinishSnapshot(round=number):
                self._start("finish_snapshot", number, self._finish)
            case _:
                raise TypeError(f"sharing does not perform {type(effect).__name__}")

    def _start(self, of: DiskWork, number: int, function: Callable[[_Job], Event | None]) -> None:
        """``function`` in a thread; the machine is told what it gives. If the disk fails the fetch does."""
        job = self._jobs.get(number)
        if job is not None:
            job.under_way += 1
            self._nursery.start_soon(self._run, of, number, job, function)

    async def _run(self, of: DiskWork, number: int, job: _Job, function: Callable[[_Job], Event | None]) -> None:
        event: Event | None = None
        try:
            with trio.CancelScope(shield=True):
                event = await trio.to_thread.run_sync(function, job, limiter=self._limiter)
        except StorageError as error:
            job.failure = job.failure or error
            event = LedgerFailed(of=of, round=number, damaged=False, text=str(error)[:1024])
        finally:
            job.under_way -= 1
            if not job.under_way:
                job.at_rest.set()
                job.at_rest = trio.Event()
        if self._jobs.get(number) is not job:
            return
        self._tell(number, job, event)

    def _tell(self, number: int, job: _Job, event: Event | None) -> None:
        if isinstance(event, FetchFailed):
            self._transport.accuse(event.peer, f"{event.key} is not what its manifest says")
        if isinstance(event, SnapshotStored):
            del self._jobs[number]
        if event is not None:
            self._post(event)
        if job.failure is not None or job.content is not None:
            job.done.set()

    def _read_manifest(self, peer: str, key: ChunkKey, chunk: Chunk) -> None:
        job = self._jobs.get(key.round)
        if job is None:
            return
        try:
            job.manifest = read_manifest(bytes(chunk.payload), job.digest, self._chunk_bytes)
        except ProtocolError as error:
            self._transport.accuse(peer, f"{key}: {error}")
            self._post(FetchFailed(peer=peer, key=key, fault="invalid"))
        else:
            self._post(ManifestRead(peer=peer, round=key.round, digest=job.digest, commit=None, differing=()))

    def _begin(self, job: _Job) -> Event:
        number = file_number(job.digest)

        def step() -> None:
            if self._jobs.get(number) is not job:
                raise StorageError("nobody wants to know any more what is here of it")

        assert job.manifest is not None
        return SnapshotOpened(round=number, missing=job.coming.begin(job.manifest, step))

    def _write(self, job: _Job, peer: str, key: ChunkKey, chunk: Chunk) -> Event:
        try:
            job.coming.write(key.chunk, chunk.payload)
        except ProtocolError:
            return FetchFailed(peer=peer, key=key, fault="invalid")
        return ChunkStored(key=key)

    def _finish(self, job: _Job) -> Event:
        job.content = job.coming.finish()
        return SnapshotStored(round=file_number(job.digest))


def _number_of(event: Event) -> int | None:
    """Of the file that ``event`` is an outcome for; ``None`` if it is none."""
    match event:
        case ChunkStored(key=key) | FetchFailed(key=key):
            return key.round
        case ManifestRead(round=number) | SnapshotOpened(round=number) | SnapshotStored(round=number):
            return number
        case _:
            return None


def _chunk(data: bytes | memoryview) -> Chunk:
    return Chunk(info=ChunkInfo(digest=blake3(data).digest()), payload=memoryview(data))
