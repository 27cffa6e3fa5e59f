"""The ledger of a node, from the event loop: what is written as it arrives, and what peers are given from the disk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio
from blake3 import blake3

from prime_async.actors.tensors import Tensors
from prime_async.errors import ChunkUnavailableError, StorageError
from prime_async.ledger import DamagedError, Ledger, SnapshotJob
from prime_async.machines.vocabulary import DiskWork, Event, LedgerFailed, Settle, StoreMeans
from prime_async.messages import ChunkInfo, ChunkKey, Commit, Manifest, encode
from prime_async.transport.base import Chunk

READS = 2
"""Chunks that are read from disk for peers at once."""
SLOW_BYTES_PER_S = 16 << 20
"""What all peers that are behind are given together, at most, while this node is in an exchange of its own."""


class LedgerKeeper:
    """Who writes to the ledger, and who reads from it, one after the other where that matters.

    ``served_round`` is the round that the outer state in memory is at, or ``None`` while it is being changed; ``tip``
    the commit that led to it. ``exchanging``: this node gets chunks of a round, and peers that are behind wait.
    Without a ledger (a workload of which nothing is kept on disk) nothing is written, and only the state in memory
    can be read.
    """

    def __init__(self, ledger: Ledger | None, tensors: Tensors, tip: Commit | None) -> None:
        self.ledger = ledger
        self.tensors = tensors
        self.tip = tip
        self.served_round: int | None = tensors.workload.round
        self.exchanging = False
        self.post: Callable[[Event], None] = lambda _: None
        """Where events for the checkpoint machine go."""
        self.on_snapshot: Callable[[], None] = lambda: None
        """Told when there is a new snapshot on disk."""
        self._writing = trio.StrictFIFOLock()  # what is done in the order in which it was asked for
        self._reads = trio.CapacityLimiter(READS)
        self._slow = trio.StrictFIFOLock()  # of who is given something in the midst of an exchange
        self._changed = trio.Event()  # what is on disk, or ``exchanging``
        self._put: dict[tuple[int, int], bytes] = {}  # round, chunk -> digest of the mean that is in its slot
        self._fetched: set[int] = set()  # rounds whose committed means are fetched: what comes late is not put
        self._job: SnapshotJob | None = None
        self._next_tip: Commit | None = None
        self._broken = False  # the last write failed

    # --- what is there ------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """Tell the machine what is on disk, and look again at who waits."""
        if self.ledger is not None:
            self.post(self.ledger.holdings)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def set_exchanging(self, exchanging: bool) -> None:
        if exchanging != self.exchanging:
            self.exchanging = exchanging
            self._wake()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Ledger]:
        """The ledger, for one write after the other; not cancelled half-way."""
        assert self.ledger is not None
        with trio.CancelScope(shield=True):
            async with self._writing:
                yield self.ledger

    def failed(self, of: DiskWork, round: int, error: StorageError) -> None:
        """Tell the machine that ``of`` could not be done for ``round``, or that what it read was damaged."""
        damaged = isinstance(error, DamagedError)
        self._broken = self._broken or not damaged
        self.post(LedgerFailed(of=of, round=round, damaged=damaged, text=str(error)[:1024]))

    # --- the means of the round that is exchanged ---------------------------------------------------------------

    def put_now(self, key: ChunkKey, payload: memoryview, digest: bytes) -> None:
        """Write a mean as it arrives (in a worker thread). What cannot be written is tried again when all are here."""
        if self.ledger is None or self._broken or key.round in self._fetched:
            return
        try:
            self.ledger.put_mean(key.round, key.chunk, payload)
        except StorageError:
            self._broken = True
        else:
            self._put[key.round, key.chunk] = digest

    async def store_means(self, effect: StoreMeans, means: Mapping[int, Chunk]) -> bool | None:
        """Have them safe from a crash, if the disk takes them. ``None``: they are not wanted any more.

        Without a ledger they are as safe as whoever keeps nothing wants them.
        """
        if self.ledger is None:
            return True
        async with self.writing():
            if effect.round in self._fetched:
                return None
            safe = await self._try("store_means", effect.round, self._close, effect.round, means)
        self.announce()
        return safe

    async def settle(self, settle: Settle, means: Mapping[int, Chunk]) -> None:
        """These are the committed means of the round."""
        if self.ledger is None:
            return
        async with self.writing() as ledger:
            if settle.round in self._fetched:
                return
            if await self._try("settle", settle.round, self._close, settle.round, means):
                commit = partial(ledger.commit_means, settle.round, settle.commit, settle.previous)
                await self._try("settle", settle.round, commit)
            self._put = {k: d for k, d in self._put.items() if k[0] > settle.round}
        self.announce()

    def _close(self, round: int, means: Mapping[int, Chunk]) -> None:
        assert self.ledger is not None
        infos: list[ChunkInfo] = [means[c].info for c in sorted(means)]
        if self.ledger.infos(round) == tuple(infos):
            return
        for chunk, mean in sorted(means.items()):
            if self._put.get((round, chunk)) != mean.info.digest:
                self.ledger.put_mean(round, chunk, mean.payload)
                self._put[round, chunk] = mean.info.digest
        self.ledger.close_means(round, infos)

    async def _try(self, of: DiskWork, round: int, function: Callable[..., None], *args: object) -> bool:
        """Whether it could be done. If not that is told, and training goes on."""
        try:
            await self.tensors.run(function, *args)
        except StorageError as error:
            self.failed(of, round, error)
            return False
        self._broken = False
        return True

    def note_commit(self, commit: Commit) -> None:
        """Its means will be applied next."""
        self._next_tip = commit

    def applied(self, round: int) -> None:
        """They were: the outer state is that after ``round`` rounds."""
        if self._next_tip is not None and self._next_tip.round == round - 1:
            self.tip = self._next_tip
        self.served_round = round

    def fetch_round(self, round: int) -> None:
        """From now on the committed means of the round are fetched, and what the exchange has of it comes too late."""
        self._fetched = {r for r in self._fetched if r > round - 64} | {round}

    # --- snapshots ----------------------------------------------------------------------------------------------

    def before_change(self, chunk: int) -> None:
        """The outer state of ``chunk`` is about to change (in a worker thread): the snapshot under way needs it."""
        job = self._job
        if job is not None:
            job.before_change(chunk)

    def begin_snapshot(self, round: int) -> SnapshotJob | None:
        """Of the outer state as it is now; ``None`` if that is another, or changing. To be written soon."""
        workload = self.tensors.workload
        if self.ledger is None or self._job is not None or self.served_round != round or workload.round != round:
            return None
        self._job = self.ledger.begin_snapshot(self.tip)
        return self._job

    async def write_snapshot(self, job: SnapshotJob) -> bool:
        """Whether it is on disk now. If not that was told. Not cancelled half-way."""
        try:
            with trio.CancelScope(shield=True):
                await self.tensors.for_each(job.before_change, range(self.tensors.workload.chunk_count))
                async with self._writing:
                    await self.tensors.run(job.finish)
        except StorageError as error:
            self.failed("write_snapshot", job.info.round, error)
            return False
        finally:
            self._job = None
        self._broken = False
        self.announce()
        self.on_snapshot()
        return True

    async def save(self) -> Path | None:
        """Have the outer state, and the inner optimiser's, on disk before this node leaves: where, if it is there.

        Not while it is half one and half another. What goes wrong is logged: the node can fetch its state again.
        """
        workload, ledger = self.tensors.workload, self.ledger
        if ledger is None or workload.round == 0 or self.served_round != workload.round:
            return None
        round = workload.round
        if round not in ledger.snapshots.rounds():
            job = self.begin_snapshot(round)
            if job is None or not await self.write_snapshot(job):
                return None
        if self.tip is not None:
            await self.save_inner(self.tip.round, self.tip.state)
        return ledger.snapshots.path(round)

    async def save_inner(self, round: int, state_digest: bytes) -> None:
        """The inner optimiser's state after the inner steps of ``round``, which began at this outer state."""
        if self.ledger is None:
            return
        tensors = self.tensors.workload.inner_state()
        if tensors:
            await self._try("save_inner", round, self.ledger.inner.save, round, state_digest, tensors)

    # --- for peers ----------------------------------------------------------------------------------------------

    def has_committed(self, round: int) -> bool:
        """Whether the committed means of the round are on disk, as far as is known."""
        return self.ledger is not None and self.ledger.find_commit(round) is not None

    async def provide(self, key: ChunkKey) -> Chunk:
        """A record, a manifest, a committed mean, or a chunk of an outer state: from the disk, or from memory.

        A few at once, and after this node's own exchange. Raises :class:`ChunkUnavailableError`.
        """
        if key.kind in ("state", "manifest") and self.served_round == key.round:
            return await self._from_memory(key)
        if self.ledger is None:
            raise ChunkUnavailableError(f"{key} is not here: nothing is kept on disk")
        await self._give_way(key)
        if key.kind == "record":
            await self._until_committed(key.round)
        return await trio.to_thread.run_sync(self._read, key, limiter=self._reads)

    async def _give_way(self, key: ChunkKey) -> None:
        """Wait until this node's exchange is over, or until it is bearable to give this chunk beside it."""
        if self.exchanging:
            async with self._slow:
                with trio.move_on_after(self._size(key) / SLOW_BYTES_PER_S):
                    while self.exchanging:
                        await self._changed.wait()

    def _size(self, key: ChunkKey) -> int:
        workload = self.tensors.workload
        if not 0 <= key.chunk < workload.chunk_count:
            return 0
        if key.kind in ("record", "manifest"):
            return 64 * workload.chunk_count
        return workload.state_bytes(key.chunk) if key.kind == "state" else workload.usual_mean_bytes(key.chunk)

    async def _until_committed(self, round: int) -> None:
        """The round that was applied last may be on its way to the disk."""
        assert self.ledger is not None
        while self.ledger.find_commit(round) is None and round >= self.tensors.workload.round - 1:
            await self._changed.wait()

    def _read(self, key: ChunkKey) -> Chunk:
        assert self.ledger is not None
        if key.kind == "mean":
            return self.ledger.read_mean(key.round, key.chunk)
        if key.kind == "state":
            return _chunk(self.ledger.read_state(key.round, key.chunk))
        read = self.ledger.read_record if key.kind == "record" else self.ledger.read_manifest
        return _chunk(read(key.round))

    async def _from_memory(self, key: ChunkKey) -> Chunk:
        """Raises :class:`ChunkUnavailableError` if the outer state is not, for as long as it takes, at that round."""
        if not 0 <= key.chunk < self.tensors.workload.chunk_count:
            raise ChunkUnavailableError(f"{key}: there is no such chunk")
        data = await self.tensors.run(self._read_memory, key)
        if self.served_round != key.round:
            raise ChunkUnavailableError(f"{key} is gone: the outer state is at round {self.served_round}")
        return _chunk(data)

    def _read_memory(self, key: ChunkKey) -> bytes:
        workload = self.tensors.workload
        if key.kind == "state":
            return workload.export_state(key.chunk)
        return encode(Manifest(round=key.round, chunks=workload.chunk_digests(), commit=self.tip))


def _chunk(data: bytes) -> Chunk:
    return Chunk(info=ChunkInfo(digest=blake3(data).digest()), payload=memoryview(data))
