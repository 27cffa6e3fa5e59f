"""Who is told what happens: what peers say, and machines and programs tell, goes to the machine that it concerns.

* A machine that this kind of node does not have is told nothing; a message for one is ignored, and counted.
* What peers say may be lost when an inbox is full, events of this node's own never.
* Who has come with an invitation may ask what the run is, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import structlog
import trio

from prime_async.actors.runner import Recorder, Runner
from prime_async.errors import LocalError, NonFiniteError, PrimeAsyncError, ProtocolError, RefusedError
from prime_async.machines.facts import (
    ContributionRejected,
    ContributorLeftOut,
    CutOff,
    Fact,
    FileNowhere,
    HelloRefused,
    InnerStepDone,
    KeyDenied,
    LeaderSilent,
    LedgerTrouble,
    MemberLost,
    MembersSeen,
    NonFiniteProgress,
    PeerDropped,
    RemoteCopyFailed,
    RoundIgnored,
    SlowWake,
    StateDiverged,
    StateNowhere,
    SteppedDown,
    StillAsking,
)
from prime_async.machines.own import Hosted, OwnActor, read, write
from prime_async.machines.vocabulary import (
    OWN,
    ActorName,
    DoorClosed,
    Effect,
    Event,
    Fail,
    Heard,
    Machine,
    Offended,
    Perform,
    Reached,
    Send,
    Told,
    ViewChanged,
)
from prime_async.messages import AskRun, AskView, LedgerMessage, Message, Own, RoundMessage, View, ViewUpdate
from prime_async.node.allow import AllowList
from prime_async.transport.base import Denied, Notice, Reachable, Received, Transport, Violation

WARNINGS = (
    ContributionRejected, ContributorLeftOut, HelloRefused, KeyDenied, MemberLost, NonFiniteProgress, PeerDropped,
    RoundIgnored, SlowWake, StateDiverged, StillAsking, LeaderSilent, LedgerTrouble, RemoteCopyFailed, CutOff,
    StateNowhere, SteppedDown, FileNowhere,
)  # fmt: skip


class Performer(Protocol):
    """The part of an actor that a runner needs."""

    def perform(self, effect: Effect) -> None:
        """Do what a machine asked for, or start to."""
        ...


class OwnPerformer:
    """Performs the effects of a user's own actor."""

    def __init__(self, actor: OwnActor, transport: Transport) -> None:
        self._actor = actor
        self._transport = transport

    def perform(self, effect: Effect) -> None:
        match effect:
            case Send(peer=peer, message=message):
                self._transport.send(peer, message)
            case Perform(body=body):
                self._actor.perform(read(self._actor, "effects", body))
            case _:
                raise TypeError(f"an actor of a user does not have {type(effect).__name__} performed")


class Switchboard:
    """See the module's rules. ``own``: the user's actors, by name. ``on_view`` is called with each decided view.

    Raises :class:`LocalError` if two of the user's ``actors`` have one name.
    """

    def __init__(
        self,
        transport: Transport,
        allow: AllowList,
        log: structlog.stdlib.BoundLogger,
        actors: Sequence[OwnActor] = (),
        on_view: Callable[[View], None] = lambda _: None,
    ) -> None:
        if len({actor.name for actor in actors}) < len(actors):
            raise LocalError(f"two actors have one name: {', '.join(sorted(actor.name for actor in actors))}")
        self.own = {actor.name: actor for actor in actors}
        self.runners: dict[ActorName, Runner] = {}
        self.ignored_messages = 0
        """Those to actors that this node does not have."""
        self._transport = transport
        self._allow = allow
        self._log = log
        self._on_view = on_view

    # --- machines -----------------------------------------------------------------------------------------------

    def connect(
        self, machines: Mapping[ActorName, Machine], report: Callable[[Fact], None], recorder: Recorder | None
    ) -> None:
        """These machines, and those of the user's actors, are there from now on."""
        hosted = {OWN + name: Hosted(actor, self._transport.id) for name, actor in self.own.items()}
        self.runners = {
            name: Runner(name, machine, tell=self.tell, report=report, recorder=recorder)
            for name, machine in {**machines, **hosted}.items()
        }

    def start(self, nursery: trio.Nursery, performers: Mapping[ActorName, Performer]) -> None:
        """Run all machines, and listen. ``performers``: of those that are ours."""
        hosted = {OWN + name: OwnPerformer(actor, self._transport) for name, actor in self.own.items()}
        of_all = {**performers, **hosted}
        for name, runner in self.runners.items():
            nursery.start_soon(runner.run, of_all[name].perform, name=f"{name} of {self._transport.id[:8]}")
        nursery.start_soon(self._listen)

    def post(self, actor: ActorName, event: Event) -> None:
        """Give one of the machines that there are an event of this node's own."""
        self.runners[actor].post(event)

    def tell(self, actor: ActorName, event: Event) -> None:
        """What one machine tells another."""
        if actor in self.runners:
            self.post(actor, event)
        if actor == "training" and isinstance(event, ViewChanged):  # the last of ours that is told of it
            for name in self.own:
                self.post(OWN + name, event)
            self._on_view(event.view)

    def tell_own(self, actor: str, event: Any) -> None:
        """See :meth:`prime_async.node.node.Node.tell`."""
        if actor not in self.own:
            known = ", ".join(self.own) or "none"
            raise LocalError(f"this node has no actor {actor}, it has {known}: open it with actors=[...]")
        self.post(OWN + actor, Told(body=write(self.own[actor], "events", event)))

    # --- peers --------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        async for notice in self._transport.notices:
            self._on_notice(notice)

    def _on_notice(self, notice: Notice) -> None:
        match notice:
            case Received(peer=peer, message=message) if self._allow.may_only_ask(peer):
                if isinstance(message, AskRun):
                    self._offer("membership", Heard(peer=peer, message=message))
                else:
                    self._log.warning("message_of_an_invitation_ignored", peer=peer, message=type(message).__name__)
            case Received(peer=peer, message=Own() as own):
                self._on_own(peer, own)
            case Received(peer=peer, message=message):
                self._on_message(Heard(peer=peer, message=message))
            case Denied(peer=peer, address=address):
                self._offer("membership", DoorClosed(peer=peer, address=address))
            case Reachable(peer=peer, reachable=reachable):
                self.post("membership", Reached(peer=peer, reachable=reachable))  # our own connections: never lost
            case Violation(peer=peer, plane=plane, reason=reason, count=count, shut_out=shut_out):
                event = Offended(peer=peer, plane=plane, reason=reason[:1024], times=count, shut_out=shut_out)
                self._offer("membership", event)

    def _on_message(self, heard: Heard) -> None:
        actor = concerned(heard.message)
        if actor not in self.runners:
            self.ignored_messages += 1
            return
        self._offer(actor, heard)
        # For both: a plan may refer to an older view.
        if isinstance(heard.message, ViewUpdate | AskView) and "exchange" in self.runners:
            self._offer("exchange", heard)

    def _on_own(self, peer: str, own: Own) -> None:
        """To a user's own actor, if this node has it."""
        actor = self.own.get(own.actor)
        if actor is None:
            self.ignored_messages += 1
            return
        try:
            read(actor, "messages", own.body)
        except ProtocolError as error:
            self._transport.accuse(peer, f"to the actor {own.actor}: {error}")
        else:
            self._offer(OWN + own.actor, Heard(peer=peer, message=own))

    def _offer(self, actor: ActorName, event: Event) -> None:
        self.runners[actor].offer(event)


def concerned(message: Message) -> ActorName:
    """The machine that a message is for."""
    if isinstance(message, RoundMessage):
        return "exchange"
    return "checkpoint" if isinstance(message, LedgerMessage) else "membership"


def failure_of(fail: Fail) -> PrimeAsyncError:
    """The error of a node that cannot go on."""
    if fail.kind == "refused":
        return RefusedError(fail.reason, fail.text, fail.differences)
    return NonFiniteError(fail.text)


def log_fact(log: structlog.stdlib.BoundLogger, fact: Fact) -> None:
    """A line of the log."""
    fields = msgspec.to_builtins(fact)
    name = fields.pop("type")
    getattr(log, _level(fact))(name, **fields)


def _level(fact: Fact) -> str:
    """Of the log. What comes each second, or with each step, is for who looks for it."""
    if isinstance(fact, InnerStepDone | MembersSeen):
        return "debug"
    return "warning" if isinstance(fact, WARNINGS) else "info"
