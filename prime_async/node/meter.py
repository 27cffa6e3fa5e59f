"""How a node is doing, in numbers, from the facts that it reports."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from prime_async.machines.facts import Fact, HeldOutLoss, InnerStepDone, RoundFinished, ViewAdopted

RECENT_STEPS = 20


@dataclass(slots=True)
class Meter:
    """Feed it every fact with the time at which it came, in seconds of one monotonic clock.

    ``training_share`` is the time spent in inner steps over the time from the beginning of the first inner step to the
    end of the last round: what is missing to 1 went into encoding, exchanging, waiting for others and the outer step.
    """

    round: int = 0
    inner_steps: int = 0
    tokens: int = 0
    loss: float = math.nan
    members: int = 0
    active: int = 0
    state_digests: dict[int, str] = field(default_factory=dict)  # outer steps taken -> digest
    heldout: dict[int, float] = field(default_factory=dict)  # outer steps taken -> nats per token
    _first_at: float | None = None
    _training_s: float = 0.0
    _counted_training_s: float = 0.0
    _round_ended_at: float | None = None
    _recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def add(self, fact: Fact, now: float) -> None:
        match fact:
            case InnerStepDone():
                self._on_step(fact, now)
            case RoundFinished(round=round, state_digest=digest):
                self.round = round + 1
                self.state_digests[self.round] = digest
                self._counted_training_s, self._round_ended_at = self._training_s, now
            case HeldOutLoss(round=round, loss=loss):
                self.heldout[round] = loss
            case ViewAdopted(members=members, active=active):
                self.members, self.active = len(members), active
            case _:
                pass

    def _on_step(self, step: InnerStepDone, now: float) -> None:
        if self._first_at is None:
            self._first_at = now - step.seconds
        self.inner_steps += 1
        self.tokens += step.tokens
        self.loss = step.loss
        self._training_s += step.seconds
        self._recent.append((step.tokens, step.seconds))
        self._losses.append(step.loss)

    @property
    def tokens_per_s(self) -> float:
        """Of the last inner steps, while they ran."""
        seconds = sum(s for _, s in self._recent)
        return sum(t for t, _ in self._recent) / seconds if seconds else 0.0

    @property
    def recent_loss(self) -> float:
        """The mean over the last inner steps; NaN before the first."""
        return sum(self._losses) / len(self._losses) if self._losses else math.nan

    @property
    def training_share(self) -> float:
        """Between 0 and 1; NaN before the first round has ended."""
        if self._first_at is None or self._round_ended_at is None:
            return math.nan
        return min(1.0, self._counted_training_s / max(self._round_ended_at - self._first_at, 1e-9))
