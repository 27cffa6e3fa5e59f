"""What the transports share below the planes: what a connection is, and a nursery for background tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum
from typing import Protocol

import trio


class Sent(Enum):
    """What became of frames that were to be sent."""

    YES = "handed to the network"
    FULL = "the queue of this connection is full"
    NO_ROUTE = "the connection is gone"


class Link(Protocol):
    """A connection to one peer, whoever dialled it. It carries gets and answers both ways."""

    @property
    def inbound(self) -> bool:
        """Whether the peer dialled us. Such a link is used for gets only if none of our own is up."""
        ...

    def send(self, header: bytes, payload: memoryview | None = None) -> Sent:
        """Queue one message. ``payload`` is not copied, and must not change from now on."""
        ...


@asynccontextmanager
async def bare_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery that is cancelled at the end, and lets the body's own exception out as it is, not in a group."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
