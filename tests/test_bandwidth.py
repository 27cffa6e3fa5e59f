"""What is measured of links, and the shares that follow from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_async.machines.bandwidth import RATES_SENT, Bandwidth, Meter, shares
from prime_async.messages import Have, Rate
from tests.machine_harness import full_member, view

rates = st.lists(st.integers(1, 10**9), min_size=1, max_size=12)


def named(bandwidths: list[int]) -> dict[str, float]:
    return {f"n{i}": float(b) for i, b in enumerate(bandwidths)}


@given(rates, st.integers(0, 3))
def test_shares_add_up_to_one_and_none_is_negative(bandwidths: list[int], others: int) -> None:
    found = shares(named(bandwidths), len(bandwidths) + others)
    assert sum(found.values()) == pytest.approx(1.0)
    assert min(found.values()) >= 0


@given(rates)
def test_all_who_own_something_are_done_at_the_same_time_and_the_others_no_sooner(bandwidths: list[int]) -> None:
    n = len(bandwidths)
    found = shares(named(bandwidths), n)
    if n < 3:
        return
    times = {id: (1 + (n - 2) * w) / named(bandwidths)[id] for id, w in found.items()}
    busy = [times[id] for id, w in found.items() if w > 0]
    assert max(busy) == pytest.approx(min(busy), rel=1e-6)
    assert all(t >= min(busy) * (1 - 1e-6) for t in times.values())


def test_equal_links_have_equal_shares_and_a_slow_one_none() -> None:
    assert shares(named([10, 10, 10]), 3) == pytest.approx({"n0": 1 / 3, "n1": 1 / 3, "n2": 1 / 3})
    assert shares(named([10, 10, 1]), 3)["n2"] == 0
    assert shares(named([30, 10]), 2) == {"n0": 0.75, "n1": 0.25}


def test_time_in_which_nothing_is_fetched_does_not_count() -> None:
    meter = Meter()
    meter.began(0.0, "n1")
    meter.began(1.0, "n2")
    meter.ended(2.0, "n1", 300)
    meter.ended(3.0, "n2", 300)
    meter.began(10.0, "n1")
    meter.ended(11.0, "n1", 300)
    assert meter.received_per_s(20.0) == 200 + 150
    assert meter.rates(20.0, ("n0", "n1", "n2"), 0) == (
        Rate(position=1, bytes_per_s=200),
        Rate(position=2, bytes_per_s=150),
    )


def test_a_slow_source_does_not_make_who_waits_for_it_look_slow() -> None:
    """Defect: the owner's time with anything under way was that of the slowest, for everybody."""
    meter = Meter()
    for peer, seconds in (("n1", 0.1), ("n2", 10.0)):
        meter.began(0.0, peer)
        meter.ended(seconds, peer, 1000)
    assert meter.received_per_s(10.0) == 10_100


def test_a_few_rates_are_sent_and_others_with_each_turn() -> None:
    meter, members = Meter(), tuple(f"n{i}" for i in range(12))
    for peer in members:
        meter.began(0.0, peer)
        meter.ended(1.0, peer, 100)
    first = [r.position for r in meter.rates(1.0, members, 0)]
    later = [r.position for r in meter.rates(1.0, members, 5)]
    assert first == list(range(RATES_SENT))
    assert later == [5, 6, 7, 8, 9, 10, 11, 0]


def report(bandwidth: Bandwidth, peer: str, round: int, received: int, **seen: int) -> None:
    have = Have(
        round=round,
        epoch=1,
        attempt=0,
        state=bytes(32),
        digest=bytes(32),
        incarnation=1,
        received_per_s=received,
        rates=tuple(Rate(position=int(p[1:]), bytes_per_s=r) for p, r in seen.items()),
    )
    bandwidth.report(peer, have, FOUR, frozenset({"n0", "n1", "n2", "n3"}))


FOUR = view(1, *(full_member(f"n{i}", weight=250) for i in range(4)))


def test_weights_change_only_if_some_share_is_far_off() -> None:
    bandwidth = Bandwidth()
    assert bandwidth.weights(FOUR) is None
    for peer in ("n0", "n1", "n2", "n3"):
        report(bandwidth, peer, 0, 1000)
    bandwidth.settle(0, FOUR)
    assert bandwidth.weights(FOUR) is None
    for peer in ("n0", "n1", "n2"):
        report(bandwidth, peer, 1, 1000, n3=33)
    bandwidth.settle(1, FOUR)
    weights = bandwidth.weights(FOUR)
    assert weights is not None
    assert weights["n3"] == 0
    assert sum(weights.values()) == pytest.approx(1000, abs=3)


def test_repeated_reports_count_once_and_who_is_gone_is_forgotten() -> None:
    bandwidth = Bandwidth()
    report(bandwidth, "n0", 0, 1000)
    report(bandwidth, "n0", 0, 9000)
    assert bandwidth.down == {"n0": 1000}
    bandwidth.settle(0, view(2, full_member("n1")))
    assert bandwidth.down == {}


def test_who_owns_nothing_gets_another_chance_in_time() -> None:
    bandwidth = Bandwidth(down={"n3": 10.0}, up={"n3": 1000.0})
    for round in range(40):
        report(bandwidth, "n3", round, 0)
    assert bandwidth.down["n3"] > 900
