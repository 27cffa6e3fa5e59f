"""Membership by itself: an agreed list of members with a leader and failure detection, in somebody's own program.

A node whose only machine of ours is that of membership. There are no rounds, so nothing is to be fetched before a
member counts: whoever is heard has a vote. Views are decided as in a run, by a majority of the voters of the one
before.
"""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from typing import Any, Final, Protocol, cast

import structlog
import trio

from prime_async.actors.groups import single_errors
from prime_async.actors.membership import MembershipActor
from prime_async.actors.runner import Runner
from prime_async.config.schema import Config, ExchangeSettings, RunSpec
from prime_async.config.spec import run_id
from prime_async.errors import ChunkUnavailableError, PrimeAsyncError
from prime_async.ledger import BallotFile
from prime_async.log import LogWriter, MachineSettings
from prime_async.machines.facts import Fact
from prime_async.machines.leadership import MembershipSettings
from prime_async.machines.membership import Membership
from prime_async.machines.own import OwnActor
from prime_async.machines.sharing import SharingSettings
from prime_async.machines.vocabulary import ActorName, Fail, Leave, StateAt
from prime_async.messages import DIGEST_BYTES, FIRST_CHAIN, ChunkKey, View
from prime_async.node.allow import AllowList
from prime_async.node.build import RECORD_BYTES, allow_list, membership_settings, open_transport, record_path
from prime_async.node.changes import Changes
from prime_async.node.events import EventStream
from prime_async.node.switchboard import Performer, Switchboard, failure_of, log_fact
from prime_async.transport.base import Chunk, Provider, Traffic, Transport

log = structlog.get_logger(__name__)

GOODBYE_S: Final = 5.0
"""How long a member that is closed by its user waits for the others to let it go."""
NO_STATE: Final = StateAt(round=0, digest=bytes(DIGEST_BYTES), chain=FIRST_CHAIN)
"""The outer state of all members: there is none."""


class Group:
    """The members of a group, as one of them sees them. Made by :func:`open_membership`."""

    def __init__(
        self,
        config: Config,
        transport: Transport,
        allow: AllowList,
        actors: Sequence[OwnActor] = (),
        files: Sharer | None = None,
    ) -> None:
        self.config = config
        self.events = EventStream()
        """What happened, and what goes wrong, in detail."""
        self._transport = transport
        self._allow = allow
        self._files = files
        self._log = log.bind(node=config.node.name or transport.id[:8])
        self._switchboard = Switchboard(transport, allow, self._log, actors, self._on_view)
        self._membership: Membership | None = None
        self._view: View | None = None
        self._in_view = trio.Event()
        self._readers: weakref.WeakSet[Changes] = weakref.WeakSet()
        self._finished = trio.Event()
        self._failure: PrimeAsyncError | None = None
        self._scope = trio.CancelScope()
        self._ballots = BallotFile(config.node.directory, run_id(config.run))

    @property
    def id(self) -> str:
        """This member's public key, 64 hexadecimal digits."""
        return self._transport.id

    @property
    def contact(self) -> str:
        """What others put into ``node.join`` to reach this member: ``KEY@HOST:PORT``."""
        return f"{self.id}@{self._transport.control_address.removeprefix('tcp://')}"

    @property
    def traffic(self) -> Traffic:
        """Bytes handed to, and taken from, the sockets so far."""
        return self._transport.traffic

    @property
    def ignored_messages(self) -> int:
        """Those to actors that this member does not have."""
        return self._switchboard.ignored_messages

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

    async def wait(self) -> None:
        """Until this member has left: it was stopped."""
        await self._finished.wait()

    def tell(self, actor: str, event: Any) -> None:
        """Give one of the user's own actors an event of its own kinds. It is handled soon.

        Raises :class:`LocalError` for an actor that this member does not have, and an event that is none of its kinds.
        """
        self._switchboard.tell_own(actor, event)

    # --- wiring -------------------------------------------------------------------------------------------------

    def _on_view(self, view: View) -> None:
        self._view = view
        self._in_view.set()
        for stream in self._readers:
            stream.see(view)

    def _report(self, fact: Fact) -> None:
        log_fact(self._log, fact)
        self.events.put(fact)

    def _fail(self, fail: Fail) -> None:
        self._failure = failure_of(fail)
        self._scope.cancel()

    def _finish(self) -> None:
        self._finished.set()
        self.events.close()
        if self._files is not None:
            self._files.close()
        for stream in self._readers:
            stream.close()

    def _admit(self, members: frozenset[str]) -> None:
        self._allow.members = members

    def _start(self, nursery: trio.Nursery, settings: MachineSettings, recorder: LogWriter | None) -> None:
        machines = settings.build()
        self._membership = cast(Membership, machines["membership"])
        self._switchboard.connect(machines, self._report, recorder)
        membership = MembershipActor(
            self._transport,
            nursery,
            self._switchboard.runners["membership"].post,
            store=self._ballots.save,
            admit=self._admit,
            let_in=self._allow.let_in,
            fail=self._fail,
            finish=self._finish,
        )
        performers: dict[ActorName, Performer] = {"membership": membership}
        if self._files is None:
            self._transport.serve(NothingToGive())
        else:
            runner = self._switchboard.runners["checkpoint"]
            performers["checkpoint"] = self._files.start(self._transport, nursery, runner)
            self._transport.serve(self._files)
        self._switchboard.start(nursery, performers)
        self._switchboard.post("membership", NO_STATE)

    async def _close(self) -> None:
        if not self._finished.is_set():
            self.stop()
            with trio.move_on_after(GOODBYE_S):
                await self._finished.wait()


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
        recorder = None
        record_to = record_path(config, group.id)
        if record_to is not None:
            names = list(group._switchboard.own)
            recorder = stack.enter_context(closing(LogWriter(record_to, group.id, settings, names)))
        try:
            with single_errors(), group._scope:
                async with trio.open_nursery() as nursery:
                    group._start(nursery, settings, recorder)
                    await group._in_view.wait()
                    yield group
                    await group._close()
                    nursery.cancel_scope.cancel()
        finally:
            group._finish()
        if group._failure is not None:
            raise group._failure
