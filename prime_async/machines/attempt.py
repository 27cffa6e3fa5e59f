"""A round as its newest plan wants it, and the means of it that are here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from blake3 import blake3

from prime_async.machines.owners import Assignment, assign
from prime_async.messages import ChunkInfo, ChunkKey, Plan, View, positions

Number: TypeAlias = tuple[int, int]
"""(epoch, attempt)"""

SETTLED: Number = (0, 0)
"""The number under which a committed mean is held by everybody. No plan has it: epochs begin at 1."""


def mean_key(round: int, chunk: int, number: Number) -> ChunkKey:
    return ChunkKey(kind="mean", round=round, chunk=chunk, epoch=number[0], attempt=number[1])


def number_of(key: ChunkKey) -> Number:
    return key.epoch, key.attempt


def misfit(plan: Plan, view: View, chunks: Sequence[int]) -> str:
    """What is wrong with ``plan`` over ``view``, its round's view, of ``chunks``; "" if nothing."""
    who = positions(plan.contributors)
    if len(who) != len(plan.weights) or not who or who[-1] >= len(view.members):
        return "the contributors do not fit the view"
    numbers = [(t.epoch, t.attempt) for t in plan.turns]
    if not numbers or sorted(set(numbers)) != numbers or numbers[-1] > (plan.epoch, plan.attempt):
        return "the turns are not in order"
    if plan.turns[0].lost or any(p >= len(view.members) for t in plan.turns for p in positions(t.lost)):
        return "the turns do not fit the view"
    if chunks and not assign(view, len(chunks), plan.turns):
        return "nobody is left to own a chunk"
    return ""


@dataclass(slots=True)
class Means:
    """The means of a round that are here: chunk -> number -> what is known of it."""

    held: dict[int, dict[Number, ChunkInfo]] = field(default_factory=dict)

    def add(self, chunk: int, number: Number, info: ChunkInfo) -> None:
        self.held.setdefault(chunk, {})[number] = info

    def holds(self, chunk: int, number: Number) -> bool:
        return number in self.held.get(chunk, ())

    def best(self, chunk: int, limit: Number) -> Number | None:
        """The highest number, up to ``limit``, under which a mean of ``chunk`` is here."""
        return max((n for n in self.held.get(chunk, ()) if n <= limit), default=None)

    def digest(self, numbers: Mapping[int, Number]) -> bytes | None:
        """Over the digests of these means, in chunk order; ``None`` while one is not here."""
        if not all(self.holds(c, n) for c, n in numbers.items()):
            return None
        return blake3(b"".join(self.held[c][n].digest for c, n in sorted(numbers.items()))).digest()


@dataclass(slots=True)
class Attempt:
    """``view`` is the round's; ``plan`` and with it ``assigned`` are replaced when owners are lost."""

    plan: Plan
    view: View
    assigned: dict[int, Assignment]  # by chunk
    weights: dict[str, int]  # contributor -> tokens, in the order of the view
    rejected: dict[str, int]  # contributor -> as the view lists it
    members: tuple[str, ...]
    numbers: dict[int, Number]  # of every chunk

    @staticmethod
    def of(plan: Plan, view: View, chunks: Sequence[int]) -> Attempt:
        """``chunks``: of the round. Who owns the i-th of them does not depend on which they are."""
        who = zip(positions(plan.contributors), plan.weights, strict=True)
        assigned = dict(zip(chunks, assign(view, len(chunks), plan.turns), strict=True))
        return Attempt(
            plan=plan,
            view=view,
            assigned=assigned,
            weights={view.members[i].id: weight for i, weight in who},
            rejected={view.members[i].id: view.members[i].rejected for i in positions(plan.contributors)},
            members=tuple(m.id for m in view.members),
            numbers={chunk: (a.epoch, a.attempt) for chunk, a in assigned.items()},
        )

    @property
    def round(self) -> int:
        return self.plan.round

    @property
    def number(self) -> Number:
        return self.plan.epoch, self.plan.attempt

    def key(self, chunk: int) -> ChunkKey:
        return mean_key(self.round, chunk, self.numbers[chunk])

    def contribution(self, peer: str, chunk: int) -> ChunkKey:
        """What ``peer`` gives to ``chunk``, under the name that it has there."""
        return ChunkKey(kind="contribution", round=self.round, chunk=chunk, attempt=self.rejected[peer])

    def is_first(self, chunk: int) -> bool:
        """Whether the chunk still has its first owner, so that nobody else can have made its mean."""
        return self.numbers[chunk] == (self.plan.turns[0].epoch, self.plan.turns[0].attempt)

    def continues(self, plan: Plan) -> bool:
        """Whether ``plan`` is of the same making, with perhaps other owners."""
        return plan.view == self.plan.view and plan.turns[0] == self.plan.turns[0]

    def still_here(self, view: View | None) -> tuple[str, ...]:
        """Members of the round's view that are in ``view``, and have not started anew; in the round's order."""
        now = {(m.id, m.incarnation) for m in view.members} if view else set()
        return tuple(m.id for m in self.view.members if (m.id, m.incarnation) in now)

    def still_offer(self, view: View | None) -> tuple[str, ...]:
        """Contributors that are still here, and whose contribution was not rejected; in the round's order."""
        now = {(m.id, m.incarnation, m.rejected) for m in view.members} if view else set()
        mine = (m for m in self.view.members if m.id in self.weights)
        return tuple(m.id for m in mine if (m.id, m.incarnation, m.rejected) in now)
