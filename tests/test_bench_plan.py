"""``prime-async bench plan``: the forecast is compared with the same settings. Never a time."""

from __future__ import annotations

import json

import pytest

from prime_async.bench.overlap import rate_for
from prime_async.bench.plan import choice_of, compare, figure, modes_of, setup_of
from prime_async.cli import app
from prime_async.cli.bench_plan import plan
from prime_async.errors import ConfigError
from prime_async.plan import FIXED_S, ROUND_TRIPS, forecast
from tests.bench_harness import BENCH, hosts_left, measured, needs_a_lab

pytestmark = pytest.mark.xdist_group("real time")


def test_what_is_forecast_is_what_runs() -> None:
    modes = modes_of(["blocking", "streaming"], ["int8", "topk"], 4)
    assert [mode.name for mode in modes] == ["blocking int8", "blocking topk", "streaming int8", "streaming topk"]
    choice = choice_of(BENCH, modes[-1])
    assert (choice.mode, choice.codec, choice.inner_steps, choice.fragments) == ("streaming", "topk", 100, 4)
    assert choice_of(BENCH, modes[0]).fragments == 1


def test_the_links_that_were_made_for_a_share_are_foreseen_to_take_it() -> None:
    """Given the rate at which payloads take a fifth; when forecast; then the exchange takes that, and what is fixed."""
    alone = measured(40.0)  # four nodes, 0.1 s a step
    rate = rate_for(BENCH, alone, 1_000_000)
    setup = setup_of(BENCH, alone, 1_000_000, rate)
    assert setup.step_s == pytest.approx(0.1)
    foreseen = forecast(setup, choice_of(BENCH, modes_of(["blocking"], ["int8"], 4)[0]))
    assert foreseen.exchange_s == pytest.approx(2.5 + FIXED_S + ROUND_TRIPS * 0.02, rel=1e-3)


def test_an_error_is_relative_to_what_was_measured() -> None:
    assert figure(3.0, 2.0).error == pytest.approx(0.5)
    setup = setup_of(BENCH, measured(40.0), 1_000_000, 5.0)
    choice = choice_of(BENCH, modes_of(["blocking"], ["int8"], 4)[0])
    foreseen = forecast(setup, choice)
    found = compare(setup, choice, [measured(40.0)], [measured(30.0, 4.0), measured(20.0, 2.0), measured(10.0, 1.0)])
    assert found["exchange_s"] == figure(foreseen.exchange_s, 2.0)
    assert found["share"] == figure(foreseen.share, 0.5)


def test_several_settings_are_named_after_one_option() -> None:
    words = ["bench", "plan", "--modes", "eager", "blocking", "--codecs", "topk", "--exchange-shares", "0.1", "0.5"]
    _, bound, _ = app.parse_args(words, exit_on_error=False)
    assert bound.arguments["modes"] == ["eager", "blocking"]
    assert bound.arguments["exchange_shares"] == [0.1, 0.5]
    with pytest.raises(ConfigError, match="below 1"):
        plan(exchange_shares=[0.2, 1.0])


@needs_a_lab
def test_a_small_comparison_reports_both_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        plan(
            model="llama-360k",
            modes=["blocking"],
            codecs=["int8"],
            exchange_shares=[0.5],
            inner_steps=16,
            rounds=1,
            rtt_ms=2,
            json_=True,
        )
        == 0
    )
    output, errors = capsys.readouterr()
    result = json.loads(output.splitlines()[-1])
    (case,) = result["cases"]
    for name in ("exchange_s", "share"):
        assert case[name]["predicted"] > 0
        assert case[name]["error"] == pytest.approx(case[name]["predicted"] / case[name]["measured"] - 1)
    assert case["exchange_s"]["measured"] == case["runs"][0]["exchange_s"] > 0
    assert case["setup"]["step_s"] == result["step_s"]
    assert "predicted, measured, error" in " ".join(errors.split())  # the table
    assert hosts_left() == []
