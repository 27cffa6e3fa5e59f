"""What a run costs in control messages as it grows, and the command that shows it."""

from __future__ import annotations

import pytest

from prime_async.cli.simulate import growth_of, simulate, sizes_up_to, table_of
from prime_async.testing.scale import measure_scale


def test_a_member_says_as_much_in_a_large_run_as_in_a_small_one_and_the_leader_in_proportion() -> None:
    small, large = measure_scale(10, 2), measure_scale(40, 2)
    assert large.member.sent_bytes < 1.2 * small.member.sent_bytes
    assert large.member.received_bytes < 1.2 * small.member.received_bytes
    assert large.member.sent < 1.2 * small.member.sent
    assert large.leader.sent_bytes < 1.2 * 4 * small.leader.sent_bytes
    assert large.leader.received_bytes < 1.2 * 4 * small.leader.received_bytes
    assert large.member.gets == pytest.approx(2 * 39)  # a contribution of each other for its chunk, and their means


@pytest.mark.long
def test_the_same_of_a_hundred_and_four_hundred() -> None:
    small, large = measure_scale(100, 2), measure_scale(400, 2)
    assert large.member.sent_bytes < 1.1 * small.member.sent_bytes
    assert large.leader.sent_bytes < 1.1 * 4 * small.leader.sent_bytes


def test_the_same_seed_gives_the_same_numbers() -> None:
    assert measure_scale(4, 1, seed=3) == measure_scale(4, 1, seed=3)


def test_the_smaller_sizes_are_a_tenth_each_down_to_ten() -> None:
    assert sizes_up_to(1000) == [10, 100, 1000]
    assert sizes_up_to(40) == [40]


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(nodes=4, rounds=1) == 0
    shown = capsys.readouterr().out
    for words in ("4 nodes", "a member", "the leader", "bytes"):
        assert words in shown


def test_the_growth_is_shown_between_two_sizes() -> None:
    measured = [measure_scale(2, 1), measure_scale(4, 1)]
    assert table_of(measured).row_count == 4
    assert growth_of(measured).row_count == 1
