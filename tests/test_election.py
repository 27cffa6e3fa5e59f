"""How a lost leader is replaced: candidates by pure calls, then machines that lost their leader."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from prime_async.machines.ballot import Ballot, apply_change, change_between, view_digest
from prime_async.machines.election import Candidate, decides
from prime_async.machines.facts import CutOff, LeaderElected, LeaderSilent, MemberLost, SteppedDown
from prime_async.machines.membership import Membership
from prime_async.machines.vocabulary import BallotStored, Effect, Heard, RunAt, StateAt, StoreBallot, Tick
from prime_async.messages import (
    FIRST_CHAIN,
    Accepted,
    Commit,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Outvoted,
    Prepare,
    PreVote,
    Promise,
    Propose,
    Redirect,
    Support,
    View,
    Welcome,
)
from tests.machine_harness import LINEAGE, facts, full_member, member, of, sent, view
from tests.membership_harness import (
    D0,
    TIMEOUT_S,
    accepts,
    beat,
    elect,
    founder,
    full_view,
    give,
    hears,
    hello,
    ids,
    leading,
    machine,
    promise,
    restarted,
    runs_at,
    stored,
    ticks,
)

COMMIT = Commit(round=3, epoch=1, attempt=0, state=bytes(32), digest=bytes(32), chain=bytes(32), view=4)
V5 = full_view(5, "n0", "n1", "n2")
YES = (1,)


def after(at: View, *ids: str, commit: Commit | None = COMMIT) -> View:
    members = tuple(m for m in at.members if m.id in ids) if ids else at.members
    return apply_change(at, change_between(at, members, 1, "n0", commit))


V6 = after(V5)  # may be decided or not
V5_OF_3 = stored(V5)

# --- a candidate ----------------------------------------------------------------------------------------------------


def candidate(ballot: Ballot = V5_OF_3, *, lost: str = "n0", preparing: bool = False) -> Candidate:
    node = Candidate("n1", ballot, 2, lost, began_at=10.0)
    if preparing:
        for peer in node.electorate:
            node.on_support(10.0, peer, Support(epoch=2, incarnations=YES), [])
    return node


def test_a_candidate_asks_first_whether_it_would_be_promised() -> None:
    node, out = candidate(), list[Effect]()
    node.ask(out)
    assert sent(out, PreVote) == [(p, PreVote(epoch=2, view=5)) for p in ("n0", "n1", "n2")]
    assert not sent(out, Prepare)


def test_a_candidate_asks_for_promises_with_the_support_of_a_quorum_and_not_before() -> None:
    node, out = candidate(), list[Effect]()
    node.on_support(10.0, "n1", Support(epoch=2, incarnations=YES), out)
    assert out == []
    node.on_support(10.0, "n2", Support(epoch=1, incarnations=YES), out)  # of another epoch
    node.on_support(10.0, "n2", Support(epoch=2, incarnations=(7,)), out)  # as somebody else
    node.on_support(10.0, "n9", Support(epoch=2, incarnations=YES), out)
    assert out == []
    node.on_support(10.0, "n2", Support(epoch=2, incarnations=YES), out)
    prepare = Prepare(epoch=2, number=5, accepted_epoch=1)
    assert sent(out, Prepare) == [(p, prepare) for p in ("n0", "n1", "n2")]


def test_a_candidate_asks_again_only_those_that_have_not_answered() -> None:
    node, out = candidate(preparing=True), list[Effect]()
    node.on_promise("n2", promise(V5_OF_3, 2, "n2"), out)
    node.ask(out)
    assert [p for p, _ in sent(out, Prepare)] == ["n0", "n1"]


def test_promises_count_only_for_the_epoch_of_the_candidate_and_from_its_electorate() -> None:
    node = candidate(preparing=True)
    node.on_promise("n1", promise(V5_OF_3, 1, "n1"), [])
    node.on_promise("n9", promise(V5_OF_3, 2, "n9"), [])
    assert node.promises == {}
    early = candidate()
    early.on_promise("n1", promise(V5_OF_3, 2, "n1"), [])
    assert early.promises == {}


def test_a_candidate_waits_a_moment_for_those_of_a_quorum_that_are_missing_but_not_for_the_lost_leader() -> None:
    at = stored(full_view(5, "n0", "n1", "n2", "n3", "n4"))
    node = candidate(at, preparing=True)
    for peer in ("n1", "n2", "n3"):
        assert not node.won(99.0, 1.25)
        node.on_promise(peer, promise(at, 2, peer), [])
    assert not node.won(10.1, 1.25)
    assert node.won(11.25, 1.25)
    node.on_promise("n4", promise(at, 2, "n4"), [])
    assert node.won(10.1, 1.25)


def test_a_candidate_learns_the_newest_view_that_was_accepted_and_asks_its_members() -> None:
    node = candidate(preparing=True)
    v6 = apply_change(V5, change_between(V5, (*V5.members, member("n7")), 1, "n0", None))
    out: list[Effect] = []
    node.on_promise("n2", promise(stored(v6, before=V5, decided=False), 2, "n2", whole=True), out)
    assert node.newest() == (v6, V5, False)
    assert "n7" in [p for p, _ in sent(out, Prepare)]


def test_of_two_views_of_the_same_number_the_one_of_the_higher_epoch_stands() -> None:
    node = candidate(preparing=True)
    low, high = after(V5, "n0", "n1"), after(V5, "n1", "n2")
    node.on_promise("n0", promise(stored(low, before=V5, decided=False), 2, "n0", whole=True), [])
    node.on_promise("n2", promise(stored(high, before=V5, decided=False, epoch=2), 2, "n2", whole=True), [])
    assert node.newest() == (high, V5, False)


def test_a_candidate_waits_for_a_quorum_of_both_views_if_the_newest_is_not_known_to_be_decided() -> None:
    smaller = after(full_view(5, "n0", "n1", "n2", "n3", "n4"), "n1", "n2")
    before = full_view(5, "n0", "n1", "n2", "n3", "n4")
    unsure, sure = stored(smaller, before=before, decided=False), stored(smaller)
    for ballot, wins in ((unsure, False), (sure, True)):
        node = candidate(ballot, preparing=True)
        for peer in ("n1", "n2"):
            node.on_promise(peer, promise(ballot, 2, peer), [])
        assert node.won(99.0, 1.25) is wins
    node = candidate(unsure, preparing=True)
    for peer in ("n1", "n2"):
        node.on_promise(peer, promise(unsure, 2, peer), [])
    node.on_promise("n4", promise(stored(before), 2, "n4"), [])
    assert node.won(99.0, 1.25)


def test_that_a_promise_knows_the_newest_view_to_be_decided_is_enough() -> None:
    node = candidate(stored(V6, before=V5, decided=False), preparing=True)
    node.on_promise("n2", promise(stored(V6), 2, "n2"), [])
    assert node.newest() == (V6, V5, True)


def test_nothing_is_decided_behind_an_unknown_view() -> None:
    granted = {"n0": YES, "n1": YES, "n2": YES}
    assert not decides(None, None, True, granted)
    assert not decides(V6, None, False, granted)
    assert decides(V6, None, True, granted)
    assert not decides(V6, None, True, dict.fromkeys(granted, (9,)))


# --- who votes ------------------------------------------------------------------------------------------------------


def following() -> Membership:
    """n1 follows n0, which it heard last at 0.2 s."""
    node = restarted("n1", V5_OF_3, incarnation=1)
    hears(node, 0.1, "n0", HeartbeatAck(epoch=1, view=5))
    hears(node, 0.2, "n0", _welcome())
    assert node.role == "member"
    return node


def _welcome(incarnation: int = 1) -> Welcome:
    at = view(5, full_member("n0"), full_member("n1", incarnation=incarnation), full_member("n2"))
    return Welcome(epoch=1, view=at, round=0, state_digest=D0)


def test_a_candidate_is_not_supported_while_the_leader_is_heard_but_told_who_leads() -> None:
    node = following()
    effects = hears(node, 1.0, "n2", PreVote(epoch=9, view=5))
    assert not sent(effects, Support)
    assert sent(effects, Redirect) == [("n2", Redirect(leader="n0", control="sim://n0"))]
    assert not sent(hears(node, 1.0, "n2", Prepare(epoch=9, number=5, accepted_epoch=1)), Promise)
    assert node.acceptor.ballot.promised == 1


def test_a_leader_that_is_asked_for_support_says_that_it_lives() -> None:
    leader = leading("n1", "n2")
    effects = hears(leader, 1.0, "n2", PreVote(epoch=9, view=5))
    assert not sent(effects, Support)
    assert sent(effects, HeartbeatAck) == [("n2", HeartbeatAck(epoch=2, view=6))]


def test_the_leader_itself_is_supported_by_those_that_followed_it() -> None:
    """It was started again, or slept, so that it knows first that there is no leader."""
    assert sent(hears(following(), 1.0, "n0", PreVote(epoch=2, view=5)), Support)


def test_a_candidate_is_supported_and_promised_when_the_leader_is_lost() -> None:
    node = restarted("n1", V5_OF_3)
    effects = hears(node, 0.1, "n2", PreVote(epoch=2, view=5))
    assert sent(effects, Support) == [("n2", Support(epoch=2, incarnations=(1, 2)))]
    assert node.acceptor.ballot.promised == 1  # support binds nobody
    [(peer, answer)] = sent(hears(node, 0.2, "n2", Prepare(epoch=2, number=5, accepted_epoch=1)), Promise)
    assert (peer, answer.epoch, answer.incarnations, answer.member.incarnation) == ("n2", 2, (1, 2), 2)


def test_a_promise_is_not_given_before_it_is_on_disk() -> None:
    node = restarted("n1", V5_OF_3)
    effects = node.handle(0.2, Heard(peer="n2", message=Prepare(epoch=2, number=5, accepted_epoch=1)))
    [store] = of(StoreBallot, effects)
    assert not sent(effects, Promise)
    assert [p for p, _ in sent(node.handle(0.3, BallotStored(seq=store.seq)), Promise)] == ["n2"]


def test_nothing_is_promised_below_what_was_promised_also_after_a_restart() -> None:
    node = restarted("n1", V5_OF_3)
    hears(node, 0.1, "n2", Prepare(epoch=4, number=5, accepted_epoch=1))
    again = restarted("n1", node.acceptor.ballot, incarnation=3)
    for each in (node, again):
        for peer, epoch in (("n0", 3), ("n0", 4)):
            effects = hears(each, 0.2, peer, Prepare(epoch=epoch, number=5, accepted_epoch=1))
            assert sent(effects, Outvoted) == [(peer, Outvoted(epoch=4))]
            assert not sent(effects, Promise)
        assert sent(hears(each, 0.3, "n0", PreVote(epoch=4, view=5)), Outvoted)
        assert sent(hears(each, 0.3, "n2", Prepare(epoch=4, number=5, accepted_epoch=1)), Promise)  # ours is lost


def test_a_leader_of_an_epoch_that_is_over_is_told_so_and_not_followed() -> None:
    node = restarted("n1", V5_OF_3)
    hears(node, 0.1, "n2", Prepare(epoch=4, number=5, accepted_epoch=1))
    proposal = Propose(
        epoch=1, number=6, digest=view_digest(V6), change=change_between(V5, V6.members, 1, "n0", COMMIT)
    )
    effects = hears(node, 0.2, "n0", proposal)
    assert sent(effects, Outvoted) == [("n0", Outvoted(epoch=4))]
    assert not sent(effects, Accepted)
    assert node.role == "asking"


@pytest.mark.parametrize("kind", [PreVote, Prepare, Outvoted, Propose, HeartbeatAck])
def test_an_epoch_that_cannot_be_is_a_lie_and_uses_up_no_numbers(kind: type) -> None:
    """Defect: whoever was outvoted with the highest number there is stood with one more, which nobody can read."""
    fields: dict[type, dict[str, Any]] = {
        PreVote: {"view": 6},
        Prepare: {"number": 6, "accepted_epoch": 2},
        Outvoted: {},
        Propose: {"number": 7, "digest": bytes(32)},
        HeartbeatAck: {"view": 7},
    }
    most = 2**63 - 1
    for node in (leading("n1", "n2"), restarted("n2", V5_OF_3)):
        before = node.acceptor.ballot
        hears(node, 12.0, "n1", kind(epoch=most, **fields[kind]))
        assert node.acceptor.ballot == before
        effects = ticks(node, 13, 40)
        assert max([m.epoch for _, m in sent(effects, PreVote)], default=0) < 100


def test_who_is_in_no_view_of_ours_cannot_stand() -> None:
    node = restarted("n1", V5_OF_3)
    for message in (PreVote(epoch=9, view=5), Prepare(epoch=9, number=5, accepted_epoch=1)):
        assert not sent(hears(node, 0.1, "n9", message), Support)
    assert node.acceptor.ballot.promised == 1


def test_an_accepted_proposal_is_answered_when_it_is_on_disk_and_not_before() -> None:
    node = following()
    change = change_between(V5, V6.members, 1, "n0", COMMIT)
    proposal = Propose(epoch=1, number=6, digest=view_digest(V6), change=change)
    effects = node.handle(1.0, Heard(peer="n0", message=proposal))
    [store] = of(StoreBallot, effects)
    assert not sent(effects, Accepted)
    at = StateAt(round=0, digest=D0, chain=FIRST_CHAIN)
    beats = sent(node.handle(1.1, Tick()), Heartbeat) + sent(node.handle(1.3, at), Heartbeat)
    assert {(m.epoch, m.view) for _, m in beats} == {(1, 5)}  # a heartbeat is as good as an answer
    assert [m.number for _, m in sent(node.handle(1.4, BallotStored(seq=store.seq)), Accepted)] == [6]
    [(_, sign)] = sent(node.handle(1.5, StateAt(round=0, digest=D0, chain=FIRST_CHAIN)), Heartbeat)
    assert (sign.epoch, sign.view) == (1, 6)


# --- who stands -----------------------------------------------------------------------------------------------------


def first_vote_s(node: Membership, start_s: float = 0.0) -> float:
    """When it first asks for support."""
    for tenth in range(1, 100):
        now = start_s + tenth / 10
        if sent(give(node, now, Tick()), PreVote):
            return round(now - start_s, 1)
    return float("inf")


def test_the_longest_standing_stands_first_and_each_next_one_a_heartbeat_later() -> None:
    waits = [first_vote_s(restarted(id, V5_OF_3)) for id in ("n0", "n1", "n2")]
    assert waits == [0.1, 1.0, 2.0]


def test_the_lost_leader_is_skipped_in_the_order() -> None:
    node = following()
    effects = ticks(node, 1, 12)
    assert [f.leader for f in facts(LeaderSilent, effects)] == ["n0"]
    assert sent(effects, PreVote)
    assert node.standing.alone_since == 11.0


def test_who_has_no_vote_or_cannot_be_dialled_does_not_stand() -> None:
    at = view(5, full_member("n0"), member("n1"), member("n2", voter=True))
    for id in ("n1", "n2"):
        assert first_vote_s(restarted(id, stored(at))) == float("inf")


def test_who_is_listed_as_an_incarnation_that_it_never_was_does_not_stand() -> None:
    """Its disk is of another time: it does not know what it promised."""
    ballot = replace(V5_OF_3, incarnations=(7,))
    assert first_vote_s(restarted("n1", ballot, incarnation=8)) == float("inf")


def test_who_has_promised_another_candidate_holds_back() -> None:
    node = restarted("n0", V5_OF_3)
    hears(node, 0.05, "n1", Prepare(epoch=2, number=5, accepted_epoch=1))
    assert first_vote_s(node) == 2.1


def test_a_candidate_that_is_outvoted_tries_a_higher_epoch() -> None:
    node = restarted("n0", V5_OF_3)
    [epoch] = {m.epoch for _, m in sent(give(node, 0.1, Tick()), PreVote)}
    assert epoch == 2
    hears(node, 0.2, "n1", Outvoted(epoch=7))
    [epoch] = {m.epoch for _, m in sent(give(node, 0.5, Tick()), PreVote)}
    assert epoch == 8


def test_a_candidate_whose_leader_is_heard_again_gives_up() -> None:
    node = restarted("n1", V5_OF_3, incarnation=1)
    give(node, 1.0, Tick())
    assert node.standing.candidate is not None
    hears(node, 1.1, "n0", HeartbeatAck(epoch=1, view=5))
    assert node.standing.candidate is None
    assert not sent(hears(node, 1.2, "n2", Support(epoch=2, incarnations=YES)), Prepare)


def test_late_and_repeated_answers_do_no_harm() -> None:
    leader = leading("n1", "n2")
    before = leader.view
    for message in (Support(epoch=2, incarnations=YES), promise(V5_OF_3, 2, "n1"), Outvoted(epoch=1)):
        hears(leader, 0.5, "n1", message)
    assert (leader.role, leader.view) == ("leader", before)


# --- who leads ------------------------------------------------------------------------------------------------------


def test_a_candidate_with_the_promises_of_a_quorum_leads_a_new_epoch() -> None:
    node = restarted("n1", V5_OF_3, incarnation=1)
    effects = elect(node, 1.0, "n0", "n2")
    assert [f.epoch for f in facts(LeaderElected, effects)] == [2]
    assert runs_at(effects) == [RunAt(round=0, digest=D0)]
    assert [p for p, _ in sent(effects, Propose)] == ["n0", "n2"]
    assert node.view == V5  # nothing is decided yet
    accepts(node, 1.1, "n2")
    assert node.view is not None
    assert (node.view.epoch, node.view.number, node.view.leader) == (2, 6, "n1")


def test_the_first_view_of_an_epoch_is_without_the_silent_whose_order_stays() -> None:
    node = restarted("n1", stored(full_view(5, "n0", "n1", "n2", "n3", "n4")), incarnation=1)
    effects = elect(node, 1.0, "n2", "n4")
    assert node.role == "asking"  # it waits a moment for n3
    effects = ticks(node, 2, 4)
    [fact] = facts(LeaderElected, effects)
    assert fact.silent == ("n0", "n3")
    effects = accepts(node, 3.1, "n2", "n4")
    assert ids(node) == ["n1", "n2", "n4"]
    assert sorted(f.peer for f in facts(MemberLost, effects)) == ["n0", "n3"]


def test_half_of_the_voters_elect_nobody_without_the_leader_of_the_view() -> None:
    at = stored(full_view(5, "n0", "n1", "n2", "n3"))
    cut_off, with_it = restarted("n1", at, incarnation=1), restarted("n1", at, incarnation=1)
    elect(cut_off, 1.0, "n2")
    elect(with_it, 1.0, "n0")
    for node, role in ((cut_off, "asking"), (with_it, "leader")):
        ticks(node, 2, 5)
        assert node.role == role


def test_what_may_be_decided_is_proposed_again_before_anything_else() -> None:
    """v6 was stored by n2 alone, as far as is known: it may be decided, with the vote of n0."""
    node = restarted("n1", V5_OF_3, incarnation=1)
    [epoch] = {m.epoch for _, m in sent(give(node, 1.0, Tick()), PreVote)}
    hears(node, 1.0, "n2", Support(epoch=epoch, incarnations=YES))
    newer = stored(V6, before=V5, decided=False)
    hears(node, 1.0, "n2", promise(newer, epoch, "n2", whole=True))
    effects = ticks(node, 2, 4)
    assert node.role == "leader"
    proposals = sent(effects, Propose)
    again = Propose(epoch=2, number=6, digest=view_digest(V6))
    assert {m for _, m in proposals} == {again}
    accepts(node, 3.1, "n2")
    assert node.view == V6
    accepts(node, 3.2, "n2")
    assert node.view.commit == COMMIT
    assert (node.view.epoch, node.view.number, ids(node)) == (2, 7, ["n1", "n2"])


def test_a_restarted_founder_with_its_ballot_alone_leads_again_at_once_with_a_higher_epoch() -> None:
    first = founder()
    again = machine("n0", contacts=(), ballot=first.acceptor.ballot, incarnation=1000)
    effects = give(again, 0.0, StateAt(round=4, digest=D0, chain=FIRST_CHAIN))
    effects += give(again, 0.0, Tick())
    assert again.role == "leader"
    assert first.view is not None
    assert again.view is not None
    assert again.view.lineage == first.view.lineage
    assert (again.view.epoch, again.view.number) == (2, 2)
    [me] = again.view.members
    assert (me.incarnation, me.voter, me.active) == (1000, True, True)
    assert runs_at(effects) == [RunAt(round=4, digest=D0)]


def test_a_restarted_founder_whose_members_have_votes_cannot_lead_alone() -> None:
    again = restarted("n0", V5_OF_3)
    ticks(again, 1, 60)
    assert again.role == "asking"
    assert LINEAGE in [m.lineage for _, m in sent(give(again, 60.0, Tick()), Hello)]


# --- who does not lead any more -------------------------------------------------------------------------------------


def test_a_leader_that_hears_no_quorum_steps_down() -> None:
    leader = leading("n1", "n2")
    ticks(leader, 1, 10)
    assert leader.role == "leader"
    effects = ticks(leader, 10, 12)
    assert [f.epoch for f in facts(SteppedDown, effects)] == [2]
    assert leader.role == "asking"
    assert ids(leader) == ["n0", "n1", "n2"]  # it changed nothing
    assert sent(effects, Hello)


def test_a_leader_that_is_cut_off_counts_the_voters_of_the_decided_view() -> None:
    """Defect: it said "heard 1 of 2" of four, by a view without the others that it alone had proposed."""
    leader = leading("n1", "n2", "n3")
    for second in range(1, 9):
        hears(leader, float(second), "n1", beat(epoch=2))
        give(leader, float(second), Tick())
    for second in range(9, 12):  # n2 and n3 are silent for longer, and a view without them is proposed
        give(leader, float(second), Tick())
    said = facts(CutOff, ticks(leader, 12, 40))
    assert {(f.heard, f.voters) for f in said} == {(1, 4)}


def test_a_leader_that_hears_a_quorum_leaves_the_others_out_and_goes_on() -> None:
    leader = leading("n1", "n2")
    for second in range(1, 12):
        give(leader, float(second), Tick())
        hears(leader, float(second), "n1", beat(epoch=2))
    accepts(leader, 11.0, "n1")
    assert leader.role == "leader"
    assert ids(leader) == ["n0", "n1"]


def test_a_leader_that_slept_longer_than_the_timeout_steps_down() -> None:
    leader = leading("n1", "n2")
    give(leader, 1.0, Tick())
    effects = give(leader, 2.0 + TIMEOUT_S + 0.1, Tick())
    [fact] = facts(SteppedDown, effects)
    assert "asleep" in fact.reason
    assert leader.role == "asking"


def test_a_leader_that_slept_a_little_goes_on() -> None:
    leader = leading("n1", "n2")
    give(leader, 1.0, Tick())
    give(leader, TIMEOUT_S, Tick())
    assert leader.role == "leader"
    assert ids(leader) == ["n0", "n1", "n2"]


def test_a_leader_that_is_outvoted_steps_down() -> None:
    leader = leading("n1", "n2")
    effects = hears(leader, 1.0, "n1", Outvoted(epoch=9))
    assert facts(SteppedDown, effects)
    assert leader.role == "asking"
    [epoch] = {m.epoch for _, m in sent(effects + ticks(leader, 2, 3), PreVote)}
    assert epoch == 10


def test_a_leader_steps_down_when_a_member_has_promised_its_epoch_to_another() -> None:
    """Defect: that member answered everything with Outvoted, which was not higher, and could never follow."""
    leader = restarted("n0", stored(V5), incarnation=1)
    elect(leader, 0.0, "n1")
    give(leader, 3.0, Tick())  # it has waited for n2
    assert leader.role == "leader"
    assert facts(SteppedDown, hears(leader, 4.0, "n2", Outvoted(epoch=2)))


@pytest.mark.parametrize("late", [False, True])
def test_a_leader_leads_on_when_a_member_that_promised_it_the_epoch_refuses_what_came_late(late: bool) -> None:
    """Defect: what it had said in an earlier epoch came after the promise, and the answer made it step down.

    ``late``: the promise itself came when it led already.
    """
    leader = restarted("n0", stored(V5), incarnation=1)
    elect(leader, 0.0, "n1")
    give(leader, 3.0, Tick())  # it has waited for n2
    assert leader.role == "leader"
    if late:
        hears(leader, 3.5, "n2", promise(V5_OF_3, 2, "n2"))
    assert not facts(SteppedDown, hears(leader, 4.0, "n2" if late else "n1", Outvoted(epoch=2)))
    assert leader.role == "leader"


def test_a_leader_that_hears_one_of_a_higher_epoch_follows_it() -> None:
    leader = leading("n1", "n2")
    assert leader.view is not None
    made = apply_change(leader.view, change_between(leader.view, leader.view.members, 5, "n1", None))
    change = change_between(leader.view, made.members, 5, "n1", None)
    effects = hears(leader, 1.0, "n1", Propose(epoch=5, number=7, digest=view_digest(made), change=change))
    assert facts(SteppedDown, effects)
    assert [(p, m.epoch, m.number) for p, m in sent(effects, Accepted)] == [("n1", 5, 7)]
    assert not sent(hears(leader, 1.1, "n2", hello("n2")), Propose)
