"""``prime-async bench join``: its figures are whole and right. Never a time."""

from __future__ import annotations

import json

import pytest

from prime_async.bench.join import LEAST_TOKENS, TOKEN_PARAMETERS, JoinBench, figures, paced_model, tokens_for
from prime_async.cli import app
from prime_async.cli.bench_join import join
from prime_async.config.load import config_from
from prime_async.errors import ConfigError
from prime_async.machines.facts import CatchUpStarted, CaughtUp
from tests.bench_harness import hosts_left, needs_a_lab

pytestmark = pytest.mark.xdist_group("real time")

BENCH = JoinBench(tokens=1000, up_mbit=(10.0, 20.0), down_mbit=100.0, rtt_ms=20.0)


def test_the_links_allow_the_sum_of_the_uplinks_or_the_downlink() -> None:
    state_bytes = 1000 * TOKEN_PARAMETERS * 8
    assert BENCH.limit_mbit == 30
    assert BENCH.ideal_s == pytest.approx(state_bytes * 8 / 30e6)
    slow = JoinBench(tokens=1000, up_mbit=(10.0, 20.0), down_mbit=5.0, rtt_ms=20.0)
    assert slow.limit_mbit == 5
    assert slow.round_s > slow.ideal_s, "the members replace their only snapshot after each round"


def test_the_share_is_what_came_in_the_time_over_what_the_links_allow() -> None:
    began = CatchUpStarted(round=0, run_round=3, snapshot=2, providers=2)
    done = CaughtUp(round=3, fetched_bytes=3_000_000, seconds=1.0)
    found = figures(BENCH, began, done, [1_100_000, 2_000_000])
    assert (found["rate_mbit"], found["share"], found["snapshot"]) == (24.0, 0.8, 2)
    assert found["wire_bytes_by_member"] == [1_100_000, 2_000_000]


def test_the_model_has_the_parameters_that_were_asked_for() -> None:
    tokens = tokens_for(1e6)
    model = paced_model(config_from({"run": {"name": "join"}}).run, tokens)
    assert sum(p.numel() for p in model.parameters()) == tokens * TOKEN_PARAMETERS == pytest.approx(1e6, rel=0.01)
    assert tokens_for(1) == LEAST_TOKENS


def test_each_member_has_an_uplink_of_its_own() -> None:
    _, bound, _ = app.parse_args(["bench", "join", "--up-mbit", "10", "20", "--congestion", "reno", "bbr"])
    assert bound.arguments["up_mbit"] == [10.0, 20.0]
    assert bound.arguments["congestion"] == ["reno", "bbr"]
    with pytest.raises(ConfigError, match="above 0 for each member"):
        join(up_mbit=[10.0, 0.0])


@needs_a_lab
def test_a_small_join_reports_every_figure_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    """Given one member; when a node joins; then it fetched a snapshot, over the links."""
    assert join(parameters=1, up_mbit=[20.0], rtt_ms=2.0, congestion=["reno"], runs=1, json_=True) == 0
    output, errors = capsys.readouterr()
    result = json.loads(output.splitlines()[-1])
    (found,) = result["congestion"]["reno"]["runs"]
    assert found["snapshot"] >= 1
    assert found["fetched_bytes"] >= 8 * result["parameters"]
    assert 0 < found["share"] < 1
    (passed,) = found["wire_bytes_by_member"]
    assert passed > found["fetched_bytes"]
    assert "share of the links" in errors
    assert hosts_left() == []
