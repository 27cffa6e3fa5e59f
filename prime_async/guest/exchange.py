"""The average of a tensor among friends, in an asyncio program: :func:`open_exchange`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from torch import Tensor

import prime_async.node
from prime_async.config.schema import Config
from prime_async.guest.node import GuestNode
from prime_async.guest.side import TrioSide, trio_side
from prime_async.node.exchange import Friends
from prime_async.transport.base import Transport


class GuestFriends:
    """:class:`~prime_async.node.exchange.Friends` for asyncio. Made by :func:`open_exchange`."""

    def __init__(self, side: TrioSide, friends: Friends) -> None:
        self.node = GuestNode(side, friends.node)
        self._side = side
        self._friends = friends

    async def average(self, tensor: Tensor, weight: int = 1) -> Tensor:
        """See :meth:`Friends.average <prime_async.node.exchange.Friends.average>`."""
        return await self._side.run(self._friends.average, tensor, weight)


@asynccontextmanager
async def open_exchange(
    config: Config, elements: int, *, transport: Transport | None = None
) -> AsyncIterator[GuestFriends]:
    """Average tensors with friends for as long as the block lasts, in asyncio: :func:`prime_async.open_exchange`."""
    async with (
        trio_side() as side,
        side.holding(prime_async.node.open_exchange(config, elements, transport=transport)) as friends,
    ):
        yield GuestFriends(side, friends)
