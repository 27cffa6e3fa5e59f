"""The leader's part of membership: it takes nodes in, hears their heartbeats, and numbers the views.

See :mod:`prime_async.machines.membership` for the rules; a membership machine has one of these while it leads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from prime_async.machines.facts import MemberJoined, MemberLeft, MemberLost, StateDiverged, ViewAdopted
from prime_async.machines.vocabulary import ConnectMembers, Effect, Finish, Report, Send, Tell, ViewChanged
from prime_async.messages import (
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Member,
    Refuse,
    View,
    ViewUpdate,
    Welcome,
)

DIGESTS_KEPT = 4


class ContactPoint(Struct, frozen=True, kw_only=True):
    """A member to ask: its id and where its control plane listens."""

    id: str
    control: str


class MembershipSettings(Struct, frozen=True, kw_only=True):
    """What a membership machine is made with. ``settings`` is the run spec, flat; times are in seconds."""

    me: Member
    run_id: bytes
    settings: dict[str, str]
    contacts: tuple[ContactPoint, ...] = ()
    min_members: int = 1
    heartbeat_s: float = 1.0
    failure_timeout_s: float = 10.0


@dataclass(slots=True)
class OuterStates:
    """This node's outer state: its round, and the digests of the last few rounds."""

    round: int = 0
    digests: dict[int, bytes] = field(default_factory=dict)

    @property
    def digest(self) -> bytes:
        return self.digests[self.round]

    def advance(self, round: int, digest: bytes) -> None:
        self.round = round
        self.digests[round] = digest
        for old in [r for r in self.digests if r <= round - DIGESTS_KEPT]:
            del self.digests[old]


def adopt(view: View, settings: MembershipSettings) -> list[Effect]:
    """What a node does when it goes by a new view."""
    leader = view.member(view.leader)
    fact = ViewAdopted(
        epoch=view.epoch,
        view=view.number,
        leader=leader.name if leader else view.leader,
        members=tuple(m.name for m in view.members),
        active=len(view.active),
    )
    return [
        Report(fact=fact),
        ConnectMembers(view=view, contacts=tuple(p.id for p in settings.contacts)),
        Tell(actor="exchange", event=ViewChanged(view=view)),
        Tell(actor="training", event=ViewChanged(view=view)),
    ]


@dataclass(slots=True)
class Peer:
    """What the leader knows of a member beside the view."""

    heard_at: float
    synced: bool = False  # its heartbeat showed the run's outer state
    round: int = -1


@dataclass(slots=True)
class Leadership:
    """The members as their leader sees them."""

    settings: MembershipSettings
    states: OuterStates
    view: View
    peers: dict[str, Peer] = field(default_factory=dict)  # all members but ourselves
    leaving: bool = False  # we have done our last round, and wait for the others

    def take_in(self, now: float, peer: str, hello: Hello, out: list[Effect]) -> None:
        """Answer the hello of a node that may join."""
        known, member = self.view.member(peer), hello.member
        if known is not None and member.incarnation < known.incarnation:
            return  # a late copy of an earlier start's hello
        if known is None or known.incarnation != member.incarnation:
            self.peers[peer] = Peer(heard_at=now)
            others = tuple(m for m in self.view.members if m.id != peer)
            self._number((*others, replace(member, active=False, weight=1)), out)
            out.append(Report(fact=MemberJoined(peer=peer, name=member.name, view=self.view.number)))
        self.peers[peer].heard_at = now
        welcome = Welcome(view=self.view, round=self.states.round, state_digest=self.states.digest)
        out.append(Send(peer=peer, message=welcome))

    def on_heartbeat(self, now: float, peer: str, beat: Heartbeat, out: list[Effect]) -> None:
        member = self.view.member(peer)
        if member is None or beat.incarnation > member.incarnation:
            refusal = Refuse(reason="not_a_member", text="you were silent too long, or never joined: say hello")
            out.append(Send(peer=peer, message=refusal))
            return
        if beat.incarnation < member.incarnation:
            return
        known = self.peers[peer]
        known.heard_at, known.round = now, beat.round
        ours = self.states.digests.get(beat.round)
        if member.active and ours is not None and ours != beat.state_digest:
            self._cast_out(peer, beat, ours, out)
            return
        known.synced = ours == beat.state_digest and beat.round >= self.states.round - 1
        if known.synced and not member.active and len(self.view.active) < self.settings.min_members:
            self.activate(out)
        if (beat.epoch, beat.view) < (self.view.epoch, self.view.number):
            out.append(Send(peer=peer, message=ViewUpdate(view=self.view)))
        out.append(Send(peer=peer, message=HeartbeatAck(epoch=self.view.epoch, view=self.view.number)))
        self._dismiss(out)

    def _cast_out(self, peer: str, beat: Heartbeat, ours: bytes, out: list[Effect]) -> None:
        fact = StateDiverged(peer=peer, round=beat.round, ours=ours.hex(), theirs=beat.state_digest.hex())
        out.append(Report(fact=fact))
        self.remove(peer, out)
        text = f"your outer state after round {beat.round} is not the run's: fetch it"
        out.append(Send(peer=peer, message=Refuse(reason="diverged", text=text)))

    def activate(self, out: list[Effect]) -> None:
        """Members that hold the run's state take part from here on."""
        near = self.states.round - 1  # whose means are still held by all
        synced = {p for p, known in self.peers.items() if known.synced and known.round >= near}
        ripe = {m.id for m in self.view.members if not m.active and m.id in synced}
        if ripe:
            self._number(tuple(replace(m, active=True) if m.id in ripe else m for m in self.view.members), out)

    def remove(self, peer: str, out: list[Effect]) -> None:
        if self.peers.pop(peer, None) is not None:
            self._number(tuple(m for m in self.view.members if m.id != peer), out)

    def remove_silent(self, now: float, out: list[Effect]) -> None:
        silent = {p: now - known.heard_at for p, known in self.peers.items()}
        lost = [m for m in self.view.members if silent.get(m.id, 0.0) > self.settings.failure_timeout_s]
        if not lost:
            return
        for member in lost:
            del self.peers[member.id]
        self._number(tuple(m for m in self.view.members if m not in lost), out)
        for m in lost:
            fact = MemberLost(peer=m.id, name=m.name, silent_s=round(silent[m.id], 3), view=self.view.number)
            out.append(Report(fact=fact))

    def on_goodbye(self, peer: str, goodbye: Goodbye, out: list[Effect]) -> None:
        """Take a member out; a repeated goodbye gets the view without it once more."""
        member = self.view.member(peer)
        if member is not None and member.incarnation != goodbye.incarnation:
            return  # of an earlier start
        if member is not None:
            self.remove(peer, out)
            out.append(Report(fact=MemberLeft(peer=peer, name=member.name, view=self.view.number)))
        out.append(Send(peer=peer, message=ViewUpdate(view=self.view)))

    def forgive(self, late_s: float) -> None:
        """We were asleep so long: nobody is to blame for what we did not hear."""
        for peer in self.peers.values():
            peer.heard_at += late_s

    def wake_at(self, now: float) -> float:
        """When somebody's silence has to be judged next."""
        expiry = min((p.heard_at for p in self.peers.values()), default=now) + self.settings.failure_timeout_s
        return min(now + self.settings.heartbeat_s, max(now, expiry + 0.001))

    def leave(self, out: list[Effect]) -> None:
        """The leader goes last: the others may still need its chunks."""
        self.leaving = True
        self._dismiss(out)

    def end_if_alone(self, out: list[Effect]) -> bool:
        if self.leaving and not self.peers:
            out.append(Finish())
            return True
        return False

    def _dismiss(self, out: list[Effect]) -> None:
        """A leaving leader says goodbye to the members that have the last round; silence removes the others."""
        if not self.leaving:
            return
        text = "the leader has left: the run ends here, and every member keeps its outer state"
        goodbye = Goodbye(incarnation=self.settings.me.incarnation, text=text)
        out += [Send(peer=p, message=goodbye) for p, known in self.peers.items() if known.round >= self.states.round]

    def _number(self, members: tuple[Member, ...], out: list[Effect]) -> None:
        """Make the next view of ``members``, and tell everybody in it."""
        view = self.view
        self.view = View(epoch=view.epoch, number=view.number + 1, leader=view.leader, members=members)
        out += adopt(self.view, self.settings)
        out += [Send(peer=m.id, message=ViewUpdate(view=self.view)) for m in members if m.id != view.leader]
