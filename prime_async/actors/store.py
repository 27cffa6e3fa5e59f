"""The chunks that this node holds for itself and its peers, and the one place where peers' gets are answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from prime_async.errors import ChunkUnavailableError
from prime_async.machines.attempt import SETTLED, number_of
from prime_async.messages import ChunkKey
from prime_async.transport.base import Chunk


class ChunkStore:
    """Contributions and means by key; what is on disk, and the outer state, by asking for it.

    Chunks are immutable: a key's bytes do not change while it is here. A get for what may still come waits; one for a
    round that was forgotten is told so. The memory is bounded by the rounds that are kept.
    """

    def __init__(self) -> None:
        self._chunks: dict[ChunkKey, Chunk] = {}
        self._waiting: dict[ChunkKey, trio.Event] = {}
        self._oldest = {"contribution": 0, "mean": 0}
        self._taken = -1  # the newest round of which a contribution was used
        self.read_ledger: Callable[[ChunkKey], Awaitable[Chunk]] | None = None
        self.has_committed: Callable[[int], bool] = lambda _: False
        """Whether the committed means of a round are on disk."""
        self.may_read: Callable[[str], bool] = lambda _: True
        self.on_taken: Callable[[int], None] | None = None
        """Told the round when the first chunk of this node's contribution is about to be used, here or by a peer."""

    def put(self, key: ChunkKey, chunk: Chunk) -> None:
        """Hold ``chunk``, and answer who waits for it."""
        if key.round < self._oldest[key.kind]:
            return
        self._chunks[key] = chunk
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
            waiting.set()

    def find(self, key: ChunkKey) -> Chunk | None:
        """The chunk, if it is here now."""
        return self._chunks.get(key)

    def use(self, key: ChunkKey) -> Chunk | None:
        """The chunk, if it is here now, for a mean or a peer."""
        chunk = self._chunks.get(key)
        if chunk is not None and key.kind == "contribution" and key.round > self._taken:
            self._taken = key.round
            if self.on_taken is not None:
                self.on_taken(key.round)
        return chunk

    def forget(self, means_before: int, contributions_before: int) -> None:
        """Drop the chunks of earlier rounds; who waits for one is told that it is gone."""
        self._oldest = {"contribution": contributions_before, "mean": means_before}
        for key in [k for k in self._chunks if k.round < self._oldest[k.kind]]:
            del self._chunks[key]
        for key in [k for k in self._waiting if k.round < self._oldest[k.kind]]:
            self._waiting.pop(key).set()

    async def provide(self, peer: str, key: ChunkKey) -> Chunk:
        """See :class:`~prime_async.transport.base.Provider`."""
        if not self.may_read(peer):
            raise ChunkUnavailableError(f"{key} is for members: who has an invitation may ask for the run spec")
        if key.kind not in ("contribution", "mean") or self._is_on_disk(key):
            if self.read_ledger is None:
                raise ChunkUnavailableError(f"{key} is not served here")
            return await self.read_ledger(key)
        while (chunk := self.use(key)) is None:
            if key.round < self._oldest[key.kind]:
                raise ChunkUnavailableError(f"{key} is of a round that is over")
            await self._wait_for(key)
        return chunk

    def _is_on_disk(self, key: ChunkKey) -> bool:
        """If it is anywhere: a settled mean of a round whose means are not in memory any more.

        Or, while this node is behind, of one that it has not come to yet.
        """
        if number_of(key) != SETTLED or key.kind != "mean":
            return False
        return key.round < self._oldest["mean"] or (key not in self._chunks and self.has_committed(key.round))

    async def _wait_for(self, key: ChunkKey) -> None:
        waiting = self._waiting.setdefault(key, trio.Event())
        try:
            await waiting.wait()
        finally:
            if self._waiting.get(key) is waiting and not waiting.statistics().tasks_waiting:
                del self._waiting[key]  # we were the last, and gave up: peers may ask for what never comes
