"""What a node says of itself to whoever watches the run, from the facts that it reports."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from prime_async.machines.facts import (
    CatchUpStarted,
    CaughtUp,
    ContributionReady,
    CutOff,
    EvaluationStarted,
    Fact,
    HeldOutLoss,
    InnerStepDone,
    Joined,
    LeaderSilent,
    RoundFinished,
    RoundPlanned,
    SnapshotWritten,
    StateSaved,
    WaitingForMembers,
)
from prime_async.messages import MAX_ROUND_TIMES, Figures, RoundTimes
from prime_async.node.meter import Meter

PHASES: dict[type[Fact], str] = {
    InnerStepDone: "training",
    ContributionReady: "waiting",
    RoundPlanned: "exchanging",
    WaitingForMembers: "waiting",
    Joined: "joining",
    CatchUpStarted: "catching up",
    CaughtUp: "waiting",
    EvaluationStarted: "evaluating",
    LeaderSilent: "no leader",
    CutOff: "cut off",
    StateSaved: "leaving",
}
"""What a node is doing from the moment at which it reports this."""


@dataclass(slots=True)
class Gauge:
    """Feed it every fact with the time at which it came, in seconds of one monotonic clock.

    A round's time runs from the end of the one before, or the beginning of the first inner step, to its own end. What
    is not inner steps of it is waiting up to the plan, exchange from there on, and the rest; so where the exchange
    runs beside the inner steps, only what it held them up counts.
    """

    witness: bool
    phase: str = "joining"
    meter: Meter = field(default_factory=Meter)
    snapshot_round: int = 0
    heldout: tuple[int, float] = (0, math.nan)
    rounds: deque[RoundTimes] = field(default_factory=lambda: deque(maxlen=MAX_ROUND_TIMES))
    training_s: float = 0.0
    elapsed_s: float = 0.0
    _ended_at: float | None = None  # the round before
    _ready_at: float | None = None
    _planned_at: float | None = None

    def add(self, fact: Fact, now: float) -> None:
        self.meter.add(fact, now)
        self.phase = PHASES.get(type(fact), self.phase)
        match fact:
            case InnerStepDone(seconds=seconds) if self._ended_at is None:
                self._ended_at = now - seconds
            case ContributionReady():
                self._ready_at, self._planned_at = now, None
            case RoundPlanned() if self._planned_at is None:  # and not when it is planned again
                self._planned_at = now
            case RoundFinished():
                self._on_round(fact, now)
            case SnapshotWritten(round=round):
                self.snapshot_round = round
            case HeldOutLoss(round=round, loss=loss):
                self.heldout = round, loss
            case _:
                pass

    def _on_round(self, done: RoundFinished, now: float) -> None:
        elapsed = now - self._ended_at if self._ended_at is not None and not self.witness else 0.0
        training = min(done.training_s, elapsed)
        self.training_s += training
        self.elapsed_s += elapsed
        idle = elapsed - training
        planned_at = self._planned_at if self._planned_at is not None else now
        waiting = min(idle, max(0.0, planned_at - self._ready_at)) if self._ready_at is not None else 0.0
        exchange = min(idle - waiting, max(0.0, now - planned_at))
        if not self.witness:
            self.rounds.append(
                RoundTimes(
                    round=done.round,
                    training_ms=_ms(training),
                    waiting_ms=_ms(waiting),
                    exchange_ms=_ms(exchange),
                    other_ms=_ms(idle - waiting - exchange),
                    tokens=done.tokens,
                )
            )
        self._ended_at, self._ready_at, self._planned_at = now, None, None
        self.phase = "training"

    def figures(self, sent_bytes: int, received_bytes: int) -> Figures:
        """What the node says now."""
        meter = self.meter
        rests = self.witness and self.phase in ("waiting", "training")
        return Figures(
            phase="serving" if rests else self.phase,
            tokens=meter.tokens,
            tokens_per_s=round(meter.tokens_per_s),
            loss_micronats=_micronats(meter.recent_loss),
            heldout_round=self.heldout[0],
            heldout_micronats=_micronats(self.heldout[1]),
            sent_bytes=sent_bytes,
            received_bytes=received_bytes,
            training_ms=_ms(self.training_s),
            elapsed_ms=_ms(self.elapsed_s),
            snapshot_round=self.snapshot_round,
            rounds=tuple(self.rounds),
        )


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _micronats(loss: float) -> int:
    """0 for what is no loss: unknown, or not finite."""
    return max(0, round(loss * 1e6)) if math.isfinite(loss) else 0
