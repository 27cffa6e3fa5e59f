"""When a node trains, contributes, takes the outer step, and stops.

There are two tracks. The local weights are in one phase at a time: they are stepped, noted, moved, measured, or at
rest. The exchange has its own: a contribution is encoded, offered, its round's mean applied to the outer weights.

The rules:

* While the outer state is the run's, this node is active, and at least ``min_members`` that train are, it does its
  inner steps, and then its local weights become its contribution to the open round.
* ``blocking`` (INTELLECT-1, arXiv 2412.01152): it waits for the round's means, and nothing else touches the tensors
  meanwhile. Otherwise (``overlapped``, and ``streaming``, where a round has one fragment of the weights) they are
  noted, and the next inner steps go on at once. The outer step is taken beside them, and then the local weights are
  moved between two of them. A node waits only if it has a contribution again before the last one's round is over.
  ``eager``: they are moved at once, too, by an estimate of the outer step, which the outer step then corrects.
* The first ``sync_rounds`` rounds are of one inner step each, and ``blocking`` in every mode, so that all nodes begin
  the next one with the outer weights. No inner step of a later round runs before the last of them is over.
* A contribution is so many inner steps, or those of so many seconds, and at least one. They are counted since the last
  contribution that was in a round. So are the tokens of each fragment, which are the weight: a node whose progress was
  in none of the means keeps all three, and contributes at once. A contribution that was in some chunks' means was in
  the round.
* Committed means are applied as soon as they can be, also by a node that did not contribute. Where the tensors must be
  free for it, it stops stepping, and then does what is left; if nothing is, it contributes at once.
* A state that is fetched takes the local weights along (:meth:`Workload.import_state`): steps and tokens stay, too.
  But a contribution to a round whose commit this node missed, of which others took something, may have been counted
  there. It is given up, since nothing may count twice; steps that came after it stay.
* If the inner steps end in NaN or infinity the node starts the round again from the outer weights, with fresh inner
  state; the third time in a row it fails, and says so.
* A contribution that owners could not use is rejected: the node begins again from the outer weights, with fresh inner
  state, as often as that happens. (It is not failed: it cannot tell whether it was the owners that are wrong.)
* Told to leave, it finishes the round, saves, and leaves; at once, it stops after the inner step that is under way.
  It does not wait for a round that cannot close, with too few members. Before it leaves, and before the end of the
  run, it does no inner steps that could not count any more.
* Nobody waits for an evaluation: a node that is told to leave, or to halt, stops the one that is under way. One that
  leaves begins no other; one that halted begins it again when it goes on.
* Told to halt, it stops where it is and answers when the tensors are at rest. Told to begin before that, it does not
  halt. One that is on its way out does not answer: it saves first, and nobody touches the tensors meanwhile.
* A witness applies what is committed, and saves, and that is all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from prime_async.machines.account import Account
from prime_async.machines.facts import (
    ContributionReady,
    EvaluationStarted,
    HeldOutLoss,
    NonFiniteProgress,
    RoundFinished,
    StateSaved,
)
from prime_async.machines.units import to_ms
from prime_async.machines.vocabulary import (
    Applied,
    Apply,
    Begin,
    Captured,
    ContributionFixed,
    ContributionTaken,
    Effect,
    Encode,
    Encoded,
    Evaluate,
    Evaluated,
    EvaluationStopped,
    Event,
    Fail,
    GiveUp,
    Halt,
    Halted,
    Leave,
    MeansCommitted,
    Merge,
    Merged,
    Progress,
    Rejected,
    Report,
    Restore,
    Restored,
    RunSteps,
    Save,
    Saved,
    StateAt,
    StepsDone,
    StopEvaluation,
    StopSteps,
    TakeBack,
    Tell,
    Tick,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import View

MAX_NON_FINITE = 3
MAX_STEPS = 2**20
"""Of one contribution, if it ends with the clock."""

Phase: TypeAlias = Literal[
    "idle", "stepping", "capturing", "merging", "evaluating", "restoring", "saving", "gone"
]  # fmt: skip
ExchangePhase: TypeAlias = Literal["none", "encoding", "offered", "applying", "applied"]


class TrainingSettings(Struct, frozen=True, kw_only=True):
    """What a training machine is made with. ``rounds`` 0: no end. ``evaluate_every`` 0: before and after only.

    A contribution is ``inner_steps``, or with 0 those of ``seconds``. A ``witness`` has none. ``overlaps``: inner steps
    go on while a contribution is exchanged; ``eager``: from an estimate of the outer step. ``fragments``: round r
    exchanges fragment r mod ``fragments``. In the first ``sync_rounds`` rounds a contribution is one inner step, and
    nothing overlaps.
    """

    me: str
    inner_steps: int
    seconds: float = 0.0
    rounds: int = 0
    evaluate_every: int = 0
    min_members: int = 1
    witness: bool = False
    overlaps: bool = False
    eager: bool = False
    fragments: int = 1
    sync_rounds: int = 0

    def steps_of(self, round: int) -> int:
        """Inner steps of a contribution to ``round``; 0: those of ``seconds``."""
        return 1 if round < self.sync_rounds else self.inner_steps

    def overlaps_in(self, round: int) -> bool:
        """Whether inner steps go on while contributions to ``round`` are exchanged."""
        return self.overlaps and round >= self.sync_rounds

    def eager_in(self, round: int) -> bool:
        """Whether they do from an estimate."""
        return self.eager and round >= self.sync_rounds


@dataclass(slots=True)
class Training:
    """See the module's rules. ``phase`` is that of the local weights, "idle" when they are at rest.

    ``exchange``: "offered" until the means come; "applied" until the local weights have moved with the outer ones.
    """

    settings: TrainingSettings
    phase: Phase = "idle"
    exchange: ExchangePhase = "none"
    round: int = 0
    view: View | None = None
    begun: bool = False
    halting: bool = False
    leaving: bool = False
    last_round: int = 0  # to which this node contributes, if it is to leave
    at_once: bool = False
    spoilt: bool = False  # the local weights are not finite, or were rejected
    rejected: int = 0  # contributions
    offered_as: int = 0  # that number, when the last one was encoded
    evaluated_round: int = -1
    account: Account = field(init=False)
    stopping: bool = False  # the steps, or the evaluation, under way are told to end early
    steps_until: float = 0.0  # if the contribution ends with the clock
    steps_done: int = 0  # since the start
    training_s: float = 0.0  # since the round before was finished
    encoded_at: float = 0.0
    taken: int = -1  # the newest round of which some of our contribution was taken
    non_finite: int = 0
    means: MeansCommitted | None = None
    finished: RoundFinished | None = None  # to be told when the local weights have moved, too

    def __post_init__(self) -> None:
        self.account = Account(self.settings.fragments)

    def handle(self, now: float, event: Event) -> list[Effect]:
        out: list[Effect] = []
        if self.phase == "gone":
            return out
        match event:
            case StateAt(round=round):
                self.round = round
                out += [Tell(actor=actor, event=event) for actor in ("checkpoint", "exchange", "membership")]
            case ViewChanged(view=view):
                self.view = view
                self._go_on(now, out)
            case Begin(round=round):
                self._on_begin(now, round, out)
            case Tick():
                self._on_tick(now, out)
            case StepsDone():
                self._on_steps_done(now, event, out)
            case Encoded(finite=finite):
                self._on_encoded(now, finite, out)
            case ContributionTaken(round=round):
                self.taken = round
            case Rejected(times=times):
                self._on_rejected(now, times, out)
            case MeansCommitted():
                self._on_means(now, event, out)
            case Applied(round=round, digest=digest):
                self._on_applied(now, round, digest, out)
            case Merged():
                self._on_merged(now, out)
            case Evaluated(loss=loss):
                out.append(Report(fact=HeldOutLoss(round=self.round, loss=loss)))
                self._rest(now, out)
            case EvaluationStopped():
                self.evaluated_round = -1
                self._rest(now, out)
            case Captured() | Restored():
                self._rest(now, out)
            case Leave(at_once=at_once):
                self._on_leave(now, at_once, out)
            case Saved(path=path):
                self._on_saved(path, out)
            case Halt():
                self._on_halt(now, out)
            case _:
                raise TypeError(f"training has no use for {type(event).__name__}")
        return out

    @property
    def active(self) -> bool:
        mine = self.view.member(self.settings.me) if self.view else None
        return mine is not None and mine.active

    # --- going on -----------------------------------------------------------------------------------------------

    def _rest(self, now: float, out: list[Effect]) -> None:
        """The local weights are at rest."""
        self.phase = "idle"
        self._go_on(now, out)

    def _go_on(self, now: float, out: list[Effect]) -> None:
        """Whatever comes next on either track, if anything can."""
        if self.halting and not self._should_leave:
            self._come_to_a_halt(out)
            return
        self._apply_if_possible(out)
        if self.phase != "idle" or self._exchange_needs_tensors:
            return
        if self.exchange == "applied":
            self._merge(out)
        elif self._should_leave:
            if not self._exchange_is_busy:
                self._finish(out)
        elif self.begun and self.spoilt:
            self._restore_if_possible(out)
        elif self.begun and self._trains and not self._too_few:
            self._next(now, out)

    def _come_to_a_halt(self, out: list[Effect]) -> None:
        if self.phase != "idle" or self._exchange_is_busy:
            return
        if self.exchange == "applied":
            self._merge(out)
            return
        self.halting, self.begun = False, False
        out.append(Tell(actor="checkpoint", event=Halted()))

    @property
    def _exchange_is_busy(self) -> bool:
        """A worker reads the contribution, or changes the outer weights."""
        return self.exchange in ("encoding", "applying")

    @property
    def _exchange_needs_tensors(self) -> bool:
        """The same, and the local weights are needed for it."""
        return self._exchange_is_busy and not self._overlaps

    @property
    def _overlaps(self) -> bool:
        """Whether inner steps go on while the open round is exchanged."""
        return self.settings.overlaps_in(self.round)

    @property
    def _steps(self) -> int:
        """Inner steps of the contribution that is being made; 0: those of some seconds.

        Beside an exchange it is the one to the round after that.
        """
        offer = self.account.offer
        return self.settings.steps_of(self.round if offer is None else offer.round + 1)

    def _apply_if_possible(self, out: list[Effect]) -> None:
        means = self._means_now
        phases = ("idle", "stepping") if self._overlaps else ("idle",)
        if means is not None and self.exchange in ("none", "offered") and self.phase in phases:
            self.exchange = "applying"
            weight = self.account.weight if self.settings.eager_in(self.round) else 0
            out.append(
                Apply(
                    round=self.round,
                    position=means.position,
                    beside=self._overlaps,
                    weight=weight,
                    rejected=self.offered_as,
                )
            )

    @property
    def _means_now(self) -> MeansCommitted | None:
        """The means that the outer state waits for."""
        ours = self.begun and self.means is not None and self.means.round == self.round
        return self.means if ours else None

    @property
    def _trains(self) -> bool:
        return self.active and not self.settings.witness

    @property
    def _should_leave(self) -> bool:
        if self.at_once or self._is_last_round_done:
            return True
        if not self.leaving or not self.begun or self._too_few:
            return self.leaving
        has_more = self.account.work.complete and self.round <= self.last_round
        return self.exchange == "none" and not has_more

    @property
    def _too_few(self) -> bool:
        return self.view is None or len(self.view.trainers) < self.settings.min_members

    @property
    def _is_last_round_done(self) -> bool:
        return 0 < self.settings.rounds <= self.round

    @property
    def _steps_could_count(self) -> bool:
        """Not those after the last contribution."""
        return self.account.offer is None or not (self.leaving or 0 < self.settings.rounds <= self.round + 1)

    def _evaluation_is_due(self, last: bool) -> bool:
        if self.settings.witness or self.leaving or self.evaluated_round == self.round:
            return False
        every = self.settings.evaluate_every
        return last or self.evaluated_round < 0 or (every > 0 and self.round % every == 0)

    def _next(self, now: float, out: list[Effect]) -> None:
        if self._evaluation_is_due(last=False) and not self._exchange_is_busy:
            self._evaluate(out)
        elif self.account.work.complete:
            self._contribute(out)
        elif self._steps_could_count and (self._overlaps or self.exchange == "none"):
            self._run_steps(now, out)

    def _run_steps(self, now: float, out: list[Effect]) -> None:
        """Those that are missing to a contribution."""
        work = self.account.work
        self.phase, self.stopping = "stepping", False
        steps = (self._steps or MAX_STEPS) - work.steps
        out.append(RunSteps(round=self.round, steps=max(steps, 1)))
        if not self._steps:
            self.steps_until = now + max(self.settings.seconds - work.seconds, 0.0)
            out.append(WakeAt(at=self.steps_until))

    def _stop_steps(self, out: list[Effect]) -> None:
        if self.phase == "stepping" and not self.stopping:
            self.stopping = True
            out.append(StopSteps())

    def _contribute(self, out: list[Effect]) -> None:
        """Once the contribution before is settled."""
        if self.exchange != "none":
            return
        self.exchange = "encoding"
        self.phase = "capturing" if self._overlaps else "idle"
        self.account.make_offer(self.round)
        self.offered_as = self.rejected
        out.append(
            Encode(
                round=self.round,
                beside=self._overlaps,
                eager=self.settings.eager_in(self.round),
                rejected=self.rejected,
            )
        )

    def _merge(self, out: list[Effect]) -> None:
        self.phase = "merging"
        out.append(Merge(round=self.round - 1))

    def _restore_if_possible(self, out: list[Effect]) -> None:
        if not self._exchange_is_busy:
            self.phase, self.spoilt = "restoring", False
            self.account.forget()
            out.append(Restore())

    def _evaluate(self, out: list[Effect]) -> None:
        self.phase, self.stopping, self.evaluated_round = "evaluating", False, self.round
        out += [Report(fact=EvaluationStarted(round=self.round)), Evaluate(round=self.round)]

    def _stop_evaluation(self, out: list[Effect]) -> None:
        if self.phase == "evaluating" and not self.stopping:
            self.stopping = True
            out.append(StopEvaluation())

    def _finish(self, out: list[Effect]) -> None:
        if self.begun and self._evaluation_is_due(last=True):
            self._evaluate(out)
        else:
            self.phase = "saving"
            out.append(Save())

    def _on_begin(self, now: float, round: int, out: list[Effect]) -> None:
        self.round = round
        self.halting = False  # what it was for is settled
        if self.begun:
            return
        self.begun = True
        offer = self.account.offer
        if self.phase == "idle" and offer is not None and offer.round != round:
            self.exchange = "none"
            if self.taken == offer.round:
                self._give_up(offer.round, out)
                return
            self.account.take_back()
            if self.settings.eager_in(offer.round):
                self.phase = "restoring"
                out.append(TakeBack(round=offer.round))
                return
        self._go_on(now, out)

    def _give_up(self, round: int, out: list[Effect]) -> None:
        self.phase = "restoring"
        if self.settings.overlaps_in(round):
            self.account.use_up()
            out.append(GiveUp(round=round))
        else:
            self.account.forget()
            out.append(Restore())

    # --- outcomes -----------------------------------------------------------------------------------------------

    def _on_tick(self, now: float, out: list[Effect]) -> None:
        """The seconds of a contribution are over, if it is still being made."""
        if self.phase != "stepping" or self._steps:
            return
        if now < self.steps_until:
            out.append(WakeAt(at=self.steps_until))
            return
        self.account.work.complete = True
        self._stop_steps(out)

    def _on_steps_done(self, now: float, done: StepsDone, out: list[Effect]) -> None:
        self.steps_done += done.steps
        self.training_s += done.seconds
        self.account.add(done.steps, done.tokens, done.seconds)
        work = self.account.work
        if not self.stopping or 0 < self._steps <= work.steps:
            work.complete = True
        self.phase = "idle"
        out.append(Tell(actor="membership", event=Progress(inner_steps=self.steps_done)))
        if work.complete and not (self.halting or self.at_once or self.spoilt or self._means_now):
            self._contribute(out)  # also if it is to leave: that is what it stays for
        self._go_on(now, out)

    def _on_means(self, now: float, means: MeansCommitted, out: list[Effect]) -> None:
        if means.round < self.round:
            return
        self.means = means
        if self._means_now and not self._overlaps:
            self._stop_steps(out)
        self._go_on(now, out)

    def _on_encoded(self, now: float, finite: bool, out: list[Effect]) -> None:
        self.encoded_at = now
        if finite and self.offered_as != self.rejected:
            self.exchange = "none"  # it goes on from what was rejected while it was encoded
            self._go_on(now, out)
            return
        if finite:
            self.non_finite = 0
            self.exchange = "offered"
            fixed = ContributionFixed(round=self.round, weight=self.account.weight, rejected=self.rejected)
            out.append(Tell(actor="exchange", event=fixed))
            out.append(Report(fact=ContributionReady(round=self.round, tokens=fixed.weight)))
            self._go_on(now, out)
            return
        self.exchange = "none"
        self.non_finite += 1
        self.account.forget()
        out.append(Report(fact=NonFiniteProgress(round=self.round, times=self.non_finite)))
        if self.non_finite < MAX_NON_FINITE:
            self.spoilt = True
            self._stop_steps(out)
            self._go_on(now, out)
            return
        text = (
            f"the inner steps of round {self.round} ended in NaN or infinity {self.non_finite} times in a row: "
            "lower run.inner.learning_rate, or raise run.inner.warmup_steps"
        )
        self.phase = "gone"
        out.append(Fail(kind="non_finite", text=text))

    def _on_rejected(self, now: float, times: int, out: list[Effect]) -> None:
        """Means that count it all the same, and are here, are applied first."""
        self.rejected, self.spoilt = times, True
        if self.exchange == "offered" and (self.means is None or self.means.round != self.round):
            self.exchange, self.offered_as = "none", times
        self._stop_steps(out)
        self._go_on(now, out)

    def _on_applied(self, now: float, round: int, digest: bytes, out: list[Effect]) -> None:
        """The outer weights are those of the next round."""
        assert self.means is not None
        counted, chain, moves_later = self.means.position >= 0, self.means.chain, self._overlaps
        if counted:
            tokens = self.account.use_up()
        else:
            tokens = 0
            self.account.take_back()
        self.finished = RoundFinished(
            round=self.round,
            state_digest=digest.hex(),
            tokens=tokens,
            training_s=0.0,
            exchange_s=to_ms(now - self.encoded_at) if self.encoded_at else 0.0,
        )
        self.round, self.means, self.encoded_at = round, None, 0.0
        self.exchange = "applied" if moves_later else "none"
        at = StateAt(round=round, digest=digest, chain=chain)
        if not moves_later:
            self._report_round(out)
        out += [Tell(actor=actor, event=at) for actor in ("checkpoint", "exchange", "membership")]
        self._stop_steps(out)
        self._go_on(now, out)

    def _on_merged(self, now: float, out: list[Effect]) -> None:
        """The local weights have moved with them."""
        self.exchange = "none"
        self._report_round(out)
        self._rest(now, out)

    def _report_round(self, out: list[Effect]) -> None:
        assert self.finished is not None
        out.append(Report(fact=replace(self.finished, training_s=to_ms(self.training_s))))
        self.finished, self.training_s = None, 0.0

    def _on_saved(self, path: str, out: list[Effect]) -> None:
        if path:
            out.append(Report(fact=StateSaved(round=self.round, path=path)))
        self.phase = "gone"
        out.append(Tell(actor="membership", event=Leave()))

    # --- being told ---------------------------------------------------------------------------------------------

    def _on_leave(self, now: float, at_once: bool, out: list[Effect]) -> None:
        if not self.leaving:
            has_more = self.account.offer is not None and self.account.work.complete
            self.leaving, self.last_round = True, self.round + has_more
        if at_once:
            self.at_once = True
        if at_once or not self._steps_could_count:
            self._stop_steps(out)
        self._stop_evaluation(out)
        self._go_on(now, out)

    def _on_halt(self, now: float, out: list[Effect]) -> None:
        self.halting = True
        self._stop_steps(out)
        self._stop_evaluation(out)
        self._go_on(now, out)
