"""Ballots, quorums, changes of views, and what an acceptor promises, accepts and answers: by pure calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from prime_async.machines.acceptor import Acceptor
from prime_async.machines.ballot import (
    INCARNATIONS_KEPT,
    Ballot,
    apply_change,
    change_between,
    entitled,
    is_quorum,
    view_digest,
)
from prime_async.machines.vocabulary import Effect, StoreBallot
from prime_async.messages import (
    Accepted,
    AskView,
    Change,
    Commit,
    Member,
    Prepare,
    Promise,
    Propose,
    View,
    ViewUpdate,
    bitmap,
    decode,
    encode,
)
from tests.machine_harness import full_member, member, of, sent, view
from tests.membership_harness import full_view, stored

COMMIT = Commit(round=3, epoch=1, attempt=0, state=bytes(32), digest=bytes(32), chain=bytes(32), view=4)
V5 = full_view(5, "n0", "n1", "n2")
BLANK = Promise(epoch=0, decided=0, number=0, accepted_epoch=0, member=member("n1", active=False), incarnations=(1,))

# --- quorums --------------------------------------------------------------------------------------------------------


def test_a_majority_of_the_voters_is_a_quorum() -> None:
    assert is_quorum(V5, {"n1", "n2"})
    assert not is_quorum(V5, {"n0"})
    assert not is_quorum(V5, {"n1", "n8", "n9"})


def test_of_an_even_split_only_the_half_with_the_leader_of_that_view_is_a_quorum() -> None:
    at = full_view(5, "n0", "n1", "n2", "n3")
    assert is_quorum(at, {"n0", "n3"})
    assert not is_quorum(at, {"n1", "n2"})


def test_half_with_a_leader_that_has_no_vote_is_no_quorum() -> None:
    at = view(5, member("n0"), full_member("n1"), full_member("n2"))
    assert not is_quorum(at, {"n0", "n1"})
    assert is_quorum(at, {"n1", "n2"})


def test_who_has_no_vote_does_not_count() -> None:
    at = view(5, full_member("n0"), member("n1"), member("n2"))
    assert is_quorum(at, {"n0"})
    assert not is_quorum(at, {"n1", "n2"})


def test_a_view_without_voters_has_no_quorum() -> None:
    assert not is_quorum(view(5, member("n0")), {"n0"})


@given(st.integers(1, 9), st.data())
def test_two_quorums_have_a_voter_in_common(count: int, data: st.DataObject) -> None:
    at = full_view(5, *(f"n{i}" for i in range(count)))
    halves = st.sets(st.sampled_from([m.id for m in at.members]))
    one, other = data.draw(halves), data.draw(halves)
    if is_quorum(at, one) and is_quorum(at, other):
        assert one & other


def test_a_vote_belongs_to_an_incarnation() -> None:
    at = view(5, full_member("n0", incarnation=7), member("n1", incarnation=7))
    assert entitled(at, "n0", (1, 7))
    assert not entitled(at, "n0", (1, 8))
    assert not entitled(at, "n1", (7,))
    assert not entitled(at, "n9", (7,))


def test_a_node_is_known_as_its_last_incarnations() -> None:
    ballot = Ballot(incarnations=(1,))
    assert ballot.known_as(1) is ballot
    for incarnation in range(2, 2 * INCARNATIONS_KEPT):
        ballot = ballot.known_as(incarnation)
    assert ballot.incarnations[-1] == 2 * INCARNATIONS_KEPT - 1
    assert len(ballot.incarnations) == INCARNATIONS_KEPT


# --- changes --------------------------------------------------------------------------------------------------------

some_members = st.builds(
    member,
    id=st.sampled_from([f"n{i}" for i in range(12)]),
    active=st.booleans(),
    incarnation=st.integers(0, 2),
    weight=st.integers(0, 3),
    witness=st.booleans(),
    voter=st.booleans(),
    reachable=st.booleans(),
)
member_lists = st.lists(some_members, max_size=12, unique_by=lambda m: m.id).map(tuple)
commits = st.none() | st.just(COMMIT)


@given(member_lists, member_lists, commits, commits)
def test_a_change_makes_the_members_it_was_made_for(
    before: tuple[Member, ...], after: tuple[Member, ...], old: Commit | None, new: Commit | None
) -> None:
    at = view(5, *before, commit=old)
    made = apply_change(at, change_between(at, after, 2, "n7", new))
    assert made.members == after
    assert (made.number, made.epoch, made.leader, made.lineage) == (6, 2, "n7", at.lineage)
    assert made.commit == (new or old)
    assert made.previous == view_digest(at)


@given(member_lists, member_lists)
def test_a_change_survives_the_wire(before: tuple[Member, ...], after: tuple[Member, ...]) -> None:
    change = change_between(view(5, *before), after, 2, "n7", None)
    assert decode(encode(change), Change) == change


@given(st.lists(some_members, min_size=1, max_size=12, unique_by=lambda m: m.id).map(tuple), st.data())
def test_a_change_has_only_what_is_new(before: tuple[Member, ...], data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from(before))
    after = (*(m for m in before if m != lost), member("joiner"))
    change = change_between(view(5, *before), after, 1, "n0", None)
    assert change.members == (member("joiner"),)
    assert change.gone == bitmap([before.index(lost)])


def test_a_change_that_removes_who_is_not_there_does_not_fit() -> None:
    with pytest.raises(ValueError, match="not in the view"):
        apply_change(V5, Change(epoch=1, leader="n0", gone=bitmap([3])))


# --- an acceptor ----------------------------------------------------------------------------------------------------


def after(at: View, *, epoch: int = 1, leader: str = "n0", commit: Commit | None = COMMIT) -> View:
    return apply_change(at, change_between(at, at.members, epoch, leader, commit))


def proposal(at: View, new: View, *, epoch: int = 1) -> Propose:
    change = change_between(at, new.members, new.epoch, new.leader, new.commit)
    return Propose(epoch=epoch, number=new.number, digest=view_digest(new), change=change)


def acceptor(ballot: Ballot | None = None) -> Acceptor:
    return Acceptor("n1", ballot or stored(V5))


def on_disk(node: Acceptor, effects: list[Effect]) -> list[Effect]:
    """What is answered when the ballots in ``effects`` are on disk."""
    return [answer for effect in of(StoreBallot, effects) for answer in node.on_stored(effect.seq)]


def test_a_proposal_is_answered_when_it_is_on_disk_and_not_before() -> None:
    node, v6, out = acceptor(), after(V5), list[Effect]()
    node.on_propose("n0", proposal(V5, v6), out)
    [store] = of(StoreBallot, out)
    assert not sent(out, Accepted)
    assert (store.ballot.view, store.ballot.before, store.ballot.decided) == (v6, V5, False)
    assert node.durable == (1, 5)
    answers = node.on_stored(store.seq)
    assert sent(answers, Accepted) == [("n0", Accepted(epoch=1, number=6, incarnations=(1,)))]
    assert node.durable == (1, 6)


def test_a_promise_is_given_when_it_is_on_disk_and_not_before() -> None:
    node, out = acceptor(), list[Effect]()
    node.promise("n2", Prepare(epoch=4, number=5, accepted_epoch=1), BLANK, out)
    [store] = of(StoreBallot, out)
    assert not sent(out, Promise)
    assert (store.ballot.promised, store.ballot.promised_to) == (4, "n2")
    [(peer, answer)] = sent(node.on_stored(store.seq), Promise)
    assert peer == "n2"
    assert (answer.epoch, answer.decided, answer.number, answer.accepted_epoch) == (4, 5, 5, 1)
    assert answer.view is None  # the candidate has it


def test_what_repeats_while_the_disk_is_busy_is_answered_with_the_first() -> None:
    node, v6, out = acceptor(), after(V5), list[Effect]()
    node.on_propose("n0", proposal(V5, v6), out)
    node.on_propose("n0", proposal(V5, v6), out)
    assert len(of(StoreBallot, out)) == 1
    assert not sent(out, Accepted)
    assert len(sent(on_disk(node, out), Accepted)) == 2
    again: list[Effect] = []
    node.on_propose("n0", proposal(V5, v6), again)
    assert [p for p, _ in sent(again, Accepted)] == ["n0"]  # it is on disk: at once
    assert not of(StoreBallot, again)


def test_one_word_of_the_disk_answers_for_all_ballots_before() -> None:
    node, out = acceptor(), list[Effect]()
    node.promise("n2", Prepare(epoch=4, number=5, accepted_epoch=1), BLANK, out)
    v6 = after(V5, epoch=4, leader="n2")
    node.on_propose("n2", proposal(V5, v6, epoch=4), out)
    answers = node.on_stored(of(StoreBallot, out)[-1].seq)
    assert [type(m) for m in (a.message for a in answers)] == [Promise, Accepted]


def test_a_candidate_that_has_less_is_handed_what_was_accepted() -> None:
    v6 = after(V5)
    node, out = acceptor(stored(v6, before=V5, decided=False)), list[Effect]()
    node.promise("n2", Prepare(epoch=4, number=5, accepted_epoch=1), BLANK, out)
    [(_, answer)] = sent(on_disk(node, out), Promise)
    assert (answer.decided, answer.number, answer.view, answer.before) == (5, 6, v6, V5)


def test_no_part_is_taken_in_an_epoch_below_what_was_promised_also_after_a_restart() -> None:
    node, out = acceptor(), list[Effect]()
    node.promise("n2", Prepare(epoch=4, number=5, accepted_epoch=1), BLANK, out)
    kept = of(StoreBallot, out)[-1].ballot
    for each in (node, acceptor(kept)):
        assert not each.takes_part_in(3, "n0")
        assert not each.takes_part_in(4, "n0")  # no two lead the same epoch
        assert each.takes_part_in(4, "n2")
        assert each.takes_part_in(5, "n0")


def test_accepting_is_promising_too() -> None:
    node, out = acceptor(), list[Effect]()
    node.on_propose("n2", proposal(V5, after(V5, epoch=3, leader="n2"), epoch=3), out)
    assert not node.takes_part_in(2, "n0")
    assert not node.takes_part_in(3, "n0")


def test_a_proposal_without_the_view_before_it_asks_for_the_view() -> None:
    v6 = after(V5)
    v7 = after(v6, commit=replace(COMMIT, round=4))
    node, out = acceptor(), list[Effect]()
    node.on_propose("n0", proposal(v6, v7), out)
    assert sent(out, AskView) == [("n0", AskView(number=7))]
    assert not of(StoreBallot, out)


def test_a_change_with_another_result_than_the_leaders_asks_for_the_view() -> None:
    for change in (change_between(V5, V5.members[:2], 1, "n0", None), Change(epoch=1, leader="n0", gone=b"\xff")):
        node, out = acceptor(), list[Effect]()
        node.on_propose("n0", Propose(epoch=1, number=6, digest=view_digest(after(V5)), change=change), out)
        assert sent(out, AskView) == [("n0", AskView(number=6))]
        assert not of(StoreBallot, out)


def test_a_whole_view_is_accepted_on_the_view_that_it_names_and_otherwise_that_one_is_asked_for() -> None:
    v6 = after(V5)
    v7 = after(v6, commit=replace(COMMIT, round=4))
    node, out = acceptor(), list[Effect]()
    node.on_view("n0", ViewUpdate(epoch=1, decided=False, view=v7), out)
    assert sent(out, AskView) == [("n0", AskView(number=6))]
    out = []
    node.on_view("n0", ViewUpdate(epoch=1, decided=False, view=v6), out)
    assert [m.number for _, m in sent(on_disk(node, out), Accepted)] == [6]


def test_what_an_earlier_leader_proposed_is_accepted_again_without_a_change() -> None:
    v6 = after(V5)
    node, out = acceptor(stored(v6, before=V5, decided=False)), list[Effect]()
    node.on_propose("n2", Propose(epoch=3, number=6, digest=view_digest(v6)), out)
    assert [m.epoch for _, m in sent(on_disk(node, out), Accepted)] == [3]
    assert (node.ballot.accepted, node.ballot.view, node.ballot.decided) == (3, v6, False)


def test_a_new_leaders_view_takes_the_place_of_one_of_the_same_number() -> None:
    lost, won = after(V5), after(V5, epoch=3, leader="n2", commit=None)
    node, out = acceptor(stored(lost, before=V5, decided=False)), list[Effect]()
    node.on_propose("n2", proposal(V5, won, epoch=3), out)
    assert (node.ballot.view, node.ballot.before) == (won, V5)


def test_a_proposal_says_that_the_view_before_it_is_decided() -> None:
    v6 = after(V5)
    v7 = after(v6, commit=replace(COMMIT, round=4))
    node = acceptor(stored(v6, before=V5, decided=False))
    assert node.ballot.decided_view == V5
    node.on_propose("n0", proposal(v6, v7), [])
    assert node.ballot.decided_view == v6


def test_a_view_is_decided_when_the_leader_under_which_it_was_accepted_says_so() -> None:
    v6 = after(V5)
    node = acceptor(stored(v6, before=V5, decided=False))
    assert not node.decide(2, 6, [])  # accepted under epoch 1: it may be another
    assert not node.decide(1, 7, [])
    assert node.decide(1, 5, [])
    assert node.ballot.decided_view == V5
    assert node.decide(1, 6, [])
    assert node.ballot.decided_view == v6


def test_a_decided_view_that_is_older_than_what_is_held_changes_nothing() -> None:
    v6 = after(V5)
    ballot = stored(v6, before=V5, decided=False)
    node, out = acceptor(ballot), list[Effect]()
    node.on_view("n0", ViewUpdate(epoch=1, decided=True, view=full_view(4, "n0")), out)
    assert node.ballot == ballot
    assert out == []
