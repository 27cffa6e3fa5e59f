"""Who owns which chunk."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from prime_async.machines.owners import chunk_owners
from prime_async.messages import Member, View
from tests.machine_harness import member, view

weights = st.lists(st.integers(0, 50), min_size=1, max_size=12)
chunk_counts = st.integers(0, 200)


def weighted(shares: list[int], spectators: int = 0) -> View:
    active = [member(f"n{i}", weight=w) for i, w in enumerate(shares)]
    idle: list[Member] = [member(f"s{i}", active=False, weight=9) for i in range(spectators)]
    return view(1, *idle, *active)


@given(weights, chunk_counts, st.integers(0, 3))
def test_every_chunk_has_an_owner_and_every_owner_is_active(shares: list[int], chunks: int, spectators: int) -> None:
    at = weighted(shares, spectators)
    owners = chunk_owners(at, chunks)
    assert len(owners) == chunks
    assert set(owners) <= {m.id for m in at.active}


@given(weights, chunk_counts)
def test_shares_are_in_proportion_to_weights_within_one_round_of_turns(shares: list[int], chunks: int) -> None:
    """Smooth weighted round-robin: at every point each owner is within one chunk per other owner of its share."""
    counts = Counter(chunk_owners(weighted(shares), chunks))
    effective = shares if any(shares) else [1] * len(shares)
    for i, weight in enumerate(effective):
        due = chunks * weight / sum(effective)
        assert abs(counts[f"n{i}"] - due) < len(shares)


@given(weights)
def test_over_whole_cycles_shares_are_exact(shares: list[int]) -> None:
    effective = shares if any(shares) else [1] * len(shares)
    counts = Counter(chunk_owners(weighted(shares), 2 * sum(effective)))
    assert [counts[f"n{i}"] for i in range(len(shares))] == [2 * w for w in effective]


@given(weights, chunk_counts)
def test_the_owners_depend_on_the_active_members_and_their_weights_alone(shares: list[int], chunks: int) -> None:
    at = weighted(shares)
    other = View(epoch=9, number=99, leader="n0", members=(*weighted(shares, 3).members,))
    assert chunk_owners(at, chunks) == chunk_owners(other, chunks) == chunk_owners(at, chunks)


@given(weights, chunk_counts, chunk_counts)
def test_fewer_chunks_have_the_same_owners(shares: list[int], fewer: int, more: int) -> None:
    fewer, more = sorted((fewer, more))
    assert chunk_owners(weighted(shares), more)[:fewer] == chunk_owners(weighted(shares), fewer)


def test_who_weighs_nothing_owns_nothing_unless_nobody_weighs_anything() -> None:
    assert set(chunk_owners(weighted([0, 1]), 10)) == {"n1"}
    assert Counter(chunk_owners(weighted([0, 0]), 10)) == {"n0": 5, "n1": 5}


def test_neighbouring_chunks_have_different_owners() -> None:
    assert chunk_owners(weighted([1, 1, 1]), 6) == ("n0", "n1", "n2", "n0", "n1", "n2")
    assert chunk_owners(weighted([2, 1]), 6) == ("n0", "n1", "n0", "n0", "n1", "n0")
