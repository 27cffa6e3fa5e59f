"""A member's part of a round: it contributes, makes the means it owns, gathers the others, and hands over what counts.

The rules:

* From ``ContributionFixed`` until the round is committed this node's contribution does not change. ``Ready`` goes to
  the leader until this node holds all means; with weight 0 while there is no contribution, so that a node that missed
  a message learns of a plan. The answer is the newest plan.
* A new leader is told the newest plan of the open round by every voter (``Open``), until a plan of its epoch has come.
* Plans are ordered by (epoch, attempt), and lower ones are refused. Under a plan each owner makes the means of its
  chunks (:mod:`~prime_async.machines.reducing`), and at the same time every member fetches the others
  (:mod:`~prime_async.machines.gathering`). The two have windows of their own: a mean that is waited for must not hold
  up the contribution that it is made of.
* A newer plan of the same making changes the owners of some chunks, and their numbers. Those are begun again, under the
  new numbers; of the others nothing is lost, gets under way included. A plan of another making begins all again.
* ``Ask`` is answered once this node goes by a plan at least as new: with what it holds, under whatever number. From
  then on it refuses means of a lower number. Who is not at that round yet holds nothing of it, and says so.
* An owner that can use nobody's contribution to one of its chunks says ``Unusable`` to the leader, until there is
  another plan, or the view lists one of those contributions as rejected. A node that finds its own rejected in the view
  gives it up, tells the training, and serves the next one under another name.
* When all means are here under the newest plan's numbers they are put on disk, and then ``Have`` goes to the leader,
  until the round is committed. If the disk is full it goes too, and says that they are in memory alone.
* What happens once the round is committed: :mod:`~prime_async.machines.handover`; and the chunks of either
  phase: :mod:`~prime_async.machines.chunks`.

May be lost: every message. Never believed: a plan that does not come from the leader of the view.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import Struct

from prime_async.machines.attempt import SETTLED, Attempt, Number, misfit
from prime_async.machines.chunks import Chunks
from prime_async.machines.coordinator import Coordinator
from prime_async.machines.facts import ContributionRejected, RoundIgnored, RoundPlanned
from prime_async.machines.fetches import Fetches
from prime_async.machines.fragments import Fragments
from prime_async.machines.handover import Contribution, HandOver
from prime_async.machines.views import Views
from prime_async.machines.vocabulary import (
    ContributionFixed,
    Effect,
    Event,
    Fetched,
    FetchFailed,
    Forget,
    Heard,
    MeansStored,
    Reduced,
    Rejected,
    Report,
    Send,
    StateAt,
    Tell,
    Tick,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import (
    Ask,
    AskView,
    Behind,
    Have,
    Held,
    HeldMean,
    Member,
    Message,
    Open,
    Plan,
    Ready,
    Unusable,
    View,
    ViewUpdate,
    bitmap,
)


class ExchangeSettings(Struct, frozen=True, kw_only=True):
    """What an exchange machine is made with. Windows count gets under way: chunks reduced, means per source.
    ``fragments``: a round exchanges one of so many, see :mod:`~prime_async.machines.fragments`.

    ``straggler_timeout_s``: a round waits so long for the last ones to be ready; 0: for ever.
    """

    me: str
    chunk_count: int
    fragments: int = 1
    min_members: int = 1
    straggler_timeout_s: float = 0.0
    chunk_window: int = 4
    mean_window: int = 4
    fetch_timeout_s: float = 60.0
    repeat_s: float = 1.0
    retry_s: float = 0.5


@dataclass(slots=True)
class Exchange:
    """See the module's rules."""

    settings: ExchangeSettings
    view: View | None = None
    views: Views = field(default_factory=Views)
    early: Plan | None = None  # a plan whose view is not known yet
    round: int | None = None
    contribution: Contribution = field(default_factory=Contribution)
    heard_epoch: int = 0  # the newest of which we had a plan
    newest: Number = SETTLED  # plan of the round that we went by
    promised: tuple[int, Number] = (-1, SETTLED)  # round and number of the newest ask that was answered
    storing: Number = SETTLED  # plan whose means are being put on disk, or are there
    stored: Number = SETTLED  # plan whose means are on disk, or cannot be put there
    safe: bool = False  # they are
    said: Number = SETTLED  # plan for which ``Have`` was said
    complained: tuple[Number, frozenset[str]] = (SETTLED, frozenset())  # plan and contributors of the last ``Unusable``
    rejected: int = 0  # contributions of this node
    repeat_at: float | None = None
    wake_at: float | None = None
    fragments: Fragments = field(init=False)
    fetches: Fetches = field(init=False)
    chunks: Chunks = field(init=False)
    hand_over: HandOver = field(init=False)
    coordinator: Coordinator = field(init=False)

    def __post_init__(self) -> None:
        s = self.settings
        self.fragments = Fragments(s.chunk_count, s.fragments)
        self.fetches = Fetches(timeout_s=s.fetch_timeout_s, retry_s=s.retry_s)
        self.chunks = Chunks(
            me=s.me,
            fragments=self.fragments,
            chunk_window=s.chunk_window,
            mean_window=s.mean_window,
            repeat_s=s.repeat_s,
            fetches=self.fetches,
        )
        self.hand_over = HandOver(me=s.me, repeat_s=s.repeat_s, chunks=self.chunks, views=self.views)
        self.coordinator = Coordinator(
            me=s.me,
            fragments=self.fragments,
            min_members=s.min_members,
            straggler_timeout_s=s.straggler_timeout_s,
            views=self.views,
        )

    # --- the one way in -----------------------------------------------------------------------------------------

    def handle(self, now: float, event: Event) -> list[Effect]:
        out: list[Effect] = []
        match event:
            case ViewChanged(view=view):
                self._on_view(now, view, out)
            case StateAt():
                self._on_state(now, event, out)
            case ContributionFixed(round=round, weight=weight, rejected=rejected):
                if round == self.round and rejected == self.rejected:
                    self.contribution.weight = weight
                    self._say_ready(out)
            case Heard(peer=peer, message=message):
                if peer != self.settings.me:  # nobody but a copy of our key says that
                    self._on_message(now, peer, message, out)
            case Fetched():
                self.chunks.on_fetched(now, event, out)
            case FetchFailed():
                if self.view is not None:
                    self.chunks.on_failed(now, event, self.view, out)
            case Reduced():
                self.chunks.on_reduced(now, event, out)
            case MeansStored(round=round, epoch=epoch, attempt=attempt, safe=safe):
                if round == self.round:
                    self.stored, self.safe = (epoch, attempt), safe
            case Tick():
                self._on_tick(now, out)
            case _:
                raise TypeError(f"exchange has no use for {type(event).__name__}")
        return self._finish(now, out)

    def _finish(self, now: float, out: list[Effect]) -> list[Effect]:
        """Go on as far as can be, and hear what this node said to itself."""
        done: list[Effect] = []
        while True:
            self._advance(now, out)
            to_me = [e.message for e in out if isinstance(e, Send) and e.peer == self.settings.me]
            done += [e for e in out if not (isinstance(e, Send) and e.peer == self.settings.me)]
            if not to_me:
                break
            out = []
            for message in to_me:
                self._on_message(now, self.settings.me, message, out)
        self._schedule(done)
        return done

    def _advance(self, now: float, out: list[Effect]) -> None:
        if self.view is None:
            return
        attempt = self.chunks.attempt
        own_here = attempt is not None and self.contribution.is_of(attempt.view, self.settings.me)
        self.chunks.pump(now, out, own_here=own_here)
        self.chunks.report_redone(now, out)
        self._complain(out)
        handed_over = self.hand_over.finish(now, self.view, self.contribution, out)
        if attempt is None or not (handed_over or self.chunks.commit is None):
            return
        if self.storing != attempt.number and self.chunks.plan_digest is not None and not handed_over:
            self.storing = attempt.number
            out.append(self.chunks.store())
        if self.said != attempt.number and (self.stored == attempt.number or handed_over):
            self._say_have(now, out)  # after the commit for its measurements: those of the slow are what matters

    # --- who and where we are -----------------------------------------------------------------------------------

    @property
    def _self(self) -> Member | None:
        """This node, as the view lists it."""
        return self.view.member(self.settings.me) if self.view else None

    def _on_view(self, now: float, view: View, out: list[Effect]) -> None:
        new_epoch = self.view is None or self.view.epoch != view.epoch
        self.view = view
        self.views.keep(view)
        self._give_up_the_rejected(out)
        self.chunks.on_view(now, view, out)
        self.hand_over.see(now, view, out)
        self._pin()
        self.coordinator.on_view(now, view, out)
        if new_epoch:
            self._repeat(now, out)

    def _give_up_the_rejected(self, out: list[Effect]) -> None:
        """If our contribution is what the view calls rejected."""
        me = self._self
        if me is None or me.rejected <= self.rejected or self.round is None:
            return
        self.rejected, self.contribution = me.rejected, Contribution()
        out.append(Report(fact=ContributionRejected(round=self.round, peer=me.id, times=me.rejected)))
        out.append(Tell(actor="training", event=Rejected(times=me.rejected)))

    def _on_state(self, now: float, at: StateAt, out: list[Effect]) -> None:
        round = at.round
        if self.round == round:
            if at.digest != self.hand_over.state:  # it was mended
                self.hand_over.state, self.hand_over.chain, self.said = at.digest, at.chain, SETTLED
            self.hand_over.lost_until = 0.0
            return
        lived_through = self.hand_over.done and self.hand_over.round == round - 1
        self.hand_over.begin(at)
        self.round, self.contribution = round, Contribution()
        self.newest, self.early = SETTLED, None
        self.storing, self.stored, self.said = SETTLED, SETTLED, SETTLED
        self.chunks.give_up(out)
        # Of who has a state that it did not come to itself the means that lead to it are on disk, if anywhere.
        out.append(Forget(means_before=round - lived_through, contributions_before=round))
        if self.view is not None:
            self.hand_over.see(now, self.view, out)
        self._pin()
        self.coordinator.on_state(now, round, out)
        self._say_open(out)
        self.repeat_at = now + self.settings.repeat_s

    def _pin(self) -> None:
        """Keep the views of the open round, and of the last commit, whose means are still asked for."""
        commit = self.view.commit if self.view else None
        plans = (self.early, self.chunks.attempt.plan if self.chunks.attempt else None)
        self.views.pin(*(p.view for p in (*plans, commit) if p is not None))

    # --- messages -----------------------------------------------------------------------------------------------

    def _on_message(self, now: float, peer: str, message: Message, out: list[Effect]) -> None:
        if self.view is None or self.view.member(peer) is None:
            return
        from_leader = peer == self.view.leader
        match message:
            case Ready():
                self.coordinator.on_ready(now, peer, message, out)
            case Have():
                self.coordinator.on_have(now, peer, message, out)
            case Open():
                self.coordinator.on_open(now, peer, message, out)
            case Ask():
                self._on_ask(peer, message, out)
            case Held() if self.chunks.reducing is not None:
                self.chunks.reducing.on_held(peer, message)
            case Unusable():
                self.coordinator.on_unusable(peer, message, out)
            case Plan() if from_leader and message.epoch == self.view.epoch:
                self._on_plan(now, peer, message, out)
            case ViewUpdate(decided=True, view=view):
                self._on_older_view(now, view, out)
            case AskView(number=number):
                self._show_view(peer, number, out)
            case Behind(round=round) if from_leader and self._is_missed(round - 1):
                self.hand_over.fall_behind(now, round - 1, out)
            case _:
                pass  # late, or from one who does not lead

    def _on_older_view(self, now: float, view: View, out: list[Effect]) -> None:
        assert self.view is not None
        early = self.early.view if self.early else None
        lacks = (early, self.hand_over.lacks, self.coordinator.lacks_view)
        if view.number not in lacks or self.views.get(view.number) or view.lineage != self.view.lineage:
            return
        self.views.keep(view)
        self.views.pin(*self.views.pinned, view.number)
        self.coordinator.advance(now, out)
        if self.early is not None and early == view.number and self.early.epoch == self.view.epoch:
            self._on_plan(now, self.view.leader, self.early, out)

    def _is_missed(self, committed: int) -> bool:
        return self.round is not None and self.round < committed and self.chunks.commit is None

    def _show_view(self, peer: str, number: int, out: list[Effect]) -> None:
        view = self.views.get(number)
        if view is not None:
            out.append(Send(peer=peer, message=ViewUpdate(epoch=view.epoch, decided=True, view=view)))

    def _to_leader(self, message: Message, out: list[Effect]) -> None:
        if self.view is not None:
            out.append(Send(peer=self.view.leader, message=message))

    def _say_ready(self, out: list[Effect]) -> None:
        me = self._self
        if me is None or self.round is None:
            return
        weight = self.contribution.weight or 0
        if weight:
            self.contribution.ready_as.add((me.incarnation, me.rejected))
        ready = Ready(round=self.round, weight=weight, incarnation=me.incarnation, rejected=me.rejected)
        self._to_leader(ready, out)

    def _say_open(self, out: list[Effect]) -> None:
        me = self._self
        if me is None or self.view is None or self.round is None or not me.voter:
            return
        if self.heard_epoch == self.view.epoch:
            return  # its leader knows by now
        plan = self.chunks.attempt.plan if self.chunks.attempt else None
        message = Open(epoch=self.view.epoch, round=self.round, incarnation=me.incarnation, plan=plan)
        self._to_leader(message, out)

    def _say_have(self, now: float, out: list[Effect]) -> None:
        me, attempt, digest = self._self, self.chunks.attempt, self.chunks.plan_digest
        if me is None or attempt is None or digest is None:
            return
        self.said = attempt.number
        meter, place = self.fetches.meter, attempt.members.index(me.id) if me.id in attempt.members else 0
        have = Have(
            round=attempt.round,
            epoch=attempt.plan.epoch,
            attempt=attempt.plan.attempt,
            state=self.hand_over.state,
            digest=digest,
            incarnation=me.incarnation,
            received_per_s=meter.received_per_s(now),
            rates=meter.rates(now, attempt.members, attempt.round + place),
            safe=self.safe and self.stored == attempt.number,
        )
        self._to_leader(have, out)

    def _complain(self, out: list[Effect]) -> None:
        """Tell the leader of whom a chunk of ours can use nothing, if it does not know."""
        attempt, reducing, me = self.chunks.attempt, self.chunks.reducing, self._self
        if attempt is None or reducing is None or me is None or self.chunks.commit is not None:
            return
        unusable = reducing.unusable.intersection(self.chunks.offering)
        complaint = attempt.number, frozenset(unusable)
        if not unusable or complaint == self.complained:
            return
        self.complained = complaint
        message = Unusable(
            round=attempt.round,
            epoch=attempt.plan.epoch,
            attempt=attempt.plan.attempt,
            contributors=bitmap([i for i, m in enumerate(attempt.members) if m in unusable]),
            incarnation=me.incarnation,
        )
        self._to_leader(message, out)

    def _repeat(self, now: float, out: list[Effect]) -> None:
        """Say again what the leader may not have heard. (One that has lost its plan wants ``Ready`` too.)"""
        self.repeat_at = now + self.settings.repeat_s
        self.complained = SETTLED, frozenset()
        self._say_open(out)
        if self.chunks.commit is None:
            self._say_ready(out)
            if self.chunks.attempt is not None and self.stored == self.chunks.attempt.number:
                self._say_have(now, out)

    # --- a plan -------------------------------------------------------------------------------------------------

    def _on_plan(self, now: float, peer: str, plan: Plan, out: list[Effect]) -> None:
        assert self.view is not None
        self.heard_epoch = plan.epoch
        if plan.round != self.round or self.chunks.commit is not None or now < self.hand_over.lost_until:
            return
        if self._refuses(plan):
            return
        view = self.views.get(plan.view)
        if view is None:
            self.early = plan
            out.append(Send(peer=peer, message=AskView(number=plan.view)))
            return
        reason = misfit(plan, view, self.fragments.chunks(plan.round))
        if reason:
            out.append(Report(fact=RoundIgnored(peer=peer, round=plan.round, reason=reason)))
            return
        self.early, self.newest = None, (plan.epoch, plan.attempt)
        attempt = Attempt.of(plan, view, self.fragments.chunks(plan.round))
        self.chunks.go_by(now, attempt, self.view, out)
        self._pin()
        fact = RoundPlanned(
            round=attempt.round,
            epoch=plan.epoch,
            attempt=plan.attempt,
            contributors=len(attempt.weights),
            chunks_owned=sum(a.owner == self.settings.me for a in attempt.assigned.values()),
        )
        out.append(Report(fact=fact))

    def _refuses(self, plan: Plan) -> bool:
        number = plan.epoch, plan.attempt
        asked_in, floor = self.promised
        return number <= self.newest or (asked_in == plan.round and number < floor)

    def _on_ask(self, peer: str, ask: Ask, out: list[Effect]) -> None:
        number = ask.epoch, ask.attempt
        ahead = self.round is None or ask.round > self.round
        if not ahead and (ask.round != self.round or self.newest < number):
            return
        self.promised = max(self.promised, (ask.round, number))
        found = {} if ahead else {c: self.chunks.means.best(c, number) for c in ask.chunks}
        means = [HeldMean(chunk=c, epoch=n[0], attempt=n[1]) for c, n in found.items() if n and n != SETTLED]
        held = Held(round=ask.round, epoch=ask.epoch, attempt=ask.attempt, means=tuple(means))
        out.append(Send(peer=peer, message=held))

    # --- time ---------------------------------------------------------------------------------------------------

    def _on_tick(self, now: float, out: list[Effect]) -> None:
        self.wake_at = None
        if self.view is not None:
            self.chunks.try_again(now, self.view, out)
            self.coordinator.advance(now, out)
        if self.repeat_at is not None and now >= self.repeat_at:
            self._repeat(now, out)
            if self.view is not None:
                self.hand_over.see(now, self.view, out)
                self.coordinator.on_tick(now, out)
                if self.hand_over.lacks is not None:
                    self.hand_over.ask_view(self.view, out)

    def _schedule(self, out: list[Effect]) -> None:
        times = [self.chunks.next_at, self.coordinator.next_at, self.repeat_at if self.round is not None else None]
        at = min((t for t in times if t is not None), default=None)
        if at is not None and at != self.wake_at:
            self.wake_at = at
            out.append(WakeAt(at=at))
