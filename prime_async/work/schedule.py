"""The learning rate: a pure function of where the run is, so that a node that joins late is where the others are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prime_async.config.schema import MAX_ROUND_STEPS, InnerSettings, RunSpec


@dataclass(frozen=True, slots=True)
class Pace:
    """Where a node is at the beginning of round r, however many steps it did itself.

    ``steps``: of the schedule, that a round has. ``batches``: of its data stream. The first ``sync_rounds`` rounds have
    one of both.
    """

    steps: int
    batches: int
    sync_rounds: int = 0

    def at(self, round: int) -> tuple[int, int]:
        """The steps and batches before ``round``."""
        first = min(round, self.sync_rounds)
        return first + (round - first) * self.steps, first + (round - first) * self.batches


def pace(run: RunSpec) -> Pace:
    """Of a run whose rounds end after so many inner steps: that many of both.

    If rounds end after so many seconds, each node does as many steps as it can. The schedule is then divided among
    the rounds; if its end is not known it follows the node's own steps alone. Batches get room for the most
    steps that a round can have, so that none comes again, also after a restart.
    """
    if run.steps_per_round:
        return Pace(run.steps_per_round, run.steps_per_round, run.warmup_sync_steps)
    return Pace(total_steps(run) // run.rounds if run.rounds else 0, MAX_ROUND_STEPS)


def total_steps(run: RunSpec) -> int:
    """Inner steps at which the schedule ends; 0: not known, for the run has no end, or rounds end with the clock."""
    if run.inner.total_steps or not run.steps_per_round:
        return run.inner.total_steps
    return pace(run).at(run.rounds)[0]


def learning_rate(step: int, settings: InnerSettings, total_steps: int) -> float:
    """Of inner step ``step``, counted from 0 over the whole run.

    Linear warm-up from ``peak / warmup_steps`` to the peak, then ``settings.schedule``: "cosine" to the ratio of the
    peak where the schedule ends (SGDR, arXiv 1608.03983); "wsd" stays at the peak and decays linearly in the last
    ``decay_share`` of all steps (2404.06395); "constant" stays. From ``total_steps`` on, the rate stays at its last
    value. With ``total_steps`` 0 there is no end to head for: both stay at the peak.
    """
    peak = settings.learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if total_steps == 0 or settings.schedule == "constant":
        return peak
    floor = peak * settings.min_learning_rate_ratio
    if settings.schedule == "cosine":
        done = _progress(step, settings.warmup_steps, total_steps)
        return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2
    decay_start = max(settings.warmup_steps, total_steps - round(settings.decay_share * total_steps))
    return peak + (floor - peak) * _progress(step, decay_start, total_steps)


def _progress(step: int, start: int, end: int) -> float:
    """0 up to ``start``, 1 from ``end`` on, linear between."""
    if step >= end:
        return 1.0
    return 0.0 if step <= start else (step - start) / (end - start)
