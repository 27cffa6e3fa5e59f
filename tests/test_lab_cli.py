"""``prime-async lab``: what it writes, that it goes on where it was, and what it says of wrong wishes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from prime_async.cli.lab import lab
from prime_async.config.schema import ExchangeSettings, InnerSettings, OuterSettings, RoundSettings, RunSpec
from prime_async.errors import ConfigError
from prime_async.lab import experiment
from prime_async.lab.experiment import HalfCorpus, Job, Outcome, perform
from prime_async.lab.lab import Plan, best_rates, run_jobs, summarise
from prime_async.lab.methods import METHODS, find_methods
from prime_async.work.corpus import Batch, open_shakespeare

BASE = RunSpec(
    name="lab",
    model="llama-360k",
    sequence_length=64,
    rounds=3,
    round=RoundSettings(inner_steps=4),
    inner=InnerSettings(batch_size=8, warmup_steps=2),
    exchange=ExchangeSettings(chunk_elements=2**16),
)


def job(name: str, rate: float = 4e-3, seed: int = 0) -> Job:
    inner = BASE.inner.model_copy(update={"learning_rate": rate})
    base = BASE.model_copy(update={"inner": inner, "seed": seed})
    return Job(method=METHODS[name], base=base, workers=2, half="reported")


def outcome(method: str, seed: int, loss: float, rate: float = 1e-3) -> Outcome:
    return Outcome(
        method=method, seed=seed, learning_rate=rate, half="tuning", loss=loss, curve=(), sent_bytes=1, seconds=1.0
    )


def test_it_writes_a_report_and_a_plot_and_goes_on_where_it_was(tmp_path: Path) -> None:
    def run() -> int:
        return lab(
            tmp_path,
            methods=["overlapped-25"],
            seeds=2,
            workers=2,
            rounds=2,
            inner_steps=4,
            learning_rates=[4e-3],
        )

    assert run() == 0
    report = json.loads((tmp_path / "lab.json").read_text())
    found = {m["method"]: m for m in report["methods"]}
    assert list(found) == ["data-parallel", "blocking", "overlapped-25"]
    for name, against in (("blocking", "data-parallel"), ("overlapped-25", "blocking")):
        gaps = [ours / theirs - 1 for ours, theirs in zip(found[name]["losses"], found[against]["losses"], strict=True)]
        assert found[name]["gaps"] == pytest.approx(gaps)
        assert len(gaps) == 2
    assert (tmp_path / "lab.png").read_bytes().startswith(b"\x89PNG")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(times) == 6
    next(iter(times)).unlink()
    assert run() == 0
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert again.keys() == times.keys()
    assert sum(again[path] != times[path] for path in times) == 1
    after = json.loads((tmp_path / "lab.json").read_text())
    assert after["methods"] == report["methods"]  # the same runs have the same outcome


class LittleHeldOut(HalfCorpus):
    """Of which a few batches are enough: to go through all of the held-out text takes longer than to train."""

    def heldout(self, batch_size: int, sequence_length: int) -> Iterator[Batch]:
        return islice(super().heldout(batch_size, sequence_length), 12)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "open_shakespeare", lambda seed: LittleHeldOut(open_shakespeare(seed), "reported"))
    found = perform(job(name))
    assert 2.5 < found.loss < 5.5  # of 5.545 for a guess
    assert [step for step, _ in found.curve][-1] == 12
    assert found.sent_bytes > 0


def test_a_run_that_diverges_has_no_loss_and_ends_nothing() -> None:
    wild = job("blocking", rate=1e9)
    wild = replace(wild, base=wild.base.model_copy(update={"outer": OuterSettings(learning_rate=1e38)}))
    assert math.isnan(perform(wild).loss)


def test_runs_of_the_same_settings_are_one_run(tmp_path: Path) -> None:
    jobs = [job("blocking"), job("int8")]
    done: list[Outcome] = []
    found = run_jobs(jobs, tmp_path, 1, done.append)
    assert [o.method for o in found] == ["blocking", "int8"]
    assert found[0].loss == found[1].loss
    assert len(done) == len(list(tmp_path.iterdir())) == 1


def test_methods_differ_in_their_runs() -> None:
    keys = {name: job(name).key for name in METHODS}
    assert len(set(keys.values())) == len(keys) - 1  # but for blocking, which is int8
    assert job("blocking").key != job("blocking", seed=1).key != job("blocking", rate=1e-3).key


def test_each_method_gets_the_rate_that_was_best_for_it() -> None:
    plan = Plan(base=BASE, methods=tuple(find_methods(["fp32"])), workers=2, seeds=1, learning_rates=(1e-3, 1e-2))
    found = [
        outcome("data-parallel", 9, 2.0, 1e-3),
        outcome("data-parallel", 9, 1.5, 1e-2),
        outcome("fp32", 9, math.nan, 1e-3),
        outcome("fp32", 9, 3.0, 1e-2),
    ]
    assert best_rates(found, plan) == {"data-parallel": 1e-2, "fp32": 1e-2}
    diverged = [replace(o, loss=math.nan) for o in found]
    assert best_rates(diverged, plan) == {"data-parallel": 1e-3, "fp32": 1e-3}


def test_gaps_are_of_pairs_with_the_same_seed() -> None:
    plan = Plan(base=BASE, methods=tuple(find_methods(["fp32"])), workers=2, seeds=2, learning_rates=(1e-3,))
    found = [outcome("data-parallel", 0, 2.0), outcome("data-parallel", 1, 4.0)]
    found += [outcome("fp32", 0, 2.2), outcome("fp32", 1, 4.2)]
    reference, fp32 = summarise(found, plan)
    assert math.isnan(reference.gap)
    assert fp32.gaps == pytest.approx((0.1, 0.05))
    assert fp32.gap == pytest.approx(0.075)
    assert fp32.gap_spread == pytest.approx(0.0353553, rel=1e-4)


def test_the_halves_share_no_text() -> None:
    corpus = open_shakespeare(0)
    halves = [list(HalfCorpus(corpus, half).heldout(8, 64)) for half in ("tuning", "reported")]
    starts = [{batch[0].numpy().tobytes() for batch in half} for half in halves]
    assert starts[0].isdisjoint(starts[1])
    assert sum(map(len, halves)) == len(list(corpus.heldout(8, 64)))


def test_a_method_that_there_is_not_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='method "blokking": not one of data-parallel, blocking'):
        lab(tmp_path, methods=["blokking"])
    with pytest.raises(ConfigError, match="inner steps must be a multiple of 4"):
        lab(tmp_path, methods=["streaming-5"], inner_steps=6)
    assert list(tmp_path.iterdir()) == []


def test_it_lists_the_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab(tmp_path, list_=True) == 0
    assert "overlapped-5" in capsys.readouterr().out
