"""``prime-async bench overlap``: its figures are whole and right. Never a time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from prime_async.bench.overlap import measure_mode, modes_of, rate_for, share
from prime_async.cli.bench_overlap import overlap
from prime_async.errors import EnvironmentFault
from tests.bench_harness import BENCH, hosts_left, measured, needs_a_lab

pytestmark = pytest.mark.xdist_group("real time")


def test_the_rate_lets_a_blocking_exchange_take_the_wanted_share() -> None:
    """100 steps of each node at 10 a second take 10 s; 2.5 s more are a fifth of the whole."""
    rate = rate_for(BENCH, measured(40.0), 1_000_000)
    sent_bytes = 2 * 3 / 4 * 1_000_000 * (1 + 4 / 256)
    assert rate == pytest.approx(sent_bytes * 8 / 2.5 / 1e6 / 0.92, rel=1e-3)


def test_the_share_is_that_of_the_medians() -> None:
    alone = [measured(10.0), measured(12.0), measured(11.0)]
    assert share(alone, [measured(9.0), measured(5.5), measured(1.0)]) == pytest.approx(0.5)


def test_what_is_compared_is_what_was_promised() -> None:
    names = [(mode.name, mode.run["mode"], mode.slow) for mode in modes_of(BENCH)]
    assert names == [
        ("blocking", "blocking", False),
        ("overlapped", "overlapped", False),
        ("streaming", "streaming", False),
        ("blocking, slow link", "blocking", True),
        ("streaming int4, slow link", "streaming", True),
    ]


@needs_a_lab
def test_a_small_measurement_reports_every_figure_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        overlap(
            model="llama-360k", inner_steps=16, rounds=1, runs=1, exchange_share=0.5, rtt_ms=2, fragments=2, json_=True
        )
        == 0
    )
    output, errors = capsys.readouterr()
    result = json.loads(output.splitlines()[-1])
    assert (result["nodes"], result["inner_steps"], result["fragments"]) == (2, 16, 2)
    assert result["rate_mbit"] > 0
    for figures in result["modes"].values():
        assert len(figures["runs"]) == 1
        assert figures["share"] == figures["shares"][0] > 0
        assert figures["round_s"] > 0
        assert figures["exchange_s"] > 0
    assert len(result["modes"]) == 5
    assert "time spent" in errors  # the table
    assert hosts_left() == []


@needs_a_lab
async def test_a_node_that_ends_is_told_with_its_last_words() -> None:
    bench = replace(BENCH, nodes=2, model="llama-360k", fragments=50)
    streaming = next(mode for mode in modes_of(bench) if mode.name == "streaming")
    told = pytest.RaisesExc(EnvironmentFault, match="fragments = 50: the model has 3 chunks")
    with pytest.RaisesGroup(told, flatten_subgroups=True):
        await measure_mode(bench, streaming, 50.0)
