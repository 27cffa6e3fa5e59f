"""What trio's side tells as it happens, for ``async for`` in asyncio."""

from __future__ import annotations

import asyncio
from typing import Generic, Protocol, TypeVar

from prime_async.guest.side import TrioSide

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Stream(Protocol[T_co]):
    """One of trio's, as the nodes have them."""

    @property
    def closed(self) -> bool:
        """Whether nothing will come but what is there."""
        ...

    def take(self) -> T_co | None:
        """The next item, if one is there."""
        ...

    async def wait(self) -> None:
        """After ``take`` gave nothing: until there may be something to take, or the stream is closed."""
        ...


class GuestStream(Generic[T]):
    """A :class:`Stream` of trio's side for asyncio. It ends when that is closed, and read."""

    def __init__(self, side: TrioSide, stream: Stream[T]) -> None:
        self._side = side
        self._stream = stream

    def __aiter__(self) -> GuestStream[T]:
        return self

    async def __anext__(self) -> T:
        await asyncio.sleep(0)
        while (item := self._stream.take()) is None:
            if self._stream.closed:
                raise StopAsyncIteration
            await self._side.run(self._stream.wait)  # cancelled, it has taken nothing
        return item
