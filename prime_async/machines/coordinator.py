"""The leader's part of a round: when it is planned, when it is planned again, when its means can be committed.

The rules:

* A new leader plans nothing before a quorum of the voters has told it what they know of the open round (``Open``). The
  newest plan among that is carried on under the new epoch; a plan that none of them knows is not known to be used.
  Nor does it plan anything while it is not itself at the round that comes after the newest commit.
* A round is planned when every trainer has a contribution ready; or ``straggler_timeout_s`` after enough of them have:
  more than half, and ``min_members``. With fewer than ``min_members`` trainers, or nobody who may own chunks, it waits.
* Nobody's silence is judged here: a member that is gone from the view is no longer waited for. What an earlier start of
  a member said is void.
* When an owner of the open round leaves the view, its chunks, and no others, go to the rest, under the next attempt.
  (A contributor that leaves needs no new plan: the owners leave it out.) But if the means that are held already can be
  committed, they are. With no contributor or owner left, the round is planned from the beginning.
* An owner that can use nobody's contribution to a chunk says so (``Unusable``). This is told to membership: the view in
  which those are rejected is what gives them up, for every leader to come. Who was rejected contributes when it is
  ready again, with what it did since.
* Means are committed when a majority of the voters holds the same, for the same outer state, under the newest plan,
  safe from a crash. Where disks are full there may be no such majority; then they are committed when all active voters
  hold them, and a majority of all: a run with full disks goes on, and only the crash of all at once loses the round.
  This is told to membership, which makes it part of a view, again and again until it is. If all voters have answered
  and there is no majority for anything, the round is planned from the beginning.
* Every message is answered from what is known, so that any of them may be lost: ``Ready`` and ``Have`` are repeated by
  their senders, and answered with the newest plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from prime_async.machines.attempt import Attempt, misfit
from prime_async.machines.ballot import is_quorum
from prime_async.machines.bandwidth import Bandwidth
from prime_async.machines.facts import Fact, OwnersLost, RoundTakenOver, StateDiverged, WaitingForMembers
from prime_async.machines.fragments import Fragments
from prime_async.machines.owners import assign, eligible
from prime_async.machines.views import Views
from prime_async.machines.vocabulary import CommitReady, Effect, FoundUnusable, Report, Send, Tell, Weighed
from prime_async.messages import (
    FIRST_CHAIN,
    AskView,
    Behind,
    Commit,
    Have,
    Open,
    Plan,
    Ready,
    Turn,
    Unusable,
    View,
    bitmap,
    next_chain,
    positions,
)


@dataclass(slots=True)
class Coordinator:
    """See the module's rules. Asked by the exchange machine of the node that leads; silent on all others.

    What it has to say to its own node it sends like all else.
    """

    me: str
    fragments: Fragments
    min_members: int
    straggler_timeout_s: float
    views: Views
    view: View | None = None
    round: int | None = None  # of this node's outer state
    opens: dict[str, Open] = field(default_factory=dict)
    taken_over: bool = False
    ready: dict[str, Ready] = field(default_factory=dict)  # for the open round
    attempt: Attempt | None = None
    next_attempt: int = 0
    haves: dict[str, Have] = field(default_factory=dict)
    told: Commit | None = None
    enough_at: float | None = None  # since when a round could do without the stragglers
    waiting_for: tuple[int, int] | None = None  # what WaitingForMembers said last
    last: Attempt | None = None  # the one before, for what is still reported of it
    bandwidth: Bandwidth = field(default_factory=Bandwidth)

    @property
    def leads(self) -> bool:
        return self.view is not None and self.view.leader == self.me

    @property
    def open_round(self) -> int | None:
        """The round that comes after the newest commit; without one, that at which this node is."""
        commit = self.view.commit if self.view else None
        return self.round if commit is None else commit.round + 1

    @property
    def next_at(self) -> float | None:
        """When the stragglers' time is over."""
        if self.enough_at is None or not self.leads or self.round != self.open_round:
            return None
        return self.enough_at + self.straggler_timeout_s

    # --- what happens -------------------------------------------------------------------------------------------

    def on_view(self, now: float, view: View, out: list[Effect]) -> None:
        before, self.view = self.view, view
        if before is None or before.epoch != view.epoch:
            self._begin_epoch()
        if not self.leads:
            return
        commit = view.commit
        if commit is not None and (before is None or before.commit is None or before.commit.round < commit.round):
            self._close_round(commit, out)
        self.told = None
        self.advance(now, out)

    def on_state(self, now: float, round: int, out: list[Effect]) -> None:
        if self.view is None or self.view.commit is None:
            self._forget_round()
        self.round = round
        self.advance(now, out)

    def on_tick(self, now: float, out: list[Effect]) -> None:
        """Once in a while: repeat what membership, or who knows a plan's view, may not have heard."""
        self.told = None
        self.advance(now, out)

    def on_open(self, now: float, peer: str, message: Open, out: list[Effect]) -> None:
        if not self.leads or self.view is None or message.epoch != self.view.epoch:
            return
        before = self.opens.get(peer)
        if before is None or _news(message) > _news(before):
            self.opens[peer] = message
            self.advance(now, out)

    def on_ready(self, now: float, peer: str, ready: Ready, out: list[Effect]) -> None:
        if not self.leads or not self._is_now(peer, ready.incarnation):
            return
        assert self.view is not None
        if self.view.commit is not None and ready.round < self.view.commit.round:
            out.append(Send(peer=peer, message=Behind(round=self.view.commit.round + 1)))
        if ready.round != self.open_round:
            return
        if ready.weight and self._is_offered(peer, ready):
            self.ready[peer] = ready
        if self.attempt is not None:
            out.append(Send(peer=peer, message=self.attempt.plan))
        else:
            self.advance(now, out)

    def on_have(self, now: float, peer: str, have: Have, out: list[Effect]) -> None:
        if not self.leads or not self._is_now(peer, have.incarnation):
            return
        for attempt in (self.attempt, self.last):
            if attempt is not None and attempt.round == have.round:
                owners = frozenset(a.owner for a in attempt.assigned.values())
                self.bandwidth.report(peer, have, attempt.view, owners)
        if self.attempt is None or have.round != self.attempt.round:
            return
        if (have.epoch, have.attempt) == self.attempt.number:
            self.haves[peer] = have
            self.advance(now, out)
        else:
            out.append(Send(peer=peer, message=self.attempt.plan))

    def on_unusable(self, peer: str, message: Unusable, out: list[Effect]) -> None:
        if not self.leads or not self._is_now(peer, message.incarnation):
            return
        attempt = self.attempt
        if attempt is None or message.round != attempt.round:
            return
        if (message.epoch, message.attempt) != attempt.number:
            out.append(Send(peer=peer, message=attempt.plan))
            return
        if not any(a.owner == peer for a in attempt.assigned.values()):
            return
        named = {attempt.members[i] for i in positions(message.contributors) if i < len(attempt.members)}
        for member in attempt.view.members:
            if member.id in named and member.id in attempt.weights:
                found = FoundUnusable(
                    peer=member.id,
                    incarnation=member.incarnation,
                    round=attempt.round,
                    times=member.rejected + 1,
                )
                out.append(Tell(actor="membership", event=found))

    def advance(self, now: float, out: list[Effect]) -> None:
        """Do whatever can be done now."""
        if not self.leads or self.round is None or self.round != self.open_round:
            return
        if not self.taken_over:
            self._take_over(out)
        if not self.taken_over:
            return
        if self.attempt is not None:
            self._look_after(now, self.attempt, out)
        else:
            self._try_plan(now, out)

    # --- who is here --------------------------------------------------------------------------------------------

    def _is_now(self, peer: str, incarnation: int) -> bool:
        member = self.view.member(peer) if self.view else None
        return member is not None and member.incarnation == incarnation

    def _valid(self, said: Iterable[tuple[str, Ready | Have | Open]]) -> set[str]:
        """Those whose present start said it."""
        assert self.view is not None
        now = {m.id: m.incarnation for m in self.view.members}
        return {peer for peer, message in said if now.get(peer) == message.incarnation}

    def _is_offered(self, peer: str, ready: Ready) -> bool:
        """Whether it is no contribution that was rejected, and of the present start."""
        member = self.view.member(peer) if self.view else None
        return member is not None and (member.incarnation, member.rejected) == (ready.incarnation, ready.rejected)

    @property
    def _offers(self) -> set[str]:
        """Who has a contribution that can be planned."""
        assert self.view is not None
        now = {m.id: (m.incarnation, m.rejected) for m in self.view.members}
        return {peer for peer, ready in self.ready.items() if now.get(peer) == (ready.incarnation, ready.rejected)}

    def _begin_epoch(self) -> None:
        self.opens, self.taken_over = {}, False
        self.last = None
        self._forget_round()

    def _forget_round(self) -> None:
        self.ready, self.attempt, self.haves = {}, None, {}
        self.next_attempt, self.enough_at, self.told = 0, None, None

    def _close_round(self, commit: Commit, out: list[Effect]) -> None:
        assert self.view is not None
        self.last = self.attempt
        self._forget_round()
        self.bandwidth.settle(commit.round, self.view)
        weights = self.bandwidth.weights(self.view)
        if weights is not None:
            out.append(Tell(actor="membership", event=Weighed(weights=weights)))

    # --- a new leader -------------------------------------------------------------------------------------------

    def _take_over(self, out: list[Effect]) -> None:
        assert self.view is not None
        valid = self._valid(self.opens.items())
        if not is_quorum(self.view, valid):
            return
        plans = {peer: self.opens[peer].plan for peer in sorted(valid)}
        known = [(p, peer) for peer, p in plans.items() if p is not None and p.round == self.open_round]
        for plan, peer in sorted(known, key=lambda k: (k[0].epoch, k[0].attempt), reverse=True):
            view = self.views.get(plan.view)
            if view is None:
                out.append(Send(peer=peer, message=AskView(number=plan.view)))
                return
            if not misfit(plan, view, self.fragments.chunks(plan.round)):
                self._carry_on(plan, view, out)
                break
        self.taken_over = True

    @property
    def lacks_view(self) -> int | None:
        """The number of the view of the plan that is to be carried on."""
        if not self.leads or self.taken_over:
            return None
        numbers = [o.plan.view for o in self.opens.values() if o.plan is not None and o.plan.round == self.open_round]
        return next((n for n in sorted(numbers, reverse=True) if self.views.get(n) is None), None)

    def _carry_on(self, plan: Plan, view: View, out: list[Effect]) -> None:
        out.append(Report(fact=RoundTakenOver(round=plan.round, epoch=plan.epoch, attempt=plan.attempt)))
        self.attempt = Attempt.of(plan, view, self.fragments.chunks(plan.round))
        self._replan(out)

    # --- a plan -------------------------------------------------------------------------------------------------

    def _try_plan(self, now: float, out: list[Effect]) -> None:
        assert self.view is not None
        trainers = [m.id for m in self.view.trainers]
        if len(trainers) < self.min_members:
            self._wait_for_members(len(trainers), out)
            return
        valid = self._offers
        count = sum(t in valid for t in trainers)
        enough = 2 * count > len(trainers) and count >= self.min_members
        if not enough:
            self.enough_at = None
        elif self.enough_at is None and self.straggler_timeout_s:
            self.enough_at = now
        late = self.next_at is not None and now >= self.next_at
        if trainers and (count == len(trainers) or late):
            self._plan(out)
        if late and self.attempt is None:
            self.enough_at = now  # nobody may own chunks: look again in a while

    def _wait_for_members(self, trainers: int, out: list[Effect]) -> None:
        assert self.round is not None
        self.enough_at = None
        if self.waiting_for != (self.round, trainers):
            self.waiting_for = (self.round, trainers)
            self._say(WaitingForMembers(round=self.round, active=trainers, min_members=self.min_members), out)

    def _plan(self, out: list[Effect]) -> None:
        """From the beginning, with whoever is ready, over the view of now; or later, if that is not possible."""
        assert self.view is not None
        assert self.round is not None
        self.haves, self.attempt = {}, None
        valid = self._offers
        who = [i for i, m in enumerate(self.view.members) if m.id in valid]
        if not who or (self.fragments.chunks(self.round) and not eligible(self.view)):
            return
        epoch, attempt = self.view.epoch, self.next_attempt
        plan = Plan(
            round=self.round,
            epoch=epoch,
            attempt=attempt,
            view=self.view.number,
            contributors=bitmap(who),
            weights=tuple(self.ready[self.view.members[i].id].weight for i in who),
            turns=(Turn(epoch=epoch, attempt=attempt),),
        )
        self.views.keep(self.view)
        self._open(Attempt.of(plan, self.view, self.fragments.chunks(plan.round)), out)

    def _open(self, attempt: Attempt, out: list[Effect]) -> None:
        assert self.view is not None
        self.attempt, self.haves, self.enough_at = attempt, {}, None
        self.next_attempt = attempt.plan.attempt + 1
        out += [Send(peer=m.id, message=attempt.plan) for m in self.view.members]

    def _look_after(self, now: float, attempt: Attempt, out: list[Effect]) -> None:
        """Commit it if it can be, or see to it that it can become complete."""
        assert self.view is not None
        if (commit := self._commit(attempt)) is not None:
            if commit != self.told:
                self.told = commit
                out.append(Tell(actor="membership", event=CommitReady(commit=commit, view=self.view.number)))
            return
        here = attempt.still_here(self.view)
        if not attempt.still_offer(self.view):
            self._begin_anew(attempt)
            self._try_plan(now, out)
        elif any(a.owner not in here for a in attempt.assigned.values()):
            self._replan(out)
        elif (fact := self._divergence(attempt)) is not None:
            self._say(fact, out)
            self._begin_anew(attempt)
            self._plan(out)

    def _begin_anew(self, attempt: Attempt) -> None:
        """Who was ready for it is ready still."""
        for member in attempt.view.members:
            if member.id not in attempt.weights:
                continue
            ready = Ready(
                round=attempt.round,
                weight=attempt.weights[member.id],
                incarnation=member.incarnation,
                rejected=member.rejected,
            )
            if self._is_offered(member.id, ready):
                self.ready.setdefault(member.id, ready)
        self.attempt, self.haves = None, {}

    def _replan(self, out: list[Effect]) -> None:
        """The plan of now under the next number, without the owners that are lost."""
        assert self.view is not None
        attempt = self.attempt
        assert attempt is not None
        here = attempt.still_here(self.view)
        owners = {a.owner for a in attempt.assigned.values()}
        lost = [i for i, m in enumerate(attempt.view.members) if m.id in owners and m.id not in here]
        number = {"epoch": self.view.epoch, "attempt": self.next_attempt}
        turns = (*attempt.plan.turns, *([Turn(**number, lost=bitmap(lost))] if lost else []))
        if attempt.assigned and not assign(attempt.view, len(attempt.assigned), turns):
            self._begin_anew(attempt)
            self._plan(out)
            return
        if lost:
            peers = tuple(attempt.members[i] for i in lost)
            self._say(OwnersLost(round=attempt.round, peers=peers, **number), out)
        plan = replace(attempt.plan, **number, turns=turns)
        self._open(Attempt.of(plan, attempt.view, self.fragments.chunks(plan.round)), out)

    # --- a commit -----------------------------------------------------------------------------------------------

    def _commit(self, attempt: Attempt) -> Commit | None:
        """Of the means that a majority holds, and holds safely unless that cannot be, for the same outer state.

        Half of the voters with their leader decide views, but would be the leader alone of two: with it the means that
        it committed would be gone.
        """
        assert self.view is not None
        valid = self._valid(self.haves.items())
        for state, digest in sorted({_what(self.haves[peer]) for peer in valid}):
            holders = {peer for peer in valid if _what(self.haves[peer]) == (state, digest)}
            if self._is_safe(self.view, holders):
                chain = self.view.commit.chain if self.view.commit else FIRST_CHAIN
                return Commit(
                    round=attempt.round,
                    epoch=attempt.plan.epoch,
                    attempt=attempt.plan.attempt,
                    state=state,
                    digest=digest,
                    chain=next_chain(chain, state, digest),
                    view=attempt.plan.view,
                )
        return None

    def _is_safe(self, view: View, holders: set[str]) -> bool:
        """Whether what these members hold is held well enough to be committed."""
        on_disk = {peer for peer in holders if self.haves[peer].safe}
        if _is_majority(view, on_disk):
            return True
        return _is_majority(view, holders) and all(v.id in holders for v in view.voters if v.active)

    def _divergence(self, attempt: Attempt) -> Fact | None:
        """What tells that no digest can have a majority any more: every voter has one, and none has enough."""
        assert self.view is not None
        voters = [v.id for v in self.view.voters]
        valid = self._valid(self.haves.items())
        if not voters or not all(v in valid for v in voters):
            return None
        ours = self.haves[voters[0]].digest  # of the means: outer states that differ are membership's to mend
        odd = next((v for v in voters if self.haves[v].digest != ours), None)
        if odd is None:
            return None
        theirs = self.haves[odd].digest
        return StateDiverged(peer=odd, round=attempt.round, ours=ours.hex(), theirs=theirs.hex())

    def _say(self, fact: Fact, out: list[Effect]) -> None:
        out.append(Report(fact=fact))


def _is_majority(view: View, members: set[str]) -> bool:
    return 2 * sum(v.id in members for v in view.voters) > len(view.voters)


def _what(have: Have) -> tuple[bytes, bytes]:
    """What is agreed on."""
    return have.state, have.digest


def _news(message: Open) -> tuple[int, int, int, int]:
    """What is known later is higher."""
    plan = message.plan
    number = (plan.epoch, plan.attempt) if plan is not None else (-1, -1)
    return message.incarnation, message.round, *number
