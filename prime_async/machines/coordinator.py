"""The leader's part of a round: when it is planned, when it is planned again, when it is committed.

The rules:

* A round is planned when every active member has a contribution ready, at least ``min_members`` of them.
* Nobody's silence is judged here: a member that is gone from the view is no longer waited for.
* When an owner of the open round leaves the view, the round is planned again under the next attempt, with what is
  left of its contributors. (A contributor that leaves needs no new plan: the owners leave it out.)
* Means are committed when a majority of the active members report the same digest of them, under the newest attempt.
  If all have reported and no digest has a majority, the round is planned again.
* Every message is answered from what is known, so that any of them may be lost: ``Ready`` and ``Have`` are repeated by
  their senders until the plan and the commit have come. Who does not know the plan of a commit gets both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TypeAlias

from blake3 import blake3

from prime_async.machines.facts import Fact, StateDiverged, WaitingForMembers
from prime_async.machines.owners import chunk_owners
from prime_async.messages import Behind, Commit, Have, Plan, Ready, View, ViewUpdate, bitmap

COMMITS_KEPT = 4
FIRST_CHAIN = bytes(32)

Answer: TypeAlias = tuple[tuple[str, ...], Plan | Commit | Behind | ViewUpdate]
"""Whom to send which message."""


def next_chain(chain: bytes, digest: bytes) -> bytes:
    """The chain after a commit of ``digest``: BLAKE3(chain || digest), both 32 bytes."""
    return blake3(chain + digest).digest()


@dataclass(slots=True)
class Coordinator:
    """See the module's rules. Asked by the exchange machine of the node that leads; silent on all others."""

    me: str
    chunk_count: int
    min_members: int
    view: View | None = None
    round: int = 0
    ready: dict[int, dict[str, int]] = field(default_factory=dict)  # round -> member -> tokens
    plan: Plan | None = None
    planned_view: View | None = None
    planned_owners: frozenset[tuple[str, int]] = frozenset()  # id, incarnation
    haves: dict[str, bytes] = field(default_factory=dict)
    commits: dict[int, Commit] = field(default_factory=dict)
    committed_plans: dict[int, tuple[View, Plan]] = field(default_factory=dict)
    chain: bytes = FIRST_CHAIN
    facts: list[Fact] = field(default_factory=list)
    waiting_for: tuple[int, int] | None = None  # what WaitingForMembers said last

    @property
    def leads(self) -> bool:
        return self.view is not None and self.view.leader == self.me

    def take_facts(self) -> list[Fact]:
        facts, self.facts = self.facts, []
        return facts

    def on_view(self, view: View) -> list[Answer]:
        before, self.view = self.view, view
        if not self.leads:
            return []
        members = {(m.id, m.incarnation) for m in view.members}
        for gone in [m.id for m in before.members if (m.id, m.incarnation) not in members] if before else []:
            for ready in self.ready.values():
                ready.pop(gone, None)
            self.haves.pop(gone, None)
        if self.plan is not None and self.plan.round not in self.commits:
            if self.planned_owners <= members:
                return self._try_commit()
            return self._plan(self.plan.attempt + 1)
        return self._try_plan()

    def on_state(self, round: int) -> list[Answer]:
        self.round = round
        if self.plan is not None and self.plan.round < round:
            self.plan, self.haves = None, {}
        for old in [r for r in self.ready if r < round]:
            del self.ready[old]
        for old in [r for r in self.commits if r < round - COMMITS_KEPT]:
            del self.commits[old], self.committed_plans[old]
        return self._try_plan() if self.leads else []

    def on_ready(self, peer: str, ready: Ready) -> list[Answer]:
        if not self.leads or self.view is None or self.view.member(peer) is None:
            return []
        if ready.round in self.commits:
            return self._commit_again(peer, ready.round, plan_known=ready.weight == 0)  # or of no use to it
        if ready.round < self.round:
            return [((peer,), Behind(round=self.round))]
        if ready.round > self.round + 1:
            return []
        if self.plan is not None and self.plan.round == ready.round:
            return self._plan_again(peer)
        if ready.weight:
            self.ready.setdefault(ready.round, {})[peer] = ready.weight
        return self._try_plan()

    def on_have(self, peer: str, have: Have) -> list[Answer]:
        if not self.leads or self.view is None or self.view.member(peer) is None:
            return []
        if have.round in self.commits:
            commit = self.commits[have.round]
            known = (have.epoch, have.attempt) == (commit.epoch, commit.attempt)
            return self._commit_again(peer, have.round, plan_known=known)
        plan = self.plan
        if plan is None or (have.round, have.epoch, have.attempt) != (plan.round, plan.epoch, plan.attempt):
            return self._plan_again(peer) if plan is not None and plan.round == have.round else []
        self.haves[peer] = have.digest
        return self._try_commit()

    def _try_plan(self) -> list[Answer]:
        if self.view is None or self.plan is not None or self.round in self.commits:
            return []
        active = self.view.active
        ready = self.ready.get(self.round, {})
        if len(active) < self.min_members:
            waiting = (self.round, len(active))
            if self.waiting_for != waiting:
                self.waiting_for = waiting
                fact = WaitingForMembers(round=self.round, active=len(active), min_members=self.min_members)
                self.facts.append(fact)
            return []
        if not active or any(m.id not in ready for m in active):
            return []
        return self._plan(0)

    def _plan(self, attempt: int) -> list[Answer]:
        """Whoever is ready and in the view contributes. With no contributor left, the round waits for new ones."""
        assert self.view is not None
        ready = self.ready.get(self.round, {})
        who = [i for i, m in enumerate(self.view.members) if m.id in ready]
        self.haves = {}
        if not who or not self.view.active:
            self.plan = None
            return []
        self.plan = Plan(
            round=self.round,
            epoch=self.view.epoch,
            attempt=attempt,
            view=self.view.number,
            contributors=bitmap(who),
            weights=tuple(ready[self.view.members[i].id] for i in who),
        )
        self.planned_view = self.view
        owners = set(chunk_owners(self.view, self.chunk_count))
        self.planned_owners = frozenset((m.id, m.incarnation) for m in self.view.members if m.id in owners)
        return [(self._everybody(), self.plan)]

    def _plan_again(self, peer: str) -> list[Answer]:
        """With the view that the plan refers to, if that is not the newest, which alone is repaired by heartbeats."""
        assert self.plan is not None
        assert self.planned_view is not None
        return self._plan_for(peer, self.planned_view, self.plan)

    def _plan_for(self, peer: str, view: View, plan: Plan) -> list[Answer]:
        answer: list[Answer] = [((peer,), plan)]
        if self.view is not None and view.number != self.view.number:
            answer.insert(0, ((peer,), ViewUpdate(view=view)))
        return answer

    def _commit_again(self, peer: str, round: int, *, plan_known: bool) -> list[Answer]:
        plan = [] if plan_known else self._plan_for(peer, *self.committed_plans[round])
        return [*plan, ((peer,), self.commits[round])]

    def _try_commit(self) -> list[Answer]:
        assert self.view is not None
        plan = self.plan
        if plan is None:
            return []
        voters = [m.id for m in self.view.active]
        votes = Counter(self.haves[v] for v in voters if v in self.haves)
        if not votes:
            return []
        digest, count = max(votes.items(), key=lambda item: (item[1], item[0]))
        if count > len(voters) // 2:
            self.chain = next_chain(self.chain, digest)
            commit = Commit(round=plan.round, epoch=plan.epoch, attempt=plan.attempt, digest=digest, chain=self.chain)
            self.commits[plan.round] = commit
            assert self.planned_view is not None
            self.committed_plans[plan.round] = (self.planned_view, plan)
            return [(self._everybody(), commit)]
        if all(v in self.haves for v in voters):
            odd = next(v for v in voters if self.haves[v] != digest)
            fact = StateDiverged(peer=odd, round=plan.round, ours=digest.hex(), theirs=self.haves[odd].hex())
            self.facts.append(fact)
            return self._plan(plan.attempt + 1)
        return []

    def _everybody(self) -> tuple[str, ...]:
        assert self.view is not None
        return tuple(m.id for m in self.view.members)
