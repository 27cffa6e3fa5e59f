"""Who owns which chunk."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from prime_async.machines.owners import Assignment, assign, chunk_owners
from prime_async.messages import Member, Turn, View, bitmap
from tests.machine_harness import full_member, member, view

weights = st.lists(st.integers(0, 50), min_size=1, max_size=12)
chunk_counts = st.integers(0, 200)


def weighted(shares: list[int], spectators: int = 0) -> View:
    active = [full_member(f"n{i}", weight=w) for i, w in enumerate(shares)]
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
    other = view(99, *weighted(shares, 3).members, epoch=9)
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


def test_who_cannot_be_dialled_owns_nothing() -> None:
    at = view(1, full_member("n0"), member("n1"), full_member("n2"))
    assert set(chunk_owners(at, 10)) == {"n0", "n2"}
    assert chunk_owners(view(1, member("n0"), member("n1")), 10) == ()
    assert assign(view(1, member("n0")), 10, FIRST) == ()


# --- turns ----------------------------------------------------------------------------------------------------------

FIRST = (Turn(epoch=1, attempt=0),)


def lose(*turns: tuple[int, ...]) -> tuple[Turn, ...]:
    """The first turn, and one for each set of lost positions."""
    return (*FIRST, *(Turn(epoch=1, attempt=i + 1, lost=bitmap(lost)) for i, lost in enumerate(turns)))


def test_without_losses_every_chunk_has_its_first_owner_and_number() -> None:
    at = weighted([1, 1, 1])
    assert assign(at, 3, FIRST) == (Assignment("n0", 1, 0), Assignment("n1", 1, 0), Assignment("n2", 1, 0))


@given(weights, chunk_counts, st.data())
def test_a_loss_moves_the_chunks_of_the_lost_and_no_others(shares: list[int], chunks: int, data: st.DataObject) -> None:
    at = weighted(shares)
    everyone = range(len(shares))
    first = data.draw(st.sets(st.sampled_from(everyone), max_size=len(shares) - 1))
    second = data.draw(st.sets(st.sampled_from(everyone), max_size=len(shares)))
    before = assign(at, chunks, lose(tuple(first)))
    after = assign(at, chunks, lose(tuple(first), tuple(second)))
    if first | second >= set(everyone):
        assert after == ()
        return
    for old, new in zip(before, after, strict=True):
        lost = old.owner in {f"n{i}" for i in second}
        assert new == old if not lost else (new.epoch, new.attempt) == (1, 2)
        assert new.owner not in {f"n{i}" for i in first | second}


def test_the_chunks_of_a_lost_owner_go_to_several_others() -> None:
    after = assign(weighted([1, 1, 1, 1]), 40, lose((0,)))
    assert {a.owner for a in after if a.attempt == 1} == {"n1", "n2", "n3"}


def test_when_all_that_weigh_something_are_lost_the_others_take_over() -> None:
    after = assign(weighted([5, 0]), 4, lose((0,)))
    assert {a.owner for a in after} == {"n1"}
