"""The commit of a round on one node: from the view that shows it until the training has its means.

The rules:

* The commit comes with a view. When all means are here their digest is compared with the commit's. If it differs, all
  is fetched once more as settled. If that differs too, or the chain does not fit, the outer state is asked for; the
  round is tried again a little later, in case that was not what was wrong.
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
from prime_async.machines.coordinator import next_chain
from prime_async.machines.facts import RoundCommitted, StateDiverged
from prime_async.machines.views import Views
from prime_async.machines.vocabulary import Effect, FetchState, MeansCommitted, Report, Send, Tell
from prime_async.messages import AskView, Commit, View, positions

LOST_REPEATS = 10
"""After so many repeats a round that was given up is tried again."""


@dataclass(slots=True)
class Contribution:
    """Of this node, to the round: its weight once it is fixed, and under which incarnations it said so."""

    weight: int | None = None
    ready_as: set[int] = field(default_factory=set)

    def is_of(self, view: View, me: str) -> bool:
        """Whether ``view`` lists the start of this node that contributes."""
        member = view.member(me)
        return self.weight is not None and member is not None and member.incarnation in self.ready_as


@dataclass(slots=True)
class HandOver:
    """See the module's rules. ``done``: the means of ``round`` are handed over."""

    me: str
    repeat_s: float
    chunks: Chunks
    views: Views
    round: int | None = None
    done: bool = False
    chain: bytes | None = None  # unknown until the first commit that this node sees
    asked: str = ""  # who was asked last for the view of the commit
    lost_until: float = 0.0  # nothing of the round is begun before that
    behind: tuple[int, float] | None = None  # the last that was missed, and when the state was asked for

    def begin(self, round: int) -> None:
        """The outer state is at ``round``."""
        if not (self.done and self.round is not None and round == self.round + 1):
            self.chain = None  # it came from a member, past commits that we did not see
        self.round, self.done, self.asked, self.lost_until, self.behind = round, False, "", 0.0, None

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
            if self.chain is not None and next_chain(self.chain, commit.digest) != commit.chain:
                self._diverged(commit, b"", view, out)
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
            self._diverged(commit, digest, view, out)
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
        self.done, self.chain = True, commit.chain
        out.append(self.chunks.settle(view.lineage))
        out.append(Report(fact=RoundCommitted(round=commit.round, attempt=commit.attempt)))
        out.append(Tell(actor="training", event=MeansCommitted(round=commit.round, position=position)))
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

    def _diverged(self, commit: Commit, ours: bytes, view: View, out: list[Effect]) -> None:
        fact = StateDiverged(peer=view.leader, round=commit.round, ours=ours.hex(), theirs=commit.digest.hex())
        out.append(Report(fact=fact))

    def _start_over(self, now: float, out: list[Effect]) -> None:
        """Nothing here can be trusted to be the run's."""
        self.chunks.give_up(out)
        self.chain = None
        self.lost_until = now + LOST_REPEATS * self.repeat_s
        out.append(Tell(actor="checkpoint", event=FetchState()))
