"""The checkpoint actor: gives the outer state to who joins, and fetches it when this node does."""

from __future__ import annotations

from collections.abc import Callable

import trio
from blake3 import blake3

from prime_async.actors.fetcher import Fetcher
from prime_async.actors.store import ChunkStore
from prime_async.actors.tensors import Tensors
from prime_async.errors import ChunkUnavailableError, ProtocolError
from prime_async.machines.vocabulary import (
    CancelFetches,
    ChunkImported,
    Effect,
    EndImport,
    Event,
    Fetch,
    FetchFailed,
    ImportChunk,
    Imported,
)
from prime_async.messages import ChunkInfo, ChunkKey
from prime_async.transport.base import Chunk, Transport


class CheckpointActor:
    """Performs the effects of a checkpoint machine, and reads the outer state for peers.

    ``served_round`` is the round that the outer state is at, or ``None`` while it is being changed: a chunk is served
    only if it was the same before and after it was read. What replaces or saves the state does so one after the other,
    in the order in which it was asked for.
    """

    def __init__(
        self,
        transport: Transport,
        tensors: Tensors,
        store: ChunkStore,
        nursery: trio.Nursery,
        post: Callable[[Event], None],
        retract: Callable[[Callable[[Event], bool]], None],
    ) -> None:
        self._tensors = tensors
        self._nursery = nursery
        self._post = post
        self._fetcher = Fetcher(transport, nursery, post, retract)
        self._imports = 0  # chunks asked to be put in their places since the start
        self.served_round: int | None = None
        store.read_state = self.read_state

    def perform(self, effect: Effect) -> None:
        match effect:
            case Fetch():
                self._fetcher.start(effect)
            case CancelFetches():
                self._fetcher.cancel_all()
            case ImportChunk():
                self.served_round = None
                self._imports += 1
                chunk = self._fetcher.take(effect.peer, effect.key)
                self._nursery.start_soon(self._import_chunk, effect, chunk)
            case EndImport(round=round):
                self._nursery.start_soon(self._end_import, round, self._imports)
            case _:
                raise TypeError(f"checkpoint does not perform {type(effect).__name__}")

    async def read_state(self, key: ChunkKey) -> Chunk:
        """The outer state of one chunk, as bytes of its own.

        Raises :class:`ChunkUnavailableError` if the outer state is not, or not for as long as it takes, at that round.
        """
        if self.served_round != key.round or not 0 <= key.chunk < self._tensors.workload.chunk_count:
            raise ChunkUnavailableError(f"{key} is not here: the outer state is at round {self.served_round}")
        data, digest = await self._tensors.run(self._read_now, key.chunk)
        if self.served_round != key.round:
            raise ChunkUnavailableError(f"{key} is gone: the outer state is at round {self.served_round}")
        return Chunk(info=ChunkInfo(digest=digest), payload=memoryview(data))

    def _read_now(self, chunk: int) -> tuple[bytes, bytes]:
        data = self._tensors.workload.export_state(chunk)
        return data, blake3(data).digest()

    async def _import_chunk(self, effect: ImportChunk, chunk: Chunk) -> None:
        key = effect.key
        try:
            async with self._tensors.state_lock:
                await self._tensors.run(self._tensors.workload.import_state, key.chunk, chunk.payload)
        except ProtocolError:
            self._post(FetchFailed(peer=effect.peer, key=key, fault="invalid"))
        else:
            self._post(ChunkImported(key=key))

    async def _end_import(self, round: int, imports: int) -> None:
        async with self._tensors.state_lock:
            digest = await self._tensors.run(self._tensors.workload.end_import, round)
        if imports == self._imports:  # else another state is being put in its place already
            self.served_round = round
        self._post(Imported(round=round, digest=digest))
