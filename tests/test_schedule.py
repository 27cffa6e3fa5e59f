"""The learning rate, at the points where its shape is decided."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prime_async.config.schema import MAX_ROUND_STEPS, InnerSettings, RoundSettings, RunSpec
from prime_async.work.schedule import Pace, learning_rate, pace, total_steps


def settings(schedule: str, **changes: float) -> InnerSettings:
    return InnerSettings.model_validate(
        {
            "schedule": schedule,
            "learning_rate": 1.0,
            "warmup_steps": 10,
            "min_learning_rate_ratio": 0.1,
            "decay_share": 0.2,
            **changes,
        }
    )


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_its_first_step_already_learns(schedule: str) -> None:
    rates = [learning_rate(step, settings(schedule), 100) for step in range(10)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


def test_cosine_falls_from_the_peak_to_the_ratio() -> None:
    rate = {step: learning_rate(step, settings("cosine"), 110) for step in (10, 35, 60, 85, 109, 110, 5000)}
    assert rate[10] == 1.0
    assert rate[60] == pytest.approx(0.55)  # half-way between 1 and 0.1
    assert rate[35] == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)
    assert rate[85] == pytest.approx(0.1 + 0.9 * (1 - 2**-0.5) / 2)
    assert rate[109] > rate[110] == rate[5000] == pytest.approx(0.1)


def test_wsd_is_flat_and_then_falls_in_a_line() -> None:
    rate = {step: learning_rate(step, settings("wsd"), 100) for step in (10, 50, 80, 90, 100, 200)}
    assert rate[10] == rate[50] == rate[80] == 1.0
    assert rate[90] == pytest.approx(0.55)
    assert rate[100] == rate[200] == pytest.approx(0.1)


def test_constant_stays() -> None:
    assert learning_rate(10**6, settings("constant"), 100) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_without_an_end_the_rate_stays_at_the_peak(schedule: str) -> None:
    assert learning_rate(10**6, settings(schedule), 0) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_warm_up_longer_than_the_run_is_only_a_warm_up(schedule: str) -> None:
    assert learning_rate(4, settings(schedule), 5) == 0.5
    assert learning_rate(10, settings(schedule), 5) == pytest.approx(0.1)


@given(
    st.sampled_from(["cosine", "wsd", "constant"]),
    st.integers(0, 50),
    st.integers(0, 300),
    st.integers(0, 400),
    st.floats(0, 1),
    st.floats(0, 1),
)
@example("wsd", 0, 1, 0, 0.0, 0.0)
def test_the_rate_is_never_negative_nor_above_the_peak(
    schedule: str, warmup: int, total: int, step: int, share: float, ratio: float
) -> None:
    chosen = settings(schedule, warmup_steps=warmup, decay_share=share, min_learning_rate_ratio=ratio)
    assert 0 <= learning_rate(step, chosen, total) <= 1.0 + 1e-12


def test_the_schedule_ends_with_the_run_unless_it_is_told_when() -> None:
    run = RunSpec(name="x", rounds=7, round=RoundSettings(inner_steps=20))
    assert total_steps(run) == 140
    assert total_steps(run.model_copy(update={"inner": InnerSettings(total_steps=99)})) == 99
    assert total_steps(run.model_copy(update={"rounds": 0})) == 0
    assert total_steps(run.model_copy(update={"warmup_sync_steps": 5})) == 5 + 2 * 20


def test_where_a_node_is_when_a_round_begins_follows_the_run() -> None:
    steps = RunSpec(name="x", rounds=7, round=RoundSettings(inner_steps=20), inner=InnerSettings(total_steps=99))
    assert pace(steps) == Pace(steps=20, batches=20)
    assert [pace(steps).at(round) for round in (0, 1, 3)] == [(0, 0), (20, 20), (60, 60)]
    warmed = pace(steps.model_copy(update={"warmup_sync_steps": 2}))
    assert [warmed.at(round)[0] for round in range(5)] == [0, 1, 2, 22, 42]
    assert [warmed.at(round)[1] for round in range(5)] == [0, 1, 2, 22, 42]
    clock = steps.model_copy(update={"round": RoundSettings(seconds=3.0)})
    assert pace(clock) == Pace(steps=14, batches=MAX_ROUND_STEPS)
    endless = clock.model_copy(update={"rounds": 0})
    assert pace(endless) == Pace(steps=0, batches=MAX_ROUND_STEPS)
    without_end = clock.model_copy(update={"inner": InnerSettings(schedule="constant")})
    assert total_steps(without_end) == 0
    assert pace(without_end) == Pace(steps=0, batches=MAX_ROUND_STEPS)
