"""Every rule of a member's part of a round, by pure calls."""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3
from msgspec.structs import replace

from prime_async.machines.attempt import Attempt
from prime_async.machines.exchange import Exchange, ExchangeSettings
from prime_async.machines.facts import (
    ChunksReassigned,
    ChunksRedone,
    ContributionRejected,
    ContributorLeftOut,
    RoundIgnored,
    RoundPlanned,
    StateDiverged,
)
from prime_async.machines.vocabulary import (
    AdoptMean,
    CancelFetch,
    CancelFetches,
    ContributionFixed,
    Effect,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    FetchFault,
    FetchState,
    Forget,
    Heard,
    MeansCommitted,
    MeansStored,
    Reduce,
    Reduced,
    Rejected,
    Settle,
    StateAt,
    StoreMeans,
    Tick,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import (
    FIRST_CHAIN,
    Ask,
    AskView,
    Behind,
    ChunkInfo,
    ChunkKey,
    Commit,
    Have,
    Held,
    HeldMean,
    Message,
    Open,
    Plan,
    Ready,
    Turn,
    Unusable,
    View,
    ViewUpdate,
    bitmap,
    next_chain,
)
from tests.machine_harness import LINEAGE, facts, full_member, info, key, member, of, sent, told, view

N0, N1, N2 = (full_member(f"n{i}") for i in range(3))
THREE = view(3, N0, N1, N2)
"""With three chunks: n0 owns chunk 0, n1 owns chunk 1, n2 owns chunk 2."""
ALL_DIGESTS = blake3(b"".join(info(c).digest for c in range(3))).digest()
FIRST = Turn(epoch=1, attempt=0)
STATE = bytes(32)
"""Digest of everybody's outer state."""


class OnDisk(Exchange):
    """Its means are on disk as soon as it asks for that."""

    def handle(self, now: float, event: Event) -> list[Effect]:
        out = super().handle(now, event)
        for store in of(StoreMeans, out):
            out.remove(store)
            stored = MeansStored(round=store.round, epoch=store.epoch, attempt=store.attempt)
            out += super().handle(now, stored)
        return out


def exchange(me: str = "n1", chunks: int = 3, at: View = THREE, round: int = 0, window: int = 4) -> Exchange:
    settings = ExchangeSettings(me=me, chunk_count=chunks, chunk_window=window, mean_window=window)
    node = OnDisk(settings)
    node.handle(0.0, ViewChanged(view=at))
    node.handle(0.0, StateAt(round=round, digest=bytes(32), chain=FIRST_CHAIN))
    return node


def plan(
    attempt: int = 0,
    who: tuple[int, ...] = (0, 1, 2),
    view_number: int = 3,
    round: int = 0,
    epoch: int = 1,
    turns: tuple[Turn, ...] = (FIRST,),
) -> Plan:
    return Plan(
        round=round,
        epoch=epoch,
        attempt=attempt,
        view=view_number,
        contributors=bitmap(who),
        weights=tuple(10 * (i + 1) for i in who),
        turns=turns,
    )


def without(position: int, attempt: int = 1) -> Plan:
    """The plan after one owner is lost."""
    return plan(attempt, turns=(FIRST, Turn(epoch=1, attempt=attempt, lost=bitmap((position,)))))


def commit(attempt: int = 0, digest: bytes = ALL_DIGESTS, chain: bytes = FIRST_CHAIN, round: int = 0) -> Commit:
    return Commit(
        round=round,
        epoch=1,
        attempt=attempt,
        state=STATE,
        digest=digest,
        chain=next_chain(chain, STATE, digest),
        view=3,
    )


def commits(node: Exchange, made: Commit, now: float = 3.0, at: View | None = None) -> list[Effect]:
    """The view that shows the commit comes."""
    members = (at or node.view or THREE).members
    return node.handle(now, ViewChanged(view=view(20 + made.round, *members, commit=made)))


def hears(node: Exchange, message: Message, now: float = 1.0, peer: str = "n0") -> list[Effect]:
    return node.handle(now, Heard(peer=peer, message=message))


def fix(node: Exchange, round: int = 0, weight: int = 7) -> list[Effect]:
    return node.handle(0.5, ContributionFixed(round=round, weight=weight))


def planned(me: str = "n1") -> tuple[Exchange, list[Effect]]:
    """A node whose contribution is fixed and which has just heard the plan."""
    node = exchange(me)
    fix(node)
    return node, hears(node, plan(), peer="n0")


def fetched(node: Exchange, peer: str, what: ChunkKey, fill: int | None = None, now: float = 2.0) -> list[Effect]:
    of_all = ChunkInfo(
        digest=info(what.chunk if fill is None else fill).digest, contributors=bitmap((0, 1, 2)), total_weight=60
    )
    return node.handle(now, Fetched(peer=peer, key=what, info=of_all, size=10))


def failed(node: Exchange, peer: str, what: ChunkKey, fault: FetchFault, now: float = 2.0) -> list[Effect]:
    return node.handle(now, FetchFailed(peer=peer, key=what, fault=fault))


def mean(chunk: int, attempt: int = 0, round: int = 0, epoch: int = 1) -> ChunkKey:
    return key("mean", chunk, round=round, epoch=epoch, attempt=attempt)


def settled(chunk: int, round: int = 0) -> ChunkKey:
    return key("mean", chunk, round=round)


def asked(effects: list[Effect]) -> list[tuple[str, str, int]]:
    return [(e.peer, e.key.kind, e.key.chunk) for e in of(Fetch, effects)]


def complete(node: Exchange) -> list[Effect]:
    """n1 has everything: its own chunk reduced, the means of the others fetched."""
    out = [*fetched(node, "n0", key("contribution", 1)), *fetched(node, "n2", key("contribution", 1))]
    out += node.handle(2.1, Reduced(key=mean(1), info=info(1)))
    return [*out, *fetched(node, "n0", mean(0)), *fetched(node, "n2", mean(2))]


def haves(effects: list[Effect]) -> list[tuple[str, int, int, bytes]]:
    return [(peer, m.epoch, m.attempt, m.digest) for peer, m in sent(effects, Have)]


# --- ready ----------------------------------------------------------------------------------------------------------


def test_a_fixed_contribution_is_told_to_the_leader_until_the_plan_comes() -> None:
    node = exchange()
    assert sent(fix(node), Ready) == [("n0", Ready(round=0, weight=7, incarnation=1))]
    assert sent(node.handle(1.5, Tick()), Ready) == [("n0", Ready(round=0, weight=7, incarnation=1))]
    assert sent(node.handle(1.6, Tick()), Ready) == []


def test_a_node_without_a_contribution_asks_with_weight_zero() -> None:
    node = exchange()
    assert sent(node.handle(1.0, Tick()), Ready) == [("n0", Ready(round=0, weight=0, incarnation=1))]


def test_a_contribution_to_another_round_is_not_told() -> None:
    assert fix(exchange(round=4), round=3) == []


def test_a_new_leader_is_told_at_once() -> None:
    node = exchange()
    fix(node)
    effects = node.handle(0.6, ViewChanged(view=view(4, N2, N1, leader="n2", epoch=2)))
    assert sent(effects, Ready) == [("n2", Ready(round=0, weight=7, incarnation=1))]


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
        node = exchange(me, chunks=8, at=view(3, N0, N1), window=1)
        fix(node)
        if me == "n0":
            effects = hears(node, Ready(round=0, weight=5, incarnation=1), peer="n1")
        else:
            effects = hears(node, plan(who=(0, 1)))
        kinds = [(peer, kind) for peer, kind, _ in asked(effects)]
        assert kinds == [(other, "contribution"), (other, "mean")]


def test_an_inactive_contributor_owns_nothing() -> None:
    at = view(3, N0, full_member("n1", active=False), N2)
    node = exchange(at=at)
    fix(node)
    assert {kind for _, kind, _ in asked(hears(node, plan()))} == {"mean"}


# --- who is left out ------------------------------------------------------------------------------------------------


def test_a_contributor_that_leaves_the_view_is_left_out_of_what_is_open() -> None:
    node, _ = planned()
    fetched(node, "n0", key("contribution", 1))
    effects = node.handle(3.0, ViewChanged(view=view(4, N0, N1)))
    [reduce] = of(Reduce, effects)
    assert (reduce.contributors, reduce.weights) == (("n0", "n1"), (10, 20))
    assert reduce.members == ("n0", "n1", "n2")  # positions are those of the plan's view
    assert [(f.peer, f.chunk) for f in facts(ContributorLeftOut, effects)] == [("n2", 1)]


def test_a_contributor_that_started_anew_has_left() -> None:
    node, _ = planned()
    fetched(node, "n0", key("contribution", 1))
    again = full_member("n2", active=False, incarnation=2)
    [reduce] = of(Reduce, node.handle(3.0, ViewChanged(view=view(4, N0, N1, again))))
    assert reduce.contributors == ("n0", "n1")


def test_a_contribution_that_came_before_its_contributor_died_counts() -> None:
    node, _ = planned()
    fetched(node, "n2", key("contribution", 1))
    node.handle(3.0, ViewChanged(view=view(4, N0, N1)))
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
    assert of(Reduce, node.handle(2.7, ViewChanged(view=view(4, N0, N1))))
    assert asked(node.handle(3.1, Tick())) == []


def test_what_the_reduction_left_out_is_reported() -> None:
    node, _ = planned()
    fetched(node, "n0", key("contribution", 1))
    fetched(node, "n2", key("contribution", 1))
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
    node.handle(2.6, ViewChanged(view=view(4, N0, N1)))
    failed(node, "n2", mean(2), "unreachable", now=2.7)
    assert asked(node.handle(3.2, Tick())) == [("n0", "mean", 2)]


def test_who_holds_all_means_says_so_until_the_commit_comes() -> None:
    node, _ = planned()
    have = ("n0", 1, 0, ALL_DIGESTS)
    assert haves(complete(node)) == [have]
    assert haves(node.handle(4.0, Tick())) == [have]
    commits(node, commit())
    assert haves(node.handle(9.0, Tick())) == []


def test_a_mean_that_is_gone_is_asked_elsewhere() -> None:
    node, _ = planned()
    failed(node, "n0", mean(0), "gone")
    assert asked(node.handle(2.5, Tick())) == [("n2", "mean", 0)]


def test_a_mean_of_nobody_is_not_made_and_those_who_are_there_are_asked_again() -> None:
    node = exchange()  # without a contribution of its own
    hears(node, plan())
    failed(node, "n0", key("contribution", 1), "late")
    effects = failed(node, "n2", key("contribution", 1), "late")
    assert not of(Reduce, effects)
    assert asked(node.handle(2.5, Tick())) == [("n0", "contribution", 1), ("n2", "contribution", 1)]


def test_a_mean_in_which_nobody_was_valid_does_not_count() -> None:
    node, _ = planned()
    fetched(node, "n0", key("contribution", 1))
    fetched(node, "n2", key("contribution", 1))
    node.handle(2.1, Reduced(key=mean(1), info=info(1), left_out=("n0", "n1", "n2")))
    assert not node.chunks.means.holds(1, (1, 0))
    assert asked(node.handle(2.6, Tick())) == []


# --- contributions that cannot be used ------------------------------------------------------------------------------

EVERYBODY = Unusable(round=0, epoch=1, attempt=0, contributors=bitmap((0, 1, 2)), incarnation=1)


def hopeless() -> tuple[Exchange, list[Effect]]:
    """n1 can use nobody's contribution to its chunk."""
    node, _ = planned()
    fetched(node, "n0", key("contribution", 1))
    failed(node, "n2", key("contribution", 1), "invalid")
    node.handle(2.1, Reduced(key=mean(1), info=info(1), left_out=("n0", "n1")))
    return node, node.handle(2.6, Tick())


def test_the_leader_is_told_of_whom_a_chunk_can_use_nothing_until_they_are_rejected() -> None:
    """Defect: their bytes were asked for again and again, for ever."""
    node, effects = hopeless()
    assert asked(effects) == []
    assert sent(effects, Unusable) == [("n0", EVERYBODY)]
    assert sent(node.handle(2.7, ViewChanged(view=view(4, N0, N1, N2))), Unusable) == []
    assert sent(node.handle(3.6, Tick()), Unusable) == [("n0", EVERYBODY)]
    rejected = (full_member(f"n{i}", rejected=1) for i in range(3))
    node.handle(3.7, ViewChanged(view=view(5, *rejected)))
    assert sent(node.handle(4.7, Tick()), Unusable) == []


def test_who_was_late_is_asked_again_and_who_cannot_be_used_is_not() -> None:
    """The one may come, the other's bytes stay what they are; the leader is told nothing."""
    node = exchange()  # without a contribution of its own
    hears(node, plan())
    failed(node, "n0", key("contribution", 1), "gone")
    failed(node, "n2", key("contribution", 1), "late")
    effects = node.handle(2.5, Tick())
    assert asked(effects) == [("n2", "contribution", 1)]
    assert not sent(effects, Unusable)
    [reduce] = of(Reduce, fetched(node, "n2", key("contribution", 1), now=3.0))
    assert reduce.contributors == ("n2",)


def test_a_chunk_that_goes_to_another_owner_is_not_complained_about_any_more() -> None:
    node, _ = hopeless()
    node.handle(3.0, ViewChanged(view=view(4, N0, N1, N2)))
    assert not sent(hears(node, without(1), now=3.1), Unusable)
    assert not sent(node.handle(9.0, Tick()), Unusable)


def test_a_node_whose_contribution_is_rejected_tells_the_training_once_and_contributes_under_another_name() -> None:
    node, _ = planned()
    mine = full_member("n1", rejected=1)
    effects = node.handle(3.0, ViewChanged(view=view(4, N0, mine, N2)))
    assert told(effects, "training") == [Rejected(times=1)]
    assert facts(ContributionRejected, effects) == [ContributionRejected(round=0, peer="n1", times=1)]
    assert not told(node.handle(3.1, ViewChanged(view=view(5, N0, mine, N2))), "training")
    assert sent(node.handle(4.1, Tick()), Ready) == [("n0", Ready(round=0, weight=0, incarnation=1, rejected=1))]
    fix(node)  # was on its way from the training
    assert sent(node.handle(5.2, Tick()), Ready) == [("n0", Ready(round=0, weight=0, incarnation=1, rejected=1))]
    effects = node.handle(6.0, ContributionFixed(round=0, weight=9, rejected=1))
    assert sent(effects, Ready) == [("n0", Ready(round=0, weight=9, incarnation=1, rejected=1))]
    effects = hears(node, plan(1, view_number=5, turns=(Turn(epoch=1, attempt=1),)), now=6.1)
    assert [f.key for f in of(Fetch, effects) if f.key.kind == "contribution"] == [key("contribution", 1)] * 2
    effects = [*fetched(node, "n0", key("contribution", 1)), *fetched(node, "n2", key("contribution", 1))]
    [reduce] = of(Reduce, effects)
    assert (reduce.contributors, reduce.rejected) == (("n0", "n1", "n2"), (0, 1, 0))
    assert reduce.inputs["n1"] == key("contribution", 1, attempt=1)


def test_means_of_a_plan_with_the_contribution_that_was_rejected_do_not_count_the_next_one() -> None:
    node, _ = planned()
    complete(node)
    node.handle(3.0, ViewChanged(view=view(4, N0, full_member("n1", rejected=1), N2)))
    node.handle(3.1, ContributionFixed(round=0, weight=9, rejected=1))
    effects = commits(node, commit(), now=3.2)
    [committed] = [e for e in told(effects, "training") if isinstance(e, MeansCommitted)]
    assert committed.position == -1


# --- newer plans ----------------------------------------------------------------------------------------------------


def test_the_chunk_of_n2_goes_to_n0() -> None:
    """What the tests below count on."""
    assert Attempt.of(without(2), THREE, range(3)).assigned[2].owner == "n0"


def heir() -> Exchange:
    """n0, the new owner of chunk 2, under the plan that made it so; n1 leads."""
    node = exchange("n0", at=view(3, N0, N1, N2, leader="n1"))
    fix(node)
    hears(node, plan(), peer="n1")
    node.handle(2.5, ViewChanged(view=view(4, N0, N1, leader="n1")))
    hears(node, without(2), peer="n1")
    return node


def test_a_newer_plan_touches_the_chunks_of_the_lost_and_no_others() -> None:
    node, _ = planned()
    node.handle(2.5, ViewChanged(view=view(4, N0, N1)))
    before = set(node.fetches.under_way)
    effects = hears(node, without(2))
    assert not of(CancelFetches, effects)
    assert [c.key for c in of(CancelFetch, effects)] == [mean(2)]
    assert [(f.peer, f.key) for f in of(Fetch, effects)] == [("n0", mean(2, attempt=1))]
    assert node.fetches.under_way >= {item for item in before if item[1].chunk != 2}


def test_it_is_told_who_does_the_chunks_of_the_lost_again_and_how_long_that_took() -> None:
    node, _ = planned()
    node.handle(2.5, ViewChanged(view=view(4, N0, N1)))
    effects = hears(node, without(2))
    [given] = facts(ChunksReassigned, effects)
    assert (given.chunks, given.lost, given.owners) == (1, ("n2",), ("n0",))
    assert facts(ChunksRedone, fetched(node, "n0", mean(0), now=3.0)) == []
    [redone] = facts(ChunksRedone, fetched(node, "n0", mean(2, attempt=1), now=3.4))
    assert (redone.chunks, redone.lost, redone.owners, redone.seconds) == (1, ("n2",), ("n0",), 2.4)
    assert facts(ChunksRedone, fetched(node, "n0", mean(2, attempt=1), now=3.5)) == []


def test_a_new_owner_asks_everybody_who_is_left_and_makes_it_anew_if_nobody_holds_it() -> None:
    node = heir()
    ask = Ask(round=0, epoch=1, attempt=1, chunks=(2,))
    effects = node.handle(5.0, Tick())
    assert ("n1", ask) in sent(effects, Ask)
    assert ("n2", ask) not in sent(effects, Ask)
    effects = hears(node, Held(round=0, epoch=1, attempt=1), peer="n1")
    assert asked(effects) == [("n1", "contribution", 2)]
    assert sent(node.handle(7.0, Tick()), Ask) == []


def test_a_mean_that_somebody_holds_is_not_made_again() -> None:
    node = heir()
    held = Held(round=0, epoch=1, attempt=1, means=(HeldMean(chunk=2, epoch=1, attempt=0),))
    effects = hears(node, held, peer="n1")
    assert [(f.peer, f.key) for f in of(Fetch, effects)] == [("n1", mean(2))]
    effects = fetched(node, "n1", mean(2), now=4.0)
    assert of(AdoptMean, effects) == [AdoptMean(found=mean(2), key=mean(2, attempt=1))]
    assert not of(Reduce, effects)


def test_a_mean_that_the_new_owner_holds_itself_is_adopted_at_once() -> None:
    node = exchange("n0", at=view(3, N0, N1, N2, leader="n1"))
    fix(node)
    hears(node, plan(), peer="n1")
    fetched(node, "n2", mean(2))
    node.handle(2.5, ViewChanged(view=view(4, N0, N1, leader="n1")))
    hears(node, without(2), peer="n1")
    held = Held(round=0, epoch=1, attempt=1, means=(HeldMean(chunk=2, epoch=1, attempt=0),))
    effects = hears(node, held, peer="n1")
    assert of(AdoptMean, effects) == [AdoptMean(found=mean(2), key=mean(2, attempt=1))]
    assert not of(Fetch, effects)


def test_if_the_only_one_that_holds_a_mean_dies_before_it_gave_it_the_mean_is_made_anew() -> None:
    node = heir()
    held = Held(round=0, epoch=1, attempt=1, means=(HeldMean(chunk=2, epoch=1, attempt=0),))
    hears(node, held, peer="n1")
    effects = node.handle(6.0, ViewChanged(view=view(5, N0, leader="n0", epoch=2)))
    assert mean(2) in [c.key for c in of(CancelFetch, effects)]
    assert [r.key for r in of(Reduce, effects) if r.key.chunk == 2] == [mean(2, attempt=1)]


def test_an_ask_is_answered_with_what_is_held_once_the_plan_is_known() -> None:
    node, _ = planned()
    fetched(node, "n2", mean(2))
    node.handle(2.5, ViewChanged(view=view(4, N0, N1)))
    ask = Ask(round=0, epoch=1, attempt=1, chunks=(0, 2))
    assert sent(hears(node, ask), Held) == []
    hears(node, without(2))
    expected = Held(round=0, epoch=1, attempt=1, means=(HeldMean(chunk=2, epoch=1, attempt=0),))
    assert sent(hears(node, ask), Held) == [("n0", expected)]


def test_an_ask_for_a_round_that_this_node_is_not_at_yet_is_answered_and_lower_plans_refused_then() -> None:
    node = exchange(round=0)
    ask = Ask(round=1, epoch=1, attempt=1, chunks=(2,))
    assert sent(hears(node, ask), Held) == [("n0", Held(round=1, epoch=1, attempt=1))]
    node.handle(2.0, StateAt(round=1, digest=bytes(32), chain=FIRST_CHAIN))
    assert not asked(hears(node, plan(round=1)))
    turns = (FIRST, Turn(epoch=1, attempt=1, lost=bitmap((2,))))
    assert asked(hears(node, plan(1, round=1, turns=turns)))


def test_a_mean_of_a_lower_number_does_not_count_after_a_newer_plan() -> None:
    node, _ = planned()
    node.handle(2.5, ViewChanged(view=view(4, N0, N1)))
    hears(node, without(2))
    fetched(node, "n2", mean(2))
    assert not node.chunks.means.holds(2, (1, 0))


def test_lower_plans_are_refused() -> None:
    node = exchange()
    fix(node)
    assert asked(hears(node, plan(attempt=2, turns=(Turn(epoch=1, attempt=2),))))
    for lower in (plan(attempt=1), plan(attempt=2)):
        assert not of(Fetch, hears(node, lower))
        assert node.newest == (1, 2)


def test_a_plan_of_another_making_begins_all_again() -> None:
    node, _ = planned()
    effects = hears(node, plan(attempt=1, turns=(Turn(epoch=1, attempt=1),)))
    assert of(CancelFetches, effects)
    assert ("n0", "contribution", 1) in asked(effects)
    node.handle(2.0, Reduced(key=mean(1), info=info(1)))
    assert node.chunks.means.held == {}


def test_a_plan_for_another_round_or_from_another_peer_or_of_another_epoch_is_ignored() -> None:
    node = exchange()
    fix(node)
    assert not asked(hears(node, plan(round=1)))
    assert not asked(hears(node, plan(), peer="n2"))
    assert not asked(hears(node, plan(), peer="n1"))  # says a copy of our own key
    assert not asked(hears(node, plan(epoch=2)))


def test_a_plan_that_does_not_fit_its_view_is_reported_and_ignored() -> None:
    for bad in (
        plan(who=(0, 1, 2, 9)),
        Plan(round=0, epoch=1, attempt=0, view=3, contributors=bitmap((0, 1)), weights=(1,), turns=(FIRST,)),
        Plan(round=0, epoch=1, attempt=0, view=3, contributors=b"", weights=(), turns=(FIRST,)),
        plan(turns=(FIRST, FIRST)),
        plan(turns=(Turn(epoch=1, attempt=9),)),
        plan(1, turns=(FIRST, Turn(epoch=1, attempt=1, lost=bitmap((9,))))),
        plan(1, turns=(FIRST, Turn(epoch=1, attempt=1, lost=bitmap((0, 1, 2))))),
    ):
        effects = hears(exchange(), bad)
        assert facts(RoundIgnored, effects)
        assert not asked(effects)


def test_a_plan_of_a_view_that_is_not_known_waits_for_the_view_that_is_asked_for() -> None:
    node = exchange(at=view(7, N0, N1))
    fix(node)
    effects = hears(node, plan())
    assert not asked(effects)
    assert sent(effects, AskView) == [("n0", AskView(number=3))]
    effects = hears(node, ViewUpdate(epoch=1, decided=True, view=THREE))
    assert ("n0", "contribution", 1) in asked(effects)
    assert [f.peer for f in facts(ContributorLeftOut, effects)] == ["n2"]  # it has left since


def test_a_view_that_nobody_asked_for_or_that_is_not_decided_is_not_kept() -> None:
    node = exchange(at=view(7, N0, N1))
    hears(node, ViewUpdate(epoch=1, decided=True, view=THREE))
    hears(node, plan())
    hears(node, ViewUpdate(epoch=1, decided=False, view=THREE))
    hears(node, ViewUpdate(epoch=1, decided=True, view=THREE), peer="n2")
    assert node.views.get(3) is None


def test_a_view_that_is_kept_is_shown_to_who_asks() -> None:
    node, _ = planned()
    for number in range(4, 40):
        node.handle(1.0, ViewChanged(view=view(number, N0, N1)))
    assert len(node.views.known) == 9
    expected = ViewUpdate(epoch=1, decided=True, view=THREE)
    assert sent(hears(node, AskView(number=3)), ViewUpdate) == [("n0", expected)]
    assert sent(hears(node, AskView(number=4)), ViewUpdate) == []


# --- a new leader ---------------------------------------------------------------------------------------------------

NEXT = view(7, N1, N2, leader="n2", epoch=2)


def test_a_new_leader_is_told_the_open_plan_until_it_has_one() -> None:
    node, _ = planned()
    opened = ("n2", Open(epoch=2, round=0, incarnation=1, plan=plan()))
    assert sent(node.handle(5.0, ViewChanged(view=NEXT)), Open) == [opened]
    assert sent(node.handle(6.0, Tick()), Open) == [opened]
    carried = plan(0, epoch=2, turns=(FIRST, Turn(epoch=2, attempt=0, lost=bitmap((0,)))))
    hears(node, carried, peer="n2", now=6.5)
    assert sent(node.handle(7.0, Tick()), Open) == []


def test_under_the_plan_of_a_new_leader_untouched_chunks_keep_their_numbers_and_count() -> None:
    node, _ = planned()
    complete(node)
    node.handle(5.0, ViewChanged(view=view(7, N0, N1, N2, leader="n2", epoch=2)))
    effects = hears(node, plan(0, epoch=2), peer="n2")
    assert not asked(effects)
    assert haves(effects) == [("n2", 2, 0, ALL_DIGESTS)]


def test_who_has_no_vote_tells_a_new_leader_nothing() -> None:
    node = exchange(at=view(3, N0, member("n1"), N2))
    assert sent(node.handle(5.0, ViewChanged(view=view(7, member("n1"), N2, leader="n2", epoch=2))), Open) == []


# --- commits --------------------------------------------------------------------------------------------------------


def settles(effects: Sequence[Effect]) -> list[tuple[int, tuple[int, int], tuple[ChunkKey, ...]]]:
    return [(s.round, (s.epoch, s.attempt), s.exceptions) for s in of(Settle, effects)]


def test_only_committed_means_are_handed_over_and_once() -> None:
    node, _ = planned()
    assert not told(complete(node), "training")
    effects = commits(node, commit())
    assert told(effects, "training") == [MeansCommitted(round=0, position=1, chain=commit().chain)]
    assert settles(effects) == [(0, (1, 0), ())]
    assert not told(node.handle(9.0, Tick()), "training")


def test_settled_means_come_with_what_an_audit_needs() -> None:
    """Given a plan with two of three members' weights, when its means are settled, then these come along."""
    node = exchange()
    fix(node)
    hears(node, plan(who=(0, 2)), peer="n0")
    complete(node)
    (settle,) = of(Settle, commits(node, commit()))
    assert (settle.lineage, settle.members, settle.weights) == (LINEAGE, ("n0", "n1", "n2"), (10, 0, 30))


def test_a_commit_may_come_before_the_means_and_gets_under_way_go_on() -> None:
    node, _ = planned()
    fetched(node, "n0", key("contribution", 1))
    fetched(node, "n2", key("contribution", 1))
    node.handle(2.1, Reduced(key=mean(1), info=info(1)))
    effects = commits(node, commit())
    assert not told(effects, "training")
    assert not of(Fetch, effects)
    fetched(node, "n0", mean(0))
    assert told(fetched(node, "n2", mean(2)), "training") == [MeansCommitted(round=0, position=1, chain=commit().chain)]


def test_what_a_node_had_still_to_make_at_the_commit_it_fetches_as_settled() -> None:
    node, _ = planned()
    effects = commits(node, commit())
    assert [(f.peer, f.key) for f in of(Fetch, effects)] == [("n0", settled(1))]
    fetched(node, "n0", mean(0))
    fetched(node, "n2", mean(2))
    effects = fetched(node, "n0", settled(1))
    assert settles(effects) == [(0, (1, 0), (settled(1),))]


def test_a_mean_whose_owner_dies_after_the_commit_is_fetched_as_settled() -> None:
    node, _ = planned()
    commits(node, commit())
    effects = node.handle(3.0, ViewChanged(view=view(21, N0, N1, commit=commit())))
    assert mean(2) in [c.key for c in of(CancelFetch, effects)]
    assert ("n0", settled(2)) in [(f.peer, f.key) for f in of(Fetch, effects)]


def test_a_settled_mean_is_asked_of_the_leader_first_and_then_of_the_others_a_short_while_each() -> None:
    node = exchange()
    effects = commits(node, commit())
    assert {f.timeout_s for f in of(Fetch, effects)} == {7.5}
    failed(node, "n0", settled(2), "late", now=4.0)
    [again] = of(Fetch, node.handle(4.5, Tick()))
    assert (again.peer, again.key, again.timeout_s) == ("n2", settled(2), 15.0)


def test_when_nobody_gives_the_committed_means_the_state_that_they_lead_to_is_fetched() -> None:
    """Defect: those who held them were gone, and who had joined since did not have them."""
    node = exchange()
    commits(node, commit())
    now, effects = 4.0, list[Effect]()
    for _ in range(8):
        for peer in ("n0", "n2"):
            failed(node, peer, settled(2), "late", now=now)
        now += 1.5
        effects += node.handle(now, Tick())
    assert FetchState() in told(effects, "checkpoint")


def follow(node: Exchange) -> list[Effect]:
    return [effect for chunk in range(3) for effect in fetched(node, "n0", settled(chunk))]


def test_a_node_without_a_contribution_follows_a_commit_without_a_plan() -> None:
    node = exchange()
    assert asked(commits(node, commit())) == [("n0", "mean", 0), ("n0", "mean", 1), ("n0", "mean", 2)]
    assert told(follow(node), "training") == [MeansCommitted(round=0, position=-1, chain=commit().chain)]


def test_a_contributor_that_never_saw_the_plan_learns_its_place_from_the_view_of_the_commit() -> None:
    """Defect: it followed as if it were in none of the means, kept its progress, and contributed it twice."""
    node = exchange(at=view(7, N0, N1, N2))
    fix(node)
    commits(node, commit())
    effects = follow(node)
    assert not told(effects, "training")
    assert sent(effects, AskView) == [("n0", AskView(number=3))]
    assert sent(node.handle(4.0, Tick()), AskView) == [("n2", AskView(number=3))]
    effects = hears(node, ViewUpdate(epoch=1, decided=True, view=THREE), peer="n2")
    assert told(effects, "training") == [MeansCommitted(round=0, position=1, chain=commit().chain)]


def test_a_contributor_that_was_not_in_the_plan_keeps_its_progress() -> None:
    node = exchange("n2")
    fix(node)
    commits(node, commit())
    for chunk in range(3):
        head = ChunkInfo(digest=info(chunk).digest, contributors=bitmap((0, 1)), total_weight=3)
        effects = node.handle(2.0, Fetched(peer="n0", key=settled(chunk), info=head))
    assert told(effects, "training") == [MeansCommitted(round=0, position=-1, chain=commit().chain)]


def test_what_an_earlier_start_of_this_node_contributed_does_not_use_up_its_progress() -> None:
    again = full_member("n1", incarnation=2)
    node = exchange(at=THREE)
    node.handle(0.1, ViewChanged(view=view(4, N0, again, N2)))
    fix(node)
    commits(node, commit())
    assert told(follow(node), "training") == [MeansCommitted(round=0, position=-1, chain=commit().chain)]


def test_who_was_removed_and_taken_in_again_since_it_contributed_still_knows_its_place() -> None:
    node, _ = planned()
    complete(node)
    node.handle(2.5, ViewChanged(view=view(4, N0, full_member("n1", incarnation=2), N2)))
    assert told(commits(node, commit()), "training") == [MeansCommitted(round=0, position=1, chain=commit().chain)]


def test_who_holds_other_means_than_the_committed_ones_fetches_those_from_the_leader() -> None:
    node, _ = planned()
    complete(node)
    right = blake3(b"".join(info(c).digest for c in (0, 9, 2))).digest()
    effects = commits(node, commit(digest=right))
    assert facts(StateDiverged, effects)
    assert asked(effects) == [("n0", "mean", 0), ("n0", "mean", 1), ("n0", "mean", 2)]
    fetched(node, "n0", settled(0))
    fetched(node, "n0", settled(1), fill=9)
    effects = fetched(node, "n0", settled(2))
    assert told(effects, "training") == [MeansCommitted(round=0, position=1, chain=commit(digest=right).chain)]
    assert settles(effects) == [(0, (0, 0), ())]


def test_a_commit_of_an_earlier_plan_takes_what_was_held_under_its_numbers() -> None:
    """The leader died after it had made it known to membership that the first plan's means are held."""
    node, _ = planned()
    complete(node)
    node.handle(2.5, ViewChanged(view=view(4, N0, N1)))
    hears(node, without(2))
    effects = commits(node, commit())
    assert told(effects, "training") == [MeansCommitted(round=0, position=1, chain=commit().chain)]


def test_settled_means_that_differ_from_the_commit_end_in_fetching_the_state_and_are_tried_again_later() -> None:
    node = exchange()
    commits(node, commit(digest=b"?" * 32))
    effects = follow(node) + follow(node)
    assert told(effects, "checkpoint") == [FetchState()]
    assert not asked(node.handle(4.0, Tick()))
    assert asked(node.handle(15.0, Tick()))


def test_a_commit_that_does_not_continue_the_chain_ends_in_fetching_the_state() -> None:
    node, _ = planned()
    complete(node)
    commits(node, commit())
    node.handle(3.0, StateAt(round=1, digest=bytes(32), chain=FIRST_CHAIN))
    effects = commits(node, commit(round=1, chain=b"?" * 32))
    assert facts(StateDiverged, effects)
    assert told(effects, "checkpoint") == [FetchState()]


def test_after_a_state_was_fetched_its_chain_is_gone_on_with() -> None:
    """Defect: a node that had missed a round took the next commit for a forgery, and fetched the state again."""
    node, _ = planned()
    complete(node)
    commits(node, commit())
    node.handle(3.0, StateAt(round=1, digest=bytes(32), chain=commit().chain))
    node.handle(4.0, StateAt(round=2, digest=bytes(32), chain=b"?" * 32))  # fetched
    effects = commits(node, commit(round=2, chain=b"?" * 32))
    assert not facts(StateDiverged, effects)
    assert asked(effects)


def test_a_commit_over_another_outer_state_than_ours_says_that_ours_is_wrong() -> None:
    node, _ = planned()
    complete(node)
    made = replace(commit(), state=b"?" * 32, chain=next_chain(FIRST_CHAIN, b"?" * 32, ALL_DIGESTS))
    effects = commits(node, made)
    [fact] = facts(StateDiverged, effects)
    assert (fact.ours, fact.theirs) == (STATE.hex(), (b"?" * 32).hex())
    assert told(effects, "checkpoint") == [FetchState()]
    assert not told(effects, "training")


def test_means_are_said_to_be_held_when_they_are_on_disk_and_not_before() -> None:
    node = Exchange(ExchangeSettings(me="n1", chunk_count=3))
    node.handle(0.0, ViewChanged(view=THREE))
    node.handle(0.0, StateAt(round=0, digest=STATE, chain=FIRST_CHAIN))
    fix(node)
    hears(node, plan())
    effects = complete(node)
    [store] = of(StoreMeans, effects)
    assert (store.round, store.epoch, store.attempt, store.exceptions) == (0, 1, 0, ())
    assert not sent(effects, Have)
    assert not sent(node.handle(9.0, Tick()), Have)
    stored = node.handle(9.1, MeansStored(round=0, epoch=1, attempt=0))
    [(_, have)] = sent(stored, Have)
    assert (have.state, have.digest, have.safe) == (STATE, ALL_DIGESTS, True)


def test_means_that_a_full_disk_does_not_take_are_said_to_be_in_memory_alone() -> None:
    """Defect: they were said to be safe from a crash."""
    node = Exchange(ExchangeSettings(me="n1", chunk_count=3))
    node.handle(0.0, ViewChanged(view=THREE))
    node.handle(0.0, StateAt(round=0, digest=STATE, chain=FIRST_CHAIN))
    fix(node)
    hears(node, plan())
    complete(node)
    effects = node.handle(9.0, MeansStored(round=0, epoch=1, attempt=0, safe=False))
    assert [(have.digest, have.safe) for _, have in sent(effects, Have)] == [(ALL_DIGESTS, False)]


def test_a_state_that_was_mended_is_said_anew() -> None:
    node, _ = planned()
    complete(node)
    effects = node.handle(3.0, StateAt(round=0, digest=b"?" * 32, chain=FIRST_CHAIN))
    [(_, have)] = sent(effects, Have)
    assert have.state == b"?" * 32


def test_a_node_that_missed_a_whole_commit_fetches_the_state_once() -> None:
    node = exchange()
    assert told(commits(node, commit(round=1)), "checkpoint") == [FetchState()]
    assert not told(node.handle(4.0, Tick()), "checkpoint")


def test_a_node_that_knows_the_commit_of_its_round_goes_on_when_the_run_is_one_ahead_and_no_more() -> None:
    node = exchange()
    commits(node, commit())
    assert not told(commits(node, commit(round=1)), "checkpoint")
    assert told(commits(node, commit(round=2)), "checkpoint") == [FetchState()]


def test_a_node_that_applies_its_round_has_missed_nothing() -> None:
    node, _ = planned()
    complete(node)
    commits(node, commit())
    assert not told(commits(node, commit(round=1)), "checkpoint")


def test_a_node_that_is_told_that_it_is_behind_fetches_the_state() -> None:
    assert told(hears(exchange(round=3), Behind(round=9)), "checkpoint") == [FetchState()]
    assert not told(hears(exchange(round=3), Behind(round=3)), "checkpoint")
    assert not told(hears(exchange(round=3), Behind(round=9), peer="n2"), "checkpoint")


def test_a_new_outer_state_drops_what_no_one_needs_and_abandons_the_rest() -> None:
    node, _ = planned()
    effects = node.handle(3.0, StateAt(round=1, digest=bytes(32), chain=FIRST_CHAIN))
    assert of(Forget, effects) == [Forget(means_before=1, contributions_before=1)]  # it has none of those before
    assert of(CancelFetches, effects)
    assert fetched(node, "n0", key("contribution", 1)) == []
    assert not of(Forget, node.handle(3.0, StateAt(round=1, digest=bytes(32), chain=FIRST_CHAIN)))


def test_who_came_to_a_state_by_its_round_still_gives_the_means_of_it() -> None:
    node, _ = planned()
    complete(node)
    commits(node, commit())
    effects = node.handle(4.0, StateAt(round=1, digest=bytes(32), chain=FIRST_CHAIN))
    assert of(Forget, effects) == [Forget(means_before=0, contributions_before=1)]


def test_a_leader_believes_no_plan_that_comes_under_its_own_name() -> None:
    """Somebody has a copy of its key."""
    node = exchange("n0")
    assert hears(node, plan(), peer="n0") == []


def test_who_fetched_contributions_says_how_fast() -> None:
    node = exchange()
    fix(node)
    hears(node, plan(), now=1.0)
    effects = complete(node)  # its contributions came in the second from 1.0 to 2.0
    [(_, have)] = sent(effects, Have)
    assert have.received_per_s == 20
    assert [(r.position, r.bytes_per_s) for r in have.rates] == [(2, 10), (0, 10)]
