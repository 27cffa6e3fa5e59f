"""An agreed list of members, in an asyncio program: :func:`open_membership`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import prime_async.node
from prime_async.config.schema import Config
from prime_async.guest.participant import GuestParticipant
from prime_async.guest.side import TrioSide, trio_side
from prime_async.guest.stream import GuestStream
from prime_async.machines.own import OwnActor
from prime_async.messages import View
from prime_async.node.changes import Change
from prime_async.node.membership import Group
from prime_async.transport.base import Transport


class GuestGroup(GuestParticipant):
    """A :class:`~prime_async.node.membership.Group` for asyncio, with the same members.

    Made by :func:`open_membership`.
    """

    def __init__(self, side: TrioSide, group: Group) -> None:
        super().__init__(side, group)
        self._group = group

    @property
    def view(self) -> View:
        """See :class:`~prime_async.node.membership.Group`, as for all members below."""
        return self._group.view

    @property
    def leads(self) -> bool:
        return self._group.leads

    @property
    def in_touch(self) -> bool:
        return self._group.in_touch

    def changes(self) -> GuestStream[Change]:
        return GuestStream(self._side, self._group.changes())

    def stop(self) -> None:
        """From the loop's own thread, as all of asyncio."""
        self._group.stop()


@asynccontextmanager
async def open_membership(
    config: Config, *, transport: Transport | None = None, actors: Sequence[OwnActor] = ()
) -> AsyncIterator[GuestGroup]:
    """Be a member of a group for as long as the block lasts, in asyncio: :func:`prime_async.open_membership`."""
    opened = prime_async.node.open_membership(config, transport=transport, actors=actors)
    async with trio_side() as side, side.holding(opened) as group:
        yield GuestGroup(side, group)
