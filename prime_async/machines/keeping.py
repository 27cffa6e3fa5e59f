"""When a snapshot of the outer state is written, and what is kept on disk.

The rules:

* Every ``snapshot_every`` rounds the outer state is written to disk; and as soon as what is there does not lead to it,
  since something was found to be damaged.
* The newest ``keep_snapshots`` snapshots are kept, and the means of the last ``keep_rounds`` rounds; and in any case
  all means since the oldest snapshot that is kept, or since the beginning while there is none: so a snapshot, or the
  initial weights, with the means since always give the newest state.
* Initial weights that came from elsewhere, and cannot be made anew, are written to disk too, as a snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass

from prime_async.machines.vocabulary import Keep, LedgerAt

WRITES_BEHIND = 2
"""So many rounds may be applied whose means are not on disk yet."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """See the module's rules. ``every`` 0: no snapshots but the last. ``given``: the initial weights are."""

    every: int
    snapshots: int
    rounds: int
    given: bool = False

    def is_due(self, round: int, floor: int, disk: LedgerAt, seen: int = -1) -> bool:
        """Whether a snapshot of the outer state after ``round`` rounds is to be written."""
        if round in disk.snapshots:
            return False
        if round == 0:
            return self.given
        return (self.every > 0 and round % self.every == 0) or not leads_to(round, floor, disk, seen, self.given)

    def what_goes(self, round: int, floor: int, disk: LedgerAt) -> Keep | None:
        """What to keep, if that is not all. The outer state is that after ``round`` rounds.

        What is below ``floor``, or above ``round``, is of a history that was given up, or has a gap after it.
        """
        kept = tuple(s for s in disk.snapshots if floor <= s <= round)[-self.snapshots :]
        means_from = max(floor, min(max(0, round - self.rounds), kept[0] if kept else 0))
        if kept == disk.snapshots and not any(r < means_from for r in disk.means):
            return None
        return Keep(snapshots=kept, means_from=means_from)


def leads_to(round: int, floor: int, disk: LedgerAt, seen: int = -1, given: bool = False) -> bool:
    """Whether a snapshot, or the initial weights, and the means since make the outer state after ``round`` rounds.

    Those of the last rounds may still be on their way to the disk, but for those up to ``seen``, which were there; and
    where nothing ever was, nothing is to be kept. Initial weights that are ``given`` are there only if a snapshot of
    them is.
    """
    if not disk.snapshots and not disk.means and seen < 0:
        return True
    snapshots = [s for s in disk.snapshots if floor <= s <= round]
    first = max(snapshots, default=0)
    if (floor > 0 or given) and not snapshots:
        return False
    return {*range(first, max(round - WRITES_BEHIND, min(seen + 1, round)))} <= {*disk.means}


def means_from(round: int, floor: int, disk: LedgerAt, coming: int) -> int:
    """The first of the rounds from ``floor`` to ``round`` whose means are on disk without a gap.

    Those of ``coming`` may still be on their way there; who asks for them waits.
    """
    there, first = {*disk.means, coming}, round
    while first > floor and first - 1 in there:
        first -= 1
    return first
