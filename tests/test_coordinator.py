"""Every rule of the leader's part of a round, by pure calls."""

from __future__ import annotations

from prime_async.machines.coordinator import Coordinator
from prime_async.machines.facts import OwnersLost, RoundTakenOver, StateDiverged, WaitingForMembers
from prime_async.machines.fragments import Fragments
from prime_async.machines.views import Views
from prime_async.machines.vocabulary import CommitReady, Effect, FoundUnusable, Send, Weighed
from prime_async.messages import (
    FIRST_CHAIN,
    AskView,
    Behind,
    Commit,
    Have,
    Member,
    Open,
    Plan,
    Rate,
    Ready,
    Turn,
    Unusable,
    View,
    bitmap,
    next_chain,
)
from tests.machine_harness import facts, full_member, member, sent, told, view

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32
N0, N1, N2, N3 = (full_member(f"n{i}") for i in range(4))
THREE = view(3, N0, N1, N2)
ALL = ("n0", "n1", "n2")
FIRST = Plan(
    round=0,
    epoch=1,
    attempt=0,
    view=3,
    contributors=bitmap((0, 1, 2)),
    weights=(5, 5, 5),
    turns=(Turn(epoch=1, attempt=0),),
)


class Leader:
    """A coordinator with a clock, which is given messages as members send them."""

    def __init__(
        self, at: View = THREE, round: int = 0, min_members: int = 1, straggler: float = 0.0, me: str = "n0"
    ) -> None:
        self.machine = Coordinator(
            me=me, fragments=Fragments(3), min_members=min_members, straggler_timeout_s=straggler, views=Views()
        )
        self.now = 0.0
        self.view(at)
        out: list[Effect] = []
        self.machine.on_state(self.now, round, out)

    def view(self, at: View) -> list[Effect]:
        out: list[Effect] = []
        self.machine.views.keep(at)
        self.machine.on_view(self.now, at, out)
        return out

    def state(self, round: int) -> list[Effect]:
        out: list[Effect] = []
        self.machine.on_state(self.now, round, out)
        return out

    def open(self, peer: str, plan: Plan | None = None, round: int = 0, epoch: int = 1) -> list[Effect]:
        out: list[Effect] = []
        message = Open(epoch=epoch, round=round, incarnation=1, plan=plan)
        self.machine.on_open(self.now, peer, message, out)
        return out

    def ready(
        self, peer: str, round: int = 0, weight: int = 5, incarnation: int = 1, rejected: int = 0
    ) -> list[Effect]:
        out: list[Effect] = []
        ready = Ready(round=round, weight=weight, incarnation=incarnation, rejected=rejected)
        self.machine.on_ready(self.now, peer, ready, out)
        return out

    def have(
        self,
        peer: str,
        digest: bytes = A,
        attempt: int = 0,
        epoch: int = 1,
        incarnation: int = 1,
        received_per_s: int = 0,
        rates: tuple[Rate, ...] = (),
        safe: bool = True,
    ) -> list[Effect]:
        out: list[Effect] = []
        message = Have(
            round=0,
            epoch=epoch,
            attempt=attempt,
            state=bytes(32),
            digest=digest,
            incarnation=incarnation,
            received_per_s=received_per_s,
            rates=rates,
            safe=safe,
        )
        self.machine.on_have(self.now, peer, message, out)
        return out

    def unusable(
        self, peer: str, who: tuple[int, ...] = (0, 1, 2), attempt: int = 0, incarnation: int = 1
    ) -> list[Effect]:
        out: list[Effect] = []
        message = Unusable(round=0, epoch=1, attempt=attempt, contributors=bitmap(who), incarnation=incarnation)
        self.machine.on_unusable(peer, message, out)
        return out

    def tick(self, now: float) -> list[Effect]:
        self.now = now
        out: list[Effect] = []
        self.machine.on_tick(now, out)
        return out


def opened(at: View = THREE, *, min_members: int = 1, straggler: float = 0.0) -> Leader:
    """A leader that knows that nothing is open."""
    leader = Leader(at, min_members=min_members, straggler=straggler)
    for voter in at.voters:
        leader.open(voter.id)
    return leader


def planned(at: View = THREE) -> Leader:
    leader = opened(at)
    for trainer in at.trainers:
        leader.ready(trainer.id)
    return leader


def plan(effects: list[Effect]) -> Plan | None:
    return next((m for _, m in sent(effects, Plan)), None)


def commit(effects: list[Effect]) -> Commit | None:
    return next((e.commit for e in told(effects, "membership") if isinstance(e, CommitReady)), None)


def made(effects: list[Effect]) -> Plan:
    found = plan(effects)
    assert found is not None
    return found


# --- the first plan -------------------------------------------------------------------------------------------------


def test_a_round_is_planned_when_every_trainer_is_ready() -> None:
    leader = opened()
    assert leader.ready("n0") == []
    assert leader.ready("n0") == []
    assert leader.ready("n1") == []
    assert sent(leader.ready("n2"), Plan) == [(peer, FIRST) for peer in ALL]


def test_a_witness_is_not_waited_for() -> None:
    leader = opened(view(3, N0, N1, full_member("n2", witness=True)))
    leader.ready("n0")
    assert made(leader.ready("n1")).contributors == bitmap((0, 1))


def test_weight_zero_is_no_contribution() -> None:
    leader = opened()
    leader.ready("n0")
    leader.ready("n1")
    assert leader.ready("n2", weight=0) == []


def test_a_member_that_is_not_active_is_not_waited_for_and_still_counted() -> None:
    leader = opened(view(3, N0, member("n1", active=False)))
    leader.ready("n1", weight=6)
    assert made(leader.ready("n0")).weights == (5, 6)


def test_nobody_but_the_leader_plans_or_commits() -> None:
    other = Leader(me="n1")
    for peer in ALL:
        assert other.open(peer) == []
        assert other.ready(peer) == []
        assert other.have(peer) == []


def test_who_is_not_in_the_view_or_started_anew_is_not_heard() -> None:
    leader = planned()
    assert leader.ready("n9") == []
    assert leader.ready("n1", incarnation=2) == []
    leader.have("n0")
    assert leader.have("n1", incarnation=2) == []
    assert leader.have("n9") == []


def test_with_fewer_than_min_members_no_round_is_planned_and_it_is_said_once() -> None:
    leader = opened(min_members=4)
    said = [fact for peer in ALL for fact in facts(WaitingForMembers, leader.ready(peer))]
    said += facts(WaitingForMembers, leader.tick(1.0))
    assert len(said) <= 1
    assert leader.machine.waiting_for == (0, 3)
    leader.view(view(4, N0, N1, N2, N3))
    assert plan(leader.ready("n3")) is not None


def test_without_anybody_who_may_own_chunks_there_is_no_plan() -> None:
    leader = Leader(view(3, member("n0", voter=True), N1))
    leader.open("n0")
    leader.open("n1")
    leader.ready("n0")
    leader.view(view(4, member("n0", voter=True)))
    assert leader.machine.attempt is None
    assert plan(leader.view(view(5, N0))) is not None


def test_a_member_that_is_gone_is_not_waited_for() -> None:
    leader = opened()
    leader.ready("n0")
    leader.ready("n1")
    assert made(leader.view(view(4, N0, N1))).weights == (5, 5)


def test_a_repeated_ready_gets_the_plan_again() -> None:
    leader = planned()
    assert sent(leader.ready("n2"), Plan) == [("n2", FIRST)]
    assert sent(leader.ready("n2", weight=0), Plan) == [("n2", FIRST)]


# --- stragglers -----------------------------------------------------------------------------------------------------


def test_stragglers_are_waited_for_so_long_after_more_than_half_are_ready() -> None:
    leader = opened(straggler=5.0)
    leader.ready("n0")
    assert leader.machine.next_at is None
    leader.now = 2.0
    leader.ready("n1")
    assert leader.machine.next_at == 7.0
    assert plan(leader.tick(6.9)) is None
    assert made(leader.tick(7.0)).contributors == bitmap((0, 1))
    assert leader.machine.next_at is None
    assert sent(leader.ready("n2"), Plan) == [("n2", leader.machine.attempt.plan)]  # type: ignore[union-attr]


def test_without_a_straggler_timeout_all_are_waited_for() -> None:
    leader = opened()
    leader.ready("n0")
    leader.ready("n1")
    assert leader.machine.next_at is None
    assert plan(leader.tick(1e9)) is None


def test_a_round_never_does_without_min_members() -> None:
    leader = opened(straggler=5.0, min_members=3)
    leader.ready("n0")
    leader.ready("n1")
    assert leader.machine.next_at is None


def test_the_time_of_the_stragglers_begins_again_if_those_that_were_ready_leave() -> None:
    leader = opened(view(3, N0, N1, N2, N3), straggler=5.0)
    for peer in ALL:
        leader.ready(peer)
    leader.view(view(4, N0, N1, full_member("n2", incarnation=2), N3))
    assert leader.machine.next_at is None
    leader.now = 4.0
    leader.ready("n2", incarnation=2)
    assert leader.machine.next_at == 9.0


# --- contributions that cannot be used ------------------------------------------------------------------------------


def rejected(id: str, times: int = 1) -> Member:
    return full_member(id, rejected=times)


def test_what_an_owner_cannot_use_is_told_to_membership() -> None:
    found = [FoundUnusable(peer=peer, incarnation=1, round=0, times=1) for peer in ("n0", "n2")]
    assert told(planned().unusable("n1", (0, 2, 9)), "membership") == found


def test_nobody_is_rejected_for_the_word_of_who_owns_nothing_or_goes_by_another_plan() -> None:
    leader = planned(view(3, N0, N1, N2, full_member("n3", witness=True)))
    leader.view(view(4, N0, N1, full_member("n2", incarnation=2)))
    assert leader.unusable("n1", attempt=0) == [Send(peer="n1", message=leader.machine.attempt.plan)]  # type: ignore[union-attr]
    assert leader.unusable("n2", attempt=1, incarnation=2) == []
    assert leader.unusable("n1", attempt=1, incarnation=7) == []
    assert opened().unusable("n1") == []


def test_a_round_whose_contributions_are_all_rejected_waits_for_others() -> None:
    """A repeated ready of what was rejected is none."""
    leader = planned()
    assert plan(leader.view(view(4, rejected("n0"), rejected("n1"), rejected("n2")))) is None
    assert leader.machine.attempt is None
    assert leader.ready("n0") == []
    for peer in ("n0", "n1"):
        assert plan(leader.ready(peer, rejected=1, weight=3)) is None
    again = made(leader.ready("n2", rejected=1, weight=3))
    assert (again.attempt, again.view, again.weights) == (1, 4, (3, 3, 3))
    assert again.turns == (Turn(epoch=1, attempt=1),)


def test_with_a_contributor_left_the_plan_stays() -> None:
    """The owners leave out who was rejected."""
    leader = planned()
    assert plan(leader.view(view(4, rejected("n0"), N1, rejected("n2")))) is None
    assert leader.machine.attempt is not None


def test_a_new_leader_does_not_carry_on_what_is_rejected() -> None:
    """It knows that from the view."""
    at = view(4, rejected("n0"), rejected("n1"), rejected("n2"), epoch=2)
    leader = Leader(at)
    leader.machine.views.keep(THREE)
    leader.open("n0", FIRST, epoch=2)
    assert plan(leader.open("n1", FIRST, epoch=2)) is None or leader.machine.attempt is None
    leader.tick(1.0)
    assert leader.machine.attempt is None


# --- owners and contributors that are lost --------------------------------------------------------------------------


def test_the_chunks_of_an_owner_that_leaves_go_to_others_under_the_next_attempt() -> None:
    leader = planned()
    effects = leader.view(view(4, N0, N1))
    turns = (Turn(epoch=1, attempt=0), Turn(epoch=1, attempt=1, lost=bitmap((2,))))
    again = made(effects)
    assert (again.attempt, again.view, again.contributors, again.turns) == (1, 3, FIRST.contributors, turns)
    assert [f.peers for f in facts(OwnersLost, effects)] == [("n2",)]


def test_an_owner_that_started_anew_is_lost() -> None:
    again = made(planned().view(view(4, N0, N2, full_member("n1", incarnation=2))))
    assert again.turns[1:] == (Turn(epoch=1, attempt=1, lost=bitmap((1,))),)


def test_two_owners_lost_one_after_the_other_are_two_turns() -> None:
    leader = planned(view(3, N0, N1, N2, N3))
    leader.view(view(4, N0, N1, N3))
    assert made(leader.view(view(5, N0, N3))).turns == (
        Turn(epoch=1, attempt=0),
        Turn(epoch=1, attempt=1, lost=bitmap((2,))),
        Turn(epoch=1, attempt=2, lost=bitmap((1,))),
    )


def test_an_owner_that_comes_back_stays_lost_and_nothing_is_planned_for_it() -> None:
    leader = planned()
    leader.view(view(4, N0, N1))
    assert plan(leader.view(view(5, N0, N1, N2))) is None


def test_a_contributor_that_owns_nothing_may_leave_without_another_attempt() -> None:
    leader = planned(view(3, N0, member("n1")))
    assert plan(leader.view(view(4, N0))) is None


def test_a_newcomer_means_no_other_attempt() -> None:
    assert planned().view(view(4, *THREE.members, member("n3", active=False))) == []


def test_what_can_be_committed_is_committed_before_owners_are_replaced() -> None:
    leader = planned(view(3, N0, N1, N2, N3))
    leader.have("n0")
    leader.have("n1")
    effects = leader.view(view(4, N0, N1, N3))
    assert commit(effects) is not None
    assert plan(effects) is None


def test_with_no_owner_left_the_round_is_planned_from_the_beginning() -> None:
    leader = planned(view(3, member("n0", voter=True), N1))
    again = made(leader.view(view(4, N0)))
    assert (again.view, again.contributors, again.turns) == (4, bitmap((0,)), (Turn(epoch=1, attempt=1),))


def test_with_no_contributor_left_the_round_waits_for_new_ones() -> None:
    leader = Leader(view(3, full_member("n0", witness=True), N1))
    leader.open("n0")
    leader.open("n1")
    leader.ready("n1")
    leader.view(view(4, full_member("n0", witness=True), full_member("n1", incarnation=2)))
    assert leader.machine.attempt is None
    assert made(leader.ready("n1", incarnation=2)).attempt == 1


# --- commits --------------------------------------------------------------------------------------------------------


def test_means_are_ready_to_be_committed_when_a_quorum_holds_the_same() -> None:
    leader = planned()
    assert leader.have("n1") == []
    assert leader.have("n1") == []  # the same member twice is one
    assert leader.have("n0", B) == []
    assert commit(leader.have("n2")) == Commit(
        round=0, epoch=1, attempt=0, state=bytes(32), digest=A, chain=next_chain(FIRST_CHAIN, bytes(32), A), view=3
    )


def test_half_is_not_enough_even_with_the_leader() -> None:
    """Defect: the leader of two committed alone, died, and with it the means."""
    leader = planned(view(3, N0, N1))
    assert commit(leader.have("n0")) is None
    assert commit(leader.have("n1")) is not None


def test_members_without_a_vote_do_not_count() -> None:
    leader = planned(view(3, N0, N1, N2, *(member(f"n{i}", active=False) for i in (3, 4))))
    assert leader.have("n3") == []
    assert leader.have("n4") == []
    assert leader.have("n0") == []
    assert commit(leader.have("n1")) is not None


def test_means_in_memory_alone_do_not_count_while_a_majority_could_have_them_on_disk() -> None:
    leader = planned()
    leader.have("n0", safe=False)
    assert commit(leader.have("n1")) is None
    assert commit(leader.have("n2")) is not None


def test_with_most_disks_full_means_are_committed_once_every_active_voter_holds_them() -> None:
    leader = planned(view(3, N0, N1, N2, full_member("n3", witness=True)))
    for peer in ("n0", "n1"):
        assert commit(leader.have(peer, safe=False)) is None
    assert commit(leader.have("n2")) is None
    assert commit(leader.have("n3", safe=False)) is not None


def test_with_most_disks_full_nobody_waits_for_a_voter_that_takes_no_part() -> None:
    """One that was started again, say: it cannot hold what it missed."""
    leader = planned(view(3, N0, N1, member("n2", voter=True, active=False)))
    leader.have("n0", safe=False)
    assert commit(leader.have("n1", safe=False)) is not None


def test_what_can_be_committed_is_told_again_until_a_view_shows_it() -> None:
    leader = planned()
    leader.have("n0")
    first = commit(leader.have("n1"))
    assert leader.have("n1") == []
    assert commit(leader.tick(1.0)) == first
    assert commit(leader.view(view(4, N0, N1, N2))) == first
    assert commit(leader.view(view(5, N0, N1, N2, commit=first))) is None
    assert commit(leader.tick(2.0)) is None


def test_a_have_of_an_earlier_attempt_is_answered_with_the_plan_and_not_counted() -> None:
    leader = planned(view(3, N0, N1, N2, N3))
    leader.view(view(4, N0, N1, N3))
    newest = leader.machine.attempt
    assert newest is not None
    assert sent(leader.have("n1", attempt=0), Plan) == [("n1", newest.plan)]
    assert leader.have("n0", attempt=1) == []
    assert commit(leader.have("n3", attempt=1)) is not None


def test_a_have_of_an_earlier_start_is_void_once_the_view_says_so() -> None:
    leader = planned()
    leader.have("n1")
    leader.view(view(4, N0, N2, full_member("n1", incarnation=2)))
    leader.have("n2", attempt=1)
    assert commit(leader.have("n1", attempt=1, incarnation=1)) is None


def test_without_a_quorum_for_any_digest_the_round_is_planned_from_the_beginning() -> None:
    leader = planned()
    leader.have("n0", A)
    leader.have("n1", B)
    effects = leader.have("n2", C)
    again = made(effects)
    assert (again.attempt, again.turns, again.contributors) == (1, (Turn(epoch=1, attempt=1),), bitmap((0, 1, 2)))
    assert facts(StateDiverged, effects)
    assert leader.machine.haves == {}


def test_the_commits_form_a_chain() -> None:
    before = Commit(round=4, epoch=1, attempt=0, state=bytes(32), digest=B, chain=C, view=2)
    leader = Leader(view(3, N0, commit=before), round=5)
    leader.open("n0", round=5)
    leader.ready("n0", 5)
    out: list[Effect] = []
    leader.machine.on_have(0.0, "n0", Have(round=5, epoch=1, attempt=0, state=bytes(32), digest=A, incarnation=1), out)
    made_now = commit(out)
    assert made_now is not None
    assert made_now.chain == next_chain(C, bytes(32), A)


def test_who_is_further_behind_than_the_last_commit_is_told() -> None:
    before = Commit(round=4, epoch=1, attempt=0, state=bytes(32), digest=B, chain=C, view=2)
    leader = Leader(view(3, N0, N1, commit=before), round=5)
    assert sent(leader.ready("n1", 3), Behind) == [("n1", Behind(round=5))]
    assert leader.ready("n1", 4) == []  # its view will show it the commit


def test_members_may_be_ready_for_the_next_round_before_the_leader_is() -> None:
    leader = planned(view(3, N0, N1))
    leader.have("n1")
    done = commit(leader.have("n0"))
    leader.view(view(4, N0, N1, commit=done))
    leader.ready("n1", 1)
    assert leader.ready("n1", 2) == []  # nobody can be two rounds ahead
    leader.ready("n0", 1)
    assert leader.machine.attempt is None
    assert made(leader.state(1)).round == 1


# --- a new leader ---------------------------------------------------------------------------------------------------

SECOND = view(7, N0, N1, N2, epoch=2)


def test_a_new_leader_plans_nothing_before_a_quorum_has_told_what_it_knows() -> None:
    leader = Leader(SECOND)
    leader.open("n0", epoch=2)
    for peer in ALL:
        assert plan(leader.ready(peer)) is None
    assert made(leader.open("n1", epoch=2)).epoch == 2


def test_a_new_leader_carries_on_the_newest_plan_that_it_is_told() -> None:
    leader = Leader(THREE)
    leader.view(SECOND)
    newer = Plan(
        round=0,
        epoch=1,
        attempt=1,
        view=3,
        contributors=FIRST.contributors,
        weights=FIRST.weights,
        turns=(*FIRST.turns, Turn(epoch=1, attempt=1, lost=bitmap((2,)))),
    )
    leader.open("n0", FIRST, epoch=2)
    effects = leader.open("n1", newer, epoch=2)
    carried = made(effects)
    assert (carried.epoch, carried.attempt, carried.view, carried.turns) == (2, 0, 3, newer.turns)
    assert (carried.contributors, carried.weights) == (newer.contributors, newer.weights)
    assert [(f.epoch, f.attempt) for f in facts(RoundTakenOver, effects)] == [(1, 1)]


def test_a_new_leader_replaces_the_owners_that_were_lost_with_the_old_one() -> None:
    leader = Leader(THREE, me="n1")
    leader.view(view(7, N1, N2, leader="n1", epoch=2))
    carried = made(leader.open("n1", FIRST, epoch=2))
    assert carried.turns == (*FIRST.turns, Turn(epoch=2, attempt=0, lost=bitmap((0,))))


def test_what_was_told_to_the_leader_of_another_epoch_or_by_an_earlier_start_does_not_count() -> None:
    leader = Leader(view(7, N0, full_member("n1", incarnation=2), N2, epoch=2))
    leader.open("n0", epoch=2)
    leader.open("n1", epoch=2)
    leader.open("n2", epoch=1)
    assert not leader.machine.taken_over


def test_a_plan_of_an_earlier_round_is_not_carried_on() -> None:
    before = Commit(round=0, epoch=1, attempt=0, state=bytes(32), digest=A, chain=B, view=3)
    leader = Leader(view(7, N0, N1, N2, epoch=2, commit=before), round=1)
    leader.open("n0", round=1, epoch=2)
    leader.open("n1", FIRST, round=0, epoch=2)
    assert leader.machine.taken_over
    assert leader.machine.attempt is None


def test_a_new_leader_that_lacks_the_view_of_the_plan_asks_for_it_until_it_comes() -> None:
    leader = Leader(SECOND)
    leader.open("n0", epoch=2)
    assert sent(leader.open("n1", FIRST, epoch=2), AskView) == [("n1", AskView(number=3))]
    assert leader.machine.lacks_view == 3
    assert sent(leader.tick(1.0), AskView) == [("n1", AskView(number=3))]
    leader.machine.views.keep(THREE)
    assert made(leader.tick(2.0)).view == 3


def test_if_the_one_that_knew_the_plan_and_its_view_is_lost_it_is_not_waited_for() -> None:
    leader = Leader(SECOND)
    leader.open("n0", epoch=2)
    leader.open("n1", FIRST, epoch=2)
    leader.open("n2", epoch=2)
    leader.view(view(8, N0, N2, epoch=2))
    assert leader.machine.taken_over
    assert leader.machine.attempt is None


def test_a_new_leader_that_is_behind_does_not_plan_until_it_has_caught_up() -> None:
    before = Commit(round=4, epoch=1, attempt=0, state=bytes(32), digest=A, chain=B, view=3)
    leader = Leader(view(7, N0, N1, epoch=2, commit=before), round=4)
    leader.open("n0", round=4, epoch=2)
    leader.open("n1", round=5, epoch=2)
    leader.ready("n1", 5)
    leader.ready("n0", 5)
    assert leader.machine.attempt is None
    assert made(leader.state(5)).round == 5


def test_who_leads_no_more_forgets_what_it_planned() -> None:
    leader = planned()
    leader.view(view(7, N0, N1, N2, leader="n1", epoch=2))
    assert leader.machine.attempt is None
    assert leader.ready("n2") == []


# --- bandwidth ------------------------------------------------------------------------------------------------------


def test_after_a_commit_the_shares_follow_what_was_measured() -> None:
    leader = planned()
    slow = (Rate(position=0, bytes_per_s=500), Rate(position=2, bytes_per_s=50))
    leader.have("n1", received_per_s=1000, rates=slow)
    done = commit(leader.have("n0", received_per_s=1000, rates=(Rate(position=1, bytes_per_s=500),)))
    [weighed] = [e for e in told(leader.view(view(4, *_all(), commit=done)), "membership") if isinstance(e, Weighed)]
    assert weighed.weights["n2"] == 0
    assert weighed.weights["n0"] == weighed.weights["n1"] == 500


def _all() -> tuple[Member, ...]:
    return THREE.members
