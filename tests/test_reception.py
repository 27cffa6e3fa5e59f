"""Letting in who comes with an invitation, as the membership machine does it."""

from __future__ import annotations

from prime_async.machines.facts import KeyLetIn
from prime_async.machines.reception import MAX_VOUCHES
from prime_async.machines.vocabulary import KeyToLetIn, LetIn, Tick
from prime_async.messages import AskRun, Refuse, RunInfo, Vouch
from tests.machine_harness import facts, of, sent
from tests.membership_harness import beat, give, hears, hello, joined, leader_with, ticks

GUEST, KEY = "guest", "newcomer"


def let_in(refusal: str = "", *, invited: bool = True) -> LetIn:
    return LetIn(peer=GUEST if invited else "n1", key=KEY, name="nina", invited=invited, refusal=refusal)


def test_whoever_asks_what_the_run_is_is_told_with_members_to_ask() -> None:
    node = leader_with("n1")
    [(peer, answer)] = sent(hears(node, 5.0, GUEST, AskRun()), RunInfo)
    assert peer == GUEST
    assert answer.settings == node.settings.settings
    assert answer.members[0].id == "n0"
    assert answer.key == ""


def test_a_key_is_put_on_the_list_before_it_is_said_that_it_may_connect() -> None:
    node = leader_with("n1")
    effects = hears(node, 5.0, GUEST, AskRun(key=KEY, name="nina"))
    assert sent(effects, RunInfo) == []
    assert of(KeyToLetIn, effects) == [KeyToLetIn(peer=GUEST, key=KEY, name="nina", invited=True)]
    effects = give(node, 5.1, let_in())
    assert [(peer, m.key) for peer, m in sent(effects, RunInfo)] == [(GUEST, KEY)]
    assert sent(effects, Vouch) == [("n1", Vouch(key=KEY, name="nina"))]
    assert facts(KeyLetIn, effects) == [KeyLetIn(key=KEY, name="nina", by=GUEST, invited=True)]


def test_a_vouch_is_repeated_after_ever_longer_until_the_key_is_in_a_view() -> None:
    """Defect: it was sent once, and a member that missed it knew nothing of the key."""
    node = leader_with("n1", "n2")
    sent(give(node, 5.0, let_in()), Vouch)
    sent_at = []
    for now in range(6, 40):
        for peer in ("n1", "n2"):
            hears(node, now, peer, beat())
        sent_at += [(now, peer) for peer, _ in sent(give(node, now, Tick()), Vouch)]
    assert sent_at == [(now, peer) for now in (6, 8, 12, 20, 36) for peer in ("n1", "n2")]
    hears(node, 40.0, KEY, hello(KEY))
    assert node.view is not None
    assert node.view.member(KEY) is not None
    assert not sent(ticks(node, 41, 300), Vouch)


def test_a_key_that_never_comes_is_vouched_for_some_times_and_no_more() -> None:
    node = leader_with("n1")
    first = sent(give(node, 5.0, let_in()), Vouch)
    again = sent(
        [e for now in range(6, 400) for e in (*hears(node, now, "n1", beat()), *give(node, now, Tick()))], Vouch
    )
    assert len(first + again) == MAX_VOUCHES
    assert node.reception.vouching == {}


def test_a_question_that_comes_again_is_answered_and_not_told_again() -> None:
    node = leader_with("n1")
    give(node, 5.0, let_in())
    effects = give(node, 5.2, let_in())
    assert [m.key for _, m in sent(effects, RunInfo)] == [KEY]
    assert sent(effects, Vouch) == []
    assert facts(KeyLetIn, effects) == []


def test_a_vouch_that_comes_again_changes_nothing_unless_the_list_had_no_room() -> None:
    node = joined()
    assert of(KeyToLetIn, hears(node, 5.0, "n0", Vouch(key=KEY, name="nina")))
    give(node, 5.1, let_in(invited=False))
    assert of(KeyToLetIn, hears(node, 6.0, "n0", Vouch(key=KEY, name="nina"))) == []
    assert of(KeyToLetIn, hears(node, 7.0, "n0", Vouch(key="another")))
    give(node, 7.1, LetIn(peer="n0", key="another", name="", invited=False, refusal="it is full"))
    assert of(KeyToLetIn, hears(node, 8.0, "n0", Vouch(key="another")))


def test_who_asks_with_a_key_that_may_connect_already_changes_nothing() -> None:
    effects = hears(leader_with("n1"), 5.0, KEY, AskRun(key=KEY))
    assert of(KeyToLetIn, effects) == []
    assert [m.key for _, m in sent(effects, RunInfo)] == [KEY]


def test_an_invitation_that_does_not_count_is_told_why() -> None:
    effects = give(leader_with("n1"), 5.0, let_in("it has expired"))
    assert sent(effects, Refuse) == [(GUEST, Refuse(reason="key_not_allowed", text="it has expired"))]
    assert sent(effects, Vouch) == []
    assert facts(KeyLetIn, effects) == []


def test_only_members_vouch_and_a_vouch_is_not_passed_on() -> None:
    node = joined()
    assert of(KeyToLetIn, hears(node, 5.0, GUEST, Vouch(key=KEY))) == []
    effects = hears(node, 5.0, "n0", Vouch(key=KEY, name="nina"))
    assert of(KeyToLetIn, effects) == [KeyToLetIn(peer="n0", key=KEY, name="nina", invited=False)]
    effects = give(node, 5.1, let_in(invited=False))
    assert sent(effects, Vouch) == []
    assert sent(effects, RunInfo) == []
