"""Every rule of the leader's part of a round, by pure calls."""

from __future__ import annotations

from prime_async.machines.coordinator import (
    COMMITS_KEPT,
    FIRST_CHAIN,
    Answer,
    Coordinator,
    next_chain,
)
from prime_async.machines.facts import StateDiverged, WaitingForMembers
from prime_async.messages import Behind, Commit, Have, Plan, Ready, ViewUpdate, bitmap
from tests.machine_harness import member, view

A, B = b"a" * 32, b"b" * 32
THREE = view(3, member("n0"), member("n1"), member("n2"))
ALL = ("n0", "n1", "n2")


def coordinator(at: int = 0, min_members: int = 1) -> Coordinator:
    leader = Coordinator(me="n0", chunk_count=3, min_members=min_members)
    leader.on_view(THREE)
    leader.on_state(at)
    return leader


def ready(leader: Coordinator, peer: str, round: int = 0, weight: int = 5) -> list[Answer]:
    return leader.on_ready(peer, Ready(round=round, weight=weight))


def have(leader: Coordinator, peer: str, digest: bytes = A, attempt: int = 0, round: int = 0) -> list[Answer]:
    return leader.on_have(peer, Have(round=round, epoch=1, attempt=attempt, digest=digest))


def planned() -> Coordinator:
    leader = coordinator()
    for peer in ALL:
        ready(leader, peer)
    return leader


def committed() -> Coordinator:
    leader = planned()
    have(leader, "n0")
    have(leader, "n1")
    return leader


def plan(answers: list[Answer]) -> Plan | None:
    return next((m for _, m in answers if isinstance(m, Plan)), None)


def commit(answers: list[Answer]) -> Commit | None:
    return next((m for _, m in answers if isinstance(m, Commit)), None)


def test_a_round_is_planned_when_every_active_member_is_ready() -> None:
    leader = coordinator()
    assert ready(leader, "n0") == []
    assert ready(leader, "n0") == []
    assert ready(leader, "n1", weight=6) == []
    assert ready(leader, "n2", weight=7) == [
        (ALL, Plan(round=0, epoch=1, attempt=0, view=3, contributors=bitmap((0, 1, 2)), weights=(5, 6, 7)))
    ]


def test_weight_zero_is_no_contribution() -> None:
    leader = coordinator()
    ready(leader, "n0")
    ready(leader, "n1")
    assert ready(leader, "n2", weight=0) == []


def test_a_member_that_is_not_active_is_not_waited_for_and_still_counted() -> None:
    leader = Coordinator(me="n0", chunk_count=3, min_members=1)
    leader.on_view(view(3, member("n0"), member("n1", active=False)))
    ready(leader, "n1", weight=6)
    made = plan(ready(leader, "n0"))
    assert made is not None
    assert made.weights == (5, 6)


def test_nobody_but_the_leader_plans_or_commits() -> None:
    member_of_it = Coordinator(me="n1", chunk_count=3, min_members=1)
    member_of_it.on_view(THREE)
    for peer in ALL:
        assert ready(member_of_it, peer) == []
        assert have(member_of_it, peer) == []


def test_who_is_not_in_the_view_is_not_heard() -> None:
    leader = planned()
    assert ready(leader, "n9") == []
    assert have(leader, "n9") == []


def test_with_fewer_than_min_members_no_round_is_planned_and_it_is_said_once() -> None:
    leader = coordinator(min_members=4)
    for peer in ALL:
        assert ready(leader, peer) == []
    assert leader.take_facts() == [WaitingForMembers(round=0, active=3, min_members=4)]
    leader.on_view(view(4, *(member(f"n{i}") for i in range(4))))
    assert plan(ready(leader, "n3")) is not None


def test_a_member_that_is_gone_is_not_waited_for() -> None:
    leader = coordinator()
    ready(leader, "n0")
    ready(leader, "n1")
    made = plan(leader.on_view(view(4, member("n0"), member("n1"))))
    assert made is not None
    assert made.weights == (5, 5)


def test_an_owner_that_leaves_means_another_attempt_with_who_is_left() -> None:
    leader = planned()
    made = plan(leader.on_view(view(4, member("n0"), member("n1"))))
    assert made is not None
    assert (made.attempt, made.view, made.contributors) == (1, 4, bitmap((0, 1)))


def test_an_owner_that_started_anew_means_another_attempt_without_what_it_had() -> None:
    leader = planned()
    again = member("n1", active=False, incarnation=2)
    made = plan(leader.on_view(view(4, member("n0"), member("n2"), again)))
    assert made is not None
    assert (made.attempt, made.contributors) == (1, bitmap((0, 1)))


def test_a_contributor_that_owns_nothing_may_leave_without_another_attempt() -> None:
    leader = Coordinator(me="n0", chunk_count=1, min_members=1)
    leader.on_view(view(3, member("n0"), member("n1")))
    ready(leader, "n0")
    ready(leader, "n1")
    assert leader.on_view(view(4, member("n0"))) == []
    assert leader.plan is not None
    assert leader.plan.attempt == 0


def test_a_newcomer_means_no_other_attempt() -> None:
    leader = planned()
    assert leader.on_view(view(4, *THREE.members, member("n3", active=False))) == []


def test_means_are_committed_when_a_majority_reports_the_same_digest() -> None:
    leader = planned()
    assert have(leader, "n0") == []
    assert have(leader, "n0") == []  # the same member twice is one
    assert have(leader, "n1", digest=B) == []
    expected = Commit(round=0, epoch=1, attempt=0, digest=A, chain=next_chain(FIRST_CHAIN, A))
    assert have(leader, "n2") == [(ALL, expected)]


def test_half_is_no_majority() -> None:
    leader = Coordinator(me="n0", chunk_count=2, min_members=1)
    leader.on_view(view(3, member("n0"), member("n1")))
    ready(leader, "n0")
    ready(leader, "n1")
    assert have(leader, "n0") == []
    assert commit(have(leader, "n1")) is not None


def test_members_without_a_vote_do_not_count() -> None:
    leader = Coordinator(me="n0", chunk_count=2, min_members=1)
    spectators = [member(f"n{i}", active=False) for i in (3, 4)]
    leader.on_view(view(3, member("n0"), member("n1"), member("n2"), *spectators))
    for peer in ALL:
        ready(leader, peer)
    assert have(leader, "n3") == []
    assert have(leader, "n4") == []
    assert have(leader, "n0") == []
    assert commit(have(leader, "n1")) is not None


def test_a_have_of_an_earlier_attempt_is_answered_with_the_plan_and_not_counted() -> None:
    leader = planned()
    leader.on_view(view(4, member("n0"), member("n1")))
    assert plan(have(leader, "n1", attempt=0)) == leader.plan
    assert have(leader, "n0", attempt=1) == []


def test_a_commit_needs_fewer_when_a_voter_is_gone() -> None:
    leader = Coordinator(me="n0", chunk_count=2, min_members=1)
    leader.on_view(view(3, member("n0"), member("n1"), member("n2"), member("n3")))
    for peer in (*ALL, "n3"):
        ready(leader, peer)
    have(leader, "n0")
    assert have(leader, "n1") == []
    answers = leader.on_view(view(4, member("n0"), member("n1"), member("n2")))
    assert commit(answers) is not None


def test_without_a_majority_for_any_digest_the_round_is_planned_again() -> None:
    leader = planned()
    have(leader, "n0", A)
    have(leader, "n1", B)
    made = plan(have(leader, "n2", b"c" * 32))
    assert made is not None
    assert made.attempt == 1
    assert [type(f) for f in leader.take_facts()] == [StateDiverged]
    assert leader.haves == {}


def test_a_repeated_ready_gets_the_plan_again() -> None:
    leader = planned()
    assert ready(leader, "n2") == [(("n2",), leader.plan)]
    assert ready(leader, "n2", weight=0) == [(("n2",), leader.plan)]


def test_a_plan_of_an_older_view_is_repeated_with_that_view() -> None:
    leader = planned()
    leader.on_view(view(4, *THREE.members, member("n3", active=False)))
    assert ready(leader, "n3", weight=0) == [(("n3",), ViewUpdate(view=THREE)), (("n3",), leader.plan)]


def test_who_knows_the_plan_gets_the_commit_alone() -> None:
    leader = committed()
    assert have(leader, "n2") == [(("n2",), leader.commits[0])]


def test_a_contributor_that_may_not_know_the_plan_gets_it_with_the_commit() -> None:
    leader = planned()
    leader.on_view(view(4, member("n0"), member("n1")))
    have(leader, "n0", attempt=1)
    have(leader, "n1", attempt=1)
    leader.on_view(view(5, member("n0"), member("n1"), member("n2", incarnation=2)))
    expected = [
        (("n1",), ViewUpdate(view=view(4, member("n0"), member("n1")))),
        (("n1",), leader.plan),
        (("n1",), leader.commits[0]),
    ]
    assert ready(leader, "n1") == expected
    assert have(leader, "n1", attempt=0) == expected


def test_who_has_no_contribution_gets_the_commit_alone() -> None:
    leader = committed()
    assert ready(leader, "n2", weight=0) == [(("n2",), leader.commits[0])]


def test_the_last_commits_are_kept_and_who_is_further_behind_is_told() -> None:
    leader = coordinator()
    rounds = COMMITS_KEPT + 2
    for number in range(rounds):
        for peer in ALL:
            ready(leader, peer, number)
        for peer in ALL:
            have(leader, peer, round=number)
        leader.on_state(number + 1)
    assert ready(leader, "n1", 0, weight=0) == [(("n1",), Behind(round=rounds))]
    assert ready(leader, "n1", rounds - COMMITS_KEPT, weight=0) == [(("n1",), leader.commits[rounds - COMMITS_KEPT])]
    assert len(leader.committed_plans) == len(leader.commits) == COMMITS_KEPT


def test_the_commits_form_a_chain() -> None:
    leader = committed()
    leader.on_state(1)
    for peer in ALL:
        ready(leader, peer, 1)
    have(leader, "n0", B, round=1)
    made = commit(have(leader, "n1", B, round=1))
    assert made is not None
    assert made.chain == next_chain(next_chain(FIRST_CHAIN, A), B)


def test_a_member_may_be_ready_for_the_next_round_before_the_leader_is() -> None:
    leader = committed()
    assert ready(leader, "n1", 1) == []
    assert ready(leader, "n2", 1) == []
    assert ready(leader, "n1", 2) == []  # nobody can be two rounds ahead
    leader.on_state(1)
    made = plan(ready(leader, "n0", 1))
    assert made is not None
    assert made.round == 1


def test_a_committed_round_is_not_planned_again() -> None:
    leader = committed()
    answers = leader.on_view(view(4, member("n0"), member("n1")))
    assert plan(answers) is None
    assert plan(ready(leader, "n1")) == leader.committed_plans[0][1]
