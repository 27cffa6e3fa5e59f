"""The history of a run, folded from facts alone: what the page, the metrics and ``prime-async status`` show.

The rules:

* Pure: a fact comes with the time of day at which it did, and nothing is read from anywhere else. The same facts give
  the same history, so what a file holds of them brings it back.
* Bounded, whatever the run does: curves get coarser; of rounds, events and members that went the last ones are kept.
* What a member did in an earlier start of it counts: its counters begin at 0 with each incarnation, and are added up.
* Who went stays in the table, as lost or left, so that what it gave is not forgotten.
* Everything that changes is noted once, for those that have the rest already (``take_delta``).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from prime_async.machines.facts import (
    ChunksRedone,
    CutOff,
    Fact,
    HeldOutLoss,
    InnerStepDone,
    LeaderSilent,
    MemberLeft,
    MemberLost,
    MemberSeen,
    MembersSeen,
    RoundFinished,
    ViewAdopted,
)
from prime_async.messages import RoundTimes
from prime_async.watch.series import Series
from prime_async.watch.words import Context, Kind, lost, redone, sentence

KEPT_ROUNDS = 48
KEPT_EVENTS = 200
KEPT_GONE = 100
CURVES = 24
"""Members with curves of their own; in a larger run those that came first. The table has all."""
RECENT_EVENTS = 12
HELDOUT_POINTS = 480
COUNTERS = ("inner_steps", "tokens", "sent_bytes", "received_bytes", "training_ms", "elapsed_ms")


class Event(Struct):
    """A line of what happened. ``id`` stays the same when a line is written anew."""

    id: int
    at: float
    kind: Kind
    text: str
    key: str = ""


class Total(Struct):
    """Of one counter of a member: what earlier incarnations left it at, and where it is now."""

    before: int = 0
    now: int = 0

    @property
    def value(self) -> int:
        return self.before + self.now


class Row(Struct):
    """A member, also one that went. ``gone``: "", "lost" or "left"."""

    id: str
    name: str
    incarnation: int
    since: float
    seen_at: float = 0.0
    gone: str = ""
    gone_at: float = 0.0
    leads: bool = False
    active: bool = False
    witness: bool = False
    round: int = 0
    silent_s: float = 0.0
    phase: str = ""
    tokens_per_s: int = 0
    loss: float | None = None
    snapshot_round: int = 0
    totals: dict[str, Total] = {}

    def total(self, counter: str) -> int:
        found = self.totals.get(counter)
        return found.value if found is not None else 0

    @property
    def training_share(self) -> float | None:
        elapsed = self.total("elapsed_ms")
        return min(1.0, self.total("training_ms") / elapsed) if elapsed else None


class Round(Struct):
    """``members``: by id."""

    round: int
    at: float
    members: dict[str, RoundTimes] = {}


class HeldOut(Struct):
    """The loss of the outer weights after ``round`` rounds."""

    round: int
    at: float
    loss: float


class State(Struct):
    """All that is remembered."""

    rows: dict[str, Row] = {}
    loss: dict[str, Series] = {}
    speed: dict[str, Series] = {}
    rounds: list[Round] = []
    heldout: list[HeldOut] = []
    events: list[Event] = []
    next_event: int = 1
    epoch: int = 0
    view: int = 0
    leader: str = ""
    round: int = 0
    began_at: float = 0.0
    lost: int = 0
    redone_chunks: int = 0


@dataclass(slots=True)
class Changes:
    """What those that have the rest do not have yet."""

    rows: set[str] = field(default_factory=set)
    loss: list[tuple[str, float, float]] = field(default_factory=list)
    speed: list[tuple[str, float, float]] = field(default_factory=list)
    rounds: set[int] = field(default_factory=set)
    heldout: list[HeldOut] = field(default_factory=list)
    events: dict[int, Event] = field(default_factory=dict)
    any: bool = False


@dataclass(slots=True)
class History:
    """See the module's rules. ``me``, ``name``: of this node. Times are seconds since 1970."""

    me: str
    name: str
    state: State = field(default_factory=State)
    connected: bool = False  # this node hears the leader
    members: int = 0
    active: int = 0
    _changes: Changes = field(default_factory=Changes)
    _recent_lost: deque[tuple[str, int, int, float]] = field(default_factory=lambda: deque(maxlen=8))

    # --- the one way in -----------------------------------------------------------------------------------------

    def add(self, fact: Fact, at: float) -> bool:
        """Take a fact in. Whether it should be remembered over a restart: figures alone need not, each time."""
        state = self.state
        state.began_at = state.began_at or at
        match fact:
            case MembersSeen():
                return self._on_members(fact, at)
            case ViewAdopted():
                self._on_view(fact, at)
            case MemberLost():
                self._on_lost(fact, at)
            case MemberLeft(peer=peer):
                self._go(peer, "left", at)
            case ChunksRedone():
                self._on_redone(fact, at)
            case HeldOutLoss(round=round, loss=loss):
                self._on_heldout(round, loss, at)
            case RoundFinished(round=round):
                self._at_round(round + 1)
            case CutOff() | LeaderSilent():
                self.connected, self._changes.any = False, True
            case InnerStepDone():
                return False
            case _:
                pass
        line = sentence(fact, self._context) if not isinstance(fact, MemberLost) else None
        if line is not None:
            self._write(at, line.kind, line.text, line.key)
        return True

    @property
    def _context(self) -> Context:
        return Context(me=self.name, round=self.state.round, name_of=self._name_of)

    def _name_of(self, peer: str) -> str:
        row = self.state.rows.get(peer)
        return self.name if peer == self.me else row.name if row is not None else peer[:8]

    def _write(self, at: float, kind: Kind, text: str, key: str = "") -> Event:
        events = self.state.events
        if key:
            for event in events[-RECENT_EVENTS:]:
                if event.key == key:
                    event.at, event.kind, event.text = at, kind, text
                    self._note(event)
                    return event
        event = Event(self.state.next_event, at, kind, text, key)
        self.state.next_event += 1
        events.append(event)
        del events[:-KEPT_EVENTS]
        self._note(event)
        return event

    def _note(self, event: Event) -> None:
        self._changes.events[event.id] = event
        self._changes.any = True

    def _at_round(self, round: int) -> None:
        if round > self.state.round:
            self.state.round, self._changes.any = round, True

    # --- members ------------------------------------------------------------------------------------------------

    def _on_view(self, view: ViewAdopted, at: float) -> None:
        state = self.state
        if state.leader and view.leader != state.leader:
            self._write(at, "note", f"{view.leader} leads the run now")
        state.epoch, state.view, state.leader = view.epoch, view.view, view.leader
        self.members, self.active = len(view.members), view.active
        self._changes.any = True

    def _on_members(self, seen: MembersSeen, at: float) -> bool:
        state = self.state
        state.epoch, state.view = seen.epoch, seen.view
        self.connected, self.members, self._changes.any = True, seen.total, True
        new = False
        for member in seen.members:
            new |= self._on_member(member, at)
        if seen.first == 0 and seen.total == len(seen.members):
            here = {m.id for m in seen.members}
            self.active = sum(m.active for m in seen.members)
            for row in state.rows.values():
                if not row.gone and row.id not in here:
                    self._go(row.id, "left", at)
        self._forget_the_gone()
        return new

    def _on_member(self, member: MemberSeen, at: float) -> bool:
        """Whether something is new that should be remembered: the member, or a round's times."""
        row = self.state.rows.get(member.id)
        new = row is None or row.incarnation != member.incarnation or bool(row.gone)
        if row is None:
            row = Row(member.id, member.name, member.incarnation, since=at)
            self.state.rows[member.id] = row
        self._changes.rows.add(member.id)
        restarted, row.incarnation = row.incarnation != member.incarnation, member.incarnation
        row.name, row.seen_at, row.gone = member.name, at, ""
        row.leads, row.active, row.witness = member.leads, member.active, member.witness
        row.silent_s = member.silent_s
        if member.leads:
            self.state.leader = member.name
        if member.active:
            self._at_round(member.round)
        row.round = member.round
        self._count(row, "inner_steps", member.inner_steps, restarted)
        return self._on_figures(row, member, restarted, at) or new

    def _on_figures(self, row: Row, member: MemberSeen, restarted: bool, at: float) -> bool:
        figures = member.figures
        if figures is None:
            row.phase = row.phase if not restarted else ""
            return False
        row.phase = figures.phase
        row.tokens_per_s, row.snapshot_round = figures.tokens_per_s, figures.snapshot_round
        row.loss = figures.loss_micronats / 1e6 if figures.loss_micronats else None
        for counter in COUNTERS[1:]:
            self._count(row, counter, getattr(figures, counter), restarted)
        if not member.witness:
            self._draw(row, at)
        if figures.heldout_micronats:
            self._on_heldout(figures.heldout_round, figures.heldout_micronats / 1e6, at)
        new = [self._on_times(row.id, times, at) for times in figures.rounds]
        return any(new)

    def _count(self, row: Row, counter: str, value: int, restarted: bool) -> None:
        total = row.totals.setdefault(counter, Total())
        if restarted or value < total.now:
            total.before += total.now
        total.now = value

    def _draw(self, row: Row, at: float) -> None:
        state, changes = self.state, self._changes
        if row.id not in state.speed and len(state.speed) >= CURVES:
            return
        speed = float(row.tokens_per_s if row.silent_s < 5 else 0)
        state.speed.setdefault(row.id, Series()).add(at, speed)
        changes.speed.append((row.id, at, speed))
        if row.loss is not None:
            state.loss.setdefault(row.id, Series()).add(at, row.loss)
            changes.loss.append((row.id, at, row.loss))

    def _go(self, peer: str, how: str, at: float) -> None:
        row = self.state.rows.get(peer)
        if row is not None and row.gone != "lost":
            row.gone, row.gone_at, row.leads, row.active, row.tokens_per_s = how, at, False, False, 0
            self._changes.rows.add(peer)
            self._changes.any = True
            if peer in self.state.speed:
                self.state.speed[peer].add(at, 0.0)
                self._changes.speed.append((peer, at, 0.0))

    def _forget_the_gone(self) -> None:
        """The ones that gave least, if there are too many."""
        gone = [row for row in self.state.rows.values() if row.gone]
        for row in sorted(gone, key=lambda r: (r.total("tokens"), r.gone_at))[: max(0, len(gone) - KEPT_GONE)]:
            for known in (self.state.rows, self.state.loss, self.state.speed):
                known.pop(row.id, None)

    # --- losses of members, and what was done about them ---------------------------------------------------------

    def _on_lost(self, fact: MemberLost, at: float) -> None:
        self.state.lost += 1
        self._go(fact.peer, "lost", at)
        event = self._write(at, "bad", lost(fact.name, self.state.round, fact.silent_s))
        self._recent_lost.append((fact.name, event.id, self.state.round, fact.silent_s))

    def _on_redone(self, fact: ChunksRedone, at: float) -> None:
        """Into the line that says who was lost, if it is one and was just now."""
        self.state.redone_chunks += fact.chunks
        for name, number, round, silent_s in reversed(self._recent_lost):
            event = next((e for e in self.state.events if e.id == number), None)
            if (name,) == fact.lost and round == fact.round and event is not None:
                event.text = lost(name, round, silent_s, (fact.chunks, fact.owners, fact.seconds))
                self._note(event)
                self._drop(f"redo {fact.round}")
                return
        text = redone(fact.round, fact.chunks, fact.lost, fact.owners, fact.seconds)
        self._write(at, "good", text, f"redo {fact.round}")

    def _drop(self, key: str) -> None:
        """Take the line of this key back: another says it better. An empty text tells those that have it."""
        for event in [e for e in self.state.events[-RECENT_EVENTS:] if e.key == key]:
            self.state.events.remove(event)
            self._note(Event(event.id, event.at, event.kind, ""))

    # --- rounds -------------------------------------------------------------------------------------------------

    def _on_times(self, member: str, times: RoundTimes, at: float) -> bool:
        """Whether they are new. Only of members with curves: the page has room for no more."""
        found = self._round(times.round, at)
        if found is None or member in found.members or member not in self.state.speed:
            return False
        found.members[member] = times
        self._changes.rounds.add(times.round)
        return True

    def _round(self, number: int, at: float) -> Round | None:
        """``None``: it is older than all that are kept."""
        rounds = self.state.rounds
        found = next((r for r in reversed(rounds) if r.round == number), None)
        if found is None and not (len(rounds) == KEPT_ROUNDS and number < rounds[0].round):
            found = Round(number, at)
            rounds.append(found)
            rounds.sort(key=lambda r: r.round)
            del rounds[:-KEPT_ROUNDS]
        return found

    def _on_heldout(self, round: int, loss: float, at: float) -> None:
        """The same weights on all nodes: the first that says it of a round counts, and nothing of an older one."""
        heldout = self.state.heldout
        if not math.isfinite(loss) or (heldout and round <= heldout[-1].round):
            return
        point = HeldOut(round, at, loss)
        heldout.append(point)
        if len(heldout) > HELDOUT_POINTS:
            del heldout[1 : HELDOUT_POINTS // 2 : 2]
        self._changes.heldout.append(point)
        self._changes.any = True

    # --- what is shown ------------------------------------------------------------------------------------------

    @property
    def here(self) -> list[Row]:
        return [row for row in self.state.rows.values() if not row.gone]

    @property
    def mine(self) -> Row | None:
        return self.state.rows.get(self.me)

    def totals(self) -> dict[str, Any]:
        """The run in a few numbers."""
        state, here = self.state, self.here
        rows = state.rows.values()
        elapsed = sum(r.total("elapsed_ms") for r in rows)
        losses = [r.loss for r in here if r.loss is not None and not r.witness]
        heldout = state.heldout[-1] if state.heldout else None
        return {
            "round": state.round,
            "epoch": state.epoch,
            "view": state.view,
            "leader": state.leader,
            "connected": self.connected,
            "members": self.members,
            "active": self.active,
            "tokens": sum(r.total("tokens") for r in rows),
            "tokens_per_s": sum(r.tokens_per_s for r in here),
            "inner_steps": sum(r.total("inner_steps") for r in rows),
            "training_share": min(1.0, sum(r.total("training_ms") for r in rows) / elapsed) if elapsed else None,
            "sent_bytes": sum(r.total("sent_bytes") for r in rows),
            "received_bytes": sum(r.total("received_bytes") for r in rows),
            "loss": sum(losses) / len(losses) if losses else None,
            "heldout_loss": heldout.loss if heldout else None,
            "heldout_round": heldout.round if heldout else None,
            "first_heldout_loss": state.heldout[0].loss if heldout else None,
            "checkpoint_round": max((r.snapshot_round for r in here), default=0),
            "lost": state.lost,
            "began_at": state.began_at,
        }

    def table(self) -> list[dict[str, Any]]:
        """All members, who gave most first."""
        rows = sorted(self.state.rows.values(), key=lambda r: (-r.total("tokens"), r.name, r.id))
        return [_shown(row) for row in rows]

    def whole(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        state = self.state
        return {
            "totals": self.totals(),
            "members": self.table(),
            "loss": {id: _points(s) for id, s in state.loss.items()},
            "speed": {id: _points(s) for id, s in state.speed.items()},
            "heldout": msgspec.to_builtins(state.heldout),
            "rounds": msgspec.to_builtins(state.rounds),
            "events": [_event(e) for e in state.events],
        }

    def take_delta(self) -> dict[str, Any] | None:
        """What changed since this was called last, or ``None``. An event with an empty text is no more."""
        changes, self._changes = self._changes, Changes()
        if not (changes.any or changes.rows):
            return None
        state = self.state
        return {
            "totals": self.totals(),
            "members": [_shown(state.rows[id]) for id in sorted(changes.rows) if id in state.rows],
            "loss": changes.loss,
            "speed": changes.speed,
            "heldout": msgspec.to_builtins(changes.heldout),
            "rounds": msgspec.to_builtins([r for r in state.rounds if r.round in changes.rounds]),
            "events": [_event(e) for _, e in sorted(changes.events.items())],
        }


def _points(series: Series) -> list[tuple[float, float]]:
    return [(round(p.at, 1), round(p.value, 4)) for p in series.points]


def _event(event: Event) -> dict[str, Any]:
    return {"id": event.id, "at": event.at, "kind": event.kind, "text": event.text}


def _shown(row: Row) -> dict[str, Any]:
    """Names and the first digits of keys are public; addresses are not shown."""
    return {
        "id": row.id,
        "name": row.name,
        "state": row.gone or row.phase or ("active" if row.active else "joining"),
        "gone": row.gone,
        "leads": row.leads,
        "active": row.active,
        "witness": row.witness,
        "round": row.round,
        "silent_s": round(row.silent_s, 1),
        "tokens": row.total("tokens"),
        "inner_steps": row.total("inner_steps"),
        "tokens_per_s": row.tokens_per_s,
        "loss": row.loss,
        "training_share": row.training_share,
        "sent_bytes": row.total("sent_bytes"),
        "received_bytes": row.total("received_bytes"),
        "snapshot_round": row.snapshot_round,
        "since": row.since,
        "seen_at": row.seen_at,
        "gone_at": row.gone_at,
    }
