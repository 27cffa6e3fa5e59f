"""How the members do, for those that show it to people: what the leader tells, and what a member that watches asks.

The rules:

* Nothing is decided by any of it. Members send their figures only while somebody watches: the leader's answer to a
  heartbeat says so, for a few heartbeats after it was asked last.
* A member that watches asks with every heartbeat for one page of at most 64 members, page after page, so that what a
  large run costs the leader and the one that watches is bounded: all of a run of 64 each second, of 640 in ten.
* Who left, and whether it was lost or said goodbye, only the leader knows; it tells the last 16 of them with each page.
  One that watches reports those of views that are newer than its own first one, each once.
* A page of a view that this node does not have (yet) is dropped: the next one comes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from prime_async.machines.facts import MemberJoined, MemberLeft, MemberLost, MemberSeen, MembersSeen
from prime_async.machines.vocabulary import Effect, Report
from prime_async.messages import (
    MAX_DEPARTED,
    MAX_ROSTER_ENTRIES,
    Departed,
    Figures,
    Member,
    Roster,
    RosterEntry,
    View,
)

WATCHED_HEARTBEATS = 5
REPORTED_DEPARTURES = 256


class Known(NamedTuple):
    """What is to be shown of a member."""

    round: int
    inner_steps: int
    silent_s: float
    figures: Figures | None


@dataclass(slots=True)
class Audience:
    """The leader's part. ``always``: it watches itself."""

    heartbeat_s: float
    always: bool
    asked_at: float = -math.inf
    departed: deque[Departed] = field(default_factory=lambda: deque(maxlen=MAX_DEPARTED))

    def came(self, now: float) -> None:
        """Somebody has asked."""
        self.asked_at = now

    def watches(self, now: float) -> bool:
        """Whether members should say how they do."""
        return self.always or now - self.asked_at <= WATCHED_HEARTBEATS * self.heartbeat_s

    def note_departure(self, member: Member, view: int, silent_s: float) -> None:
        self.departed.append(Departed(id=member.id, name=member.name, view=view, silent_ms=_ms(silent_s)))

    def roster(self, view: View, first: int, known: Mapping[str, Known]) -> Roster:
        """The page that begins with the member at position ``first`` of ``view``."""
        page = enumerate(view.members[first : first + MAX_ROSTER_ENTRIES], first)
        entries = tuple(_entry(position, known[m.id]) for position, m in page if m.id in known)
        return Roster(view=view.number, first=first, entries=entries, departed=tuple(self.departed))


@dataclass(slots=True)
class Watcher:
    """The part of a member that watches. ``next``: the position from which it asks."""

    next: int = 0
    since: int | None = None  # the first view that it saw
    reported: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=REPORTED_DEPARTURES))

    def see_view(self, before: View | None, view: View, out: list[Effect]) -> None:
        """Who is new in ``view``; ``before`` is the one that this node went by until now."""
        if self.since is None:
            self.since = view.number
        old = {(m.id, m.incarnation) for m in before.members} if before is not None else set()
        for member in view.members if before is not None else ():
            if (member.id, member.incarnation) not in old:
                out.append(Report(fact=MemberJoined(peer=member.id, name=member.name, view=view.number)))

    def on_roster(self, roster: Roster, view: View, out: list[Effect]) -> None:
        """A page came of ``view``, which this node has."""
        for gone in roster.departed:
            self._report_departure(gone, out)
        members = view.members
        known = {members[e.position].id: _known(e) for e in roster.entries if e.position < len(members)}
        self.show(view, roster.first, known, out)

    def show(self, view: View, first: int, known: Mapping[str, Known], out: list[Effect]) -> None:
        """Report how the members of the page that begins at ``first`` do, and go on to the next one."""
        page = view.members[first : first + MAX_ROSTER_ENTRIES]
        end = first + len(page)
        self.next = end if page and end < len(view.members) else 0
        seen = tuple(_seen(m, view.leader, known.get(m.id)) for m in page)
        fact = MembersSeen(epoch=view.epoch, view=view.number, first=first, total=len(view.members), members=seen)
        out.append(Report(fact=fact))

    def _report_departure(self, gone: Departed, out: list[Effect]) -> None:
        key = gone.view, gone.id
        if self.since is None or gone.view <= self.since or key in self.reported:
            return
        self.reported.append(key)
        if gone.silent_ms:
            lost = MemberLost(peer=gone.id, name=gone.name, silent_s=gone.silent_ms / 1000, view=gone.view)
            out.append(Report(fact=lost))
        else:
            out.append(Report(fact=MemberLeft(peer=gone.id, name=gone.name, view=gone.view)))


def _ms(seconds: float) -> int:
    """Of a departure: 0 means that it said goodbye, so a silence is at least 1."""
    return max(1, round(seconds * 1000)) if seconds > 0 else 0


def _entry(position: int, known: Known) -> RosterEntry:
    return RosterEntry(
        position=position,
        round=known.round,
        inner_steps=known.inner_steps,
        silent_ms=round(known.silent_s * 1000),
        figures=known.figures,
    )


def _known(entry: RosterEntry) -> Known:
    return Known(entry.round, entry.inner_steps, entry.silent_ms / 1000, entry.figures)


def _seen(member: Member, leader: str, known: Known | None) -> MemberSeen:
    known = known or Known(0, 0, 0.0, None)
    return MemberSeen(
        id=member.id,
        name=member.name,
        incarnation=member.incarnation,
        leads=member.id == leader,
        active=member.active,
        witness=member.witness,
        round=known.round,
        inner_steps=known.inner_steps,
        silent_s=round(known.silent_s, 3),
        figures=known.figures,
    )
