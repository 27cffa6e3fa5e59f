"""A node in an asyncio program: :func:`open_node`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import prime_async.node
from prime_async.config.schema import Config
from prime_async.guest.participant import GuestParticipant
from prime_async.guest.side import TrioSide, trio_side
from prime_async.machines.own import OwnActor
from prime_async.node.meter import Meter
from prime_async.node.node import Node
from prime_async.transport.base import Transport
from prime_async.work.workload import Workload


class GuestNode(GuestParticipant):
    """A :class:`~prime_async.node.node.Node` for asyncio, with the same members. Made by :func:`open_node`."""

    def __init__(self, side: TrioSide, node: Node) -> None:
        super().__init__(side, node)
        self._node = node

    @property
    def round(self) -> int:
        """See :class:`~prime_async.node.node.Node`, as for all members below."""
        return self._node.round

    @property
    def meter(self) -> Meter:
        return self._node.meter

    @property
    def workload(self) -> Workload:
        return self._node.workload

    @property
    def stopping(self) -> bool:
        return self._node.stopping

    def stop(self, *, at_once: bool = False) -> None:
        """From the loop's own thread, as all of asyncio."""
        self._node.stop(at_once=at_once)


@asynccontextmanager
async def open_node(
    config: Config,
    *,
    transport: Transport | None = None,
    workload: Workload | None = None,
    actors: Sequence[OwnActor] = (),
) -> AsyncIterator[GuestNode]:
    """Run a node for as long as the block lasts, in asyncio: :func:`prime_async.open_node`, with its promises.

    ``transport``, if it is given, is one of trio's. What ``actors`` have performed is called in trio's tasks, in the
    same thread.

    If the node cannot go on, the block is cancelled and the node's error is raised. Where the block is not left then,
    as in a web server that goes on without its node, ``node.events`` have ended.
    """
    opened = prime_async.node.open_node(config, transport=transport, workload=workload, actors=actors)
    async with trio_side() as side, side.holding(opened) as node:
        yield GuestNode(side, node)
