"""The chunks of a round on one node: what is here, what is made or fetched, first for a plan, then for a commit.

The rules:

* A plan of another making begins all again. One of the same making changes the owners, and so the numbers, of some
  chunks: those are begun again under the new number, and of the others nothing is lost, gets under way included.
* What is here under a lower number than the newest plan's stays known, to answer asks, and does not count.
* From the commit on, what is held of each chunk under the highest number up to the commit's counts. What is still
  fetched under such a number goes on; all else is fetched as settled. What this node owned and has not made yet was
  made without it, and is given up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prime_async.machines.attempt import SETTLED, Attempt, Means, Number, mean_key, number_of
from prime_async.machines.facts import ChunksReassigned, ChunksRedone
from prime_async.machines.fetches import Fetches
from prime_async.machines.fragments import Fragments
from prime_async.machines.gathering import Gathering
from prime_async.machines.recovery import Recovery
from prime_async.machines.reducing import Reducing
from prime_async.machines.units import to_ms
from prime_async.machines.vocabulary import Effect, Fetched, FetchFailed, Reduced, Report, Settle, StoreMeans
from prime_async.messages import ChunkKey, Commit, View, positions


@dataclass(slots=True)
class Redo:
    """Chunks that were given to other owners since ``began_at``. ``lost``, ``owners``: names, in order of coming."""

    began_at: float
    chunks: set[int] = field(default_factory=set)
    lost: dict[str, None] = field(default_factory=dict)
    owners: dict[str, None] = field(default_factory=dict)


@dataclass(slots=True)
class Chunks:
    """See the module's rules. ``numbers``: under which the committed mean of each chunk is, or will be, here."""

    me: str
    fragments: Fragments
    chunk_window: int
    mean_window: int
    repeat_s: float
    fetches: Fetches
    means: Means = field(default_factory=Means)
    attempt: Attempt | None = None
    reducing: Reducing | None = None
    gathering: Gathering = field(init=False)
    here: tuple[str, ...] = ()  # members of the round's view that are still in the present one
    offering: tuple[str, ...] = ()  # contributors of the plan that are, and were not rejected
    commit: Commit | None = None
    numbers: dict[int, Number] = field(default_factory=dict)
    anew: bool = False  # all is fetched as settled
    redo: Redo | None = None  # what others lost, and is not here again yet

    def __post_init__(self) -> None:
        self.gathering = Gathering(me=self.me, window=self.mean_window, fetches=self.fetches)

    @property
    def plan_digest(self) -> bytes | None:
        """Over all means under the plan's numbers, once they are here."""
        return self.means.digest(self.attempt.numbers) if self.attempt else None

    @property
    def committed_digest(self) -> bytes | None:
        """Over the means that are taken for the committed ones, once they are here."""
        return self.means.digest(self.numbers)

    @property
    def committed_contributors(self) -> set[bytes]:
        """Who is in those means: the bitmaps of their headers."""
        return {self.means.held[c][n].contributors for c, n in self.numbers.items()}

    @property
    def next_at(self) -> float | None:
        working = self.reducing.next_at if self.reducing and self.commit is None else None
        return min((at for at in (self.fetches.next_at, working) if at is not None), default=None)

    def give_up(self, out: list[Effect]) -> None:
        """All of it."""
        self.fetches.cancel_all(out)
        self.gathering = Gathering(me=self.me, window=self.mean_window, fetches=self.fetches)
        self.means, self.attempt, self.reducing = Means(), None, None
        self.commit, self.numbers, self.anew = None, {}, False
        self.redo = None

    # --- under a plan -------------------------------------------------------------------------------------------

    def go_by(self, now: float, attempt: Attempt, view: View, out: list[Effect]) -> None:
        """Work for ``attempt``, whose plan is newer than the one before."""
        before = self.attempt
        if before is not None and before.continues(attempt.plan):
            known = before.numbers
            reducing = self._hand_on(now, before, attempt, out)
            self._note_reassigned(now, before, attempt, out)
        else:
            self.give_up(out)
            known = {}
            reducing = self._new_reducing(attempt)
        self.attempt, self.reducing = attempt, reducing
        self.here, self.offering = attempt.still_here(view), attempt.still_offer(view)
        for chunk, number in attempt.numbers.items():
            if known.get(chunk) == number:
                continue
            owner = attempt.assigned[chunk].owner
            if owner == self.me and self.me in self.here:
                reducing.own(chunk)
            elif owner != self.me:  # else it was an earlier start of this node, which may have made it otherwise
                self.gathering.want(attempt.assigned[chunk].owner, attempt.key(chunk))

    def _new_reducing(self, attempt: Attempt) -> Reducing:
        return Reducing(
            me=self.me,
            window=self.chunk_window,
            attempt=attempt,
            means=self.means,
            fetches=self.fetches,
            recovery=Recovery(me=self.me, round=attempt.round, repeat_s=self.repeat_s),
        )

    def _hand_on(self, now: float, before: Attempt, attempt: Attempt, out: list[Effect]) -> Reducing:
        """Give up what goes to another owner."""
        assert self.reducing is not None
        for chunk, number in before.numbers.items():
            if attempt.numbers[chunk] != number:
                self.reducing.disown(now, chunk, out)
                self.gathering.unwant(now, before.key(chunk), out)
        self.reducing.attempt = attempt
        return self.reducing

    def _note_reassigned(self, now: float, before: Attempt, attempt: Attempt, out: list[Effect]) -> None:
        chunks = [c for c, number in before.numbers.items() if attempt.numbers[c] != number]
        if not chunks:
            return
        names = {m.id: m.name for m in attempt.view.members}
        turns = attempt.plan.turns[len(before.plan.turns) :]
        lost = {attempt.view.members[i].name: None for turn in turns for i in positions(turn.lost)}
        owners = {names[attempt.assigned[c].owner]: None for c in chunks}
        self.redo = self.redo or Redo(began_at=now)
        self.redo.chunks |= set(chunks)
        self.redo.lost |= lost
        self.redo.owners |= owners
        fact = ChunksReassigned(
            round=attempt.round,
            epoch=attempt.plan.epoch,
            attempt=attempt.plan.attempt,
            chunks=len(chunks),
            lost=tuple(lost),
            owners=tuple(owners),
        )
        out.append(Report(fact=fact))

    def report_redone(self, now: float, out: list[Effect]) -> None:
        """Once the means of all chunks that were given to others are here under their numbers."""
        redo, attempt = self.redo, self.attempt
        if redo is None or attempt is None:
            return
        if not all(self.means.holds(c, attempt.numbers[c]) for c in redo.chunks):
            return
        self.redo = None
        fact = ChunksRedone(
            round=attempt.round,
            chunks=len(redo.chunks),
            lost=tuple(redo.lost),
            owners=tuple(redo.owners),
            seconds=to_ms(now - redo.began_at),
        )
        out.append(Report(fact=fact))

    def pump(self, now: float, out: list[Effect], *, own_here: bool) -> None:
        """Begin as much as the windows allow. ``own_here``: see ``Reducing``."""
        if self.reducing is not None and self.commit is None:
            self.reducing.own_here = own_here
            self.reducing.pump(now, self.here, self.offering, out)
        self.gathering.pump(now, out)

    def on_view(self, now: float, view: View, out: list[Effect]) -> None:
        """Wait for nobody who is gone."""
        if self.attempt is not None:
            self.here, self.offering = self.attempt.still_here(view), self.attempt.still_offer(view)
        if self.commit is not None:
            for chunk in self.gathering.replace_the_gone(now, view, self.here, out):
                self.numbers[chunk] = SETTLED
        elif self.reducing is not None:
            self.reducing.leave_out_the_gone(now, self.here, self.offering, out)

    # --- what comes ---------------------------------------------------------------------------------------------

    def on_fetched(self, now: float, event: Fetched, out: list[Effect]) -> None:
        peer, key = event.peer, event.key
        if not self.fetches.ended(now, peer, key, event.size):
            return
        if self.reducing is not None and self.reducing.waits_for(peer, key):
            self.reducing.on_fetched(now, peer, key, event.info, out)
        elif self.gathering.waits_for(peer, key):
            self.gathering.on_fetched(peer, key)
            self.means.add(key.chunk, number_of(key), event.info)

    def on_failed(self, now: float, event: FetchFailed, view: View, out: list[Effect]) -> None:
        peer, key, fault = event.peer, event.key, event.fault
        if not self.fetches.ended(now, peer, key):
            return
        if self.reducing is not None and self.reducing.waits_for(peer, key):
            self.reducing.on_failed(now, peer, key, fault, out)
        elif self.gathering.waits_for(peer, key):
            self.gathering.on_failed(now, peer, key, fault, view, committed=self.commit is not None)
            if self.commit is not None:
                self.numbers[key.chunk] = SETTLED

    def on_reduced(self, now: float, event: Reduced, out: list[Effect]) -> None:
        if self.reducing is not None:
            self.reducing.on_reduced(now, event, out)

    def try_again(self, now: float, view: View, out: list[Effect]) -> None:
        """The gets that failed, and whose time has come."""
        for peer, key in self.fetches.due(now):
            if self.reducing is not None and self.reducing.waits_for(peer, key):
                self.fetches.begin(now, peer, key, out)
            elif self.gathering.waits_for(peer, key):
                self.gathering.begin_again(now, peer, key, view, out)

    # --- under a commit -----------------------------------------------------------------------------------------

    def follow(self, now: float, commit: Commit, view: View, out: list[Effect]) -> None:
        """Come to hold the means of ``commit``."""
        self.commit = commit
        if self.reducing is not None:
            self.reducing.stop(now, out)
        for chunk in self.fragments.chunks(commit.round):
            self.numbers[chunk] = self._follow_chunk(now, chunk, commit, view, out)

    def follow_anew(self, view: View) -> None:
        """The same, trusting nothing that is here."""
        assert self.commit is not None
        chunks = self.fragments.chunks(self.commit.round)
        self.anew, self.numbers = True, dict.fromkeys(chunks, SETTLED)
        self.means = Means()
        for chunk in chunks:
            self._want_settled(chunk, view)

    def _follow_chunk(self, now: float, chunk: int, commit: Commit, view: View, out: list[Effect]) -> Number:
        limit = commit.epoch, commit.attempt
        attempt = self.attempt
        if attempt is not None and attempt.view.number == commit.view:
            held = self.means.best(chunk, limit)
            coming = self._comes_from(attempt, chunk) and attempt.numbers[chunk] <= limit <= attempt.number
            if held is not None and not (coming and held < attempt.numbers[chunk]):
                self.gathering.unwant(now, attempt.key(chunk), out)
                return held
            if coming:
                return attempt.numbers[chunk]
            self.gathering.unwant(now, attempt.key(chunk), out)
        elif attempt is not None:
            self.gathering.unwant(now, attempt.key(chunk), out)
        self._want_settled(chunk, view)
        return SETTLED

    def _comes_from(self, attempt: Attempt, chunk: int) -> bool:
        """Whether its owner is asked for it, and can still give it."""
        source = self.gathering.source.get(attempt.key(chunk))
        return source in self.here

    def _want_settled(self, chunk: int, view: View) -> None:
        assert self.commit is not None
        self.gathering.want(self.gathering.first_source(view), mean_key(self.commit.round, chunk, SETTLED))

    def store(self) -> StoreMeans:
        """Have the means of the plan, all of which are here, put on disk."""
        assert self.attempt is not None
        round, (epoch, attempt) = self.attempt.round, self.attempt.number
        others = _others(round, self.attempt.numbers, (epoch, attempt))
        return StoreMeans(round=round, epoch=epoch, attempt=attempt, exceptions=others)

    def settle(self, lineage: bytes, previous: bytes) -> Settle:
        """Have the committed means, all of which are here, held as the round's. ``previous``: the chain before."""
        assert self.commit is not None
        usual = next(iter(self.numbers.values()), SETTLED)
        attempt = self.attempt
        members = attempt.members if attempt is not None and attempt.view.number == self.commit.view else ()
        return Settle(
            round=self.commit.round,
            epoch=usual[0],
            attempt=usual[1],
            commit=self.commit,
            previous=previous,
            exceptions=_others(self.commit.round, self.numbers, usual),
            lineage=lineage,
            members=members,
            weights=tuple(attempt.weights.get(m, 0) for m in members) if attempt is not None else (),
        )


def _others(round: int, numbers: dict[int, Number], usual: Number) -> tuple[ChunkKey, ...]:
    """The keys of the chunks whose number is not the usual one."""
    return tuple(mean_key(round, c, n) for c, n in sorted(numbers.items()) if n != usual)
