"""When a snapshot is written and what is kept: what is on disk always leads to the newest state."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_async.machines.keeping import Keeping, leads_to, means_from
from prime_async.machines.vocabulary import Keep, LedgerAt

TEN = Keeping(every=10, snapshots=2, rounds=20)


def disk(*snapshots: int, means: range | tuple[int, ...] = ()) -> LedgerAt:
    return LedgerAt(snapshots=snapshots, means=tuple(means))


def test_a_snapshot_is_due_every_so_many_rounds_and_not_of_the_first_state() -> None:
    due = [r for r in range(41) if TEN.is_due(r, 0, disk(means=range(r)))]
    assert due == [10, 20, 30, 40]


def test_a_snapshot_that_is_there_is_not_due() -> None:
    assert not TEN.is_due(10, 0, disk(10, means=range(10)))


def test_initial_weights_from_elsewhere_are_written_too_since_they_cannot_be_made_anew() -> None:
    given = Keeping(every=10, snapshots=2, rounds=20, given=True)
    assert given.is_due(0, 0, disk())
    assert not given.is_due(0, 0, disk(0))
    assert [r for r in range(1, 21) if given.is_due(r, 0, disk(0, means=range(r)))] == [10, 20]
    assert given.is_due(3, 0, disk(means=range(3))), "the means alone lead nowhere"
    assert given.what_goes(40, 0, disk(0, 10, 20, means=range(40))) == Keep(snapshots=(10, 20), means_from=10)


def test_without_snapshots_none_is_due() -> None:
    never = Keeping(every=0, snapshots=2, rounds=20)
    assert not any(never.is_due(r, 0, disk(means=range(r))) for r in range(50))


@pytest.mark.parametrize(
    ("there", "leads"),
    [
        (disk(), True),  # nothing is kept here
        (disk(means=range(13)), True),
        (disk(means=range(11)), True),  # the last two may still come
        (disk(means=range(10)), False),
        (disk(means=range(1, 13)), False),
        (disk(10, means=(10,)), True),
        (disk(10, means=(11, 12)), False),
        (disk(5, 10, means=range(10, 13)), True),
        (disk(5, means=range(5, 13)), True),
        (disk(5, means=(5, 6, 8, 9, 10, 11, 12)), False),
        (disk(13), True),
        (disk(20, means=range(13)), True),  # of a history that was given up
    ],
)
def test_a_snapshot_or_the_beginning_with_all_means_since_leads_to_our_state(there: LedgerAt, leads: bool) -> None:
    assert leads_to(13, 0, there) is leads
    assert TEN.is_due(13, 0, there) is not leads


def test_where_a_snapshot_was_loaded_the_beginning_leads_nowhere() -> None:
    assert not leads_to(13, 10, disk(means=range(13)))
    assert leads_to(13, 10, disk(10, means=range(13)))


def test_nothing_goes_while_all_of_it_is_to_be_kept() -> None:
    assert TEN.what_goes(15, 0, disk(10, means=range(15))) is None
    assert TEN.what_goes(5, 0, disk(means=range(5))) is None


def test_the_newest_snapshots_stay_and_the_means_of_the_last_rounds() -> None:
    assert TEN.what_goes(45, 0, disk(10, 20, 30, 40, means=range(45))) == Keep(snapshots=(30, 40), means_from=25)


def test_the_means_since_the_oldest_snapshot_that_is_kept_stay_in_any_case() -> None:
    few = Keeping(every=10, snapshots=2, rounds=0)
    assert few.what_goes(45, 0, disk(20, 30, 40, means=range(45))) == Keep(snapshots=(30, 40), means_from=30)


def test_without_a_snapshot_all_means_stay() -> None:
    few = Keeping(every=0, snapshots=1, rounds=0)
    assert few.what_goes(45, 0, disk(means=range(45))) is None


def test_what_is_of_a_history_that_was_given_up_goes() -> None:
    assert TEN.what_goes(12, 10, disk(5, 10, 20, means=range(20))) == Keep(snapshots=(10,), means_from=10)


def test_the_means_that_members_are_told_of_have_no_gap() -> None:
    assert means_from(12, 0, disk(means=range(12)), -1) == 0
    assert means_from(12, 0, disk(means=(3, 4, 6, 7, 8, 9, 10, 11)), -1) == 6
    assert means_from(12, 0, disk(means=range(11)), -1) == 12, "the last is not there"
    assert means_from(12, 0, disk(means=range(11)), 11) == 0, "the last is on its way"
    assert means_from(12, 8, disk(means=range(12)), -1) == 8, "what is below does not lead here"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(0, 6),
    st.integers(1, 3),
    st.integers(0, 9),
    st.lists(st.sampled_from(["round", "damage", "tidy", "lost snapshot"]), max_size=60),
    st.randoms(use_true_random=False),
)
def test_whatever_is_damaged_after_two_more_rounds_the_disk_leads_to_our_state(
    every: int, snapshots: int, rounds: int, what: list[str], chance: object
) -> None:
    keeping, now = Keeping(every=every, snapshots=snapshots, rounds=rounds), 0
    kept: set[int] = set()
    means: set[int] = set()

    def there() -> LedgerAt:
        return LedgerAt(snapshots=tuple(sorted(kept)), means=tuple(sorted(means)))

    def one_round() -> None:
        nonlocal now
        means.add(now)
        now += 1
        if keeping.is_due(now, 0, there()):
            kept.add(now)
        goes = keeping.what_goes(now, 0, there())
        if goes is not None:
            kept.intersection_update(goes.snapshots)
            means.difference_update([r for r in means if r < goes.means_from])

    for step in what:
        if step == "damage" and means:
            means.discard(chance.choice(sorted(means)))  # type: ignore[attr-defined]
        elif step == "lost snapshot" and kept:
            kept.discard(chance.choice(sorted(kept)))  # type: ignore[attr-defined]
        else:
            one_round()
    for _ in range(3):
        one_round()

    newest = max(kept, default=0)
    assert {*range(newest, now)} <= means
