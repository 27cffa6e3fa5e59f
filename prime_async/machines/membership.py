"""Who is in the run: hello, heartbeats, and numbered views that a quorum agrees on.

The rules:

* What the members agree on is a sequence of views; see :mod:`~prime_async.machines.ballot` and
  :mod:`~prime_async.machines.acceptor` for how one is decided, :mod:`~prime_async.machines.leadership` for who makes
  them, :mod:`~prime_async.machines.election` for how a lost leader is replaced. Everybody goes by decided views alone.
* A node with no contacts and no ballot on disk founds the run, as a lineage of its own, and leads it.
* A node asks with ``Hello`` until it is answered. ``Welcome`` takes it into a view, ``Redirect`` names the leader,
  ``Refuse`` says why not. All three may be lost or come twice.
* Members send the leader a heartbeat every ``heartbeat_s`` and after every outer step. One that hears nothing from its
  leader for ``failure_timeout_s`` on its own clock has lost it: it asks its contacts and, in turn, the members who
  leads; and if it may lead, it stands for election, the longest-standing first and each next one ``heartbeat_s`` later.
* Nobody supports a candidate while it hears its leader. A candidate gives way to one that has been a member for longer.
  A leader that hears no quorum steps down.
* A member that learns that it was removed asks again, as a new incarnation. One that was started again is another
  incarnation, too; with its ballot it can still vote as the one before.
* Who was a member keeps its work and waits, as long as it takes, and says so. Nodes of another lineage are told apart:
  neither takes the other in.
* A machine that wakes late was itself asleep: it gives everybody the time that it lost before it judges them. A leader
  that slept longer than the failure timeout does not take itself for one any more.
* A member that leaves says goodbye until the leader shows it a view without it, three times at most; a leader, when a
  view without it is decided, to everybody, and until one who has a vote in that view has it. If it is asked who leads
  after that, and be it after another start, it shows that view again.
  A member that is told to leave while it looks for a leader, or whose leader does not answer its goodbyes, goes on
  looking, and voting, a little longer than ``failure_timeout_s`` at most: to say goodbye to the one that is found, or
  to lead, and to hand over. Not if nobody but that leader would miss it.

May be lost: any message; heartbeats and their answers repair views. Never believed: a view or proposal that does not
come from a member, or that is of an epoch which is over, and anything from an incarnation that is not in the view.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from blake3 import blake3
from msgspec.structs import replace

from prime_async.machines.acceptor import Acceptor
from prime_async.machines.ballot import Ballot
from prime_async.machines.door import judge_hello, setting_differences
from prime_async.machines.election import Candidate
from prime_async.machines.facts import (
    CutOff,
    Founded,
    HelloRefused,
    Joined,
    LeaderElected,
    LeaderSilent,
    PeerDropped,
    SlowWake,
    SteppedDown,
    StillAsking,
    ViewAdopted,
)
from prime_async.machines.leadership import ContactPoint, Leadership, MembershipSettings, OuterStates, Peer
from prime_async.machines.reception import Reception
from prime_async.machines.roster import Known, Watcher
from prime_async.machines.seeking import Seeking
from prime_async.machines.standing import Standing
from prime_async.machines.vocabulary import (
    AskAgain,
    BallotStored,
    CommitReady,
    ConnectMembers,
    DoorClosed,
    Effect,
    Event,
    Fail,
    Finish,
    FoundUnusable,
    Heard,
    Leave,
    LetIn,
    Measured,
    Offended,
    Progress,
    Reached,
    Report,
    RunAt,
    Send,
    StateAt,
    Tell,
    Tick,
    ViewChanged,
    WakeAt,
    Weighed,
)
from prime_async.messages import (
    Accepted,
    AskRoster,
    AskRun,
    AskView,
    Figures,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Member,
    Message,
    Outvoted,
    Prepare,
    PreVote,
    Promise,
    Propose,
    Redirect,
    Refuse,
    Roster,
    Support,
    View,
    ViewUpdate,
    Vouch,
    Welcome,
)

MAX_GOODBYES = 3
VIEWS_KEPT = 32

__all__ = ["ContactPoint", "Membership", "MembershipSettings", "setting_differences"]


@dataclass(slots=True)
class Membership:
    """See the module's rules. ``role``: "starting", "asking", "member", "leader", "leaving", "gone"."""

    settings: MembershipSettings
    role: str = "starting"
    view: View | None = None  # the newest decided one
    in_view: int = 0  # the number of the view in which this incarnation is a member, as far as it knows
    acceptor: Acceptor = field(init=False)
    states: OuterStates = field(default_factory=OuterStates)
    leadership: Leadership | None = None
    standing: Standing = field(init=False)
    seeking: Seeking = field(init=False)
    reception: Reception = field(init=False)
    announced: tuple[int, tuple[Member, ...]] = (0, ())
    views: dict[int, tuple[int, View]] = field(default_factory=dict)  # number -> epoch, view: newest decided ones
    incarnation: int = 0
    rejected: int = 0  # contributions of this node
    welcomed_as: int = 0  # the incarnation that was told where the run is
    inner_steps: int = 0
    figures: Figures | None = None  # of this node
    watched: bool = False  # the leader wants them
    watcher: Watcher | None = None  # if this node shows how all do
    leader: str = ""  # whom we follow
    leader_heard_at: float = 0.0
    heard: dict[str, float] = field(default_factory=dict)  # peer -> when
    show_at: float = 0.0  # when a leader that watches says again how all do
    act_at: float = 0.0  # when the next hello, heartbeat or goodbye is due
    reported_at: float = 0.0
    reachable: dict[str, bool] = field(default_factory=dict)
    goodbyes: int = 0
    farewell: tuple[str, ...] = ()  # whom a goodbye goes to
    leave_by: float = 0.0
    unheard: View | None = None  # the view without us, until somebody who can go on from it has it
    would_leave: bool = False  # told to leave while there was no leader
    wake_at: float | None = None

    def __post_init__(self) -> None:
        self.incarnation = self.settings.me.incarnation
        stored = self.settings.ballot or Ballot(incarnations=())
        me = self.settings.me.id
        self.acceptor = Acceptor(me, stored.known_as(self.incarnation))
        self.standing = Standing(me, self.settings.heartbeat_s, self.acceptor)
        self.seeking = Seeking(self.settings)
        self.reception = Reception(self.settings)
        self.watcher = Watcher() if self.settings.watches else None

    # --- the one way in -----------------------------------------------------------------------------------------

    def handle(self, now: float, event: Event) -> list[Effect]:
        if self.role == "gone":
            return []
        out: list[Effect] = []
        self._on_event(now, event, out)
        self._hear_ourselves(now, out)
        if self.role != "gone":
            self._schedule(now, out)
        return out

    def _on_event(self, now: float, event: Event, out: list[Effect]) -> None:
        match event:
            case StateAt(round=round, digest=digest):
                self._on_state(now, round, digest, out)
            case Tick():
                self._on_tick(now, out)
            case Heard(peer=peer, message=message) if peer == self.settings.me.id:
                self._on_double(message, out)
            case Heard(peer=peer, message=message):
                self.heard[peer] = now
                self._on_message(now, peer, message, out)
            case BallotStored(seq=seq):
                out += self.acceptor.on_stored(seq)
            case Progress(inner_steps=steps):
                self.inner_steps = steps
            case Measured(figures=figures):
                self.figures = figures
            case AskAgain():
                self._on_ask_again(now, out)
            case CommitReady(commit=commit, view=number):
                # What the voters of an earlier view hold, those of this one need not: it is said again if they do.
                if self.leadership is not None and self.leadership.view.number == number:
                    self.leadership.commit = commit
                    self.leadership.go_on(now, out)
            case Weighed(weights=weights):
                if self.leadership is not None:
                    self.leadership.weights = dict(weights)
                    self.leadership.go_on(now, out)
            case FoundUnusable():
                if self.leadership is not None:
                    self.leadership.reject(now, event, out)
            case Reached(peer=peer, reachable=reachable):
                self.reachable[peer] = reachable
                if self.leadership is not None:
                    self.leadership.go_on(now, out)
            case LetIn():
                self.reception.on_let_in(now, self.view, event, out)
            case DoorClosed(peer=peer, address=address):
                self._on_door_closed(peer, address, out)
            case Offended():
                self._on_offence(now, event, out)
            case Leave():
                self._on_leave(now, out)
            case _:
                raise TypeError(f"membership has no use for {type(event).__name__}")

    def _hear_ourselves(self, now: float, out: list[Effect]) -> None:
        """What this node says to itself, as a leader to a voter, takes effect at once; then what became decided."""
        at, me = 0, self.settings.me.id
        while True:
            while at < len(out):
                effect = out[at]
                if isinstance(effect, Send) and effect.peer == me and not isinstance(effect.message, Refuse):
                    del out[at]
                    self._on_message(now, me, effect.message, out)
                else:
                    at += 1
            if not self._go_by_decided(now, out):
                return

    @property
    def me(self) -> Member:
        return replace(self.settings.me, incarnation=self.incarnation, rejected=self.rejected)

    # --- views --------------------------------------------------------------------------------------------------

    def _go_by_decided(self, now: float, out: list[Effect]) -> bool:
        """Whether there was something new."""
        decided = self.acceptor.ballot.decided_view
        if decided is None or self.role == "gone" or (self.view is not None and decided.number <= self.view.number):
            return False
        if self.watcher is not None and self.role != "leader":  # a leader accounts for them itself
            self.watcher.see_view(self.view, decided, out)
        self.view = decided
        self.views[decided.number] = (self.acceptor.ballot.accepted, decided)
        needed = decided.commit.view if decided.commit else 0  # over which the committed means name their contributors
        for old in [n for n in self.views if n <= decided.number - VIEWS_KEPT and n != needed]:
            del self.views[old]
        mine = decided.member(self.settings.me.id)
        out.append(ConnectMembers(view=decided, contacts=tuple(p.id for p in self.settings.contacts)))
        if mine is not None and mine.incarnation == self.incarnation:
            self.in_view = decided.number
            self.rejected = max(self.rejected, mine.rejected)
            self._announce(decided, out)
        if self.role == "leader":
            self._after_decision(now, mine, out)
        elif self.role == "member" and (mine is None or mine.incarnation != self.incarnation):
            self._ask_as_new(now, out)
        elif self.role == "leaving" and mine is None and not self.farewell:
            self._end(Finish(), out)
        return True

    def _announce(self, view: View, out: list[Effect]) -> None:
        """Tell the other machines; and whoever watches, unless only a commit is new."""
        out += [
            Tell(actor="exchange", event=ViewChanged(view=view)),
            Tell(actor="checkpoint", event=ViewChanged(view=view)),
            Tell(actor="training", event=ViewChanged(view=view)),
        ]
        watched = (view.epoch, view.members)
        if watched == self.announced:
            return
        self.announced = watched
        leader = view.member(view.leader)
        fact = ViewAdopted(
            epoch=view.epoch,
            view=view.number,
            leader=leader.name if leader else view.leader,
            members=tuple(m.name for m in view.members),
            active=len(view.active),
        )
        out.append(Report(fact=fact))

    def _after_decision(self, now: float, mine: Member | None, out: list[Effect]) -> None:
        assert self.leadership is not None
        if mine is not None:
            self.leadership.go_on(now, out)
            return
        held_by = self.leadership.stored_by
        self.role, self.leadership = "leaving", None  # it has handed over
        assert self.view is not None
        self.farewell = tuple(m.id for m in self.view.members)
        if not any(v.id in held_by for v in self.view.voters):
            self.unheard, self.leave_by = self.view, now + self.settings.failure_timeout_s
        self._say_goodbye(now, out)

    def _follow(self, now: float, peer: str, epoch: int) -> None:
        """``peer`` leads, and was heard."""
        if self.role == "leader":
            return
        self.leader, self.leader_heard_at = peer, now
        self.standing.end(epoch)
        if self.role == "asking" and self.in_view and self.welcomed_as == self.incarnation:
            self.role, self.act_at = "member", now

    def _knows(self, peer: str) -> bool:
        ballot = self.acceptor.ballot
        return any(v is not None and v.member(peer) is not None for v in (ballot.view, ballot.before))

    def _may_follow(self, peer: str, epoch: int, out: list[Effect]) -> bool:
        if self.role in ("starting", "gone") or not self._knows(peer):
            return False
        if self.acceptor.takes_part_in(epoch, peer):
            return True
        out.append(Send(peer=peer, message=Outvoted(epoch=self.acceptor.ballot.promised)))
        return False

    # --- our own state ------------------------------------------------------------------------------------------

    def _on_state(self, now: float, round: int, digest: bytes, out: list[Effect]) -> None:
        newer = round > self.states.round
        self.states.advance(round, digest)
        if self.role == "starting":
            self._start(now, out)
        elif self.role == "member":
            self._heartbeat(now, out)
        elif self.leadership is not None and newer:
            self.leadership.on_state(now, out)

    def _start(self, now: float, out: list[Effect]) -> None:
        stored = self.acceptor.ballot.view
        if stored is not None:
            out.append(ConnectMembers(view=stored, contacts=tuple(p.id for p in self.settings.contacts)))
        if stored is not None or self.settings.contacts:
            self.view = self.acceptor.ballot.decided_view
            self._ask_from_now(now, out)
            return
        me = replace(self.me, active=True, voter=True, reachable=True)
        lineage = blake3(self.settings.run_id + f"{me.id}/{me.incarnation}".encode()).digest()
        view = View(
            lineage=lineage,
            epoch=1,
            number=1,
            previous=bytes(32),
            leader=me.id,
            members=(me,),
            commit=self.settings.tip,
        )
        ballot = replace(self.acceptor.ballot, promised=1, promised_to=me.id, accepted=1, view=view, decided=True)
        self.role, self.leader = "leader", me.id
        self.leadership = Leadership(self.settings, self.me, self.states, 1, view, {}, self.reachable, opened=True)
        self.acceptor.store(ballot, out)
        out.append(Report(fact=Founded()))
        self._on_ask_again(now, out)

    def _on_ask_again(self, now: float, out: list[Effect]) -> None:
        """Checkpoint wants to know where the run is."""
        if self.leadership is not None:
            round, digest = self.leadership.run_state
            out.append(Tell(actor="checkpoint", event=RunAt(round=round, digest=digest)))
        elif self.role in ("asking", "member"):
            self._ask(now, out)

    # --- asking -------------------------------------------------------------------------------------------------

    def _ask_from_now(self, now: float, out: list[Effect]) -> None:
        """There is no leader that we hear, or we are no member."""
        self.standing.begin(now, self.leader)
        self.role, self.leader, self.reported_at = "asking", "", now
        self._ask(now, out)

    def _ask(self, now: float, out: list[Effect]) -> None:
        self.act_at = now + self.settings.heartbeat_s
        self.seeking.ask(self._hello, self.acceptor.ballot, self.leader, out)

    @property
    def _hello(self) -> Hello:
        return self.seeking.hello(self.me, self.acceptor.ballot, self.in_view)

    def _asked(self, peer: str) -> bool:
        return self.seeking.was_asked(self.acceptor.ballot, peer)

    def _on_welcome(self, now: float, peer: str, welcome: Welcome, out: list[Effect]) -> None:
        view = welcome.view
        mine, stored = view.member(self.settings.me.id), self.acceptor.ballot.view
        if not self._asked(peer) or mine is None or mine.incarnation != self.incarnation:
            return
        if stored is not None and stored.lineage != view.lineage:
            return
        if not self.acceptor.takes_part_in(welcome.epoch, peer):
            out.append(Send(peer=peer, message=Outvoted(epoch=self.acceptor.ballot.promised)))
            return
        if stored is None and welcome.round < self.states.round:
            self._refuse_to_go_back(welcome, out)
            return
        self.acceptor.learn(peer, welcome.epoch, view, out)
        newly, self.welcomed_as = self.role == "asking", self.incarnation
        self.in_view = self.in_view or view.number
        self._follow(now, peer, welcome.epoch)
        if newly:
            self.standing.hold_back_until = 0.0
            out.append(Report(fact=Joined(leader=peer, view=view.number, round=welcome.round)))
        at = RunAt(round=welcome.round, digest=welcome.state_digest)
        self._go_by_decided(now, out)
        if self.view is not None and self.view.number >= view.number and newly:
            self._announce(self.view, out)
        out.append(Tell(actor="checkpoint", event=at))
        if self.role == "member":
            self._heartbeat(now, out)

    def _refuse_to_go_back(self, welcome: Welcome, out: list[Effect]) -> None:
        text = (
            f"this node holds the outer state after {self.states.round} rounds, the run that it asks to join one after "
            f"{welcome.round}: start the run again from this node, without node.join; or, to give its state up, move "
            "the file in node.directory away"
        )
        self._end(Fail(kind="refused", text=text, reason="other_lineage"), out)

    def _on_refuse(self, now: float, peer: str, refusal: Refuse, out: list[Effect]) -> None:
        if refusal.reason in ("not_a_member", "diverged"):
            waits = self.role == "asking" and self._asked(peer)
            if waits or (self.role == "member" and peer == self.leader):
                self._ask_as_new(now, out)
        elif self.role == "asking" and self._asked(peer):
            if self.acceptor.ballot.view is not None and refusal.reason == "other_lineage":
                out.append(Report(fact=HelloRefused(peer=peer, reason=refusal.reason, text=refusal.text)))
                return  # it is one of another lineage; ours may still come back
            fail = Fail(kind="refused", text=refusal.text, reason=refusal.reason, differences=refusal.differences)
            self._end(fail, out)

    def _ask_as_new(self, now: float, out: list[Effect]) -> None:
        if self.would_leave:
            self._end(Finish(), out)
            return
        self.incarnation += 1
        self.in_view = 0
        self.acceptor.rename(self.incarnation, out)
        self._ask_from_now(now, out)

    def _on_door_closed(self, peer: str, address: str, out: list[Effect]) -> None:
        self.seeking.on_door_closed(peer, address, out)
        fail = self.seeking.shut_out(self.acceptor.ballot, address)
        if fail is not None and self.role == "asking":
            self._end(fail, out)

    # --- messages -----------------------------------------------------------------------------------------------

    def _on_double(self, message: Message, out: list[Effect]) -> None:
        """Somebody has a copy of our key (or, without encryption, says so): it is told, and nothing else."""
        if isinstance(message, Hello):
            text = "another node uses the same key: give each node a key of its own, with `prime-async init`"
            me = self.settings.me.id
            out.append(Report(fact=HelloRefused(peer=me, reason="key_not_allowed", text=text)))
            out.append(Send(peer=me, message=Refuse(reason="key_not_allowed", text=text)))

    def _on_message(self, now: float, peer: str, message: Message, out: list[Effect]) -> None:
        match message:
            case Hello():
                self._on_hello(now, peer, message, out)
            case Welcome() if self.role in ("asking", "member"):
                self._on_welcome(now, peer, message, out)
            case Redirect() if self.role == "asking" and self._asked(peer):
                self.seeking.on_redirect(message, self._hello, out)
            case Refuse():
                self._on_refuse(now, peer, message, out)
            case Heartbeat() if self.leadership is not None:
                self.leadership.on_heartbeat(now, peer, message, out)
            case Accepted() if self.leadership is not None:
                self.leadership.on_accepted(now, peer, message.epoch, message.number, message.incarnations, out)
            case Accepted(number=number):
                self._on_inherited(peer, number)
            case Goodbye():
                self._on_goodbye(now, peer, message, out)
            case AskRun():
                self.reception.answer_run(self.view, peer, message, out)
            case Vouch() if self._knows(peer):
                self.reception.on_vouch(peer, message, out)
            case AskRoster() if self.leadership is not None:
                self._on_ask_roster(now, peer, message, out)
            case Roster():
                self._on_roster(peer, message, out)
            case AskView(number=number) if self._knows(peer):
                self._show(peer, number, out)
            case HeartbeatAck() | Propose() | ViewUpdate():
                self._on_leader(now, peer, message, out)
            case _:
                self._on_election(now, peer, message, out)

    def _on_hello(self, now: float, peer: str, hello: Hello, out: list[Effect]) -> None:
        stored = self.acceptor.ballot.view
        refusal = judge_hello(self.settings, stored.lineage if stored else b"", peer, hello)
        if refusal is not None:
            fact = HelloRefused(peer=peer, reason=refusal.reason, text=refusal.text, differences=refusal.differences)
            out += [Report(fact=fact), Send(peer=peer, message=refusal)]
        elif self.leadership is not None:
            self.leadership.take_in(now, peer, hello, out)
        elif (left := self._view_left_behind) is not None and left.member(peer) is not None:
            out.append(self._legacy(peer, left))
        elif self.role == "member" and self.view is not None:
            leader = self.view.member(self.leader)
            if leader is not None and leader.id != peer:
                out.append(Send(peer=peer, message=Redirect(leader=leader.id, control=leader.control)))

    def _on_leader(
        self, now: float, peer: str, message: HeartbeatAck | Propose | ViewUpdate, out: list[Effect]
    ) -> None:
        if isinstance(message, ViewUpdate) and _has_left_with(peer, message):
            self._inherit(now, peer, message, out)
            return
        if self.role == "leaving" and isinstance(message, ViewUpdate) and message.decided:
            self.acceptor.learn(peer, message.epoch, message.view, out)
            return
        if isinstance(message, ViewUpdate) and peer not in (self.leader, message.view.leader):
            return  # the exchange asked for it
        if not self._may_follow(peer, message.epoch, out):
            return
        if self.leadership is not None and peer != self.settings.me.id:
            self._step_down(now, "another leads a higher epoch", out)
        self._follow(now, peer, message.epoch)
        match message:
            case Propose():
                self.acceptor.on_propose(peer, message, out)
            case ViewUpdate():
                self.acceptor.on_view(peer, message, out)
            case HeartbeatAck(epoch=epoch, view=number, watched=watched):
                self.watched = watched
                if not self.acceptor.decide(epoch, number, out):
                    out.append(Send(peer=peer, message=AskView(number=number)))

    # --- from a leader that leaves to those who stay ------------------------------------------------------------

    @property
    def _view_left_behind(self) -> View | None:
        """The one in which this node, which led, is not any more, as long as nobody else leads."""
        view, me = self.acceptor.ballot.decided_view, self.settings.me.id
        goes = self.role in ("asking", "leaving") and view is not None and view.leader == me
        return view if goes and view is not None and view.member(me) is None else None

    def _legacy(self, peer: str, view: View) -> Send:
        return Send(peer=peer, message=ViewUpdate(epoch=view.epoch, decided=True, view=view))

    def _inherit(self, now: float, peer: str, update: ViewUpdate, out: list[Effect]) -> None:
        """``peer``, which led, has left with this view: it is not to be followed."""
        new = self.acceptor.ballot.decided_view != update.view
        if new:
            if not self._may_follow(peer, update.epoch, out):
                return
            if self.leadership is not None:
                self._step_down(now, "another led a higher epoch", out)
            self.acceptor.learn(peer, update.epoch, update.view, out)
        ballot = self.acceptor.ballot
        if ballot.decided_view == update.view:
            taken = Accepted(epoch=update.epoch, number=update.view.number, incarnations=ballot.incarnations)
            self.acceptor.store(ballot, out, [Send(peer=peer, message=taken)])
        if (self.role == "asking" and new) or (self.role == "member" and peer == self.leader):
            self._ask_from_now(now, out)  # and stand, if at all, with what is known now

    def _on_inherited(self, peer: str, number: int) -> None:
        """``peer`` has the view of this number on its disk."""
        view = self.unheard
        heir = view.member(peer) if view is not None and view.number == number else None
        if heir is not None and heir.voter:
            self.unheard = None

    def _show(self, peer: str, number: int, out: list[Effect]) -> None:
        """Send a view whole: a decided one that we still have, or what we propose."""
        proposal = self.leadership.proposal if self.leadership is not None else None
        if self.leadership is not None and proposal is not None and proposal.number == number:
            update = ViewUpdate(epoch=self.leadership.epoch, decided=False, view=proposal)
        elif number in self.views:
            epoch, view = self.views[number]
            epoch = self.leadership.epoch if self.leadership is not None else epoch
            update = ViewUpdate(epoch=epoch, decided=True, view=view)
        elif self.leadership is not None:
            update = ViewUpdate(epoch=self.leadership.epoch, decided=True, view=self.leadership.view)
        else:
            return
        out.append(Send(peer=peer, message=update))

    def _on_goodbye(self, now: float, peer: str, goodbye: Goodbye, out: list[Effect]) -> None:
        if self.leadership is not None:
            self.leadership.on_goodbye(now, peer, goodbye, out)
        elif self.role == "member" and peer == self.leader:
            self._ask_from_now(now, out)

    def _on_offence(self, now: float, offence: Offended, out: list[Effect]) -> None:
        fact = PeerDropped(
            peer=offence.peer,
            plane=offence.plane,
            reason=offence.reason,
            times=offence.times,
            shut_out=offence.shut_out,
        )
        out.append(Report(fact=fact))
        record = self.leadership.peers.get(offence.peer) if self.leadership is not None else None
        if offence.shut_out and self.leadership is not None and record is not None:
            record.gone = True
            self.leadership.go_on(now, out)

    # --- elections ----------------------------------------------------------------------------------------------

    def _hears_leader(self, peer: str) -> bool:
        return self.role == "leader" or (self.role == "member" and peer != self.leader)

    def _on_election(self, now: float, peer: str, message: Message, out: list[Effect]) -> None:
        if not self._knows(peer) or self.role == "starting":
            return
        asked_for = message.epoch if isinstance(message, PreVote | Prepare | Outvoted) else 0
        if not self.acceptor.is_credible(asked_for):
            return
        ballot, own = self.acceptor.ballot, peer == self.settings.me.id
        match message:
            case PreVote(epoch=epoch):
                if not own and self._hears_leader(peer):
                    self._point_out_leader(now, peer, out)
                    return
                self.standing.give_way(now, peer)
                if epoch <= ballot.promised:
                    out.append(Send(peer=peer, message=Outvoted(epoch=ballot.promised)))
                else:
                    out.append(Send(peer=peer, message=Support(epoch=epoch, incarnations=ballot.incarnations)))
            case Prepare(epoch=epoch):
                self._on_prepare(now, peer, message, out)
            case Support() | Promise():
                if self.leadership is not None and isinstance(message, Promise):
                    self.leadership.on_promise(peer, message)
                self.standing.hears_answer(now, peer, message, out)
                self._lead_if_won(now, out)
            case Outvoted(epoch=epoch):
                self._on_outvoted(now, peer, epoch, out)
            case _:
                pass  # a late or repeated answer

    def _point_out_leader(self, now: float, peer: str, out: list[Effect]) -> None:
        if self.leadership is not None:
            out.append(Send(peer=peer, message=self.leadership.ack(now)))
            return
        leader = self.view.member(self.leader) if self.view else None
        if leader is not None:
            out.append(Send(peer=peer, message=Redirect(leader=leader.id, control=leader.control)))

    def _on_prepare(self, now: float, peer: str, prepare: Prepare, out: list[Effect]) -> None:
        ballot, own = self.acceptor.ballot, peer == self.settings.me.id
        if not own and self._hears_leader(peer):
            return
        if prepare.epoch < ballot.promised or (prepare.epoch == ballot.promised and ballot.promised_to != peer):
            out.append(Send(peer=peer, message=Outvoted(epoch=ballot.promised)))
            return
        if not own:
            self.standing.promised(now)
        blank = Promise(
            epoch=0, decided=0, number=0, accepted_epoch=0, member=self.me, incarnations=ballot.incarnations
        )
        self.acceptor.promise(peer, prepare, blank, out)

    def _on_outvoted(self, now: float, peer: str, epoch: int, out: list[Effect]) -> None:
        self.standing.outvoted(epoch)
        if self.leadership is None or epoch < self.leadership.epoch:
            return
        # The same epoch: that member has promised it to another candidate, and cannot follow us in it. Or it has
        # promised it to us, and means something that we said before and that came late.
        if epoch > self.leadership.epoch or peer not in self.leadership.promised:
            self._step_down(now, f"a member has promised epoch {epoch}", out)

    def _try_to_lead(self, now: float, out: list[Effect]) -> None:
        self.standing.stand(now, out)
        self._lead_if_won(now, out)

    def _lead_if_won(self, now: float, out: list[Effect]) -> None:
        candidate = self.standing.winner(now)
        if candidate is None:
            return
        view, before, decided = candidate.newest()
        base = view if decided or before is None else before
        peers, silent = self._answers_to(candidate, view, now)
        self.role, self.leader = "leader", self.settings.me.id
        seconds = round(now - self.standing.alone_since, 3)
        out.append(Report(fact=LeaderElected(epoch=candidate.epoch, seconds=seconds, silent=silent)))
        who = set(candidate.promises)
        self.leadership = Leadership(
            self.settings, self.me, self.states, candidate.epoch, base, peers, self.reachable, who
        )
        self.acceptor.learn(self.settings.me.id, candidate.epoch, base, out)
        if base is view:
            self._go_by_decided(now, out)
            self.leadership.go_on(now, out)
        else:
            self.leadership.propose(view, out, again=True)
        self._on_ask_again(now, out)
        if self.would_leave:
            self._on_leave(now, out)

    def _answers_to(self, candidate: Candidate, view: View, now: float) -> tuple[dict[str, Peer], tuple[str, ...]]:
        """The members of ``view`` as the new leader knows them, and the names of those that are silent."""
        peers = {}
        for peer, promise in sorted(candidate.promises.items()):
            if peer != self.settings.me.id:
                peers[peer] = Peer(heard_at=now, member=promise.member, incarnations=promise.incarnations)
        silent = [m for m in view.members if m.id not in candidate.promises]
        for member in silent:
            silent_s = max(0.001, now - self.heard.get(member.id, self.standing.alone_since))
            peers[member.id] = Peer(heard_at=now, member=member, gone=True, silent_s=silent_s)
        return peers, tuple(m.name for m in silent)

    def _step_down(self, now: float, reason: str, out: list[Effect]) -> None:
        assert self.leadership is not None
        out.append(Report(fact=SteppedDown(epoch=self.leadership.epoch, reason=reason)))
        leaving = self.leadership.leaving_since is not None
        self.leadership = None
        if leaving:
            self._end(Finish(), out)
            return
        self.leader = ""  # it was ourselves
        self._ask_from_now(now, out)

    # --- time ---------------------------------------------------------------------------------------------------

    def _on_tick(self, now: float, out: list[Effect]) -> None:
        self._forgive_own_sleep(now, out)
        self.reception.vouch(now, self.view, out)
        if self.role == "asking":
            self._on_asking_tick(now, out)
        elif self.role == "member" and self.would_leave:
            self._on_leave(now, out)  # there is a leader after all
        elif self.role == "member":
            silent_s = now - self.leader_heard_at
            if silent_s > self.settings.failure_timeout_s:
                out.append(Report(fact=LeaderSilent(leader=self.leader, silent_s=round(silent_s, 3))))
                self._ask_from_now(now, out)
                self._try_to_lead(now, out)
            elif now >= self.act_at:
                self._heartbeat(now, out)
        elif self.role == "leaving":
            if now >= self.act_at:
                self._say_goodbye(now, out)
        elif self.leadership is not None:
            self._on_leading_tick(now, out)

    def _on_asking_tick(self, now: float, out: list[Effect]) -> None:
        if self.would_leave and now >= self.leave_by:
            self._end(Finish(), out)
            return
        if now >= self.act_at:
            self._ask(now, out)
        self._try_to_lead(now, out)
        if self.role == "asking" and now - self.reported_at >= self.settings.failure_timeout_s:
            self.reported_at = now
            self._say_still_asking(now, out)

    def _say_still_asking(self, now: float, out: list[Effect]) -> None:
        seconds = round(now - self.standing.alone_since, 1)
        view = self.acceptor.ballot.decided_view  # and not one that we alone may have proposed
        if view is None or not view.voters:
            asked = tuple(p.control for p in self.seeking.whom(self.acceptor.ballot, self.leader))
            out.append(Report(fact=StillAsking(contacts=asked, seconds=seconds)))
            return
        recent = now - self.settings.failure_timeout_s
        heard = sum(self.heard.get(m.id, -1.0) >= recent or m.id == self.settings.me.id for m in view.voters)
        advice = (
            "this node keeps its work and goes on as soon as enough of them answer; if they are lost for good, stop it "
            "and carry on from what it holds with `prime-async recover --force`"
        )
        out.append(Report(fact=CutOff(seconds=seconds, heard=heard, voters=len(view.voters), advice=advice)))

    def _on_leading_tick(self, now: float, out: list[Effect]) -> None:
        assert self.leadership is not None
        self._show_as_leader(now, out)
        if self.leadership.leaving_since is not None and (self.leadership.alone or now >= self.leave_by):
            self._end(Finish(), out)
        elif not self.leadership.judge(now, out):
            self._step_down(now, "too few voters were heard", out)

    def _forgive_own_sleep(self, now: float, out: list[Effect]) -> None:
        late = now - self.wake_at if self.wake_at is not None else 0.0
        self.wake_at = None
        if late <= self.settings.heartbeat_s:
            return
        self.leader_heard_at += late
        self.standing.hold_back_until += late
        out.append(Report(fact=SlowWake(seconds=round(late, 3))))
        if self.leadership is not None:
            self.leadership.forgive(late)
            if late > self.settings.failure_timeout_s and len(self.leadership.view.voters) > 1:
                self._step_down(now, f"this node was asleep for {late:.1f} s", out)

    def _heartbeat(self, now: float, out: list[Effect]) -> None:
        self.act_at = now + self.settings.heartbeat_s
        epoch, number = self.acceptor.durable
        beat = Heartbeat(
            incarnation=self.incarnation,
            epoch=epoch,
            view=number,
            round=self.states.round,
            state_digest=self.states.digest,
            inner_steps=self.inner_steps,
            figures=self.figures if self.watched else None,
        )
        out.append(Send(peer=self.leader, message=beat))
        if self.watcher is not None:
            out.append(Send(peer=self.leader, message=AskRoster(first=self.watcher.next)))

    # --- for those who watch ------------------------------------------------------------------------------------

    def _on_ask_roster(self, now: float, peer: str, ask: AskRoster, out: list[Effect]) -> None:
        leadership = self.leadership
        if leadership is not None and leadership.view.member(peer) is not None:
            leadership.audience.came(now)
            roster = leadership.audience.roster(leadership.view, ask.first, self._known_of_all(now, leadership))
            out.append(Send(peer=peer, message=roster))

    def _known_of_all(self, now: float, leadership: Leadership) -> dict[str, Known]:
        ours = Known(self.states.round, self.inner_steps, 0.0, self.figures)
        return {**leadership.known(now), self.settings.me.id: ours}

    def _on_roster(self, peer: str, roster: Roster, out: list[Effect]) -> None:
        known = self.views.get(roster.view)
        if self.watcher is not None and self.role == "member" and peer == self.leader and known is not None:
            self.watcher.on_roster(roster, known[1], out)

    def _show_as_leader(self, now: float, out: list[Effect]) -> None:
        """The leader needs to ask nobody."""
        if self.watcher is None or self.leadership is None or self.view is None or now < self.show_at:
            return
        self.show_at = now + self.settings.heartbeat_s
        known = self._known_of_all(now, self.leadership)
        self.watcher.show(self.view, self.watcher.next, known, out)

    def _schedule(self, now: float, out: list[Effect]) -> None:
        """One wake-up is always asked for: the earliest time at which something may have to be done."""
        if self.role == "asking":
            may_stand = self.standing.may_stand
            at = min(self.act_at, self.standing.next_try_at(now)) if may_stand else self.act_at
        elif self.role == "member":
            at = min(self.act_at, self.leader_heard_at + self.settings.failure_timeout_s + 0.001)
        elif self.role == "leaving":
            at = self.act_at
        elif self.leadership is not None:
            at = self.leadership.wake_at(now)
            if self.leadership.leaving_since is not None:
                at = min(at, max(now, self.leave_by))
        else:
            return
        at = max(min(at, self.reception.next_at), now)
        if self.wake_at is not None and self.wake_at <= at:
            return
        self.wake_at = at
        out.append(WakeAt(at=at))

    # --- the end ------------------------------------------------------------------------------------------------

    def _on_leave(self, now: float, out: list[Effect]) -> None:
        if self.leadership is not None:
            if self.leadership.alone:
                self._end(Finish(), out)
                return
            self.leadership.leaving_since = now
            # Somebody may have to be left out first, who died just now.
            self.leave_by = now + self.settings.failure_timeout_s + 5 * self.settings.heartbeat_s
        elif self.role == "member":
            self.role = "leaving"
            self._say_goodbye(now, out)
        elif self.role == "asking" and self._is_missed:
            self._leave_when_there_is_a_leader(now, out)
        else:
            self._end(Finish(), out)

    @property
    def _is_missed(self) -> bool:
        """Whether there are others in the view, beside a lost leader, who take this node for one of them."""
        ballot, me, lost = self.acceptor.ballot, self.settings.me.id, self.leader or self.standing.lost
        mine = ballot.view.member(me) if ballot.view else None
        if ballot.view is None or mine is None or mine.incarnation not in ballot.incarnations:
            return False
        return any(m.id not in (me, lost) for m in ballot.view.members)

    def _leave_when_there_is_a_leader(self, now: float, out: list[Effect]) -> None:
        """Look for one, or be it: else those who are left may be too few to agree on anything."""
        if not self.would_leave:
            self.leave_by = now + self.settings.failure_timeout_s + 5 * self.settings.heartbeat_s
        self.would_leave, self.goodbyes = True, 0
        self._try_to_lead(now, out)

    @property
    def _is_leader_lost(self) -> bool:
        """Whether it has left too, and before us, or does not answer."""
        return self.goodbyes >= MAX_GOODBYES or (self.view is not None and self.view.member(self.leader) is None)

    def _say_goodbye(self, now: float, out: list[Effect]) -> None:
        late = self.would_leave and now >= self.leave_by
        if not self.farewell and self._is_leader_lost and self._is_missed and not late:
            self._ask_from_now(now, out)
            self._leave_when_there_is_a_leader(now, out)
            return
        waits = self.unheard is not None and now < self.leave_by
        if self.goodbyes >= MAX_GOODBYES and not waits:
            self._end(Finish(), out)
            return
        self.goodbyes += 1
        self.act_at = now + self.settings.heartbeat_s / 2
        if self.unheard is not None:
            out += [self._legacy(v.id, self.unheard) for v in self.unheard.voters]
        goodbye = Goodbye(incarnation=self.incarnation)
        out += [Send(peer=p, message=goodbye) for p in self.farewell or (self.leader,) if p != self.settings.me.id]

    def _end(self, effect: Fail | Finish, out: list[Effect]) -> None:
        self.role = "gone"
        out.append(effect)


def _has_left_with(peer: str, update: ViewUpdate) -> bool:
    """Whether ``peer`` says that it is decided that it, which led, is not in the view any more."""
    return update.decided and update.view.leader == peer and update.view.member(peer) is None
