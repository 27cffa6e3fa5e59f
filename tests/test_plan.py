"""What an exchange will cost: the model of it, and what is recommended."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_async.cli.plan import plan
from prime_async.plan import (
    FIXED_S,
    LINK_SHARE,
    ROUND_TRIPS,
    TARGET,
    Choice,
    Setup,
    choices,
    exchange_seconds,
    forecast,
    payload_bytes,
    recommend,
)
from prime_async.work.codec import make_codec

SETUP = Setup(parameters=10**9, step_s=1.0, nodes=4, up_mbit=100.0, down_mbit=500.0, rtt_ms=100.0, cores=8)
setups = st.builds(
    Setup,
    parameters=st.integers(10**6, 10**11),
    step_s=st.floats(0.01, 60),
    nodes=st.integers(2, 100),
    up_mbit=st.floats(1, 10_000),
    down_mbit=st.floats(1, 10_000),
    rtt_ms=st.floats(0, 500),
    cores=st.integers(1, 64),
)


def choice(mode: str, inner_steps: int = 500, fragments: int = 1) -> Choice:
    return Choice(mode=mode, codec="int8", inner_steps=inner_steps, fragments=fragments)


def test_an_exchange_takes_what_the_slowest_link_needs_for_both_halves() -> None:
    payload = make_codec("int8").payload_bytes(10**9)
    expected = 2 * 3 / 4 * payload * 8 / (100e6 * LINK_SHARE) + ROUND_TRIPS * 0.1 + FIXED_S
    assert exchange_seconds(SETUP, "int8", 10**9) == pytest.approx(expected)
    assert forecast(SETUP, choice("blocking")).sent_bytes == round(1.5 * payload)


def test_who_waits_trains_less_and_who_does_not_waits_only_for_what_is_longer_than_its_steps() -> None:
    exchange_s = exchange_seconds(SETUP, "int8", 10**9)
    assert 100 < exchange_s < 500
    assert forecast(SETUP, choice("blocking")).share == pytest.approx(500 / (500 + exchange_s))
    overlapped = forecast(SETUP, choice("overlapped"))
    assert overlapped.share == 1.0
    assert overlapped.delay == pytest.approx(exchange_s / 500)
    assert forecast(SETUP, choice("overlapped", 100)).share == pytest.approx(100 / exchange_s)
    streaming = forecast(SETUP, choice("streaming", 500, 4))
    assert streaming.training_s == 125
    assert streaming.share == 1.0
    assert streaming.delay < overlapped.delay / 3


@given(setups, st.integers(1, 1000))
def test_no_mode_trains_more_than_all_the_time_or_less_than_blocking(setup: Setup, inner_steps: int) -> None:
    found = {(f.choice.mode, f.choice.codec): f for f in (forecast(setup, c) for c in choices(inner_steps, 1))}
    for (mode, codec), f in found.items():
        assert 0 < found["blocking", codec].share <= f.share <= 1
        assert 0 <= f.delay <= 1
        assert (f.delay == 0) == (mode == "blocking")
        assert f.host_bytes >= found["blocking", codec].host_bytes


@given(setups)
def test_a_recommendation_reaches_the_aim_or_says_that_nothing_does(setup: Setup) -> None:
    best, reason = recommend(setup)
    assert (best.share >= TARGET) == ("nothing reaches" not in reason)
    assert best.choice.codec != "topk", "its loss is to be compared first"


def test_fast_links_need_no_overlap_and_slow_ones_do() -> None:
    assert recommend(replace(SETUP, step_s=2.0, up_mbit=50_000, down_mbit=50_000))[0].choice.mode == "blocking"
    slow, reason = recommend(SETUP)
    assert slow.choice.mode != "blocking"
    assert "hides" in reason
    assert "nothing reaches" in recommend(replace(SETUP, up_mbit=0.1))[1]


def test_bits_per_weight_are_those_of_the_codecs() -> None:
    assert payload_bytes(10**6, "int4") < 0.53 * payload_bytes(10**6, "int8")


def test_topk_of_four_nodes_takes_more_than_ten_thousand_times_fewer_bytes_than_data_parallel() -> None:
    """A ring all-reduce sends 2 (n - 1) / n of fp32 in each step."""
    data_parallel = 500 * 2 * 3 / 4 * 4 * 10**9
    few = forecast(SETUP, Choice(mode="blocking", codec="topk", inner_steps=500))
    assert data_parallel / few.sent_bytes > 20_000
    many = forecast(replace(SETUP, nodes=32), Choice(mode="blocking", codec="topk", inner_steps=500))
    assert 2 * few.sent_bytes < many.sent_bytes, "the union grows with the nodes"
    assert few.exchange_s < forecast(SETUP, choice("blocking")).exchange_s / 7


def test_it_prints_a_table_and_what_to_begin_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(parameters=1e9, step_s=1.0, up_mbit=100) == 0
    output = capsys.readouterr().out
    assert "begin with run.mode" in output
    assert plan(parameters=1e9, step_s=1.0, up_mbit=100, json_=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert {m["choice"]["mode"] for m in told["modes"]} == {"blocking", "overlapped", "streaming", "eager"}
    assert {m["choice"]["codec"] for m in told["modes"]} == {"int8", "int4", "topk"}
    assert told["down_mbit"] == 100
    assert told["why"]
