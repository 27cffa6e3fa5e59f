"""Who is in the run: hello, heartbeats, numbered views.

The rules:

* One member leads: it numbers the views, and a higher (epoch, number) replaces a lower one. A node with no contacts
  founds the run and leads it. (A lost leader ends the run, and its members keep their state. The founder's start is
  the epoch, so that the views of one that starts again are not mistaken for its earlier ones.)
* No node goes back: one that holds the outer state of a later round than a leader whose views it does not know ends
  with an error instead of joining, and keeps its state.
* A node asks with ``Hello`` until it is answered. ``Welcome`` takes it into a view, ``Redirect`` names the leader,
  ``Refuse`` says why not. All three may be lost or come twice.
* A new member is not active: nobody waits for it, and it owns nothing. It becomes active once its heartbeat shows the
  run's outer state: at the next round's start, or at once while fewer than ``min_members`` are active, so that it
  begins its inner steps together with the others.
* Members send the leader a heartbeat every ``heartbeat_s`` and after every outer step. One that was silent for
  ``failure_timeout_s`` on the leader's clock is not in the next view. A member that hears as long nothing from the
  leader has lost it: it asks again, as a new incarnation, for three timeouts more, and then gives up.
* A machine that wakes late was itself asleep: it gives everybody the time that it lost before it judges them.
* A member that learns that it was removed asks again, as a new incarnation.
* The digests in heartbeats are compared: a member whose digest differs from the leader's for the same round is removed
  as ``diverged``, asks again, and fetches the state.
* A member that leaves says goodbye until the leader shows it a view without it, three times at most.
* A leader that leaves waits until the others have the last round, says goodbye to them, and goes when they have gone.

May be lost: any message; heartbeats and their answers repair views. Never believed: a view that does not come from
the leader it names, and anything from an incarnation that is not in the view.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from prime_async.machines.facts import (
    Founded,
    HelloRefused,
    Joined,
    KeyDenied,
    LeaderSilent,
    PeerDropped,
    RunEnding,
    SlowWake,
    StillAsking,
)
from prime_async.machines.leadership import ContactPoint, Leadership, MembershipSettings, OuterStates, adopt
from prime_async.machines.vocabulary import (
    AskAgain,
    Dial,
    DoorClosed,
    Effect,
    Event,
    Fail,
    Finish,
    Heard,
    Leave,
    Offended,
    Progress,
    Report,
    RunAt,
    Send,
    StateAt,
    Tell,
    Tick,
    WakeAt,
)
from prime_async.messages import (
    PROTOCOL_VERSION,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Member,
    Message,
    Redirect,
    Refuse,
    View,
    ViewUpdate,
    Welcome,
)

MAX_GOODBYES = 3
MAX_LINE = 512
"""Characters of a difference: 256 of them are still a message. What a peer said may be longer."""
PATIENCE = 4
"""A leader that is silent for so many failure timeouts is given up."""

__all__ = ["ContactPoint", "Membership", "MembershipSettings", "setting_differences"]


@dataclass(slots=True)
class Membership:
    """See the module's rules. ``role``: "starting", "asking", "member", "leaving", "leader", "gone"."""

    settings: MembershipSettings
    role: str = "starting"
    view: View | None = None
    states: OuterStates = field(default_factory=OuterStates)
    leadership: Leadership | None = None
    incarnation: int = 0
    inner_steps: int = 0
    leader_heard_at: float = 0.0
    leader_gone: bool = False  # it said goodbye: the run ends
    act_at: float = 0.0  # when the next hello or heartbeat is due
    asking_since: float = 0.0
    reported_asking_at: float = 0.0
    redirected_to: ContactPoint | None = None
    denied: set[str] = field(default_factory=set)
    goodbyes: int = 0
    wake_at: float | None = None

    def __post_init__(self) -> None:
        self.incarnation = self.settings.me.incarnation

    # --- the one way in -----------------------------------------------------------------------------------------

    def handle(self, now: float, event: Event) -> list[Effect]:
        if self.role == "gone":
            return []
        out: list[Effect] = []
        match event:
            case StateAt(round=round, digest=digest):
                self._on_state(now, round, digest, out)
            case Tick():
                self._on_tick(now, out)
            case Heard(peer=peer, message=message) if peer == self.settings.me.id:
                self._on_double(message, out)
            case Heard(peer=peer, message=message):
                self._on_message(now, peer, message, out)
            case Progress(inner_steps=steps):
                self.inner_steps = steps
            case AskAgain():
                self._on_ask_again(now, out)
            case DoorClosed(peer=peer, address=address):
                self._on_door_closed(peer, address, out)
            case Offended():
                self._on_offence(event, out)
            case Leave():
                self._on_leave(now, out)
            case _:
                raise TypeError(f"membership has no use for {type(event).__name__}")
        self._follow_leadership(out)
        self._schedule(now, out)
        return out

    @property
    def me(self) -> Member:
        return replace(self.settings.me, incarnation=self.incarnation)

    def _follow_leadership(self, out: list[Effect]) -> None:
        if self.leadership is not None and self.role == "leader":
            self.view = self.leadership.view
            if self.leadership.end_if_alone(out):
                self.role = "gone"

    # --- our own state ------------------------------------------------------------------------------------------

    def _on_state(self, now: float, round: int, digest: bytes, out: list[Effect]) -> None:
        newer = round > self.states.round
        self.states.advance(round, digest)
        if self.role == "starting":
            self._start(now, out)
        elif self.role == "member":
            self._heartbeat(now, out)
        elif self.leadership is not None and newer:
            self.leadership.activate(out)

    def _start(self, now: float, out: list[Effect]) -> None:
        if self.settings.contacts:
            self._ask_from_now(now, out)
            return
        self.role = "leader"
        me = replace(self.me, active=True)
        self.view = View(epoch=me.incarnation, number=1, leader=me.id, members=(me,))
        self.leadership = Leadership(self.settings, self.states, self.view)
        out.append(Report(fact=Founded()))
        out += adopt(self.view, self.settings)
        self._on_ask_again(now, out)

    def _on_ask_again(self, now: float, out: list[Effect]) -> None:
        """Checkpoint wants to know where the run is. The leader's own state is the run's."""
        if self.role == "leader":
            at = RunAt(round=self.states.round, digest=self.states.digest, provider=self.settings.me.id)
            out.append(Tell(actor="checkpoint", event=at))
        elif self.role in ("asking", "member"):
            self._ask(now, out)

    # --- asking -------------------------------------------------------------------------------------------------

    def _ask_from_now(self, now: float, out: list[Effect]) -> None:
        self.role = "asking"
        self.asking_since = self.reported_asking_at = now
        self._ask(now, out)

    def _ask(self, now: float, out: list[Effect]) -> None:
        self.act_at = now + self.settings.heartbeat_s
        for point in self._whom_to_ask():
            self._ask_one(point, out)

    def _ask_one(self, point: ContactPoint, out: list[Effect]) -> None:
        spec = self.settings.settings
        hello = Hello(protocol=PROTOCOL_VERSION, run_id=self.settings.run_id, settings=spec, member=self.me)
        out.append(Dial(peer=point.id, control=point.control))
        out.append(Send(peer=point.id, message=hello))

    def _asked(self, peer: str) -> bool:
        return any(peer == p.id for p in self._whom_to_ask())

    def _whom_to_ask(self) -> list[ContactPoint]:
        points = {p.id: p for p in self.settings.contacts}
        if self.redirected_to is not None:
            points[self.redirected_to.id] = self.redirected_to
        leader = self.view.member(self.view.leader) if self.view else None
        if leader is not None:
            points[leader.id] = ContactPoint(id=leader.id, control=leader.control)
        return [p for p in points.values() if p.id != self.settings.me.id]

    def _on_welcome(self, now: float, peer: str, welcome: Welcome, out: list[Effect]) -> None:
        view = welcome.view
        mine = view.member(self.settings.me.id)
        if not self._asked(peer) or view.leader != peer or mine is None or mine.incarnation != self.incarnation:
            return
        unknown = self.view is None or self.view.epoch != view.epoch
        if unknown and welcome.round < self.states.round:
            self._refuse_to_go_back(welcome, out)
            return
        self.leader_heard_at = now
        if self.role == "asking":
            self.role = "member"
            out.append(Report(fact=Joined(leader=peer, view=view.number, round=welcome.round)))
        self._adopt_newer(view, out)
        self._heartbeat(now, out)
        at = RunAt(round=welcome.round, digest=welcome.state_digest, provider=peer)
        out.append(Tell(actor="checkpoint", event=at))

    def _refuse_to_go_back(self, welcome: Welcome, out: list[Effect]) -> None:
        text = (
            f"this node holds the outer state after {self.states.round} rounds, the leader that answers one after "
            f"{welcome.round}: start the run again from this node, without node.join; or, to give its state up, move "
            "the file in node.directory away"
        )
        self._end(Fail(kind="leader_lost", text=text), out)

    def _on_redirect(self, peer: str, redirect: Redirect, out: list[Effect]) -> None:
        """Whom it names is asked at once, and it alone: members that name different leaders must not echo."""
        if not self._asked(peer) or redirect.leader == self.settings.me.id:
            return
        moved = self.redirected_to is None or self.redirected_to.id != redirect.leader
        self.redirected_to = ContactPoint(id=redirect.leader, control=redirect.control)
        if moved:
            self._ask_one(self.redirected_to, out)

    def _on_refuse(self, now: float, peer: str, refusal: Refuse, out: list[Effect]) -> None:
        if refusal.reason in ("not_a_member", "diverged"):
            if self._is_leader(peer):
                self._ask_as_new(now, out)
        elif self.role == "asking" and self._asked(peer):
            fail = Fail(kind="refused", text=refusal.text, reason=refusal.reason, differences=refusal.differences)
            self._end(fail, out)

    def _ask_as_new(self, now: float, out: list[Effect]) -> None:
        self.incarnation += 1
        self._ask_from_now(now, out)

    def _on_door_closed(self, peer: str, address: str, out: list[Effect]) -> None:
        if peer not in self.denied:
            self.denied.add(peer)
            out.append(Report(fact=KeyDenied(peer=peer, address=address)))
        contacts = {p.id for p in self.settings.contacts}
        if self.role == "asking" and contacts <= self.denied:
            text = (
                f"{address} does not allow this node's key {self.settings.me.id}: "
                "ask the operator there to add it to node.allow, or to the file that node.allow_file names"
            )
            self._end(Fail(kind="refused", text=text, reason="key_not_allowed"), out)

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
            case Redirect() if self.role == "asking":
                self._on_redirect(peer, message, out)
            case Refuse():
                self._on_refuse(now, peer, message, out)
            case Heartbeat() if self.leadership is not None:
                self.leadership.on_heartbeat(now, peer, message, out)
            case HeartbeatAck() if self._is_leader(peer):
                self.leader_heard_at = now
            case ViewUpdate(view=view) if self._is_leader(peer) and view.leader == peer:
                self.leader_heard_at = now
                self._adopt_newer(view, out)
                self._check_still_in(now, out)
            case ViewUpdate(view=view) if self.role == "leaving" and view.leader == peer and self._left(view):
                self._end(Finish(), out)
            case Goodbye() if self.leadership is not None:
                self.leadership.on_goodbye(peer, message, out)
            case Goodbye(text=text) if self._is_leader(peer) and not self.leader_gone:
                self.leader_gone = True
                out += [Report(fact=RunEnding(text=text)), Tell(actor="training", event=Leave(at_once=True))]
            case _:
                pass  # a late or repeated answer

    def _left(self, view: View) -> bool:
        return self.view is not None and view.leader == self.view.leader and view.member(self.settings.me.id) is None

    def _is_leader(self, peer: str) -> bool:
        return self.role == "member" and self.view is not None and peer == self.view.leader

    def _adopt_newer(self, view: View, out: list[Effect]) -> None:
        if self.view is None or (view.epoch, view.number) > (self.view.epoch, self.view.number):
            self.view = view
            out += adopt(view, self.settings)

    def _check_still_in(self, now: float, out: list[Effect]) -> None:
        mine = self.view.member(self.settings.me.id) if self.view else None
        if mine is None or mine.incarnation != self.incarnation:
            self._ask_as_new(now, out)

    def _on_hello(self, now: float, peer: str, hello: Hello, out: list[Effect]) -> None:
        refusal = self._why_not(peer, hello)
        if refusal is not None:
            fact = HelloRefused(peer=peer, reason=refusal.reason, text=refusal.text, differences=refusal.differences)
            out += [Report(fact=fact), Send(peer=peer, message=refusal)]
        elif self.leadership is not None:
            self.leadership.take_in(now, peer, hello, out)
        elif self.role == "member" and self.view is not None:
            leader = self.view.member(self.view.leader)
            if leader is not None:
                out.append(Send(peer=peer, message=Redirect(leader=leader.id, control=leader.control)))

    def _why_not(self, peer: str, hello: Hello) -> Refuse | None:
        if hello.protocol != PROTOCOL_VERSION:
            text = f"this run speaks protocol {PROTOCOL_VERSION}, the node that asks speaks {hello.protocol}: "
            return Refuse(reason="other_protocol", text=text + "install the same version of prime-async")
        if hello.run_id != self.settings.run_id:
            text = "the node that asks has another run spec: copy the [run] table of a member"
            differences = setting_differences(self.settings.settings, hello.settings)
            return Refuse(reason="other_run", text=text, differences=differences[:256])
        if self.leader_gone or (self.leadership is not None and self.leadership.leaving):
            return Refuse(reason="leader_left", text="the run is ending: its leader has left")
        if hello.member.id != peer:
            return Refuse(reason="key_not_allowed", text="the hello names another key than the connection's")
        return None

    def _on_offence(self, offence: Offended, out: list[Effect]) -> None:
        fact = PeerDropped(
            peer=offence.peer,
            plane=offence.plane,
            reason=offence.reason,
            times=offence.times,
            shut_out=offence.shut_out,
        )
        out.append(Report(fact=fact))
        if offence.shut_out and self.leadership is not None:
            self.leadership.remove(offence.peer, out)

    # --- time ---------------------------------------------------------------------------------------------------

    def _on_tick(self, now: float, out: list[Effect]) -> None:
        self._forgive_own_sleep(now, out)
        if self.role == "asking":
            was_member = self.view is not None
            if was_member and now - self.asking_since > (PATIENCE - 1) * self.settings.failure_timeout_s:
                self._give_up(out)
                return
            if now >= self.act_at:
                self._ask(now, out)
            if now - self.reported_asking_at >= self.settings.failure_timeout_s:
                self.reported_asking_at = now
                asked = tuple(p.control for p in self._whom_to_ask())
                out.append(Report(fact=StillAsking(contacts=asked, seconds=round(now - self.asking_since, 1))))
        elif self.role == "member":
            silent_s = now - self.leader_heard_at
            if silent_s > self.settings.failure_timeout_s and not self.leader_gone:
                out.append(Report(fact=LeaderSilent(leader=self.view.leader if self.view else "", silent_s=silent_s)))
                self._ask_as_new(now, out)
            elif now >= self.act_at:
                self._heartbeat(now, out)
        elif self.role == "leaving":
            if now >= self.act_at:
                self._say_goodbye(now, out)
        elif self.leadership is not None:
            self.leadership.remove_silent(now, out)

    def _forgive_own_sleep(self, now: float, out: list[Effect]) -> None:
        late = now - self.wake_at if self.wake_at is not None else 0.0
        self.wake_at = None
        if late > self.settings.heartbeat_s:
            self.leader_heard_at += late
            if self.leadership is not None:
                self.leadership.forgive(late)
            out.append(Report(fact=SlowWake(seconds=round(late, 3))))

    def _give_up(self, out: list[Effect]) -> None:
        leader = self.view.member(self.view.leader) if self.view else None
        text = (
            f"the leader {leader.name if leader else 'of the run'!r} has not answered for "
            f"{PATIENCE * self.settings.failure_timeout_s:g} s. This node's outer state is kept in node.directory: "
            "start the run again from there"
        )
        self._end(Fail(kind="leader_lost", text=text), out)

    def _heartbeat(self, now: float, out: list[Effect]) -> None:
        if self.view is None:
            return
        self.act_at = now + self.settings.heartbeat_s
        beat = Heartbeat(
            incarnation=self.incarnation,
            epoch=self.view.epoch,
            view=self.view.number,
            round=self.states.round,
            state_digest=self.states.digest,
            inner_steps=self.inner_steps,
        )
        out.append(Send(peer=self.view.leader, message=beat))

    def _schedule(self, now: float, out: list[Effect]) -> None:
        """One wake-up is always asked for: the earliest time at which something may have to be done."""
        if self.role in ("asking", "member", "leaving"):
            at = self.act_at
        elif self.role == "leader" and self.leadership is not None:
            at = self.leadership.wake_at(now)
            at = at if self.wake_at is None else min(at, self.wake_at)
        else:
            return
        if at != self.wake_at:
            self.wake_at = at
            out.append(WakeAt(at=at))

    # --- the end ------------------------------------------------------------------------------------------------

    def _on_leave(self, now: float, out: list[Effect]) -> None:
        if self.leadership is not None:
            self.leadership.leave(out)  # and go when the others have gone
        elif self.role == "member":
            self.role = "leaving"
            self._say_goodbye(now, out)
        else:
            self._end(Finish(), out)

    def _say_goodbye(self, now: float, out: list[Effect]) -> None:
        if self.goodbyes == MAX_GOODBYES or self.view is None:
            self._end(Finish(), out)
            return
        self.goodbyes += 1
        self.act_at = now + self.settings.heartbeat_s / 2
        out.append(Send(peer=self.view.leader, message=Goodbye(incarnation=self.incarnation)))

    def _end(self, effect: Fail | Finish, out: list[Effect]) -> None:
        self.role = "gone"
        out.append(effect)


def setting_differences(ours: dict[str, str], theirs: dict[str, str]) -> tuple[str, ...]:
    """One line for each setting that differs, in order of the settings' names; what is too long for a line is cut."""
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(name, "not set"), theirs.get(name, "not set")
        if here != there:
            lines.append(f"{name}: {here} in the run, {there} at the node that asks"[:MAX_LINE])
    return tuple(lines)
