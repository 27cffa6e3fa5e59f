"""Many runs: each method tuned on one half of the held-out text, then compared on the other, seed by seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from prime_async.config.schema import RunSpec
from prime_async.lab.experiment import Job, Outcome, perform
from prime_async.lab.methods import METHODS, Method

TUNING_SEED = 1_000_000
"""Weights and data order of the runs that choose the learning rates: apart from those that are reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``base``: the settings that all share. ``learning_rates``: of the inner optimiser; each method gets its best."""

    base: RunSpec
    methods: tuple[Method, ...]
    workers: int
    seeds: int
    learning_rates: tuple[float, ...]

    def tuning(self) -> list[Job]:
        """With one learning rate there is nothing to choose."""
        if len(self.learning_rates) == 1:
            return []
        return [self._job(m, TUNING_SEED, rate, "tuning") for m in self.methods for rate in self.learning_rates]

    def reported(self, rates: dict[str, float]) -> list[Job]:
        """``rates``: by method."""
        return [self._job(m, seed, rates[m.name], "reported") for seed in range(self.seeds) for m in self.methods]

    def _job(self, method: Method, seed: int, rate: float, half: Any) -> Job:
        inner = self.base.inner.model_copy(update={"learning_rate": rate})
        base = self.base.model_copy(update={"seed": seed, "inner": inner})
        return Job(method=method, base=base, workers=self.workers, half=half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Of one method over all seeds, in their order. ``gaps``: to ``against`` with the same seed, shares of its loss."""

    method: str
    about: str
    against: str
    learning_rate: float
    losses: tuple[float, ...]
    gaps: tuple[float, ...]
    sent_bytes: int

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def gap(self) -> float:
        """Mean; NaN without anything to compare with."""
        return statistics.fmean(self.gaps) if self.gaps else math.nan

    @property
    def gap_spread(self) -> float:
        """Sample standard deviation of the gaps; NaN of fewer than two."""
        return statistics.stdev(self.gaps) if len(self.gaps) > 1 else math.nan


def run_jobs(jobs: Sequence[Job], directory: Path, processes: int, done: Callable[[Outcome], None]) -> list[Outcome]:
    """Run those whose outcome is not in ``directory``, so many at once, and write it there. Gives all, in order."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{job.key}.json" for job in jobs]
    open_jobs: list[tuple[Job, Path]] = []
    for job, path in zip(jobs, paths, strict=True):
        if path.exists():
            done(Outcome.read(path))
        elif all(path != other for _, other in open_jobs):
            open_jobs.append((job, path))
    if open_jobs:
        _run(open_jobs, processes, done)
    return [replace(Outcome.read(p), method=job.method.name) for job, p in zip(jobs, paths, strict=True)]


def _run(jobs: Iterable[tuple[Job, Path]], processes: int, done: Callable[[Outcome], None]) -> None:
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    try:
        running = {pool.submit(perform, job): path for job, path in jobs}
        for future in as_completed(running):
            outcome = future.result()
            outcome.write(running[future])
            done(outcome)
    finally:
        pool.shutdown(cancel_futures=True)


def best_rates(outcomes: Iterable[Outcome], plan: Plan) -> dict[str, float]:
    """The learning rate with the lowest loss, by method; of one whose runs all diverged, the lowest."""
    rates: dict[str, float] = {}
    found = [(o.method, o.loss if math.isfinite(o.loss) else math.inf, o.learning_rate) for o in outcomes]
    for method in plan.methods:
        tried = [(loss, rate) for name, loss, rate in found if name == method.name]
        rates[method.name] = min(tried)[1] if tried else plan.learning_rates[0]
    return rates


def summarise(outcomes: Iterable[Outcome], plan: Plan) -> list[Summary]:
    """One of each method, in their order."""
    by_method: dict[str, dict[int, Outcome]] = {}
    for outcome in outcomes:
        by_method.setdefault(outcome.method, {})[outcome.seed] = outcome
    return [_summary(METHODS[m.name], by_method) for m in plan.methods]


def _summary(method: Method, by_method: dict[str, dict[int, Outcome]]) -> Summary:
    ours, theirs = by_method[method.name], by_method.get(method.against, {})
    pairs = [(ours[seed].loss, theirs[seed].loss) for seed in sorted(ours) if seed in theirs]
    first = next(iter(ours.values()))
    return Summary(
        method=method.name,
        about=method.about,
        against=method.against,
        learning_rate=first.learning_rate,
        losses=tuple(ours[seed].loss for seed in sorted(ours)),
        gaps=tuple(loss / reference - 1 for loss, reference in pairs),
        sent_bytes=first.sent_bytes,
    )


def write_report(path: Path, plan: Plan, summaries: Iterable[Summary], outcomes: Iterable[Outcome]) -> None:
    """JSON of all that was found."""
    report = {
        "run": plan.base.model_dump(mode="json"),
        "workers": plan.workers,
        "seeds": plan.seeds,
        "learning_rates": plan.learning_rates,
        "methods": [asdict(s) | {"loss": s.loss, "gap": s.gap, "gap_spread": s.gap_spread} for s in summaries],
        "runs": [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(report, indent=1))
