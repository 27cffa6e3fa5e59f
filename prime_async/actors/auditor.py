"""Writes a node's contributions and settled means down for an audit, in worker threads, off the event loop."""

from __future__ import annotations

from collections.abc import Mapping

import trio

from prime_async.actors.tensors import Tensors
from prime_async.audit import AuditFolder
from prime_async.machines.vocabulary import Settle
from prime_async.messages import ChunkKey
from prime_async.transport.base import Chunk


class Auditor:
    """One round after the other: a contribution waits until the means of the round before are written.

    So a slow disk slows the rounds down, and what waits for it is bounded.
    """

    def __init__(self, folder: AuditFolder, tensors: Tensors) -> None:
        self._folder = folder
        self._tensors = tensors
        self._turn = trio.StrictFIFOLock()

    async def write_contribution(self, round: int, chunks: Mapping[int, Chunk]) -> None:
        """All of it is on its way to the disk when this returns. Cancelled, it leaves whole files."""

        def write(chunk: int) -> None:
            key = ChunkKey(kind="contribution", round=round, chunk=chunk)
            self._folder.contribution(key, chunks[chunk].payload)

        async with self._turn:
            await self._tensors.for_each(write, sorted(chunks))

    async def write_means(self, settle: Settle, means: Mapping[ChunkKey, Chunk]) -> None:
        """The last ones of a run, too: this is not cancelled."""

        def write(chunk: int) -> None:
            key, mean = by_chunk[chunk]
            self._folder.mean(
                key,
                mean.info,
                mean.payload,
                lineage=settle.lineage,
                members=settle.members,
                weights=settle.weights,
            )

        by_chunk = {key.chunk: (key, mean) for key, mean in means.items()}
        with trio.CancelScope(shield=True):
            async with self._turn:
                await self._tensors.for_each(write, sorted(by_chunk))
