"""Files that members give each other, in an asyncio program: :func:`open_checkpoint`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from torch import Tensor

import prime_async.node
from prime_async.config.schema import Config
from prime_async.guest.membership import GuestGroup
from prime_async.guest.side import TrioSide, trio_side
from prime_async.node.checkpoint import Shelf
from prime_async.transport.base import Transport


class GuestShelf:
    """A :class:`~prime_async.node.checkpoint.Shelf` for asyncio, with the same members.

    Made by :func:`open_checkpoint`. Cancelling a task that waits for it waits until what is under way has ended.
    """

    def __init__(self, side: TrioSide, shelf: Shelf) -> None:
        self.group = GuestGroup(side, shelf.group)
        self._side = side
        self._shelf = shelf

    async def share(self, what: Path | bytes | Mapping[str, Tensor]) -> str:
        """See :class:`~prime_async.node.checkpoint.Shelf`, as for all members below."""
        return await self._side.run(self._shelf.share, what)

    def unshare(self, name: str) -> None:
        self._shelf.unshare(name)

    async def fetch(self, name: str, path: Path) -> None:
        await self._side.run(self._shelf.fetch, name, path)

    async def fetch_bytes(self, name: str) -> bytes:
        return await self._side.run(self._shelf.fetch_bytes, name)

    async def fetch_tensors(self, name: str) -> dict[str, Tensor]:
        return await self._side.run(self._shelf.fetch_tensors, name)


@asynccontextmanager
async def open_checkpoint(config: Config, *, transport: Transport | None = None) -> AsyncIterator[GuestShelf]:
    """Share files with a group for as long as the block lasts, in asyncio: :func:`prime_async.open_checkpoint`."""
    opened = prime_async.node.open_checkpoint(config, transport=transport)
    async with trio_side() as side, side.holding(opened) as shelf:
        yield GuestShelf(side, shelf)
