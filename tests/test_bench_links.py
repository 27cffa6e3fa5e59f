"""``prime-async bench links``: its figures are whole and right. Never a time."""

from __future__ import annotations

import json

import pytest

from prime_async.bench.figures import Phases
from prime_async.bench.links import TCP_SHARE, LinksBench, busiest_link, link_bytes, payload_of
from prime_async.cli.bench_links import links
from prime_async.errors import ConfigError
from tests.bench_harness import hosts_left, needs_a_lab


def test_each_link_has_to_carry_its_share_of_both_halves_of_the_exchange() -> None:
    """Four nodes: 3/4 of a contribution leave a node, and the mean of the quarter that it owns three times."""
    bench = LinksBench(
        nodes=4, elements=2**20, chunk_elements=2**18, iterations=1, codec="int8", encrypt=True, pause_s=0
    )
    assert payload_of(bench) == 2**20 + 4 * 2**20 // 256
    assert link_bytes(bench) == payload_of(bench) * (3 / 4 + 3 / 4)


def test_the_busiest_link_is_that_of_the_host_that_sent_or_received_most() -> None:
    before = {(0, 1): 100}
    after = {(0, 1): 150, (2, 1): 30, (1, 0): 70}
    assert busiest_link(before, after, 3) == 80  # host 1 received 50 + 30


@needs_a_lab
def test_a_small_measurement_reports_every_figure_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    """Given two nodes and two kinds of links; when they exchange; then no share exceeds what the link carried."""
    assert (
        links(
            nodes=2,
            mib=1,
            iterations=2,
            rate_mbit=20.0,
            rtt_ms=[2.0, 10.0],
            loss=[0.0, 0.1],
            streams=[2],
            congestion=["reno"],
            chunk_elements=2**16,
            pause_s=0.0,
            json_=True,
        )
        == 0
    )
    output, errors = capsys.readouterr()
    result = json.loads(output.splitlines()[-1])
    assert [(case["rtt_ms"], case["loss_percent"]) for case in result["cases"]] == [(2.0, 0.0), (10.0, 0.1)]
    for case in result["cases"]:
        assert len(case["seconds"]) == len(case["shares"]) == 2
        assert 0 < case["share"] < TCP_SHARE
        assert case["share"] < case["filled"] <= 1.0
        assert case["share_without_headers"] == pytest.approx(case["share"] / TCP_SHARE)
        assert case["link_payload_bytes"] < case["link_wire_bytes"] < 1.5 * case["link_payload_bytes"]
        assert 2 * case["payload_bytes"] < case["sent_bytes"] < 2.1 * case["payload_bytes"]
        assert case["bitwise_equal"] is True
        assert set(case["phases_s"]) == set(Phases.__struct_fields__)
    assert "filled" in errors  # the table
    assert hosts_left() == []


def test_each_round_trip_needs_a_loss_of_its_own() -> None:
    with pytest.raises(ConfigError, match="2 values and --loss 1"):
        links(rtt_ms=[20.0, 100.0], loss=[0.0])
