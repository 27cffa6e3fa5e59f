"""How fast links must be: the inverse of the forecast."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_async.cli.bandwidth import bandwidth
from prime_async.errors import ConfigError
from prime_async.plan import Choice, Setup, forecast
from prime_async.utilisation import PUBLISHED, TARGETS, needed_gbit, needs

SETUP = Setup(parameters=10**9, step_s=1.0, nodes=2, up_mbit=0.0, down_mbit=0.0, rtt_ms=100.0, cores=16)


@given(
    st.sampled_from([("blocking", 1), ("overlapped", 1), ("streaming", 10)]),
    st.sampled_from(["int8", "int4"]),
    st.sampled_from(TARGETS),
    st.integers(10**6, 10**11),
    st.floats(0.01, 30),
)
def test_over_links_of_that_rate_the_forecast_is_that_share(
    mode: tuple[str, int], codec: str, target: float, parameters: int, step_s: float
) -> None:
    setup = replace(SETUP, parameters=parameters, step_s=step_s)
    choice = Choice(mode=mode[0], codec=codec, inner_steps=100, fragments=mode[1])  # type: ignore[arg-type]
    gbit = needed_gbit(setup, choice, target)
    if gbit is None:
        assert forecast(replace(setup, up_mbit=1e12, down_mbit=1e12), choice).share < target
    else:
        there = replace(setup, up_mbit=1000 * gbit, down_mbit=1000 * gbit)
        assert forecast(there, choice).share == pytest.approx(target)


def test_data_parallel_sends_fp32_after_each_step_and_waits() -> None:
    """Half the time, with steps of a second: each of two nodes sends 4 bytes of 1e9 parameters in a second."""
    assert needs(SETUP, 100, 10)[0].gbit[0] == pytest.approx(32 / 0.92)


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_figures_stand_beside_the_same_case_alone(case: tuple[int, float]) -> None:
    same = replace(SETUP, parameters=case[0], step_s=case[1])
    published = {need.name: need.gbit for need in needs(same, 100, 10) if need.published}
    assert published == PUBLISHED[case]
    assert not any(need.published for need in needs(same, 200, 10))
    assert not any(need.published for need in needs(replace(same, step_s=1.0), 100, 10))


@pytest.mark.parametrize("case", PUBLISHED)
def test_in_the_paper_more_of_the_time_takes_faster_links_and_each_method_slower_ones(
    case: tuple[int, float],
) -> None:
    rows = list(PUBLISHED[case].values())
    assert all(list(row) == sorted(row) for row in rows)
    for row, better in itertools.pairwise(rows):
        assert all(slower <= faster for faster, slower in zip(row, better, strict=True))


def test_it_prints_a_table_for_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert bandwidth() == 0
    output = capsys.readouterr().out
    assert all(size in output for size in ("1 B", "10 B", "100 B", "paper: Vanilla DiLoCo", "streaming int4"))
    assert bandwidth(json_=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert [model["parameters"] for model in told["models"]] == [10**9, 10**10, 10**11]


def test_what_does_not_fit_together_is_told() -> None:
    with pytest.raises(ConfigError, match="one step time for each model"):
        bandwidth(parameters=[1e9])
    with pytest.raises(ConfigError, match="multiple of --fragments 7"):
        bandwidth(fragments=7)
