"""One run of one method, and what is known of it afterwards."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from prime_async.config.schema import RunSpec
from prime_async.errors import NonFiniteError
from prime_async.lab.methods import Method
from prime_async.lab.team import DataParallel, LabError, Team
from prime_async.work.corpus import Batch, Corpus, open_shakespeare
from prime_async.work.schedule import pace

Half: TypeAlias = Literal["tuning", "reported"]
CURVE_POINTS = 20
CURVE_BATCHES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run of ``method`` with the settings of ``base``, which have its seed and learning rate.

    ``half``: of the held-out text, on which it is measured: what is tuned on one is reported on the other.
    """

    method: Method
    base: RunSpec
    workers: int
    half: Half

    @property
    def key(self) -> str:
        """Names the job by all that decides its outcome."""
        run = self.method.spec(self.base)
        decides = {
            "run": run.model_dump(mode="json"),
            "delay": self.method.delay_steps(run),
            "rounds_late": self.method.rounds_late,
            "together": self.method.together,
            "workers": self.workers,
            "half": self.half,
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        return f"{self.base.seed}-{self.base.inner.learning_rate:g}-{digest[:16]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``loss``: of all of the half's text after the last step, nats per token; NaN if the weights were not finite.

    ``curve``: inner steps done, and the loss on some of it. ``sent_bytes``: payloads of a worker's contributions.
    """

    method: str
    seed: int
    learning_rate: float
    half: Half
    loss: float
    curve: tuple[tuple[int, float], ...]
    sent_bytes: int
    seconds: float

    @classmethod
    def read(cls, path: Path) -> Outcome:
        """What :meth:`write` wrote."""
        values: dict[str, Any] = json.loads(path.read_text())
        values["curve"] = tuple((int(step), float(loss)) for step, loss in values["curve"])
        return cls(**values)

    def write(self, path: Path) -> None:
        """All of it or nothing."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)))
        part.replace(path)


class HalfCorpus(Corpus):
    """A corpus of whose held-out batches every second one counts."""

    def __init__(self, corpus: Corpus, half: Half) -> None:
        self._corpus = corpus
        self._first = 0 if half == "reported" else 1

    @property
    def vocab_size(self) -> int:
        return self._corpus.vocab_size

    def batch(self, stream: int, step: int, batch_size: int, sequence_length: int) -> Batch:
        return self._corpus.batch(stream, step, batch_size, sequence_length)

    def heldout(self, batch_size: int, sequence_length: int) -> Iterator[Batch]:
        for index, batch in enumerate(self._corpus.heldout(batch_size, sequence_length)):
            if index % 2 == self._first:
                yield batch

    def encode(self, text: str) -> list[int] | None:
        return self._corpus.encode(text)

    def decode(self, tokens: Sequence[int]) -> str | None:
        return self._corpus.decode(tokens)


def perform(job: Job) -> Outcome:
    """Train, with one thread, and measure. A run whose weights are not finite at some time has a loss of NaN."""
    began = time.monotonic()
    run = job.method.spec(job.base)
    corpus = HalfCorpus(open_shakespeare(run.seed), job.half)
    curve: list[tuple[int, float]] = []
    try:
        loss, sent_bytes = _train(job, run, corpus, curve)
    except (NonFiniteError, LabError):
        loss, sent_bytes = math.nan, 0
    return Outcome(
        method=job.method.name,
        seed=run.seed,
        learning_rate=run.inner.learning_rate,
        half=job.half,
        loss=loss,
        curve=tuple(curve),
        sent_bytes=sent_bytes,
        seconds=round(time.monotonic() - began, 1),
    )


def _train(job: Job, run: RunSpec, corpus: Corpus, curve: list[tuple[int, float]]) -> tuple[float, int]:
    streams, steps_at = range(job.workers), pace(run).at
    every = max(1, steps_at(run.rounds)[0] // run.steps_per_round // CURVE_POINTS) * run.steps_per_round
    if job.method.together:
        model = DataParallel(run, streams, corpus=corpus)
        for _ in range(run.rounds):
            model.train(run.steps_per_round)
            if model.step % every == 0:
                curve.append((model.step, model.evaluate(CURVE_BATCHES)))
        return model.evaluate(None), 4 * model.trainer.flat.numel() * model.step
    delay = job.method.delay_steps(run)
    team = Team(run, streams, delay=lambda *_: delay, rounds_late=job.method.rounds_late, corpus=corpus)
    for round, _ in enumerate(team.rounds(run.rounds), 1):
        step, _ = steps_at(round)
        if step % every == 0:
            curve.append((step, team.evaluate(CURVE_BATCHES)))
    return team.evaluate(None), team.sent_bytes * run.rounds // run.fragment_count
