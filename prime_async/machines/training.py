"""When a node trains, contributes, takes the outer step, and stops.

The rules (mode ``blocking``, as INTELLECT-1, arXiv 2412.01152):

* While the outer state is the run's, this node is active, and at least ``min_members`` are, it does the inner steps of
  the round, encodes its contribution, and waits for the round's means. Nothing else touches the tensors meanwhile.
* Committed means are applied as soon as the tensors are free, also by a node that did not contribute.
* If the inner steps end in NaN or infinity the node starts the round again from the outer weights, with fresh inner
  state; the third time in a row it fails, and says so.
* Told to leave, it finishes the round, saves, and leaves; at once, it stops after the inner step that is under way.
  It does not wait for a round that cannot close, with too few members.
* Told to halt, it stops where it is and answers when the tensors are at rest. Told to begin before that, it does not
  halt. One that is on its way out does not answer: it saves first, and nobody touches the tensors meanwhile.
* Tokens add up until they are counted: a node whose progress was in none of the means keeps both.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from prime_async.machines.facts import HeldOutLoss, NonFiniteProgress, RoundFinished, StateSaved
from prime_async.machines.units import to_ms
from prime_async.machines.vocabulary import (
    Applied,
    Apply,
    Begin,
    ContributionFixed,
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
    ViewChanged,
)
from prime_async.messages import View

MAX_NON_FINITE = 3


class TrainingSettings(Struct, frozen=True, kw_only=True):
    """What a training machine is made with. ``rounds`` 0: no end. ``evaluate_every`` 0: before and after only."""

    me: str
    inner_steps: int
    rounds: int = 0
    evaluate_every: int = 0
    min_members: int = 1


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
    steps_done: int = 0
    tokens: int = 0  # of this round's inner steps, also those of earlier rounds that were not counted yet
    training_s: float = 0.0
    encoded_at: float = 0.0
    non_finite: int = 0
    means: MeansCommitted | None = None

    def handle(self, now: float, event: Event) -> list[Effect]:
        out: list[Effect] = []
        if self.phase == "gone":
            return out
        match event:
            case StateAt(round=round, digest=digest):
                self.round = round
                at = StateAt(round=round, digest=digest)
                out += [Tell(actor=actor, event=at) for actor in ("checkpoint", "exchange", "membership")]
            case ViewChanged(view=view):
                self.view = view
                self._go_on_if_resting(out)
            case Begin(round=round):
                self._on_begin(round, out)
            case StepsDone():
                self._on_steps_done(event, out)
            case Encoded(finite=finite):
                self._on_encoded(now, finite, out)
            case MeansCommitted(round=round):
                self.means = event if round >= self.round else None
                self._go_on_if_resting(out)
            case Applied(round=round, digest=digest):
                self._on_applied(now, round, digest, out)
            case Evaluated(loss=loss):
                out.append(Report(fact=HeldOutLoss(round=self.round, loss=loss)))
                self._rest("idle", out)
            case Restored():
                self._rest("idle", out)
            case Leave(at_once=at_once):
                self._on_leave(at_once, out)
            case Saved(path=path):
                self._on_saved(path, out)
            case Halt():
                self._on_halt(out)
            case _:
                raise TypeError(f"training has no use for {type(event).__name__}")
        return out

    @property
    def active(self) -> bool:
        mine = self.view.member(self.settings.me) if self.view else None
        return mine is not None and mine.active

    # --- going on -----------------------------------------------------------------------------------------------

    def _rest(self, phase: str, out: list[Effect]) -> None:
        """The tensors are free: ``phase`` is "idle" or "exchanging". What comes next?"""
        self.phase = phase
        self._go_on_if_resting(out)

    def _go_on_if_resting(self, out: list[Effect]) -> None:
        if self.phase not in ("idle", "exchanging"):
            return
        if self.halting and not self._should_leave():
            self.halting, self.begun, self.phase = False, False, "idle"
            out.append(Tell(actor="checkpoint", event=Halted()))
        elif self.begun and self.means is not None:
            self.phase = "applying"
            means = self.means
            out.append(Apply(round=self.round, epoch=means.epoch, attempt=means.attempt, position=means.position))
        elif self._should_leave():
            self._finish(out)
        elif self.phase == "idle" and self.begun and self.active and not self._too_few:
            self._next(out)

    def _should_leave(self) -> bool:
        if self.at_once or self._is_last_round_done():
            return True
        return self.leaving and (self.phase == "idle" or self._too_few)

    @property
    def _too_few(self) -> bool:
        return self.view is None or len(self.view.active) < self.settings.min_members

    def _is_last_round_done(self) -> bool:
        return 0 < self.settings.rounds <= self.round

    def _evaluation_is_due(self, last: bool) -> bool:
        if self.evaluated_round == self.round:
            return False
        every = self.settings.evaluate_every
        return last or self.evaluated_round < 0 or (every > 0 and self.round % every == 0)

    def _next(self, out: list[Effect]) -> None:
        if self._evaluation_is_due(last=False):
            self._evaluate(out)
        else:
            self.phase = "stepping"
            out.append(RunSteps(round=self.round, steps=self.settings.inner_steps))

    def _evaluate(self, out: list[Effect]) -> None:
        self.phase, self.evaluated_round = "evaluating", self.round
        out.append(Evaluate(round=self.round))

    def _finish(self, out: list[Effect]) -> None:
        if not self.at_once and self.begun and self._evaluation_is_due(last=True):
            self._evaluate(out)
        else:
            self.phase = "saving"
            out.append(Save())

    def _on_begin(self, round: int, out: list[Effect]) -> None:
        if round != self.round:
            self.round, self.tokens = round, 0
            if self.means is not None and self.means.round != round:
                self.means = None
        self.halting = False  # what it was for is settled
        if not self.begun:
            self.begun, self.tokens = True, 0  # the state may have been replaced, and our progress with it
            self._go_on_if_resting(out)

    # --- outcomes -----------------------------------------------------------------------------------------------

    def _on_steps_done(self, done: StepsDone, out: list[Effect]) -> None:
        self.steps_done += done.steps
        self.tokens += done.tokens
        self.training_s += done.seconds
        out.append(Tell(actor="membership", event=Progress(inner_steps=self.steps_done)))
        if self.halting or self.at_once or self.means is not None:
            self._rest("idle", out)
        else:
            self.phase = "encoding"
            out.append(Encode(round=self.round))

    def _on_encoded(self, now: float, finite: bool, out: list[Effect]) -> None:
        self.encoded_at = now
        if finite:
            self.non_finite = 0
            out.append(Tell(actor="exchange", event=ContributionFixed(round=self.round, weight=max(1, self.tokens))))
            self._rest("exchanging", out)
            return
        self.non_finite += 1
        self.tokens = 0
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
        fact = RoundFinished(
            round=self.round,
            state_digest=digest.hex(),
            tokens=self.tokens,
            training_s=to_ms(self.training_s),
            exchange_s=to_ms(now - self.encoded_at) if self.encoded_at else 0.0,
        )
        out.append(Report(fact=fact))
        if self.means is None or self.means.position >= 0:
            self.tokens = 0
        self.round, self.means = round, None
        self.training_s, self.encoded_at = 0.0, 0.0
        at = StateAt(round=round, digest=digest)
        out += [Tell(actor=actor, event=at) for actor in ("checkpoint", "exchange", "membership")]
        self._rest("idle", out)

    def _on_saved(self, path: str, out: list[Effect]) -> None:
        if path:
            out.append(Report(fact=StateSaved(round=self.round, path=path)))
        self.phase = "gone"
        out.append(Tell(actor="membership", event=Leave()))

    # --- being told ---------------------------------------------------------------------------------------------

    def _on_leave(self, at_once: bool, out: list[Effect]) -> None:
        self.leaving = True
        if at_once and not self.at_once:
            self.at_once = True
            if self.phase == "stepping":
                out.append(StopSteps())
        self._go_on_if_resting(out)

    def _on_halt(self, out: list[Effect]) -> None:
        self.halting = True
        if self.phase == "stepping":
            out.append(StopSteps())
        self._go_on_if_resting(out)
