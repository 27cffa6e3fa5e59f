"""What a node that is behind gets onto its disk: the means of rounds, and a snapshot if that is cheaper.

The rules:

* Nothing is fetched before it is known what it must be. First the records of the rounds come, each verified by the one
  above it (:mod:`~prime_async.machines.records`); they say what each mean must be, and what the outer state was. A
  manifest of that digest says what each chunk of a snapshot must be.
* All goes to disk, and what is there already, from an earlier start, is not fetched again; nor are the records of
  rounds whose means are there. These are verified as all others are: they may be of another history.
* What comes faster than the disk takes it is not asked for (:mod:`~prime_async.machines.providers`).
* A few rounds are worked on at once, the oldest first; a snapshot before them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from prime_async.machines.attempt import SETTLED, mean_key
from prime_async.machines.providers import Download
from prime_async.machines.records import Records
from prime_async.machines.vocabulary import (
    ChunkStored,
    Effect,
    FindRecord,
    FinishSnapshot,
    ManifestRead,
    OpenRound,
    OpenSnapshot,
    StoreRecord,
)
from prime_async.messages import MAX_STRETCHES, ChunkKey, Stretch

ROUNDS_AT_ONCE = 8


def record_key(round: int) -> ChunkKey:
    return ChunkKey(kind="record", round=round, chunk=0)


def manifest_key(round: int) -> ChunkKey:
    return ChunkKey(kind="manifest", round=round, chunk=0)


def state_key(round: int, chunk: int) -> ChunkKey:
    return ChunkKey(kind="state", round=round, chunk=chunk)


@dataclass(slots=True)
class Filling:
    """A round, or a snapshot, that is coming onto the disk. ``missing``: chunks; ``None`` while that is not known."""

    missing: set[int] | None = None
    closing: bool = False


@dataclass(slots=True)
class CatchUp:
    """See the module's rules."""

    download: Download
    records: Records
    rounds: dict[int, Filling] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)  # rounds whose verified means are on disk
    snapshot: int | None = None  # the round of the one that is wanted
    filling: Filling | None = None  # of the snapshot, once its manifest is verified
    snapshot_stored: bool = False
    on_disk: frozenset[int] = frozenset()  # rounds whose means are there since before, of whatever history
    looked_for: set[int] = field(default_factory=set)  # rounds whose records were looked for on our disk

    def begin(self) -> None:
        """Nothing is known of the history yet."""
        self.stored.clear()
        self.looked_for.clear()
        self.records = Records(self.records.fragments)

    def first_missing(self, first: int) -> int:
        """The first round from ``first`` on whose means are not on disk, or not verified yet."""
        while first in self.stored:
            first += 1
        return first

    def first_lacking(self, first: int) -> int:
        """The first round from ``first`` on whose means are not known to be on our disk."""
        first = self.first_missing(first)
        while first in self.on_disk and self.records.linked(first) is not None:
            first = self.first_missing(first + 1)
        return first

    def verified(self, first: int, goal: int) -> tuple[Stretch, ...]:
        """The rounds from ``first`` to ``goal`` whose means are on our disk, and are what they must be."""
        stretches: list[Stretch] = []
        for round in range(first, goal):
            filling = self.rounds.get(round)
            damaged = filling is not None and bool(filling.missing)
            here = round in self.stored or round in self.on_disk
            if damaged or not here or self.records.linked(round) is None:
                continue
            if stretches and stretches[-1].end == round:
                stretches[-1] = Stretch(first=stretches[-1].first, end=round + 1)
            else:
                stretches.append(Stretch(first=round, end=round + 1))
        return tuple(stretches[-MAX_STRETCHES:])

    def look_on_disk(self, first: int, out: list[Effect]) -> None:
        """For the next record downwards, if it may be there. Of ``first`` only the means may be damaged."""
        below = self.records.bottom - 1
        if below >= first and (below in self.on_disk or below == first) and below not in self.looked_for:
            self.looked_for.add(below)
            out.append(FindRecord(round=below))

    def missing(self, first: int, goal: int) -> tuple[float, float]:
        """How many rounds' means are missing from ``first`` to before ``goal``, and which part of the snapshot."""
        fragments = self.records.fragments
        rounds = (r for r in range(first, goal) if r not in self.stored)
        means = sum(_share(self.rounds.get(r), len(fragments.chunks(r))) for r in rounds)
        wanted = self.snapshot is not None and not self.snapshot_stored
        return means, _share(self.filling, fragments.chunk_count) if wanted else 0.0

    def choose_snapshot(self, round: int | None, out: list[Effect]) -> None:
        """From now on get this one, or none. What came of another stays on disk."""
        if self.snapshot != round:
            self.give_up(out)
        self.snapshot, self.filling, self.snapshot_stored = round, None, False

    def give_up(self, out: list[Effect]) -> None:
        """Whatever is under way."""
        self.download.give_up(out)
        self.rounds.clear()
        self.filling = None

    def go_on(self, now: float, first: int, goal: int, known: bool, out: list[Effect]) -> None:
        """Get the means of the rounds from ``first`` to ``goal``, which is not one of them, and the snapshot.

        ``known``: what the snapshot must be.
        """
        if first < self.records.bottom:
            unread = self.on_disk - self.looked_for
            missing = [r for r in range(first, goal) if r not in unread and not self.records.has(r)]
            self.download.want(map(record_key, missing), first=True)
        if self.snapshot is not None and not self.snapshot_stored and known:
            self._go_on_with_snapshot(self.snapshot, out)
        for round in range(self.first_missing(first), goal):
            if len(self.rounds) >= ROUNDS_AT_ONCE:
                break
            record = self.records.linked(round)
            if record is not None and round not in self.stored and round not in self.rounds:
                self.rounds[round] = Filling()
                out.append(OpenRound(record=record))
        self.download.pump(now, out)

    # --- the snapshot -------------------------------------------------------------------------------------------

    def _go_on_with_snapshot(self, round: int, out: list[Effect]) -> None:
        if self.filling is None:
            self.download.want([manifest_key(round)])
        elif self.filling.missing is not None and not self.filling.missing and not self.filling.closing:
            self.filling.closing = True
            out.append(FinishSnapshot(round=round))

    def on_manifest(self, read: ManifestRead, out: list[Effect]) -> None:
        """It is the right one."""
        if read.round == self.snapshot and self.filling is None:
            self.filling = Filling()
            out.append(OpenSnapshot(round=read.round))

    def on_snapshot_opened(self, round: int, missing: Iterable[int]) -> None:
        if round == self.snapshot and self.filling is not None:
            chunks = sorted(missing)
            self.filling = Filling(missing=set(chunks))
            self.download.want([state_key(round, c) for c in chunks], first=True)

    def on_snapshot_stored(self, round: int) -> None:
        if round == self.snapshot:
            self.snapshot_stored, self.filling = True, None

    def on_snapshot_damaged(self, round: int) -> None:
        """What is bad of it is fetched again."""
        if round == self.snapshot:
            self.snapshot_stored, self.filling = False, None

    # --- rounds -------------------------------------------------------------------------------------------------

    def on_round_opened(self, round: int, missing: Iterable[int], out: list[Effect]) -> None:
        if round in self.rounds:
            chunks = sorted(missing)
            self.rounds[round].missing = set(chunks)
            self.download.want([mean_key(round, chunk, SETTLED) for chunk in chunks])
            self._close(round, out)

    def on_chunk_stored(self, event: ChunkStored, out: list[Effect]) -> None:
        key = event.key
        if key.kind == "state" and key.round == self.snapshot and self.filling is not None:
            if self.filling.missing is not None:
                self.filling.missing.discard(key.chunk)
        elif key.kind == "mean" and key.round in self.rounds:
            missing = self.rounds[key.round].missing
            if missing is not None:
                missing.discard(key.chunk)
                self._close(key.round, out)

    def _close(self, round: int, out: list[Effect]) -> None:
        filling, record = self.rounds[round], self.records.linked(round)
        if filling.missing is not None and not filling.missing and not filling.closing and record is not None:
            filling.closing = True
            out.append(StoreRecord(record=record))

    def on_round_stored(self, round: int) -> None:
        self.rounds.pop(round, None)
        self.stored.add(round)

    def on_round_damaged(self, round: int) -> None:
        """Look at it again, and fetch what is bad. All its chunks had come."""
        self.rounds.pop(round, None)
        self.stored.discard(round)

    def is_here(self, round: int) -> bool:
        """Whether all means of the round have come, though they may not be on disk as such yet."""
        filling = self.rounds.get(round)
        return filling is not None and filling.missing is not None and not filling.missing


def _share(filling: Filling | None, chunks: int) -> float:
    """That is missing. As long as that is not known, all."""
    return 1.0 if filling is None or filling.missing is None else len(filling.missing) / chunks
