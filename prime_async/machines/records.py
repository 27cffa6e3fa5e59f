"""The records of committed rounds that a node fetches from others, and how it knows that they are the run's.

The rules:

* The newest commit is that of a decided view, and is believed. Its record must be of that commit, and names the chain
  before it; the record of the round before must be of a commit with that chain; and so on, downwards. What does not fit
  was sent by a liar, or is of another history.
* Records may come in any order. One that cannot be judged yet waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from blake3 import blake3

from prime_async.machines.fragments import Fragments
from prime_async.messages import DIGEST_BYTES, FIRST_CHAIN, Commit, Record, next_chain


@dataclass(slots=True)
class Records:
    """See the module's rules. ``known``: verified; from ``bottom`` to the newest commit there is no gap.

    What is known stays so when there is a newer commit, though its own record may still have to come.
    """

    fragments: Fragments
    newest: Commit | None = None
    decided: dict[int, Commit] = field(default_factory=dict)  # those that were the newest, by round
    known: dict[int, Record] = field(default_factory=dict)
    bottom: int = 0
    loose: dict[int, tuple[str, Record]] = field(default_factory=dict)  # not judged yet, with who sent it

    def aim(self, commit: Commit) -> None:
        """``commit`` is the newest."""
        if self.newest == commit:
            return
        if self.newest is not None and commit.round <= self.newest.round:
            self.known.clear()
            self.decided.clear()
        self.newest, self.bottom = commit, commit.round + 1
        self.decided[commit.round] = commit
        self._link([])

    def take(self, peer: str, record: Record) -> list[str]:
        """Look at a record that came. Returns the peers whose records do not fit."""
        liars: list[str] = []
        round = record.commit.round
        if round not in self.known:
            self.loose[round] = peer, record
            self._link(liars)
        return liars

    def has(self, round: int) -> bool:
        """Whether the record of ``round`` came, verified or not."""
        return round in self.known or round in self.loose

    def chain_before(self, round: int) -> bytes | None:
        """The chain of the commits before ``round``; ``None`` while it is not known."""
        if round == 0:
            return FIRST_CHAIN
        if round in self.known:
            return self.known[round].previous
        if round - 1 in self.decided:
            return self.decided[round - 1].chain
        return self.known[round - 1].commit.chain if round - 1 in self.known else None

    def linked(self, round: int) -> Record | None:
        """The record of ``round``, if it is verified."""
        return self.known.get(round)

    def _link(self, liars: list[str]) -> None:
        """Go down as far as the chain holds."""
        while self.bottom > 0:
            below, expected = self.bottom - 1, self.chain_before(self.bottom)
            assert expected is not None
            record = self.known.get(below)
            if record is not None and record.commit.chain != expected:  # what is below was of another history
                self.known = {r: known for r, known in self.known.items() if r > below}
                self.decided = {r: commit for r, commit in self.decided.items() if r > below}
                record = None
            if record is None:
                peer, record = self.loose.pop(below, ("", None))
                if record is None:
                    return
                if not self._fits(record, below, expected):
                    liars.append(peer)
                    return
                self.known[below] = record
            self.bottom = below

    def _fits(self, record: Record, round: int, chain: bytes) -> bool:
        commit, count = record.commit, len(self.fragments.chunks(round))
        return (
            commit.round == round
            and commit.chain == chain == next_chain(record.previous, commit.state, commit.digest)
            and len(record.means) == DIGEST_BYTES * count
            and blake3(record.means).digest() == commit.digest
            and sum(run.chunks for run in record.included) == count
        )
