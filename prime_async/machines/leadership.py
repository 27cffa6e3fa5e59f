"""The leader's part of membership: it takes nodes in, hears their heartbeats, and proposes views.

The rules:

* One view is proposed at a time, and the next when it is decided: when a quorum of the voters of the view before has
  stored it. Until then whatever is to change gathers, and goes into the next view together: ten joiners make one view.
* Only decided views are gone by. A proposal is repeated to those that have not stored it.
* A node that joins is not active until its heartbeat shows the run's outer state; then it becomes so at the start of a
  round, or at once while fewer than ``min_members`` train. It has a vote once it has completed a round. Only who can be
  dialled owns chunks, and may lead.
* Where there are no rounds (``rounds`` false) there is nothing to complete or to begin: with its first heartbeat a node
  is active, and has a vote.
* A member that is silent for ``failure_timeout_s`` is left out of the next view. If those that are not silent are no
  quorum, this node does not lead any more: it is the one that is cut off.
* The first view of an epoch has the members that promised it, in their order, and no others.
* A member whose outer state is another than that of a quorum, this node's among them, is told to fetch it, and comes
  back as a joiner. If most have another than this node, it is this node's that is wrong: checkpoint mends it. If all
  have said theirs and none has a majority, that of the largest number counts; of equal ones, this node's. A member
  that is not active yet is told again which state counts.
* A contribution that owners cannot use is counted in its member's place in the view (``rejected``). So it is given up
  when that is decided, everywhere and by every leader to come, and its node learns it as it learns of views.
* A leader that leaves proposes a view without itself and says goodbye when it is decided, so that another is elected at
  once. It gives others that leave at the same time a moment to go first, and hands over when it has heard from most of
  those that vote, so that it does not leave the run to the dead.

See :mod:`prime_async.machines.membership` for the rules of the other members.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from prime_async.machines.ballot import Ballot, change_between, entitled, is_quorum, view_digest
from prime_async.machines.facts import ContributionRejected, MemberJoined, MemberLeft, MemberLost, StateDiverged
from prime_async.machines.roster import Audience, Known
from prime_async.machines.vocabulary import Effect, FoundUnusable, Report, RunAt, Send, Tell
from prime_async.messages import (
    Commit,
    Figures,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Member,
    Promise,
    Propose,
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
    """What a membership machine is made with. ``settings`` is the run spec, flat; times are in seconds.

    ``watches``: this node shows to people how all members do, so it asks the leader. ``rounds``: whether there are any;
    without, all outer states are equal. ``ballot``: what this node had on disk when it started; ``tip``: the commit
    that its outer state came of.
    """

    me: Member
    run_id: bytes
    settings: dict[str, str]
    contacts: tuple[ContactPoint, ...] = ()
    min_members: int = 1
    heartbeat_s: float = 1.0
    failure_timeout_s: float = 10.0
    watches: bool = False
    rounds: bool = True
    ballot: Ballot | None = None
    tip: Commit | None = None


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


@dataclass(slots=True)
class Peer:
    """What the leader knows of another node beside the view. ``member``: as the node described itself last."""

    heard_at: float
    member: Member
    round: int = -1  # of its outer state, as of its last heartbeat
    digests: dict[int, bytes] = field(default_factory=dict)  # of its outer states of the last few rounds
    began: int = -1  # the round at whose start it became active, as far as this leader knows
    incarnations: tuple[int, ...] = ()  # those that it can prove, from its promise
    gone: bool = False
    told_at: float = -math.inf  # when it was told that its outer state is another
    silent_s: float = 0.0  # how long it had been silent when it was given up; 0: it said goodbye
    inner_steps: int = 0
    figures: Figures | None = None  # to be shown; nothing is decided by them

    @property
    def digest(self) -> bytes:
        return self.digests.get(self.round, b"")

    def report(self, round: int, digest: bytes) -> None:
        """Its outer state is this now."""
        self.round = round
        self.digests[round] = digest
        for old in [r for r in self.digests if r <= round - DIGESTS_KEPT]:
            del self.digests[old]


@dataclass(slots=True)
class Leadership:
    """See the module's rules. ``view`` is decided; ``proposal`` is not yet."""

    settings: MembershipSettings
    own: Member  # this node, as it is now
    states: OuterStates
    epoch: int
    view: View
    peers: dict[str, Peer]  # all members but ourselves, and those that join
    reachable: dict[str, bool]  # of those that we dialled; kept by the membership machine
    promised: set[str] = field(default_factory=set)  # who has promised us this epoch
    proposal: View | None = None
    message: Propose | None = None  # that says so
    stored_by: set[str] = field(default_factory=set)  # voters of ``view`` that have stored the proposal
    commit: Commit | None = None  # to be made the next view's
    weights: dict[str, int] = field(default_factory=dict)
    rejected: dict[tuple[str, int], int] = field(default_factory=dict)  # id and incarnation -> contributions
    activating: set[str] = field(default_factory=set)
    welcome: set[str] = field(default_factory=set)  # joiners, not welcomed yet
    left: dict[str, int] = field(default_factory=dict)  # who said goodbye, and as which incarnation
    leaving_since: float | None = None
    repeat_at: float = 0.0
    opened: bool = False  # the first view of this epoch was proposed
    doubted: int = -1  # the newest round of which our own outer state was found to be wrong
    audience: Audience = field(init=False)

    def __post_init__(self) -> None:
        self.audience = Audience(self.settings.heartbeat_s, self.settings.watches)

    @property
    def me(self) -> str:
        return self.own.id

    def on_promise(self, peer: str, promise: Promise) -> None:
        """One that came when enough had been there."""
        if promise.epoch == self.epoch:
            self.promised.add(peer)

    # --- nodes that come ----------------------------------------------------------------------------------------

    def take_in(self, now: float, peer: str, hello: Hello, out: list[Effect]) -> None:
        """Answer the hello of a node that may join, or that asks where its leader is."""
        known, member = self.view.member(peer), hello.member
        if known is not None and member.incarnation < known.incarnation:
            return  # a late copy of an earlier start's hello
        record = self.peers.get(peer)
        same = record is not None and record.member.incarnation == member.incarnation
        cast_out = record is not None and same and record.gone and not record.silent_s
        if cast_out or member.incarnation <= self.left.get(peer, -1):
            return  # it has left, or was told to come as another; this is a late copy
        if record is not None and same and record.gone and known is not None:
            return  # a view without it is under way: as this incarnation it does not come back
        if record is None or not same or record.gone:
            if hello.view and (known is None or known.incarnation != member.incarnation):
                self._tell_removed(peer, out)
                return
            self.peers[peer] = record = Peer(heard_at=now, member=member)
        record.heard_at = now
        if known is not None and known.incarnation == member.incarnation:
            self._welcome(peer, out)
        else:
            self.welcome.add(peer)
            self.go_on(now, out)

    def _tell_removed(self, peer: str, out: list[Effect]) -> None:
        text = "you were silent too long, or never joined: say hello"
        out.append(Send(peer=peer, message=Refuse(reason="not_a_member", text=text)))

    def _welcome(self, peer: str, out: list[Effect]) -> None:
        round, digest = self.run_state
        welcome = Welcome(epoch=self.epoch, view=self.view, round=round, state_digest=digest)
        out.append(Send(peer=peer, message=welcome))

    @property
    def run_state(self) -> tuple[int, bytes]:
        """Our outer state, by round and digest; but if most voters have another at that round, theirs.

        If we have missed the newest commit: that which it leads to, as most members have it.
        """
        round, ours = self.states.round, self.states.digest
        goal = self.view.commit.round + 1 if self.view.commit else 0
        ahead = Counter(p.digests[goal] for p in self.peers.values() if goal in p.digests and not p.gone)
        if round < goal and ahead:
            return goal, max(sorted(ahead), key=lambda digest: ahead[digest])
        return round, self._which_counts(round) or ours

    def _which_counts(self, round: int) -> bytes | None:
        """The outer state after ``round`` rounds that is taken for the run's, or ``None`` if that is still open."""
        ours, voters = self.states.digests.get(round, b""), self.view.voters
        has = {m.id: self._state_of(m.id, round) for m in self.view.members}
        if ours and is_quorum(self.view, {id for id, digest in has.items() if digest == ours}):
            return ours
        votes = Counter(digest for v in voters if (digest := has[v.id]))
        if not votes:
            return None
        most = max(sorted(votes), key=lambda digest: (votes[digest], digest == ours))
        all_said = all(has[v.id] or self._is_gone(v.id) for v in voters)
        return most if all_said or 2 * votes[most] > len(voters) else None

    def _state_of(self, node: str, round: int) -> bytes:
        """What it has reported; empty: nothing."""
        if node == self.me:
            return self.states.digests.get(round, b"")
        return b"" if self._is_gone(node) else self.peers[node].digests.get(round, b"")

    def _is_gone(self, node: str) -> bool:
        record = self.peers.get(node)
        return node != self.me and (record is None or record.gone)

    # --- heartbeats ---------------------------------------------------------------------------------------------

    def on_heartbeat(self, now: float, peer: str, beat: Heartbeat, out: list[Effect]) -> None:
        record, member = self.peers.get(peer), self.view.member(peer)
        incarnation = record.member.incarnation if record else -1
        if record is None or record.gone or beat.incarnation > incarnation:
            self._tell_removed(peer, out)
            return
        if beat.incarnation < incarnation:
            return
        record.heard_at = now
        record.report(beat.round, beat.state_digest)
        record.inner_steps, record.figures = beat.inner_steps, beat.figures or record.figures
        ours = self.states.digests.get(beat.round)
        if member is not None and member.active and ours is not None and ours != beat.state_digest:
            right = self._which_counts(beat.round)
            if right == ours:
                self._cast_out(now, peer, beat, ours, out)
                return
            if right is not None:
                self._doubt_ourselves(peer, beat.round, ours, right, out)
        waits = member is not None and not member.active
        if waits and record.round == self.states.round and now >= record.told_at + self.settings.heartbeat_s:
            self._tell_if_it_differs(now, record, out)
        if self._is_synced(record) and waits and self._activates_at_once:
            self.activating.add(peer)
        self.on_accepted(now, peer, beat.epoch, beat.view, (beat.incarnation,), out)
        if self.proposal is not None and (beat.epoch, beat.view) < (self.epoch, self.proposal.number):
            self._propose_to(peer, out)
        out.append(Send(peer=peer, message=self.ack(now)))
        votes_now = member is not None and not member.voter and self._may_vote(member, record)
        if votes_now or peer in self.activating or self.leaving_since is not None:
            self.go_on(now, out)  # not with every heartbeat: it looks at all members

    @property
    def _activates_at_once(self) -> bool:
        return not self.settings.rounds or len(self.view.trainers) < self.settings.min_members

    def known(self, now: float) -> dict[str, Known]:
        """What is to be shown of the others, by id."""
        return {
            id: Known(p.round, p.inner_steps, max(0.0, now - p.heard_at), p.figures)
            for id, p in self.peers.items()
            if p.round >= 0
        }

    def _tell_if_it_differs(self, now: float, record: Peer, out: list[Effect]) -> None:
        """It is where we are, by its own means, and does not know that another state counts."""
        if record.digest != self.run_state[1]:
            record.told_at = now
            self._welcome(record.member.id, out)

    def _doubt_ourselves(self, peer: str, round: int, ours: bytes, right: bytes, out: list[Effect]) -> None:
        """We lead, and it is our outer state that is the wrong one."""
        if self.doubted < round:
            self.doubted = round
            out.append(Report(fact=StateDiverged(peer=peer, round=round, ours=ours.hex(), theirs=right.hex())))
            out.append(Tell(actor="checkpoint", event=RunAt(round=round, digest=right)))

    def _cast_out(self, now: float, peer: str, beat: Heartbeat, ours: bytes, out: list[Effect]) -> None:
        fact = StateDiverged(peer=peer, round=beat.round, ours=ours.hex(), theirs=beat.state_digest.hex())
        out.append(Report(fact=fact))
        self.peers[peer].gone = True
        text = f"your outer state after round {beat.round} is not the run's: fetch it"
        out.append(Send(peer=peer, message=Refuse(reason="diverged", text=text)))
        self.go_on(now, out)

    def on_state(self, now: float, out: list[Effect]) -> None:
        """Our outer state is a newer one: a round begins, and members that hold the state take part from here on."""
        waiting = {m.id for m in self.view.members if not m.active}
        synced = {p for p, record in self.peers.items() if self._is_synced(record)}
        self.activating |= synced & waiting
        self.go_on(now, out)

    def reject(self, now: float, found: FoundUnusable, out: list[Effect]) -> None:
        """Its contribution to the open round counts for nothing."""
        start, member = (found.peer, found.incarnation), self.view.member(found.peer)
        if member is None or member.incarnation != found.incarnation or member.rejected >= found.times:
            return
        if self.rejected.get(start, 0) < found.times:
            self.rejected[start] = found.times
            out.append(Report(fact=ContributionRejected(round=found.round, peer=found.peer, times=found.times)))
        self.go_on(now, out)

    # --- views --------------------------------------------------------------------------------------------------

    def go_on(self, now: float, out: list[Effect]) -> None:
        """Propose the next view, if there is anything to change and nothing under way."""
        if self.proposal is not None:
            return
        members = self._members(now)
        commit = self.commit if self._is_next(self.commit) else None
        if members == self.view.members and commit is None and self.opened:
            return
        self.opened = True
        view = View(
            lineage=self.view.lineage,
            epoch=self.epoch,
            number=self.view.number + 1,
            previous=view_digest(self.view),
            leader=self.me,
            members=members,
            commit=commit or self.view.commit,
        )
        self.propose(view, out)

    def propose(self, view: View, out: list[Effect], *, again: bool = False) -> None:
        """To all members. Who is new in it cannot know what it changes, and is welcomed with the whole.

        ``again``: an earlier leader proposed this view under the same number, and they may have it.
        """
        change = None
        if not again:
            commit = view.commit if view.commit != self.view.commit else None
            change = change_between(self.view, view.members, view.epoch, view.leader, commit)
        self.proposal, self.stored_by = view, set()
        self.message = Propose(epoch=self.epoch, number=view.number, digest=view_digest(view), change=change)
        for peer in dict.fromkeys([*(m.id for m in self.view.members), self.me]):
            self._propose_to(peer, out)

    def _propose_to(self, peer: str, out: list[Effect]) -> None:
        assert self.message is not None
        out.append(Send(peer=peer, message=self.message))

    def on_accepted(
        self, now: float, peer: str, epoch: int, number: int, incarnations: Collection[int], out: list[Effect]
    ) -> bool:
        """Whether the proposal is decided with this."""
        proposal = self.proposal
        if proposal is None or (epoch, number) != (self.epoch, proposal.number):
            return False
        if entitled(self.view, peer, incarnations):
            self.stored_by.add(peer)
        if not is_quorum(self.view, self.stored_by):
            return False
        self._decide(now, proposal, out)
        return True

    def ack(self, now: float) -> HeartbeatAck:
        return HeartbeatAck(epoch=self.epoch, view=self.view.number, watched=self.audience.watches(now))

    def _decide(self, now: float, view: View, out: list[Effect]) -> None:
        before, self.view, self.proposal = self.view, view, None
        self._account_for(before, out)
        ack = self.ack(now)
        out += [Send(peer=p, message=ack) for p in dict.fromkeys([*(m.id for m in view.members), self.me])]
        for peer in sorted(self.welcome):
            if view.member(peer) is not None:
                self.welcome.discard(peer)
                self._welcome(peer, out)

    def _account_for(self, before: View, out: list[Effect]) -> None:
        view = self.view
        old, new = {(m.id, m.incarnation): m for m in before.members}, {(m.id, m.incarnation) for m in view.members}
        for member in [m for key, m in old.items() if key not in new and m.id != self.me]:
            record = self.peers.get(member.id)
            silent_s = record.silent_s if record else 0.0
            if record is not None and record.gone:
                del self.peers[member.id]
            self.audience.note_departure(member, view.number, silent_s)
            if silent_s:
                fact = MemberLost(peer=member.id, name=member.name, silent_s=round(silent_s, 3), view=view.number)
                out.append(Report(fact=fact))
            else:
                out.append(Report(fact=MemberLeft(peer=member.id, name=member.name, view=view.number)))
            if member.incarnation == self.left.get(member.id):
                self._show_it_is_out(member.id, out)
        for member in [m for m in view.members if (m.id, m.incarnation) not in old]:
            out.append(Report(fact=MemberJoined(peer=member.id, name=member.name, view=view.number)))
        self.activating -= {m.id for m in view.active}
        self.commit = None  # if it is not in this view: its voters may be others than those that hold the means

    def _is_next(self, commit: Commit | None) -> bool:
        last = self.view.commit.round if self.view.commit else -1
        return commit is not None and commit.epoch == self.epoch and commit.round > last

    def _members(self, now: float) -> tuple[Member, ...]:
        """Who should be in the next view: those that are in it now and stay, in their order, then the new ones."""
        members = [m for m in map(self._as_it_should_be, self.view.members) if m is not None]
        known = {m.id for m in members}
        new = [p for p in self.peers.values() if p.member.id not in known and not p.gone]
        members += [replace(p.member, active=False, voter=False, reachable=False, weight=1) for p in new]
        if self.leaving_since is not None:
            heirs = _with_votes([m for m in members if m.id != self.me])
            members = heirs if heirs and self.hands_over(now, self.leaving_since, heirs) else members
        return tuple(self._with_reachability(m) for m in members)

    def _as_it_should_be(self, member: Member) -> Member | None:
        weight = self.weights.get(member.id, member.weight)
        rejected = max(member.rejected, self.rejected.get((member.id, member.incarnation), 0))
        if member.id == self.me:
            active = (member.active and member.incarnation == self.own.incarnation) or self._i_am_synced()
            rejected = max(rejected, self.own.rejected)
            return replace(
                self.own, active=active, voter=member.voter, reachable=True, weight=weight, rejected=rejected
            )
        record = self.peers.get(member.id)
        if record is None or record.gone:
            return None
        if record.member.incarnation != member.incarnation:
            # It comes anew, as the last one; but not if it promised this epoch as what the view calls it.
            known = member.incarnation in record.incarnations
            return replace(record.member, active=False, voter=member.voter, weight=weight) if known else None
        active = member.active or member.id in self.activating
        if active and record.began < 0:
            record.began = self.states.round
        voter = member.voter or self._may_vote(member, record) or (active and not self.settings.rounds)
        return replace(member, active=active, voter=voter, weight=weight, rejected=rejected)

    def _may_vote(self, member: Member, record: Peer) -> bool:
        """It has completed a round."""
        return member.active and self._is_synced(record) and 0 <= record.began < record.round

    def _is_synced(self, record: Peer) -> bool:
        """Its outer state is the run's, or that of the round before, whose means are still held by all.

        Of who is ahead of this node that can be told when this node is there.
        """
        known = self.states.digests.get(record.round)
        return known is not None and known == record.digest and record.round >= self.states.round - 1

    def _i_am_synced(self) -> bool:
        commit = self.view.commit
        return commit is None or self.states.round >= commit.round

    def _with_reachability(self, member: Member) -> Member:
        reachable = True if member.id == self.me else self.reachable.get(member.id, member.reachable)
        return member if reachable == member.reachable else replace(member, reachable=reachable)

    # --- silence ------------------------------------------------------------------------------------------------

    def judge(self, now: float, out: list[Effect]) -> bool:
        """Leave the silent out. ``False``: the others are no quorum, and we do not lead any more."""
        timeout_s = self.settings.failure_timeout_s
        silent = {id: now - p.heard_at for id, p in self.peers.items() if now - p.heard_at > timeout_s and not p.gone}
        heard = {id for id, p in self.peers.items() if id not in silent and not p.silent_s} | {self.me}
        if not is_quorum(self.view, heard):
            return False
        for id, silent_s in silent.items():
            self.peers[id].gone, self.peers[id].silent_s = True, silent_s
        members = {m.id for m in self.view.members}
        for id in [id for id, p in self.peers.items() if p.gone and id not in members and self.proposal is None]:
            del self.peers[id]
        self.go_on(now, out)
        self._propose_again(now, out)
        return True

    def _propose_again(self, now: float, out: list[Effect]) -> None:
        """To the voters that have not stored it: one that does not follow us yet sends no heartbeats."""
        if self.proposal is None or now < self.repeat_at:
            return
        self.repeat_at = now + self.settings.heartbeat_s
        for voter in self.view.voters:
            if voter.id not in self.stored_by:
                self._propose_to(voter.id, out)

    def forgive(self, late_s: float) -> None:
        """We were asleep so long: nobody is to blame for what we did not hear."""
        for peer in self.peers.values():
            peer.heard_at += late_s
        if self.leaving_since is not None:
            self.leaving_since += late_s

    def wake_at(self, now: float) -> float:
        """When somebody's silence has to be judged next."""
        waiting = [p.heard_at for p in self.peers.values() if not p.gone]
        expiry = min(waiting, default=now) + self.settings.failure_timeout_s
        times = [now + self.settings.heartbeat_s, max(now, expiry + 0.001)]
        if self.leaving_since is not None and now < self.leaving_since + self.settings.heartbeat_s / 2:
            times.append(self.leaving_since + self.settings.heartbeat_s / 2)
        return min(times)

    # --- leaving ------------------------------------------------------------------------------------------------

    def on_goodbye(self, now: float, peer: str, goodbye: Goodbye, out: list[Effect]) -> None:
        """Take a member out; who says it again learns that it is out."""
        record = self.peers.get(peer)
        if record is not None and record.member.incarnation == goodbye.incarnation:
            record.gone = True
            self.left[peer] = goodbye.incarnation
            if self.leaving_since is not None:
                self.leaving_since = now
            self.go_on(now, out)
        if self.view.member(peer) is None:
            self._show_it_is_out(peer, out)

    def _show_it_is_out(self, peer: str, out: list[Effect]) -> None:
        out.append(Send(peer=peer, message=ViewUpdate(epoch=self.epoch, decided=True, view=self.view)))

    def hands_over(self, now: float, since: float, heirs: list[Member]) -> bool:
        """Not before more than half of those that will vote were heard since: else they could not go on without us.

        What comes in the first half of a heartbeat may have been on its way from one that has just died.
        """
        sure_at = since + self.settings.heartbeat_s / 2
        voters = [self.peers[m.id] for m in heirs if m.voter]
        return now >= sure_at and 2 * sum(p.heard_at >= sure_at for p in voters) > len(voters)

    @property
    def alone(self) -> bool:
        """Nobody is left to hand over to, and those who left have been told that they are out."""
        return all(m.id == self.me for m in self.view.members) and all(p.gone for p in self.peers.values())


def _with_votes(members: list[Member]) -> list[Member]:
    """``members`` as they go on without us: if none of them has a vote, all have one that are active, or else all."""
    if any(m.voter for m in members):
        return members
    return [replace(m, voter=m.active or not any(o.active for o in members)) for m in members]


def may_lead(member: Member) -> bool:
    return member.voter and member.reachable
