"""When a node trains, contributes, takes the outer step, and stops.

The rules (mode ``blocking``, as INTELLECT-1, arXiv 2412.01152):

* While the outer state is the run's, this node is active, and at least ``min_members`` that train are, it does its
  inner steps, encodes its contribution, and waits for the round's means. Nothing else touches the tensors meanwhile.
* A contribution is so many inner steps, or those of so many seconds, and at least one. They are counted since the last
  contribution that was in a round, and so are their tokens, which are its weight: a node whose progress was in none of
  the means keeps all three. A contribution that was in some chunks' means was in the round.
* Committed means are applied as soon as the tensors are free, also by a node that did not contribute. If they come
  while it steps, it stops for that, and then does what is left; if nothing is, it contributes at once.
* A state that is fetched takes the local weights along (:meth:`Workload.import_state`): steps and tokens stay, too.
  But a contribution to a round whose commit this node missed, of which others took something, may have been counted
  there. It is given up, since nothing may count twice.
* If the inner steps end in NaN or infinity the node starts the round again from the outer weights, with fresh inner
  state; the third time in a row it fails, and says so.
* Told to leave, it finishes the round, saves, and leaves; at once, it stops after the inner step that is under way.
  It does not wait for a round that cannot close, with too few members.
* Told to halt, it stops where it is and answers when the tensors are at rest. Told to begin before that, it does not
  halt. One that is on its way out does not answer: it saves first, and nobody touches the tensors meanwhile.
* A witness applies what is committed, and saves, and that is all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import Struct

from prime_async.machines.facts import HeldOutLoss, NonFiniteProgress, RoundFinished, StateSaved
from prime_async.machines.units import to_ms
from prime_async.machines.vocabulary import (
    Applied,
    Apply,
    Begin,
    ContributionFixed,
    ContributionTaken,
    Effect,
    Encode,
    Encoded,
    Evaluate,
    Evaluated,
    Event,
    Fail,
    Halt,
    Halted,
    Leave,
    MeansCommitted,
    Progress,
    Report,
    Restore,
    Restored,
    RunSteps,
    Save,
    Saved,
    StateAt,
    StepsDone,
    StopSteps,
    Tell,
    Tick,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import MAX_TOKENS, View

MAX_NON_FINITE = 3
MAX_STEPS = 2**20
"""Of one contribution, if it ends with the clock."""


class TrainingSettings(Struct, frozen=True, kw_only=True):
    """What a training machine is made with. ``rounds`` 0: no end. ``evaluate_every`` 0: before and after only.

    A contribution is ``inner_steps``, or with 0 those of ``seconds``. A ``witness`` has none.
    """

    me: str
    inner_steps: int
    seconds: float = 0.0
    rounds: int = 0
    evaluate_every: int = 0
    min_members: int = 1
    witness: bool = False


@dataclass(slots=True)
class Work:
    """Inner steps that are in no round's means yet. ``complete``: they are a contribution."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    complete: bool = False


@dataclass(slots=True)
class Training:
    """See the module's rules.

    ``phase``: "idle" (nothing to do yet), "evaluating", "stepping", "encoding", "exchanging", "applying", "restoring",
    "saving", "gone". In "idle" and "exchanging" the tensors are at rest.
    """

    settings: TrainingSettings
    phase: str = "idle"
    round: int = 0
    view: View | None = None
    begun: bool = False
    halting: bool = False
    leaving: bool = False
    at_once: bool = False
    evaluated_round: int = -1
    work: Work = field(default_factory=Work)
    stopping: bool = False  # the steps under way are told to end early
    steps_until: float = 0.0  # if the contribution ends with the clock
    steps_done: int = 0  # since the start
    training_s: float = 0.0  # since the round before was applied
    encoded_at: float = 0.0
    offered: int = -1  # the round that our contribution, not known to be counted or not, was offered to
    taken: int = -1  # the newest round of which some of our contribution was taken
    non_finite: int = 0
    means: MeansCommitted | None = None

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
                self._go_on_if_resting(now, out)
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
            case MeansCommitted():
                self._on_means(now, event, out)
            case Applied(round=round, digest=digest):
                self._on_applied(now, round, digest, out)
            case Evaluated(loss=loss):
                out.append(Report(fact=HeldOutLoss(round=self.round, loss=loss)))
                self._rest(now, "idle", out)
            case Restored():
                self._rest(now, "idle", out)
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

    def _rest(self, now: float, phase: str, out: list[Effect]) -> None:
        """The tensors are free: ``phase`` is "idle" or "exchanging". What comes next?"""
        self.phase = phase
        self._go_on_if_resting(now, out)

    def _go_on_if_resting(self, now: float, out: list[Effect]) -> None:
        if self.phase not in ("idle", "exchanging"):
            return
        if self.halting and not self._should_leave():
            self.halting, self.begun, self.phase = False, False, "idle"
            out.append(Tell(actor="checkpoint", event=Halted()))
        elif (means := self._means_now) is not None:
            self.phase = "applying"
            out.append(Apply(round=self.round, position=means.position))
        elif self._should_leave():
            self._finish(out)
        elif self.phase == "idle" and self.begun and self._trains and not self._too_few:
            self._next(now, out)

    @property
    def _means_now(self) -> MeansCommitted | None:
        """The means that the outer state waits for."""
        ours = self.begun and self.means is not None and self.means.round == self.round
        return self.means if ours else None

    @property
    def _trains(self) -> bool:
        return self.active and not self.settings.witness

    def _should_leave(self) -> bool:
        if self.at_once or self._is_last_round_done():
            return True
        return self.leaving and (self.phase == "idle" or self._too_few)

    @property
    def _too_few(self) -> bool:
        return self.view is None or len(self.view.trainers) < self.settings.min_members

    def _is_last_round_done(self) -> bool:
        return 0 < self.settings.rounds <= self.round

    def _evaluation_is_due(self, last: bool) -> bool:
        if self.settings.witness or self.evaluated_round == self.round:
            return False
        every = self.settings.evaluate_every
        return last or self.evaluated_round < 0 or (every > 0 and self.round % every == 0)

    def _next(self, now: float, out: list[Effect]) -> None:
        if self._evaluation_is_due(last=False):
            self._evaluate(out)
        elif self.work.complete:
            self._encode(out)
        else:
            self._run_steps(now, out)

    def _run_steps(self, now: float, out: list[Effect]) -> None:
        """Those that are missing to a contribution."""
        self.phase, self.stopping = "stepping", False
        steps = (self.settings.inner_steps or MAX_STEPS) - self.work.steps
        out.append(RunSteps(round=self.round, steps=max(steps, 1)))
        if not self.settings.inner_steps:
            self.steps_until = now + max(self.settings.seconds - self.work.seconds, 0.0)
            out.append(WakeAt(at=self.steps_until))

    def _stop_steps(self, out: list[Effect]) -> None:
        if self.phase == "stepping" and not self.stopping:
            self.stopping = True
            out.append(StopSteps())

    def _encode(self, out: list[Effect]) -> None:
        self.phase = "encoding"
        out.append(Encode(round=self.round))

    def _evaluate(self, out: list[Effect]) -> None:
        self.phase, self.evaluated_round = "evaluating", self.round
        out.append(Evaluate(round=self.round))

    def _finish(self, out: list[Effect]) -> None:
        if not self.at_once and self.begun and self._evaluation_is_due(last=True):
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
        if 0 <= self.offered < round and self.taken == self.offered and self.phase in ("idle", "exchanging"):
            self.work, self.offered, self.phase = Work(), -1, "restoring"
            out.append(Restore())
        else:
            self._go_on_if_resting(now, out)

    # --- outcomes -----------------------------------------------------------------------------------------------

    def _on_tick(self, now: float, out: list[Effect]) -> None:
        """The seconds of a contribution are over, if it is still being made."""
        if self.phase != "stepping" or self.settings.inner_steps:
            return
        if now < self.steps_until:
            out.append(WakeAt(at=self.steps_until))
            return
        self.work.complete = True
        self._stop_steps(out)

    def _on_steps_done(self, now: float, done: StepsDone, out: list[Effect]) -> None:
        self.steps_done += done.steps
        self.training_s += done.seconds
        self.work.steps += done.steps
        self.work.tokens += done.tokens
        self.work.seconds += done.seconds
        if not self.stopping or 0 < self.settings.inner_steps <= self.work.steps:
            self.work.complete = True
        out.append(Tell(actor="membership", event=Progress(inner_steps=self.steps_done)))
        if self.work.complete and not (self.halting or self.at_once or self._means_now):
            self._encode(out)
        else:
            self._rest(now, "idle", out)

    def _on_means(self, now: float, means: MeansCommitted, out: list[Effect]) -> None:
        if means.round < self.round:
            return
        self.means = means
        if self._means_now:
            self._stop_steps(out)
        self._go_on_if_resting(now, out)

    def _on_encoded(self, now: float, finite: bool, out: list[Effect]) -> None:
        self.encoded_at = now
        if finite:
            self.non_finite = 0
            weight = min(max(1, self.work.tokens), MAX_TOKENS)
            self.offered = self.round
            out.append(Tell(actor="exchange", event=ContributionFixed(round=self.round, weight=weight)))
            self._rest(now, "exchanging", out)
            return
        self.non_finite += 1
        self.work = Work()
        out.append(Report(fact=NonFiniteProgress(round=self.round, times=self.non_finite)))
        if self.non_finite < MAX_NON_FINITE:
            self.phase = "restoring"
            out.append(Restore())
            return
        text = (
            f"the inner steps of round {self.round} ended in NaN or infinity {self.non_finite} times in a row: "
            "lower run.inner.learning_rate, or raise run.inner.warmup_steps"
        )
        self.phase = "gone"
        out.append(Fail(kind="non_finite", text=text))

    def _on_applied(self, now: float, round: int, digest: bytes, out: list[Effect]) -> None:
        assert self.means is not None
        counted, chain = self.means.position >= 0, self.means.chain
        fact = RoundFinished(
            round=self.round,
            state_digest=digest.hex(),
            tokens=self.work.tokens if counted else 0,
            training_s=to_ms(self.training_s),
            exchange_s=to_ms(now - self.encoded_at) if self.encoded_at else 0.0,
        )
        out.append(Report(fact=fact))
        if counted:
            self.work = Work()
        self.round, self.means, self.offered = round, None, -1
        self.training_s, self.encoded_at = 0.0, 0.0
        at = StateAt(round=round, digest=digest, chain=chain)
        out += [Tell(actor=actor, event=at) for actor in ("checkpoint", "exchange", "membership")]
        self._rest(now, "idle", out)

    def _on_saved(self, path: str, out: list[Effect]) -> None:
        if path:
            out.append(Report(fact=StateSaved(round=self.round, path=path)))
        self.phase = "gone"
        out.append(Tell(actor="membership", event=Leave()))

    # --- being told ---------------------------------------------------------------------------------------------

    def _on_leave(self, now: float, at_once: bool, out: list[Effect]) -> None:
        self.leaving = True
        if at_once:
            self.at_once = True
            self._stop_steps(out)
        self._go_on_if_resting(now, out)

    def _on_halt(self, now: float, out: list[Effect]) -> None:
        self.halting = True
        self._stop_steps(out)
        self._go_on_if_resting(now, out)
