"""Whom a node asks that wants to join, or has lost its leader.

The rules:

* It asks its contacts, the leader as far as it knows, whom a member has named (``Redirect``), and, if it was a member,
  the other members, a few at a time: all at once, by all, would be a storm.
* Whoever is named is asked at once, and it alone: members that name different leaders must not echo.
* Only who was asked can answer.
* A node that was never a member, and whose key no contact allows, cannot go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prime_async.machines.ballot import Ballot
from prime_async.machines.facts import KeyDenied
from prime_async.machines.leadership import ContactPoint, MembershipSettings
from prime_async.machines.vocabulary import Dial, Effect, Fail, Report, Send
from prime_async.messages import PROTOCOL_VERSION, Hello, Member, Redirect

ASKED_IN_TURN = 3


@dataclass(slots=True)
class Seeking:
    """See the module's rules."""

    settings: MembershipSettings
    turns: int = 0
    redirected_to: ContactPoint | None = None
    denied: set[str] = field(default_factory=set)  # who does not allow our key

    def hello(self, me: Member, ballot: Ballot, in_view: int) -> Hello:
        """What is asked. ``in_view``: the number of the view in which ``me`` is a member, 0 if in none."""
        return Hello(
            protocol=PROTOCOL_VERSION,
            run_id=self.settings.run_id,
            settings=self.settings.settings,
            member=me,
            lineage=ballot.view.lineage if ballot.view else b"",
            view=in_view,
        )

    def ask(self, hello: Hello, ballot: Ballot, leader: str, out: list[Effect]) -> None:
        """All whose turn it is."""
        for point in self.whom(ballot, leader):
            self._ask_one(point, hello, out)
        self.turns += 1

    def _ask_one(self, point: ContactPoint, hello: Hello, out: list[Effect]) -> None:
        out.append(Dial(peer=point.id, control=point.control))
        out.append(Send(peer=point.id, message=hello))

    def _members(self, ballot: Ballot) -> list[ContactPoint]:
        members = ballot.view.members if ballot.view else ()
        return [ContactPoint(id=m.id, control=m.control) for m in members if m.id != self.settings.me.id]

    def whom(self, ballot: Ballot, leader: str) -> list[ContactPoint]:
        """Whose turn it is."""
        points = {p.id: p for p in self.settings.contacts}
        members = self._members(ballot)
        for k in range(min(ASKED_IN_TURN, len(members))):
            point = members[(self.turns * ASKED_IN_TURN + k) % len(members)]
            points[point.id] = point
        points |= {p.id: p for p in members if p.id == leader}
        if self.redirected_to is not None:
            points[self.redirected_to.id] = self.redirected_to
        return [p for p in points.values() if p.id != self.settings.me.id]

    def was_asked(self, ballot: Ballot, peer: str) -> bool:
        known = {p.id for p in (*self.settings.contacts, *self._members(ballot))}
        return peer in known or (self.redirected_to is not None and peer == self.redirected_to.id)

    def on_redirect(self, redirect: Redirect, hello: Hello, out: list[Effect]) -> None:
        """One who was asked says who leads."""
        if redirect.leader == self.settings.me.id:
            return
        moved = self.redirected_to is None or self.redirected_to.id != redirect.leader
        self.redirected_to = ContactPoint(id=redirect.leader, control=redirect.control)
        if moved:
            self._ask_one(self.redirected_to, hello, out)

    def on_door_closed(self, peer: str, address: str, out: list[Effect]) -> None:
        if peer not in self.denied:
            self.denied.add(peer)
            out.append(Report(fact=KeyDenied(peer=peer, address=address)))

    def shut_out(self, ballot: Ballot, address: str) -> Fail | None:
        """Why this node cannot go on, after it was denied at ``address``."""
        if ballot.view is not None or not {p.id for p in self.settings.contacts} <= self.denied:
            return None
        text = (
            f"{address} does not allow this node's key {self.settings.me.id}: "
            "ask the operator there to add it to node.allow, or to the file that node.allow_file names"
        )
        return Fail(kind="refused", text=text, reason="key_not_allowed")
