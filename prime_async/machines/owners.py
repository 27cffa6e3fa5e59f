"""Who reduces which chunk, and under which number: a pure function of a view and a plan's turns, so it is not sent.

The rules:

* The active, reachable members with a weight own chunks, in proportion to it. If none has one, all weigh the same.
* When owners are lost, each of their chunks goes to another, and only those chunks: they get the turn's number. The
  number of a chunk thus changes only with its owner, and whoever knows the turns knows every chunk's number.
* Who is lost stays lost for the round, even if it comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from blake3 import blake3

from prime_async.messages import Member, Turn, View, positions


class Assignment(NamedTuple):
    """Who makes the mean of a chunk, and the number under which it counts."""

    owner: str
    epoch: int
    attempt: int


def eligible(view: View) -> tuple[Member, ...]:
    """Who may own chunks."""
    reachable = tuple(m for m in view.active if m.reachable)
    return tuple(m for m in reachable if m.weight) or reachable


def assign(view: View, chunk_count: int, turns: Sequence[Turn]) -> tuple[Assignment, ...]:
    """The assignment of every chunk, in chunk order; empty if nobody is left who may own one."""
    owners = chunk_owners(view, chunk_count)
    assigned = [Assignment(owner, turns[0].epoch, turns[0].attempt) for owner in owners]
    lost: set[str] = set()
    for turn in turns[1:]:
        lost |= {view.members[i].id for i in positions(turn.lost)}
        heirs = _heirs(view, lost)
        if not heirs:
            return ()
        for chunk, at in enumerate(assigned):
            if at.owner in lost:
                assigned[chunk] = Assignment(_heir(chunk, heirs), turn.epoch, turn.attempt)
    return tuple(assigned)


def chunk_owners(view: View, chunk_count: int) -> tuple[str, ...]:
    """The first owner of every chunk, in chunk order; empty if there is nobody who may own one.

    Smooth weighted round-robin, as nginx does it: neighbouring chunks go to different owners, so that all owners can
    begin at once. Integers only, so that every node computes the same.
    """
    members = eligible(view)
    if not members:
        return ()
    weights = tuple(m.weight for m in members)
    turns = _round_robin(weights if any(weights) else (1,) * len(members), chunk_count)
    return tuple(members[i].id for i in turns)


@lru_cache(maxsize=4)  # every plan of a round asks for the same, several times
def _round_robin(weights: tuple[int, ...], turns: int) -> tuple[int, ...]:
    total = sum(weights)
    credit = [0] * len(weights)
    chosen = []
    for _ in range(turns):
        credit = [c + w for c, w in zip(credit, weights, strict=True)]
        best = credit.index(max(credit))  # the first of several
        credit[best] -= total
        chosen.append(best)
    return tuple(chosen)


def _heirs(view: View, lost: set[str]) -> list[str]:
    return [m.id for m in eligible(view) if m.id not in lost] or [
        m.id for m in view.active if m.reachable and m.id not in lost
    ]


def _heir(chunk: int, members: list[str]) -> str:
    """Rendezvous hashing: every chunk has its own order of preference, so the lost one's chunks go to all."""
    return max(members, key=lambda id: blake3(f"{chunk}/{id}".encode()).digest())
