"""What a node and a member of a group have in common, for asyncio."""

from __future__ import annotations

from typing import Any

from prime_async.config.schema import Config
from prime_async.guest.side import TrioSide
from prime_async.guest.stream import GuestStream
from prime_async.machines.facts import Fact
from prime_async.node.events import EventStream
from prime_async.node.participant import Participant
from prime_async.transport.base import Traffic


class GuestEvents(GuestStream[Fact]):
    """A node's events for asyncio; see :class:`~prime_async.node.events.EventStream`."""

    def __init__(self, side: TrioSide, stream: EventStream) -> None:
        super().__init__(side, stream)
        self._events = stream

    @property
    def missed(self) -> int:
        """Facts that nobody read in time."""
        return self._events.missed


class GuestParticipant:
    """A :class:`~prime_async.node.participant.Participant` for asyncio, with the same members. See there."""

    def __init__(self, side: TrioSide, participant: Participant) -> None:
        self.events = GuestEvents(side, participant.events)
        self._side = side
        self._participant = participant

    @property
    def config(self) -> Config:
        return self._participant.config

    @property
    def id(self) -> str:
        return self._participant.id

    @property
    def contact(self) -> str:
        return self._participant.contact

    @property
    def traffic(self) -> Traffic:
        return self._participant.traffic

    @property
    def ignored_messages(self) -> int:
        return self._participant.ignored_messages

    def tell(self, actor: str, event: Any) -> None:
        self._participant.tell(actor, event)

    async def wait(self) -> None:
        await self._side.run(self._participant.wait)
