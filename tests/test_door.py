"""Who may join, and what those that may not are told."""

from __future__ import annotations

from msgspec.structs import replace

from prime_async.machines.door import MAX_LINE, judge_hello, setting_differences
from prime_async.machines.facts import HelloRefused, KeyDenied
from prime_async.machines.leadership import ContactPoint
from prime_async.machines.vocabulary import DoorClosed, Fail, Tick
from prime_async.messages import Goodbye, Hello, Refuse, encode
from tests.machine_harness import LINEAGE, facts, member, of, sent
from tests.membership_harness import (
    N0,
    asking,
    beat,
    founder,
    full_view,
    give,
    hears,
    hello,
    ids,
    joined,
    leader_with,
    machine,
    restarted,
    stored,
    welcome,
)

OTHER = b"o" * 32


def judge(question: Hello, *, peer: str = "n1", lineage: bytes = LINEAGE) -> str | None:
    refusal = judge_hello(machine("n0").settings, lineage, peer, question)
    return refusal.reason if refusal else None


def test_who_has_the_same_run_and_protocol_and_its_own_key_may_join() -> None:
    assert judge(hello("n1")) is None
    assert judge(hello("n1", lineage=LINEAGE)) is None


def test_one_of_another_lineage_is_refused_by_one_that_has_a_lineage() -> None:
    assert judge(hello("n1", lineage=OTHER)) == "other_lineage"
    assert judge(hello("n1", lineage=OTHER), lineage=b"") is None


def test_settings_that_one_side_does_not_have_differ() -> None:
    assert setting_differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == (
        "a: 1 in the run, not set at the node that asks",
        "c: not set in the run, 3 at the node that asks",
    )


def test_as_many_and_as_long_differences_as_a_peer_can_have_are_still_a_message() -> None:
    theirs = {f"{i:03}": "x" * 4096 for i in range(300)}
    question = replace(hello("n1", run_id=OTHER), settings=theirs)
    refusal = judge_hello(machine("n0").settings, LINEAGE, "n1", question)
    assert refusal is not None
    assert len(refusal.differences) == 256
    assert max(map(len, refusal.differences)) == MAX_LINE
    assert len(encode(refusal)) < 1 << 20


def test_a_hello_of_another_run_is_refused_with_what_differs() -> None:
    leader = founder()
    effects = hears(leader, 1.0, "n1", hello("n1", run_id=b"z" * 32, seed="2"))
    [(peer, refusal)] = sent(effects, Refuse)
    assert (peer, refusal.reason) == ("n1", "other_run")
    assert refusal.differences == ("seed: 1 in the run, 2 at the node that asks",)
    assert facts(HelloRefused, effects)
    assert ids(leader) == ["n0"]


def test_a_hello_of_another_protocol_is_refused_also_by_a_member_that_does_not_lead() -> None:
    for node in (founder(), joined()):
        effects = hears(node, 1.0, "n9", hello("n9", protocol=2))
        assert [m.reason for _, m in sent(effects, Refuse)] == ["other_protocol"]


def test_a_hello_of_another_lineage_is_refused_also_by_a_member_that_does_not_lead() -> None:
    for node in (founder(), joined()):
        effects = hears(node, 1.0, "n9", hello("n9", lineage=OTHER))
        assert [m.reason for _, m in sent(effects, Refuse)] == ["other_lineage"]


def test_a_hello_for_somebody_else_is_refused() -> None:
    effects = hears(founder(), 1.0, "n1", hello("n2"))
    assert [m.reason for _, m in sent(effects, Refuse)] == ["key_not_allowed"]


def test_a_copy_of_the_leaders_key_is_told_so_and_changes_nothing() -> None:
    """Defect: the leader took a node with its own key for a member, and its next heartbeat raised KeyError."""
    leader = leader_with("n1")
    before = leader.view
    effects = hears(leader, 1.0, "n0", hello("n0", incarnation=7))
    assert [(p, m.reason) for p, m in sent(effects, Refuse)] == [("n0", "key_not_allowed")]
    assert hears(leader, 1.0, "n0", beat()) == []
    assert hears(leader, 1.0, "n0", Goodbye(incarnation=1)) == []
    assert leader.view == before


def test_a_refused_node_ends_with_the_reason() -> None:
    node = asking()
    refusal = Refuse(reason="other_run", text="copy it", differences=("seed: 1, 2",))
    assert of(Fail, hears(node, 0.1, "n0", refusal)) == [
        Fail(kind="refused", text="copy it", reason="other_run", differences=("seed: 1, 2",))
    ]
    assert give(node, 5.0, Tick()) == []


def test_who_was_a_member_waits_for_its_lineage_when_one_of_another_refuses_it() -> None:
    node = restarted("n1", stored(full_view(5, "n0", "n1", "n2")))
    effects = hears(node, 0.1, "n0", Refuse(reason="other_lineage", text="another"))
    assert not of(Fail, effects)
    assert [f.reason for f in facts(HelloRefused, effects)] == ["other_lineage"]
    assert node.role == "asking"


def test_who_was_a_member_is_not_welcomed_into_another_lineage() -> None:
    node = restarted("n1", stored(replace(full_view(5, "n0", "n1"), lineage=OTHER)))
    hears(node, 0.1, "n0", welcome(number=9, incarnation=2))
    assert node.role == "asking"
    assert node.view is not None
    assert node.view.lineage == OTHER


def test_closed_doors_end_a_node_when_every_contact_has_closed_its_own() -> None:
    node = asking(contacts=(N0, ContactPoint(id="n5", control="sim://n5")))
    first = give(node, 0.1, DoorClosed(peer="n0", address="sim://n0"))
    assert facts(KeyDenied, first) == [KeyDenied(peer="n0", address="sim://n0")]
    assert not facts(KeyDenied, give(node, 0.2, DoorClosed(peer="n0", address="sim://n0")))
    [fail] = of(Fail, give(node, 0.3, DoorClosed(peer="n5", address="sim://n5")))
    assert (fail.kind, fail.reason) == ("refused", "key_not_allowed")


def test_closed_doors_do_not_end_who_was_a_member() -> None:
    node = restarted("n1", stored(full_view(5, "n0", "n1")))
    assert not of(Fail, give(node, 0.1, DoorClosed(peer="n0", address="sim://n0")))
    assert node.role == "asking"


def test_a_newcomer_cannot_say_that_it_is_active_or_has_a_vote_or_how_much_it_weighs() -> None:
    leader = founder()
    boast = replace(hello("n1"), member=member("n1", active=True, voter=True, reachable=True, weight=99))
    hears(leader, 1.0, "n1", boast)
    assert leader.view is not None
    assert leader.view.member("n1") == member("n1", active=False, weight=1)
