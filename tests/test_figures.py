"""What a node says of itself, from the facts that it reports."""

from __future__ import annotations

import math

import pytest

from prime_async.machines.facts import (
    CatchUpStarted,
    CaughtUp,
    ContributionReady,
    EvaluationStarted,
    Fact,
    HeldOutLoss,
    InnerStepDone,
    RoundFinished,
    RoundPlanned,
    SnapshotWritten,
)
from prime_async.messages import MAX_ROUND_TIMES, Figures, RoundTimes
from prime_async.node.figures import Gauge


def step(loss: float = 2.0, seconds: float = 1.0) -> InnerStepDone:
    return InnerStepDone(round=0, step=1, loss=loss, tokens=256, seconds=seconds)


def planned(attempt: int = 0) -> RoundPlanned:
    return RoundPlanned(round=0, epoch=1, attempt=attempt, contributors=2, chunks_owned=1)


def finished(round: int = 0, training_s: float = 4.0) -> RoundFinished:
    return RoundFinished(round=round, state_digest="ab", tokens=1024, training_s=training_s, exchange_s=0.5)


def fed(*facts: tuple[float, Fact], witness: bool = False) -> Figures:
    gauge = Gauge(witness)
    for now, fact in facts:
        gauge.add(fact, now)
    return gauge.figures(70, 80)


def test_a_node_that_has_done_nothing_says_so_and_claims_no_loss() -> None:
    assert fed() == Figures(phase="joining", sent_bytes=70, received_bytes=80)


def test_a_blocking_round_is_training_then_waiting_for_others_then_the_exchange_and_the_rest() -> None:
    """given 4 s of steps, 0.25 s of encoding, 2 s until the plan, 1.5 s until the outer step"""
    facts: list[tuple[float, Fact]] = [
        *((10.0 + i, step()) for i in range(1, 5)),
        (14.25, ContributionReady(round=0, tokens=1024)),
    ]
    figures = fed(*facts, (16.25, planned()), (17.0, planned(attempt=1)), (17.75, finished()))
    assert figures.rounds == (
        RoundTimes(round=0, training_ms=4000, waiting_ms=2000, exchange_ms=1500, other_ms=250, tokens=1024),
    )
    assert (figures.training_ms, figures.elapsed_ms) == (4000, 7750)


def test_what_ran_beside_the_steps_did_not_hold_them_up() -> None:
    """given an exchange of 3 s in a round of 4 s, all of which were steps; then none of it counts"""
    facts: list[tuple[float, Fact]] = [
        (1.0, step()),
        (1.1, ContributionReady(round=0, tokens=1)),
        (1.2, planned()),
        (4.0, finished()),
    ]
    [times] = fed(*facts).rounds
    assert (times.training_ms, times.waiting_ms, times.exchange_ms, times.other_ms) == (4000, 0, 0, 0)


def test_the_times_of_a_round_add_up_to_what_passed_since_the_one_before() -> None:
    facts: list[tuple[float, Fact]] = [
        (1.0, step()),
        (5.0, finished()),
        (8.5, planned()),
        (12.0, finished(round=1, training_s=3.0)),
    ]
    times = fed(*facts).rounds[1]
    assert times.training_ms + times.waiting_ms + times.exchange_ms + times.other_ms == 7000


def test_only_the_last_rounds_are_told() -> None:
    facts: list[tuple[float, Fact]] = [(1.0, step()), *((5.0 * r, finished(round=r)) for r in range(1, 8))]
    assert [t.round for t in fed(*facts).rounds] == list(range(8 - MAX_ROUND_TIMES, 8))


def test_a_witness_serves_and_has_no_times_of_its_own() -> None:
    figures = fed((1.0, planned()), (2.0, finished(training_s=0.0)), witness=True)
    assert (figures.phase, figures.rounds) == ("serving", ())


@pytest.mark.parametrize(
    ("fact", "phase"),
    [
        (step(), "training"),
        (ContributionReady(round=0, tokens=1), "waiting"),
        (planned(), "exchanging"),
        (finished(), "training"),
        (CatchUpStarted(round=0, run_round=5, snapshot=-1, providers=2), "catching up"),
        (CaughtUp(round=5, fetched_bytes=10, seconds=0.1), "waiting"),
        (EvaluationStarted(round=5), "evaluating"),
    ],
)
def test_what_a_node_is_doing_is_a_word(fact: Fact, phase: str) -> None:
    assert fed((1.0, step()), (2.0, fact)).phase == phase


def test_losses_are_whole_millionths_and_the_recent_mean() -> None:
    figures = fed((1.0, step(2.0)), (2.0, step(3.0)), (3.0, HeldOutLoss(round=4, loss=1.25)))
    assert (figures.loss_micronats, figures.heldout_round, figures.heldout_micronats) == (2_500_000, 4, 1_250_000)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_none_is_told_as_unknown(loss: float) -> None:
    assert fed((1.0, step(loss)), (2.0, HeldOutLoss(round=4, loss=loss))).loss_micronats == 0


def test_the_newest_snapshot_is_told() -> None:
    assert fed((1.0, SnapshotWritten(round=10)), (2.0, SnapshotWritten(round=20))).snapshot_round == 20
