"""The commit of a round on one node: from the view that shows it until the training has its means.

The rules:

* The commit comes with a view. Its outer state must be ours, and its chain ours with it. When all means are here their
  digest is compared with the commit's. If it differs, all is fetched once more as settled. If that differs too, or the
  state or the chain does, the outer state is asked for; the round is tried again a little later, in case that was not
  what was wrong.
* A node that missed a whole commit asks for the outer state. One that knows the commit of its round goes on with it,
  until the run is two commits ahead, or nobody gives it the means: those who held them are gone, and who has joined
  since has the state that they lead to alone.
* The training is told this node's place in the bitmaps of the means, if it is in any: if a start of this node said
  ``Ready`` for the round, and is listed in the view that the commit names. Who contributed, and lacks that view, asks
  the leader for it, then the others in turn, and hands over when it has come.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prime_async.machines.chunks import Chunks
from prime_async.machines.facts import RoundCommitted, StateDiverged
from prime_async.machines.views import Views
from prime_async.machines.vocabulary import Effect, FetchState, MeansCommitted, Report, Send, StateAt, Tell
from prime_async.messages import FIRST_CHAIN, AskView, Commit, View, next_chain, positions

LOST_REPEATS = 10
"""After so many repeats a round that was given up is tried again."""


@dataclass(slots=True)
class Contribution:
    """Of this node, to the round: its weight once it is fixed, and as what it said so.

    ``ready_as``: incarnations, each with how many contributions were rejected before.
    """

    weight: int | None = None
    ready_as: set[tuple[int, int]] = field(default_factory=set)

    def is_of(self, view: View, me: str) -> bool:
        """Whether ``view`` lists the start of this node that contributes, and no later rejection."""
        member = view.member(me)
        return self.weight is not None and member is not None and (member.incarnation, member.rejected) in self.ready_as


@dataclass(slots=True)
class HandOver:
    """See the module's rules. ``done``: the means of ``round`` are handed over."""

    me: str
    repeat_s: float
    chunks: Chunks
    views: Views
    round: int | None = None
    done: bool = False
    state: bytes = b""  # digest of the outer state
    chain: bytes = FIRST_CHAIN  # of the commits that led to it
    asked: str = ""  # who was asked last for the view of the commit
    lost_until: float = 0.0  # nothing of the round is begun before that
    behind: tuple[int, float] | None = None  # the last that was missed, and when the state was asked for

    def begin(self, at: StateAt) -> None:
        """The outer state is another."""
        self.round, self.state, self.chain = at.round, at.digest, at.chain
        self.done, self.asked, self.lost_until, self.behind = False, "", 0.0, None

    @property
    def lacks(self) -> int | None:
        """The number of the view that is asked for."""
        commit = self.chunks.commit
        return commit.view if commit is not None and self.asked and not self.done else None

    def see(self, now: float, view: View, out: list[Effect]) -> None:
        """What ``view`` says is committed."""
        commit = view.commit
        if commit is None or self.round is None or self.done or now < self.lost_until:
            return
        if commit.round == self.round and self.chunks.commit is None:
            if commit.state != self.state:
                self._diverged(self.round, self.state, commit.state, view, out)
                self._start_over(now, out)
            elif next_chain(self.chain, commit.state, commit.digest) != commit.chain:
                self._diverged(self.round, self.chain, commit.chain, view, out)
                self._start_over(now, out)
            else:
                self.chunks.follow(now, commit, view, out)
        elif commit.round > self.round + (self.chunks.commit is not None) or self.chunks.gathering.is_stuck(view):
            self.fall_behind(now, commit.round, out)

    def fall_behind(self, now: float, round: int, out: list[Effect]) -> None:
        """``round`` is committed, and ours is an earlier one. Said once of each; again if that did not help."""
        recently = now - LOST_REPEATS * self.repeat_s
        if self.behind is None or self.behind[0] < round or self.behind[1] <= recently:
            self.behind = (round, now)
            out.append(Tell(actor="checkpoint", event=FetchState()))

    def finish(self, now: float, view: View, contribution: Contribution, out: list[Effect]) -> bool:
        """Hand over the means of the commit if they are here, and if it is known what is to be told."""
        commit, digest = self.chunks.commit, self.chunks.committed_digest
        if commit is None or digest is None or self.done:
            return False
        if digest != commit.digest:
            self._diverged(commit.round, digest, commit.digest, view, out)
            if self.chunks.anew:
                self._start_over(now, out)
            else:
                self.chunks.follow_anew(view)
                self.chunks.pump(now, out, own_here=False)
            return False
        position = self._position(commit, contribution)
        if position is None:
            if not self.asked:
                self.ask_view(view, out)
            return False
        self.done = True
        out.append(self.chunks.settle(view.lineage, self.chain))
        out.append(Report(fact=RoundCommitted(round=commit.round, attempt=commit.attempt)))
        committed = MeansCommitted(round=commit.round, position=position, chain=commit.chain)
        out.append(Tell(actor="training", event=committed))
        return True

    def _position(self, commit: Commit, contribution: Contribution) -> int | None:
        """Of this node in the bitmaps of the means; -1 if it is in none, ``None`` if that cannot be told yet."""
        if contribution.weight is None or not contribution.ready_as:
            return -1
        view = self.views.get(commit.view)
        if view is None:
            return None
        if not contribution.is_of(view, self.me):
            return -1
        place = next(i for i, m in enumerate(view.members) if m.id == self.me)
        return place if any(place in positions(bits) for bits in self.chunks.committed_contributors) else -1

    def ask_view(self, view: View, out: list[Effect]) -> None:
        """Ask the leader, then the others in turn, for the view of the commit."""
        commit, gathering = self.chunks.commit, self.chunks.gathering
        assert commit is not None
        self.asked = gathering.next_source(view, self.asked) if self.asked else gathering.first_source(view)
        out.append(Send(peer=self.asked, message=AskView(number=commit.view)))

    def _diverged(self, round: int, ours: bytes, theirs: bytes, view: View, out: list[Effect]) -> None:
        fact = StateDiverged(peer=view.leader, round=round, ours=ours.hex(), theirs=theirs.hex())
        out.append(Report(fact=fact))

    def _start_over(self, now: float, out: list[Effect]) -> None:
        """Nothing here can be trusted to be the run's."""
        self.chunks.give_up(out)
        self.lost_until = now + LOST_REPEATS * self.repeat_s
        out.append(Tell(actor="checkpoint", event=FetchState()))
