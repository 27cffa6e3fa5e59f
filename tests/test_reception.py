"""Letting in who comes with an invitation, as the membership machine does it."""

from __future__ import annotations

from prime_async.machines.facts import KeyLetIn
from prime_async.machines.vocabulary import KeyToLetIn, LetIn
from prime_async.messages import AskRun, Refuse, RunInfo, Vouch
from tests.machine_harness import facts, of, sent
from tests.membership_harness import give, hears, joined, leader_with

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
