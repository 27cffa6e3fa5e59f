"""Every rule of a member's part of a round, by pure calls."""

from __future__ import annotations

from blake3 import blake3

from prime_async.machines.coordinator import FIRST_CHAIN, next_chain
from prime_async.machines.exchange import Exchange, ExchangeSettings
from prime_async.machines.facts import ContributorLeftOut, RoundIgnored, RoundPlanned, StateDiverged
from prime_async.machines.vocabulary import (
    CancelFetches,
    ContributionFixed,
    Effect,
    Fetch,
    Fetched,
    FetchFailed,
    FetchFault,
    FetchState,
    Forget,
    Heard,
    MeansCommitted,
    Reduce,
    Reduced,
    StateAt,
    Tick,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import (
    Behind,
    ChunkInfo,
    ChunkKey,
    Commit,
    Have,
    Message,
    Plan,
    Ready,
    View,
    ViewUpdate,
    bitmap,
)
from tests.machine_harness import facts, info, key, member, of, sent, told, view

THREE = view(3, member("n0"), member("n1"), member("n2"))
"""With three chunks: n0 owns chunk 0, n1 owns chunk 1, n2 owns chunk 2."""
ALL_DIGESTS = blake3(b"".join(info(c).digest for c in range(3))).digest()


def exchange(me: str = "n1", chunks: int = 3, at: View = THREE, round: int = 0, window: int = 4) -> Exchange:
    settings = ExchangeSettings(me=me, chunk_count=chunks, chunk_window=window, mean_window=window)
    node = Exchange(settings)
    node.handle(0.0, ViewChanged(view=at))
    node.handle(0.0, StateAt(round=round, digest=bytes(32)))
    return node


def plan(
    attempt: int = 0, who: tuple[int, ...] = (0, 1, 2), view_number: int = 3, round: int = 0, epoch: int = 1
) -> Plan:
    weights = tuple(10 * (i + 1) for i in who)
    return Plan(round=round, epoch=epoch, attempt=attempt, view=view_number, contributors=bitmap(who), weights=weights)


def commit(attempt: int = 0, digest: bytes = ALL_DIGESTS, chain: bytes = FIRST_CHAIN, round: int = 0) -> Commit:
    return Commit(round=round, epoch=1, attempt=attempt, digest=digest, chain=next_chain(chain, digest))


def hears(node: Exchange, message: Message, now: float = 1.0, peer: str = "n0") -> list[Effect]:
    return node.handle(now, Heard(peer=peer, message=message))


def fix(node: Exchange, round: int = 0, weight: int = 7) -> list[Effect]:
    return node.handle(0.5, ContributionFixed(round=round, weight=weight))


def planned(me: str = "n1") -> tuple[Exchange, list[Effect]]:
    """A node whose contribution is fixed and which has just heard the plan."""
    node = exchange(me)
    fix(node)
    return node, hears(node, plan())


def fetched(node: Exchange, peer: str, what: ChunkKey, fill: int | None = None) -> list[Effect]:
    return node.handle(2.0, Fetched(peer=peer, key=what, info=info(what.chunk if fill is None else fill)))


def failed(node: Exchange, peer: str, what: ChunkKey, fault: FetchFault, now: float = 2.0) -> list[Effect]:
    return node.handle(now, FetchFailed(peer=peer, key=what, fault=fault))


def mean(chunk: int, attempt: int = 0, round: int = 0) -> ChunkKey:
    return key("mean", chunk, round=round, epoch=1, attempt=attempt)


def asked(effects: list[Effect]) -> list[tuple[str, str, int]]:
    return [(e.peer, e.key.kind, e.key.chunk) for e in of(Fetch, effects)]


def complete(node: Exchange) -> list[Effect]:
    """n1 has everything: its own chunk reduced, the means of the others fetched."""
    out = [*fetched(node, "n0", key("contribution", 1)), *fetched(node, "n2", key("contribution", 1))]
    out += node.handle(2.1, Reduced(key=mean(1), info=info(1)))
    return [*out, *fetched(node, "n0", mean(0)), *fetched(node, "n2", mean(2))]


# --- ready ----------------------------------------------------------------------------------------------------------


def test_a_fixed_contribution_is_told_to_the_leader_until_the_plan_comes() -> None:
    node = exchange()
    assert sent(fix(node), Ready) == [("n0", Ready(round=0, weight=7))]
    assert sent(node.handle(1.5, Tick()), Ready) == [("n0", Ready(round=0, weight=7))]
    assert sent(node.handle(1.6, Tick()), Ready) == []


def test_a_node_without_a_contribution_asks_with_weight_zero() -> None:
    node = exchange()
    assert sent(node.handle(1.0, Tick()), Ready) == [("n0", Ready(round=0, weight=0))]


def test_a_contribution_to_another_round_is_not_told() -> None:
    assert fix(exchange(round=4), round=3) == []


def test_a_new_leader_is_told_at_once() -> None:
    node = exchange()
    fix(node)
    effects = node.handle(0.6, ViewChanged(view=view(4, member("n2"), member("n1"), leader="n2")))
    assert sent(effects, Ready) == [("n2", Ready(round=0, weight=7))]


def test_a_tick_is_always_asked_for_so_that_what_was_lost_is_repeated() -> None:
    node = exchange()
    assert [w.at for w in of(WakeAt, node.handle(1.0, Tick()))] == [2.0]
    assert [w.at for w in of(WakeAt, node.handle(2.0, Tick()))] == [3.0]


# --- under a plan ---------------------------------------------------------------------------------------------------


def test_under_a_plan_a_node_fetches_what_it_owns_from_contributors_and_the_rest_from_owners() -> None:
    _, effects = planned()
    assert asked(effects) == [
        ("n0", "contribution", 1),
        ("n2", "contribution", 1),
        ("n0", "mean", 0),
        ("n2", "mean", 2),
    ]
    [fact] = facts(RoundPlanned, effects)
    assert (fact.contributors, fact.chunks_owned) == (3, 1)


def test_a_chunk_is_reduced_when_every_contribution_is_there_in_the_order_of_the_view() -> None:
    node, _ = planned()
    assert not of(Reduce, fetched(node, "n2", key("contribution", 1)))
    assert of(Reduce, fetched(node, "n0", key("contribution", 1))) == [
        Reduce(key=mean(1), contributors=("n0", "n1", "n2"), weights=(10, 20, 30), members=("n0", "n1", "n2"))
    ]


def test_both_windows_are_respected_and_chunks_go_in_order() -> None:
    node = exchange(chunks=30, window=2)
    fix(node)
    effects = hears(node, plan())
    assert [c for _, kind, c in asked(effects) if kind == "contribution"] == [1, 1, 4, 4]
    assert [(p, c) for p, kind, c in asked(effects) if kind == "mean"] == [("n0", 0), ("n0", 3), ("n2", 2), ("n2", 5)]
    assert asked(fetched(node, "n0", key("contribution", 1))) == []
    assert asked(fetched(node, "n2", key("contribution", 1))) == []  # it is being reduced
    assert asked(node.handle(2.0, Reduced(key=mean(1), info=info(1)))) == [
        ("n0", "contribution", 7),
        ("n2", "contribution", 7),
    ]
    assert asked(fetched(node, "n0", mean(0))) == [("n0", "mean", 6)]


def test_means_that_are_waited_for_do_not_hold_up_the_contributions_they_are_made_of() -> None:
    """Two nodes wait for each other's means with full windows, and both still fetch contributions."""
    for me, other in (("n0", "n1"), ("n1", "n0")):
        node = exchange(me, chunks=8, at=view(3, member("n0"), member("n1")), window=1)
        fix(node)
        if me == "n0":
            effects = node.handle(1.0, Heard(peer="n1", message=Ready(round=0, weight=5)))
        else:
            effects = hears(node, plan(who=(0, 1)))
        kinds = [(peer, kind) for peer, kind, _ in asked(effects)]
        assert kinds == [(other, "contribution"), (other, "mean")]


def test_an_inactive_contributor_owns_nothing() -> None:
    at = view(3, member("n0"), member("n1", active=False), member("n2"))
    node = exchange(at=at)
    fix(node)
    assert {kind for _, kind, _ in asked(hears(node, plan()))} == {"mean"}


# --- who is left out ------------------------------------------------------------------------------------------------


def test_a_contributor_that_leaves_the_view_is_left_out_of_what_is_open() -> None:
    node, _ = planned()
    fetched(node, "n0", key("contribution", 1))
    effects = node.handle(3.0, ViewChanged(view=view(4, member("n0"), member("n1"))))
    [reduce] = of(Reduce, effects)
    assert (reduce.contributors, reduce.weights) == (("n0", "n1"), (10, 20))
    assert reduce.members == ("n0", "n1", "n2")  # positions are those of the plan's view
    assert [(f.peer, f.chunk) for f in facts(ContributorLeftOut, effects)] == [("n2", 1)]


def test_a_contributor_that_started_anew_has_left() -> None:
    node, _ = planned()
    fetched(node, "n0", key("contribution", 1))
    again = member("n2", active=False, incarnation=2)
    [reduce] = of(Reduce, node.handle(3.0, ViewChanged(view=view(4, member("n0"), member("n1"), again))))
    assert reduce.contributors == ("n0", "n1")


def test_a_contribution_that_came_before_its_contributor_died_counts() -> None:
    node, _ = planned()
    fetched(node, "n2", key("contribution", 1))
    node.handle(3.0, ViewChanged(view=view(4, member("n0"), member("n1"))))
    [reduce] = of(Reduce, fetched(node, "n0", key("contribution", 1)))
    assert reduce.contributors == ("n0", "n1", "n2")


def test_a_contribution_that_is_gone_late_or_invalid_is_left_out() -> None:
    faults: tuple[FetchFault, ...] = ("gone", "late", "invalid")
    for fault in faults:
        node, _ = planned()
        fetched(node, "n0", key("contribution", 1))
        effects = failed(node, "n2", key("contribution", 1), fault)
        assert [r.contributors for r in of(Reduce, effects)] == [("n0", "n1")]
        assert [f.reason for f in facts(ContributorLeftOut, effects)] == [fault]


def test_a_contributor_that_cannot_be_reached_is_tried_again_until_the_view_says_that_it_is_gone() -> None:
    node, _ = planned()
    fetched(node, "n0", key("contribution", 1))
    effects = failed(node, "n2", key("contribution", 1), "unreachable", now=2.0)
    assert not of(Reduce, effects)
    assert asked(node.handle(2.5, Tick())) == [("n2", "contribution", 1)]
    failed(node, "n2", key("contribution", 1), "unreachable", now=2.6)
    assert of(Reduce, node.handle(2.7, ViewChanged(view=view(4, member("n0"), member("n1")))))
    assert asked(node.handle(3.1, Tick())) == []


def test_what_the_reduction_left_out_is_reported() -> None:
    node, _ = planned()
    effects = node.handle(2.0, Reduced(key=mean(1), info=info(1), left_out=("n2",)))
    assert [(f.peer, f.chunk) for f in facts(ContributorLeftOut, effects)] == [("n2", 1)]


def test_a_plan_that_counts_on_what_an_earlier_start_of_this_node_had_is_served_without_it() -> None:
    """Defect: the actor was told to reduce a contribution that is not here, which ended the node."""
    node = exchange()
    hears(node, plan())
    fetched(node, "n0", key("contribution", 1))
    [reduce] = of(Reduce, fetched(node, "n2", key("contribution", 1)))
    assert reduce.contributors == ("n0", "n2")


# --- means ----------------------------------------------------------------------------------------------------------


def test_a_mean_that_its_owner_does_not_give_is_asked_of_the_others_in_turn() -> None:
    node, _ = planned()
    failed(node, "n2", mean(2), "late", now=2.0)
    assert asked(node.handle(2.5, Tick())) == [("n0", "mean", 2)]
    failed(node, "n0", mean(2), "invalid", now=3.0)
    assert asked(node.handle(3.5, Tick())) == [("n2", "mean", 2)]


def test_an_owner_that_cannot_be_reached_for_a_moment_is_asked_again() -> None:
    """Defect: members asked each other for what none of them had, and each waited a minute for the next."""
    node, _ = planned()
    failed(node, "n2", mean(2), "unreachable", now=2.0)
    assert asked(node.handle(2.5, Tick())) == [("n2", "mean", 2)]
    node.handle(2.6, ViewChanged(view=view(4, member("n0"), member("n1"))))
    failed(node, "n2", mean(2), "unreachable", now=2.7)
    assert asked(node.handle(3.2, Tick())) == [("n0", "mean", 2)]


def test_a_committed_mean_that_does_not_come_is_asked_of_the_leader_first() -> None:
    node, _ = planned()
    fetched(node, "n0", key("contribution", 1))
    fetched(node, "n2", key("contribution", 1))
    hears(node, commit())
    failed(node, "n2", mean(2), "unreachable", now=2.0)
    assert asked(node.handle(2.5, Tick())) == [("n0", "mean", 2)]
    failed(node, "n0", mean(2), "unreachable", now=3.0)
    assert asked(node.handle(3.5, Tick())) == [("n2", "mean", 2)]


def test_a_mean_that_the_leader_says_is_gone_means_that_the_run_has_moved_on() -> None:
    node, _ = planned()
    effects = failed(node, "n0", mean(0), "gone")
    assert told(effects, "checkpoint") == [FetchState()]
    assert of(CancelFetches, effects)


def test_a_mean_that_another_member_says_is_gone_is_asked_elsewhere() -> None:
    node, _ = planned()
    assert not told(failed(node, "n2", mean(2), "gone"), "checkpoint")
    assert asked(node.handle(2.5, Tick())) == [("n0", "mean", 2)]


def test_who_holds_all_means_says_so_until_the_commit_comes() -> None:
    node, _ = planned()
    have = ("n0", Have(round=0, epoch=1, attempt=0, digest=ALL_DIGESTS))
    assert sent(complete(node), Have) == [have]
    assert sent(node.handle(4.0, Tick()), Have) == [have]
    hears(node, commit())
    assert sent(node.handle(9.0, Tick()), Have) == []


# --- attempts -------------------------------------------------------------------------------------------------------


def test_a_higher_attempt_abandons_all_fetches_and_begins_again() -> None:
    node, _ = planned()
    smaller = view(4, member("n0"), member("n1"))
    node.handle(3.0, ViewChanged(view=smaller))
    effects = hears(node, plan(1, (0, 1), 4))
    assert of(CancelFetches, effects)
    assert asked(effects) == [("n0", "contribution", 1), ("n0", "mean", 0), ("n0", "mean", 2)]
    assert fetched(node, "n2", key("contribution", 1)) == []  # of the attempt before


def test_lower_attempts_are_refused() -> None:
    node = exchange()
    fix(node)
    assert asked(hears(node, plan(attempt=2)))
    for lower in (plan(attempt=1), plan(attempt=2), plan(attempt=9, epoch=0)):
        assert not asked(hears(node, lower))
    assert asked(hears(node, plan(attempt=3)))


def test_what_was_reduced_for_an_earlier_attempt_does_not_count() -> None:
    node, _ = planned()
    hears(node, plan(attempt=1))
    node.handle(2.0, Reduced(key=mean(1), info=info(1)))
    assert node.attempt is not None
    assert node.attempt.digests == {}


def test_a_plan_for_another_round_or_from_another_peer_is_ignored() -> None:
    node = exchange()
    fix(node)
    assert not asked(hears(node, plan(round=1)))
    assert not asked(hears(node, plan(), peer="n2"))
    assert not asked(hears(node, plan(), peer="n1"))  # says a copy of our own key


def test_a_plan_that_does_not_fit_its_view_is_reported_and_ignored() -> None:
    for bad in (
        Plan(round=0, epoch=1, attempt=0, view=3, contributors=bitmap((0, 1)), weights=(1,)),
        Plan(round=0, epoch=1, attempt=0, view=3, contributors=bitmap((9,)), weights=(1,)),
        Plan(round=0, epoch=1, attempt=0, view=3, contributors=b"", weights=()),
    ):
        effects = hears(exchange(), bad)
        assert facts(RoundIgnored, effects)
        assert not asked(effects)


def test_a_plan_of_a_view_that_is_not_known_waits_for_the_view() -> None:
    """The leader repeats both: the plan may refer to a view that this node never saw."""
    node = exchange(at=view(7, member("n0"), member("n1")))
    fix(node)
    assert not asked(hears(node, plan()))
    hears(node, ViewUpdate(view=THREE))
    effects = hears(node, plan())
    assert ("n0", "contribution", 1) in asked(effects)
    assert node.view is not None
    assert node.view.number == 7
    assert [f.peer for f in facts(ContributorLeftOut, effects)] == ["n2"]  # it has left since


def test_a_view_from_somebody_who_does_not_lead_is_not_kept() -> None:
    node = exchange(at=view(7, member("n0"), member("n1")))
    hears(node, ViewUpdate(view=THREE), peer="n1")
    hears(node, ViewUpdate(view=THREE), peer="n2")
    assert not asked(hears(node, plan()))


def test_a_few_views_are_kept_and_the_newest_always() -> None:
    node = exchange()
    for number in range(4, 40):
        node.handle(1.0, ViewChanged(view=view(number, member("n0"), member("n1"))))
    for number in range(1, 20):
        hears(node, ViewUpdate(view=view(number, member("n0"))))
    assert len(node.views) == 8
    assert (1, 39) in node.views


# --- commits --------------------------------------------------------------------------------------------------------


def test_only_committed_means_are_handed_over_and_once() -> None:
    node, _ = planned()
    assert not told(complete(node), "training")
    assert told(hears(node, commit()), "training") == [MeansCommitted(round=0, epoch=1, attempt=0, position=1)]
    assert not told(hears(node, commit()), "training")


def test_a_commit_may_come_before_the_means() -> None:
    node, _ = planned()
    fetched(node, "n0", key("contribution", 1))
    fetched(node, "n2", key("contribution", 1))
    node.handle(2.1, Reduced(key=mean(1), info=info(1)))
    assert not told(hears(node, commit()), "training")
    fetched(node, "n0", mean(0))
    effects = fetched(node, "n2", mean(2))
    assert told(effects, "training") == [MeansCommitted(round=0, epoch=1, attempt=0, position=1)]
    assert not sent(effects, Have)


def follow(node: Exchange) -> list[Effect]:
    return [effect for chunk in range(3) for effect in fetched(node, "n0", mean(chunk))]


def test_a_node_without_a_contribution_follows_a_commit_without_a_plan() -> None:
    node = exchange()
    assert asked(hears(node, commit())) == [("n0", "mean", 0), ("n0", "mean", 1), ("n0", "mean", 2)]
    assert told(follow(node), "training") == [MeansCommitted(round=0, epoch=1, attempt=0, position=-1)]


def test_a_contributor_waits_for_the_plan_of_a_commit_to_know_whether_it_is_counted() -> None:
    """Defect: it followed as if it were in none of the means, kept its progress, and contributed it twice."""
    node = exchange()
    fix(node)
    assert not asked(hears(node, commit(attempt=1)))
    assert sent(node.handle(1.5, Tick()), Ready) == [("n0", Ready(round=0, weight=7))]
    node.handle(1.6, ViewChanged(view=view(4, member("n0"), member("n1"))))
    hears(node, plan(1, (0, 1), 4))
    effects = hears(node, commit(attempt=1))
    assert asked(effects) == [("n0", "mean", 0), ("n0", "mean", 1), ("n0", "mean", 2)]
    for chunk in range(3):
        effects = fetched(node, "n0", mean(chunk, attempt=1))
    assert told(effects, "training") == [MeansCommitted(round=0, epoch=1, attempt=1, position=1)]


def test_a_contributor_that_was_not_in_the_plan_keeps_its_progress() -> None:
    node = exchange("n2", at=view(3, member("n0"), member("n1"), member("n2", active=False)))
    fix(node)
    hears(node, plan(who=(0, 1)))
    fetched(node, "n0", mean(0))
    fetched(node, "n1", mean(1))
    fetched(node, "n0", mean(2))
    assert told(hears(node, commit()), "training") == [MeansCommitted(round=0, epoch=1, attempt=0, position=-1)]


def test_who_holds_other_means_than_the_committed_ones_fetches_those_from_the_leader() -> None:
    node, _ = planned()
    complete(node)
    right = blake3(b"".join(info(c).digest for c in (0, 9, 2))).digest()
    effects = hears(node, commit(digest=right))
    assert facts(StateDiverged, effects)
    assert asked(effects) == [("n0", "mean", 0), ("n0", "mean", 1), ("n0", "mean", 2)]
    fetched(node, "n0", mean(0))
    fetched(node, "n0", mean(1), fill=9)
    effects = fetched(node, "n0", mean(2))
    # Defect: position was -1, so a contribution that is in the means was kept for the next round as well.
    assert told(effects, "training") == [MeansCommitted(round=0, epoch=1, attempt=0, position=1)]


def test_means_of_the_leader_that_differ_from_its_commit_end_in_fetching_the_state() -> None:
    node = exchange()
    hears(node, commit(digest=b"?" * 32))
    assert told(follow(node), "checkpoint") == [FetchState()]


def test_a_commit_that_does_not_continue_the_chain_ends_in_fetching_the_state() -> None:
    node, _ = planned()
    complete(node)
    hears(node, commit())
    node.handle(3.0, StateAt(round=1, digest=bytes(32)))
    effects = hears(node, commit(round=1, chain=b"?" * 32))
    assert facts(StateDiverged, effects)
    assert told(effects, "checkpoint") == [FetchState()]


def test_the_first_commit_after_a_state_was_fetched_begins_a_new_chain() -> None:
    """Defect: a node that had missed a round took the next commit for a forgery, and fetched the state again."""
    node, _ = planned()
    complete(node)
    hears(node, commit())
    node.handle(3.0, StateAt(round=1, digest=bytes(32)))
    node.handle(4.0, StateAt(round=2, digest=bytes(32)))  # fetched
    effects = hears(node, commit(round=2, chain=b"?" * 32))
    assert not facts(StateDiverged, effects)
    assert asked(effects)


def test_a_commit_of_another_round_or_from_another_peer_is_ignored() -> None:
    node = exchange()
    assert hears(node, commit(round=1)) == []
    assert hears(node, commit(), peer="n2") == []


def test_a_node_that_is_too_far_behind_fetches_the_state() -> None:
    node = exchange(round=3)
    assert told(hears(node, Behind(round=9)), "checkpoint") == [FetchState()]
    assert not told(hears(node, Behind(round=3)), "checkpoint")
    assert not told(hears(node, Behind(round=9), peer="n2"), "checkpoint")


def test_a_new_outer_state_drops_what_no_one_needs_and_abandons_the_rest() -> None:
    node, _ = planned()
    effects = node.handle(3.0, StateAt(round=1, digest=bytes(32)))
    assert of(Forget, effects) == [Forget(means_before=0, contributions_before=1)]
    assert of(CancelFetches, effects)
    assert fetched(node, "n0", key("contribution", 1)) == []
    assert node.handle(3.0, StateAt(round=1, digest=bytes(32))) == []


def test_a_mean_with_who_is_in_it_counts_by_its_digest_alone() -> None:
    node = exchange()
    hears(node, commit())
    for chunk in range(3):
        head = ChunkInfo(digest=info(chunk).digest, contributors=bitmap((0, 1)), total_weight=3)
        effects = node.handle(2.0, Fetched(peer="n0", key=mean(chunk), info=head))
    assert told(effects, "training")


def test_a_leader_believes_no_commit_that_comes_under_its_own_name() -> None:
    """Somebody has a copy of its key."""
    node = exchange("n0")
    assert hears(node, commit(), peer="n0") == []
    assert hears(node, plan(), peer="n0") == []


def test_a_contributor_that_gets_wrong_means_twice_fetches_the_state() -> None:
    node, _ = planned()
    complete(node)
    assert asked(hears(node, commit(digest=b"?" * 32)))
    assert told(follow(node), "checkpoint") == [FetchState()]


def test_a_plan_that_counts_on_an_earlier_start_of_this_node_does_not_use_up_its_progress() -> None:
    node = exchange("n2")
    hears(node, plan())
    for peer in ("n0", "n1"):
        fetched(node, peer, key("contribution", 2))
    node.handle(2.1, Reduced(key=mean(2), info=info(2)))
    fetched(node, "n0", mean(0))
    fetched(node, "n1", mean(1))
    assert told(hears(node, commit()), "training") == [MeansCommitted(round=0, epoch=1, attempt=0, position=-1)]
