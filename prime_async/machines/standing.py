"""When a member that hears no leader stands for election, and for whom it gives way.

The rules:

* A member stands if it has a vote, can be dialled, and can prove to be the one that the newest view lists.
* The longest-standing of those stands first, each next one a heartbeat later. The leader that was lost has no turn.
* A candidate gives way to one that has been a member for longer, and to one that it has promised to: two that split the
  promises between them would both fail. It holds back for a moment, in case that one dies, too.
* A candidate that is outvoted, or gets no further, tries a higher epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prime_async.machines.acceptor import Acceptor
from prime_async.machines.ballot import entitled
from prime_async.machines.election import Candidate
from prime_async.machines.leadership import may_lead
from prime_async.machines.vocabulary import Effect
from prime_async.messages import Promise, Support

GIVES_WAY_HEARTBEATS = 1.5
PROMISED_HEARTBEATS = 2.0
PREPARES_HEARTBEATS = 4.0
"""So long a candidate waits for promises before it takes them to have gone to another."""
GRACE_HEARTBEATS = 1.25
"""So long after a quorum supports it a candidate waits for those whose leader was silent a little less long."""


@dataclass(slots=True)
class Standing:
    """See the module's rules."""

    me: str
    heartbeat_s: float
    acceptor: Acceptor
    candidate: Candidate | None = None
    lost: str = ""  # the leader that we lost
    alone_since: float = 0.0  # when we lost it, or began to ask
    hold_back_until: float = 0.0
    highest_epoch: int = field(default=0)  # that we have heard of

    def begin(self, now: float, lost: str) -> None:
        """There is no leader any more; that was ``lost``."""
        self.candidate, self.lost, self.alone_since = None, lost, now

    def end(self, epoch: int) -> None:
        """There is a leader, of this epoch."""
        self.candidate = None
        self.highest_epoch = max(self.highest_epoch, epoch)

    @property
    def may_stand(self) -> bool:
        ballot = self.acceptor.ballot
        mine = ballot.view.member(self.me) if ballot.view else None
        if ballot.view is None or mine is None or not may_lead(mine):
            return False
        return entitled(ballot.view, self.me, ballot.incarnations)

    @property
    def _order(self) -> list[str]:
        view = self.acceptor.ballot.view
        return [m.id for m in view.members if may_lead(m)] if view else []

    @property
    def _turn_at(self) -> float:
        order = [id for id in self._order if id != self.lost]
        rank = order.index(self.me) if self.me in order else 0
        return max(self.alone_since + rank * self.heartbeat_s, self.hold_back_until)

    def next_try_at(self, now: float) -> float:
        """When ``stand`` may have something to do."""
        turn = self._turn_at
        return turn if turn > now else now + self.heartbeat_s / 4

    def stand(self, now: float, out: list[Effect]) -> None:
        """Ask for what is missing, if it is our turn."""
        if not self.may_stand or now < self._turn_at:
            return
        candidate = self.candidate
        if candidate is None:
            ballot = self.acceptor.ballot
            epoch = max(ballot.promised, self.highest_epoch) + 1
            candidate = self.candidate = Candidate(self.me, ballot, epoch, self.lost, began_at=now)
        elif candidate.preparing and now > candidate.began_at + PREPARES_HEARTBEATS * self.heartbeat_s:
            self.outvoted(candidate.epoch)
            return
        candidate.ask(out)

    def hears_answer(self, now: float, peer: str, answer: Support | Promise, out: list[Effect]) -> None:
        if self.candidate is None:
            return
        if isinstance(answer, Support):
            self.candidate.on_support(now, peer, answer, out)
        else:
            self.candidate.on_promise(peer, answer, out)

    def winner(self, now: float) -> Candidate | None:
        """What we stood as, if with that we lead now."""
        candidate = self.candidate
        if candidate is None or not candidate.won(now, GRACE_HEARTBEATS * self.heartbeat_s):
            return None
        self.candidate = None
        return candidate

    def outvoted(self, epoch: int) -> None:
        """Somebody takes part in nothing below ``epoch``, and in that with another."""
        self.highest_epoch = max(self.highest_epoch, epoch)
        if self.candidate is not None and epoch >= self.candidate.epoch:
            self.candidate = None

    def give_way(self, now: float, peer: str) -> None:
        """``peer`` stands: to it, if it has been a member for longer."""
        order = self._order
        if peer in order and (self.me not in order or order.index(peer) < order.index(self.me)):
            self._hold_back(now + GIVES_WAY_HEARTBEATS * self.heartbeat_s)

    def promised(self, now: float) -> None:
        """Another has our promise."""
        self._hold_back(now + PROMISED_HEARTBEATS * self.heartbeat_s)

    def _hold_back(self, until: float) -> None:
        self.candidate = None
        self.hold_back_until = max(self.hold_back_until, until)
