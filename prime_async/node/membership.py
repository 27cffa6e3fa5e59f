"""Membership by itself: an agreed list of members with a leader and failure detection, in somebody's own program.

A node whose only machine of ours is that of membership. There are no rounds, so nothing is to be fetched before a
member counts: whoever is heard has a vote. Views are decided as in a run, by a majority of the voters of the one
before.
"""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, Protocol, cast

import trio

from prime_async.actors.runner import Runner
from prime_async.config.schema import Config, ExchangeSettings, RunSpec
from prime_async.errors import ChunkUnavailableError
from prime_async.log import LogWriter, MachineSettings
from prime_async.machines.facts import Fact
from prime_async.machines.leadership import MembershipSettings
from prime_async.machines.membership import Membership
from prime_async.machines.own import OwnActor
from prime_async.machines.sharing import SharingSettings
from prime_async.machines.vocabulary import ActorName, Leave, StateAt
from prime_async.messages import DIGEST_BYTES, FIRST_CHAIN, ChunkKey, View
from prime_async.node.allow import AllowList
from prime_async.node.build import RECORD_BYTES, allow_list, membership_settings, open_transport
from prime_async.node.changes import Changes
from prime_async.node.participant import Participant
from prime_async.node.switchboard import Performer, log_fact
from prime_async.transport.base import Chunk, Provider, Transport

NO_STATE: Final = StateAt(round=0, digest=bytes(DIGEST_BYTES), chain=FIRST_CHAIN)
"""The outer state of all members: there is none."""


class Group(Participant):
    """The members of a group, as one of them sees them. Made by :func:`open_membership`."""

    def __init__(
        self,
        config: Config,
        transport: Transport,
        allow: AllowList,
        actors: Sequence[OwnActor] = (),
        files: Sharer | None = None,
    ) -> None:
        super().__init__(config, transport, allow, actors, self._on_view)
        self._files = files
        self._membership: Membership | None = None
        self._view: View | None = None
        self._in_view = trio.Event()
        self._readers: weakref.WeakSet[Changes] = weakref.WeakSet()

    @property
    def view(self) -> View:
        """The newest view that is decided, as far as this member knows: ``members``, the longest-standing first.

        ``number`` grows with each view, ``epoch`` with each leader: of two that take themselves for the leader, as may
        be for a moment when one was asleep or cut off, the one of the higher epoch is.
        """
        assert self._view is not None
        return self._view

    @property
    def leads(self) -> bool:
        """Whether this member is the leader, and hears enough of the others to be."""
        return self._role == "leader"

    @property
    def in_touch(self) -> bool:
        """Whether this member leads, or hears the leader. If not, the others may have agreed on a later view.

        It stays so where a majority cannot be heard, or no half of an even number with the leader among it.
        """
        return self._role in ("leader", "member")

    @property
    def _role(self) -> str:
        return self._membership.role if self._membership is not None else "starting"

    def changes(self) -> Changes:
        """A stream of its own: first the view as it is, then each time that members come or go, or another leads."""
        stream = Changes(self.view)
        if self._finished.is_set():
            stream.close()
        self._readers.add(stream)
        return stream

    def stop(self) -> None:
        """Say goodbye to the others. Returns immediately; the changes end when it is done."""
        self._switchboard.post("membership", Leave())

    # --- wiring -------------------------------------------------------------------------------------------------

    def _on_view(self, view: View) -> None:
        self._view = view
        self._in_view.set()
        for stream in self._readers:
            stream.see(view)

    def _report(self, fact: Fact) -> None:
        log_fact(self._log, fact)
        self.events.put(fact)

    def _finish(self) -> None:
        self._finished.set()
        self.events.close()
        if self._files is not None:
            self._files.close()
        for stream in self._readers:
            stream.close()

    def _start(self, nursery: trio.Nursery, settings: MachineSettings, recorder: LogWriter | None) -> None:
        machines = settings.build()
        self._membership = cast(Membership, machines["membership"])
        self._switchboard.connect(machines, self._report, recorder)
        membership = self._membership_actor(nursery, self._finish)
        performers: dict[ActorName, Performer] = {"membership": membership}
        if self._files is None:
            self._transport.serve(NothingToGive())
        else:
            runner = self._switchboard.runners["checkpoint"]
            performers["checkpoint"] = self._files.start(self._transport, nursery, runner)
            self._transport.serve(self._files)
        self._switchboard.start(nursery, performers)
        self._switchboard.post("membership", NO_STATE)


class Sharer(Provider, Protocol):
    """What shares files in a group, beside membership."""

    def settings(self, membership: MembershipSettings) -> SharingSettings:
        """What its machine is made with."""
        ...

    def start(self, transport: Transport, nursery: trio.Nursery, runner: Runner) -> Performer:
        """The actor of that machine. ``runner``: of the machine."""
        ...

    def close(self) -> None:
        """The member leaves, or has left. Idempotent."""
        ...


class NothingToGive:
    """A :class:`~prime_async.transport.base.Provider` without chunks."""

    async def provide(self, peer: str, key: ChunkKey) -> Chunk:  # noqa: ARG002
        raise ChunkUnavailableError(f"{key} is not served here: this is a group without tensors or files")


def of_group(config: Config, kind: str, chunk_elements: int | None = None) -> Config:
    """``config`` with what counts in a group of this ``kind``; the group's id depends on nothing else of ``run``."""
    run = config.run
    spec = RunSpec(name=run.name, model=kind, heartbeat_s=run.heartbeat_s, failure_timeout_s=run.failure_timeout_s)
    if chunk_elements is not None:
        spec = spec.model_copy(update={"exchange": ExchangeSettings(chunk_elements=chunk_elements)})
    return config.model_copy(update={"run": spec})


@asynccontextmanager
async def open_membership(
    config: Config, *, transport: Transport | None = None, actors: Sequence[OwnActor] = ()
) -> AsyncIterator[Group]:
    """Be a member of a group, for as long as the block lasts. It begins when this node is in a view.

    Of ``config`` count ``run.name``, ``run.heartbeat_s`` and ``run.failure_timeout_s``, which are equal on all members;
    and of ``node`` what is about the network and who may join, ``name``, ``directory``, where this member keeps what it
    has voted, and ``record``. ``actors`` of the user's own run beside, and hear each view: see
    :mod:`prime_async.machines.own`. ``transport`` replaces the real network.

    A member that is silent for ``run.failure_timeout_s`` is in no further view. A view counts when a majority of the
    voters of the one before have stored it; of two members, the one that did not lead cannot go on alone.

    Leaving the block says goodbye; cancelling it does not. If the node cannot go on, the block is cancelled, or not
    begun, and one of these is raised: :class:`ConfigError`, :class:`AddressInUseError`, :class:`RefusedError`,
    :class:`StorageError`. While no member of ``node.join`` answers it waits, and says so in the log.
    """
    config, allow = of_group(config, "members"), allow_list(config.node)
    async with AsyncExitStack() as stack:
        if transport is None:
            transport = await stack.enter_async_context(open_transport(config.node, RECORD_BYTES, allow))
        yield await stack.enter_async_context(open_group(Group(config, transport, allow, actors)))


@asynccontextmanager
async def open_group(group: Group) -> AsyncIterator[Group]:
    """Be the member that ``group`` is, for as long as the block lasts."""
    config, transport, files = group.config, group._transport, group._files
    async with AsyncExitStack() as stack:
        ballot = await trio.to_thread.run_sync(group._ballots.load)
        membership = membership_settings(config, transport, ballot, rounds=False)
        sharing = files.settings(membership) if files is not None else None
        settings = MachineSettings(membership=membership, sharing=sharing)
        recorder = group._open_recorder(stack, settings)
        try:
            async with group._running(group.stop) as nursery:
                group._start(nursery, settings, recorder)
                await group._in_view.wait()
                yield group
        finally:
            group._finish()
        group._raise_failure()
