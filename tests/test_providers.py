"""Who is asked for what of the ledger, and what becomes of it when it does not come."""

from __future__ import annotations

from collections import Counter

import pytest

from prime_async.machines.attempt import SETTLED, mean_key
from prime_async.machines.catchup import manifest_key, record_key, state_key
from prime_async.machines.providers import MAX_PLACING, Download, Providers
from prime_async.machines.vocabulary import CancelFetch, CancelFetches, Effect, Fetch, FetchFault
from prime_async.messages import ChunkKey, Holdings, Stretch
from tests.machine_harness import full_member, of, view

PAUSE_S = 5.0


def providers(*names: str, window: int = 2) -> Providers:
    made = Providers(me="me", window=window, pause_s=PAUSE_S)
    made.see(view(5, *(full_member(n) for n in names), full_member("me")))
    return made


def all_have(providers: Providers, round: int = 20, means_from: int = 0, snapshots: tuple[int, ...] = (10,)) -> None:
    for name in providers.members:
        providers.heard(name, Holdings(round=round, means_from=means_from, snapshots=snapshots))


def download(*names: str, window: int = 2) -> Download:
    made = Download(providers=providers(*names, window=window), timeout_s=60.0)
    all_have(made.providers)
    return made


def means(rounds: range, chunks: int = 1) -> list[ChunkKey]:
    return [mean_key(r, c, SETTLED) for r in rounds for c in range(chunks)]


def pumped(download: Download, now: float = 0.0) -> list[Fetch]:
    out: list[Effect] = []
    download.pump(now, out)
    return of(Fetch, out)


def came(download: Download, peer: str, key: ChunkKey, size: int, now: float = 0.0) -> list[CancelFetch] | None:
    """Who need not send it any more; ``None``: it was not asked for."""
    out: list[Effect] = []
    return of(CancelFetch, out) if download.came(now, peer, key, size, out) else None


# --- who has what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "has"),
    [
        (mean_key(3, 0, SETTLED), False),
        (mean_key(4, 0, SETTLED), True),
        (mean_key(11, 0, SETTLED), True),
        (mean_key(12, 0, SETTLED), False),
        (record_key(4), True),
        (record_key(12), False),
        (manifest_key(5), True),
        (manifest_key(6), False),
        (state_key(5, 2), True),
        (state_key(12, 2), True),  # from memory
        (state_key(11, 2), False),
    ],
)
def test_a_member_has_what_it_says(key: ChunkKey, has: bool) -> None:
    one = providers("n0")
    assert not one.has("n0", key)
    one.heard("n0", Holdings(round=12, means_from=4, snapshots=(5,)))
    assert one.has("n0", key) is has
    assert one.somebody_has(key) is has


@pytest.mark.parametrize(
    ("key", "has"),
    [
        (mean_key(3, 0, SETTLED), True),
        (mean_key(5, 0, SETTLED), False),
        (record_key(6), True),
        (mean_key(7, 0, SETTLED), True),
        (mean_key(8, 0, SETTLED), False),
        (record_key(9), True),
        (manifest_key(5), False),
        (state_key(5, 0), False),
    ],
)
def test_a_member_that_is_behind_has_the_rounds_that_it_says_and_no_state_that_is_wrong(
    key: ChunkKey, has: bool
) -> None:
    one = providers("n0")
    above = (Stretch(first=6, end=8), Stretch(first=9, end=10))
    one.heard("n0", Holdings(round=5, means_from=0, state=False, above=above))
    assert one.has("n0", key) is has


def test_who_is_no_member_is_not_believed_and_who_has_left_is_forgotten() -> None:
    both = providers("n0", "n1")
    all_have(both)
    both.heard("stranger", Holdings(round=20, means_from=0))
    assert set(both.holdings) == {"n0", "n1"}
    both.see(view(6, full_member("n1"), full_member("me")))
    assert set(both.holdings) == {"n1"}


def test_this_node_does_not_ask_itself() -> None:
    assert providers("n0").members == ("n0",)


def test_snapshots_are_those_of_anybody_but_a_liar() -> None:
    both = providers("n0", "n1")
    both.heard("n0", Holdings(round=20, means_from=0, snapshots=(5, 10)))
    both.heard("n1", Holdings(round=20, means_from=0, snapshots=(10, 15)))
    assert both.snapshots == [5, 10, 15]
    both.blame(0.0, "n1", manifest_key(15), "invalid")
    assert both.snapshots == [5, 10]


# --- asking ---------------------------------------------------------------------------------------------------------


def test_each_member_is_asked_for_a_few_at_a_time_and_for_the_next_when_one_has_come() -> None:
    loading = download("n0", "n1", "n2")
    loading.want(means(range(12)))
    first = pumped(loading)
    assert Counter(f.peer for f in first) == {"n0": 2, "n1": 2, "n2": 2}
    assert {f.key.round for f in first} == set(range(6))
    assert pumped(loading) == []
    assert came(loading, "n1", first[1].key, 7) == []
    [after] = pumped(loading)
    assert after.peer == "n1"
    assert after.key.round == 6
    assert loading.bytes_come == 7


def test_nothing_more_is_asked_for_while_too_many_chunks_that_came_are_not_in_their_place() -> None:
    """And what is in its place, was found to be wrong, or is given up does not count."""
    loading = download("n0", window=MAX_PLACING)
    keys = means(range(3 * MAX_PLACING))
    loading.want(keys)
    pumped(loading)
    for key in keys[:MAX_PLACING]:
        came(loading, "n0", key, 1)
    assert pumped(loading) == []
    loading.want([record_key(0)], first=True)
    assert pumped(loading) == []

    loading.done(keys[0])
    assert pumped(loading) != []
    came(loading, "n0", keys[MAX_PLACING], 1)
    assert pumped(loading) == []
    loading.failed(0.0, "n0", keys[1], "gone")
    assert len(loading.placing) == MAX_PLACING - 1
    loading.forget(keys[2].round, [])
    assert len(loading.placing) == MAX_PLACING - 2
    loading.give_up([])
    loading.want(keys)
    assert pumped(loading) != []


def test_nothing_is_asked_for_twice() -> None:
    loading = download("n0", window=8)
    loading.want(means(range(3)))
    loading.want(means(range(4)))
    assert [f.key.round for f in pumped(loading)] == [0, 1, 2, 3]
    for key in means(range(3)):
        came(loading, "n0", key, 1)
    loading.want(means(range(3)))
    assert pumped(loading) == [], "they have come, though they are not where they belong yet"
    loading.done(means(range(1))[0])
    loading.want(means(range(1)))
    assert [f.key.round for f in pumped(loading)] == [0]


def test_what_is_wanted_first_goes_before_the_rest_in_its_order() -> None:
    loading = download("n0", window=8)
    loading.want(means(range(2)))
    loading.want([record_key(5), record_key(6)], first=True)
    assert [(f.key.kind, f.key.round) for f in pumped(loading)] == [
        ("record", 5), ("record", 6), ("mean", 0), ("mean", 1),
    ]  # fmt: skip


def test_what_the_next_member_lacks_does_not_hold_up_the_rest() -> None:
    loading = Download(providers=providers("n0", "n1", window=8), timeout_s=60.0)
    loading.providers.heard("n0", Holdings(round=20, means_from=4))
    loading.want(means(range(6)))
    assert [f.key.round for f in pumped(loading)] == [4, 5]
    loading.providers.heard("n1", Holdings(round=20, means_from=0))
    assert [(f.peer, f.key.round) for f in pumped(loading)] == [("n1", r) for r in range(4)]


# --- the end --------------------------------------------------------------------------------------------------------


def at_the_end() -> tuple[Download, Fetch, list[Fetch]]:
    """One has sent what it was asked for, and has nothing to do; the other has two chunks under way."""
    loading = download("n0", "n1")
    loading.want(means(range(3)))
    asked = pumped(loading)
    [done] = [f for f in asked if sum(g.peer == f.peer for g in asked) == 1]
    assert came(loading, done.peer, done.key, 1, now=1.0) == []
    return loading, done, [f for f in asked if f is not done]


def test_at_the_end_who_has_nothing_to_do_takes_the_last_of_who_has_more_than_one() -> None:
    loading, done, slow = at_the_end()
    assert [(f.peer, f.key) for f in pumped(loading, 1.0)] == [(done.peer, slow[-1].key)]
    assert pumped(loading, 1.0) == [], "once"
    left = came(loading, done.peer, slow[-1].key, 1, now=2.0)
    assert left is not None
    assert [(c.peer, c.key) for c in left] == [(slow[0].peer, slow[-1].key)], "the other need not send it"
    assert came(loading, slow[0].peer, slow[-1].key, 1) is None
    assert loading.bytes_come == 2


def test_at_the_end_what_is_on_its_way_is_asked_again_when_it_takes_twice_as_long_as_others_need() -> None:
    loading, done, slow = at_the_end()
    assert came(loading, slow[-1].peer, slow[-1].key, 1, now=1.0) == []
    assert pumped(loading, 1.9) == []
    assert [(f.peer, f.key) for f in pumped(loading, 2.1)] == [(done.peer, slow[0].key)]


@pytest.mark.parametrize("who", ["first", "second", "both"])
def test_at_the_end_what_one_of_two_does_not_send_is_waited_for_from_the_other(who: str) -> None:
    loading, done, slow = at_the_end()
    pumped(loading, 1.0)
    key = slow[-1].key
    for peer in {"first": [slow[-1].peer], "second": [done.peer], "both": [slow[-1].peer, done.peer]}[who]:
        loading.failed(1.0, peer, key, "gone")
    assert (key in loading.waiting) is (who == "both")
    assert loading.providers.busy == {done.peer: who == "first", slow[0].peer: 1 + (who == "second")}


def test_at_the_end_a_chunk_of_who_left_is_waited_for_from_the_other() -> None:
    loading, done, slow = at_the_end()
    pumped(loading, 1.0)
    loading.providers.see(view(6, full_member(done.peer), full_member("me")))
    loading.leave_the_gone([])
    assert loading.under_way.keys() == {slow[-1].key}
    assert list(loading.waiting) == [slow[0].key]


def test_a_record_is_not_asked_for_twice() -> None:
    loading = download("n0", "n1")
    loading.want([record_key(1)])
    pumped(loading)
    assert pumped(loading, 100.0) == []


# --- what does not come ---------------------------------------------------------------------------------------------


def test_what_one_does_not_have_any_more_is_asked_of_another_and_of_it_only_when_it_says_so_anew() -> None:
    loading = download("n0", "n1", window=1)
    loading.want(means(range(1)))
    [asked] = pumped(loading)
    loading.failed(0.0, asked.peer, asked.key, "gone")
    [again] = pumped(loading)
    assert again.peer != asked.peer
    loading.failed(0.0, again.peer, again.key, "gone")
    assert pumped(loading) == []
    loading.providers.heard(asked.peer, Holdings(round=20, means_from=0))
    assert [f.peer for f in pumped(loading)] == [asked.peer]


@pytest.mark.parametrize("fault", ["late", "unreachable"])
def test_who_is_late_or_cannot_be_reached_is_left_alone_for_a_while(fault: FetchFault) -> None:
    loading = download("n0", "n1", window=1)
    loading.want(means(range(1)))
    [asked] = pumped(loading)
    loading.failed(3.0, asked.peer, asked.key, fault)
    [again] = pumped(loading, 3.0)
    assert again.peer != asked.peer
    came(loading, again.peer, again.key, 1)
    loading.want(means(range(1, 3)))
    assert [f.peer for f in pumped(loading, 3.0 + PAUSE_S / 2)] == [again.peer]
    assert [f.peer for f in pumped(loading, 3.0 + PAUSE_S)] == [asked.peer]


def test_who_sends_what_does_not_fit_is_never_asked_again() -> None:
    loading = download("n0", "n1", window=1)
    loading.want(means(range(2)))
    asked, other = pumped(loading)
    assert came(loading, asked.peer, asked.key, 1) == []
    loading.failed(0.0, asked.peer, asked.key, "invalid")
    came(loading, other.peer, other.key, 1)
    assert [(f.peer, f.key) for f in pumped(loading)] == [(other.peer, asked.key)]
    loading.providers.heard(asked.peer, Holdings(round=20, means_from=0))
    loading.want(means(range(5, 9)))
    assert pumped(loading) == []


def test_a_failure_of_what_is_not_wanted_any_more_changes_nothing() -> None:
    loading = download("n0")
    loading.want(means(range(1)))
    [asked] = pumped(loading)
    loading.give_up([])
    loading.failed(0.0, asked.peer, asked.key, "invalid")
    assert not loading.providers.liars
    assert pumped(loading) == []
    assert came(loading, asked.peer, asked.key, 1) is None


def test_what_was_asked_of_who_left_is_asked_of_the_others_at_once() -> None:
    loading = download("n0", "n1", window=2)
    loading.want(means(range(4)))
    asked = pumped(loading)
    loading.providers.see(view(6, full_member("n1"), full_member("me")))
    out: list[Effect] = []
    loading.leave_the_gone(out)
    assert {(e.peer, e.key) for e in of(CancelFetch, out)} == {(f.peer, f.key) for f in asked if f.peer == "n0"}
    for fetch in asked:
        if fetch.peer == "n1":
            came(loading, "n1", fetch.key, 1)
    assert {f.key for f in pumped(loading)} == {f.key for f in asked if f.peer == "n0"}


def test_given_up_all_gets_are_cancelled_and_the_members_are_free_again() -> None:
    loading = download("n0", window=2)
    loading.want(means(range(4)))
    pumped(loading)
    out: list[Effect] = []
    loading.give_up(out)
    assert out == [CancelFetches()]
    loading.want(means(range(7, 9)))
    assert [f.key.round for f in pumped(loading)] == [7, 8]
    loading.give_up(out)
    loading.give_up(out)
    assert len(out) == 2, "nothing was under way the second time"
