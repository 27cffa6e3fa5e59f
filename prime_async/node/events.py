"""What a node tells its user: a bounded stream of facts."""

from __future__ import annotations

from collections import deque

import trio

from prime_async.machines.facts import Fact

KEPT_EVENTS = 4096


class EventStream:
    """Iterate over it with ``async for``; it ends when the node does.

    Facts wait until they are read, the last 4096 of them: a reader that does not keep up misses the oldest, counted in
    ``missed``, and never holds up the node.
    """

    def __init__(self) -> None:
        self._facts: deque[Fact] = deque()
        self._something = trio.Event()
        self.closed = False
        self.missed = 0

    def put(self, fact: Fact) -> None:
        if len(self._facts) == KEPT_EVENTS:
            self._facts.popleft()
            self.missed += 1
        self._facts.append(fact)
        self._something.set()

    def take(self) -> Fact | None:
        """The next fact, if one is here. ``closed`` says whether there may be more."""
        return self._facts.popleft() if self._facts else None

    async def wait(self) -> None:
        """Until there is one to take, or the stream is closed."""
        while not (self._facts or self.closed):
            if self._something.is_set():
                self._something = trio.Event()
            await self._something.wait()

    def close(self) -> None:
        self.closed = True
        self._something.set()

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Fact:
        await trio.lowlevel.checkpoint()
        while (fact := self.take()) is None:
            if self.closed:
                raise StopAsyncIteration
            await self.wait()
        return fact
