"""Membership where there are no rounds: a node that is heard counts at once, and views are agreed on as in a run."""

from __future__ import annotations

import pytest

from prime_async.machines.facts import CutOff, LeaderElected, MemberLost
from prime_async.machines.vocabulary import StateAt
from prime_async.messages import FIRST_CHAIN
from tests.membership_harness import D0, TIMEOUT_S, Cluster, active, beat, give, hears, hello, machine, voters


def together(count: int, seed: int = 0, loss: float = 0.0) -> Cluster:
    """Nobody has ever done a round."""
    nodes = Cluster(count, seed, loss, has_rounds=False)
    nodes.run(5.0)
    return nodes


def members(nodes: Cluster, id: str) -> list[str]:
    shown = nodes.nodes[id].view
    assert shown is not None
    return [m.id for m in shown.members]


def test_a_node_has_a_vote_from_its_first_heartbeat_on() -> None:
    """Given a founder without rounds, when a node joins and is heard, then it is active and votes; not before that."""
    founder = machine("n0", contacts=(), min_members=1, rounds=False)
    give(founder, 0.0, StateAt(round=0, digest=D0, chain=FIRST_CHAIN))

    hears(founder, 1.0, "n1", hello("n1"))
    assert (active(founder), voters(founder)) == (["n0"], ["n0"])

    hears(founder, 2.0, "n1", beat(view=2))
    assert (active(founder), voters(founder)) == (["n0", "n1"], ["n0", "n1"])


def test_a_late_heartbeat_of_an_earlier_start_gives_no_vote() -> None:
    founder = machine("n0", contacts=(), rounds=False)
    give(founder, 0.0, StateAt(round=0, digest=D0, chain=FIRST_CHAIN))
    hears(founder, 1.0, "n1", hello("n1", incarnation=2))

    hears(founder, 2.0, "n1", beat(incarnation=1))

    assert voters(founder) == ["n0"]


@pytest.mark.parametrize("seed", range(5))
def test_a_leader_that_dies_is_replaced_by_those_who_never_did_a_round(seed: int) -> None:
    """Given five members and a lossy network, when one leader dies after the other, then the rest agree without it."""
    nodes = together(5, seed, loss=0.1)
    assert nodes.healthy()

    for left in (4, 3):
        [leader] = nodes.leaders
        nodes.crash(leader)
        nodes.run(2.5 * TIMEOUT_S)

        assert len(nodes.leaders) == 1
        assert nodes.leaders != [leader]
        assert len(nodes.up) == left
        assert [sorted(members(nodes, id)) for id in sorted(nodes.up)] == [sorted(nodes.up)] * left
        assert nodes.healthy()
    assert len(nodes.seen(LeaderElected)) >= 2


@pytest.mark.parametrize("seed", range(3))
def test_who_was_started_again_comes_back_as_a_new_start_of_itself(seed: int) -> None:
    nodes = together(3, seed, loss=0.1)

    nodes.crash("n2")
    nodes.run(2 * TIMEOUT_S)
    assert members(nodes, "n0") == ["n0", "n1"]
    nodes.start("n2")
    nodes.run(10.0)

    assert members(nodes, "n0") == members(nodes, "n2") == ["n0", "n1", "n2"]
    assert nodes.healthy()
    assert [fact.peer for _, fact in nodes.seen(MemberLost) if isinstance(fact, MemberLost)] == ["n2"]


def test_of_two_the_one_that_led_goes_on_alone_and_the_other_waits() -> None:
    """Given two members that are cut off from each other, then the old leader's view is without the other.

    And when they meet again, then both are in it.
    """
    nodes = together(2)

    nodes.split(["n0"])
    nodes.run(3 * TIMEOUT_S)
    assert members(nodes, "n0") == ["n0"]
    assert members(nodes, "n1") == ["n0", "n1"]
    assert nodes.nodes["n1"].role == "asking"
    assert {id for id, _ in nodes.seen(CutOff)} == {"n1"}

    nodes.heal()
    nodes.run(2 * TIMEOUT_S)
    assert members(nodes, "n0") == members(nodes, "n1") == ["n0", "n1"]


@pytest.mark.parametrize("seed", range(3))
def test_a_minority_makes_no_view_of_its_own(seed: int) -> None:
    nodes = together(5, seed, loss=0.05)

    nodes.split(["n0", "n1"])
    nodes.run(4 * TIMEOUT_S)
    assert nodes.leaders == ["n2"]
    assert members(nodes, "n2") == ["n2", "n3", "n4"]
    assert members(nodes, "n0") == members(nodes, "n1") == ["n0", "n1", "n2", "n3", "n4"]

    nodes.heal()
    nodes.run(3 * TIMEOUT_S)
    assert nodes.healthy()
    assert sorted(members(nodes, "n0")) == ["n0", "n1", "n2", "n3", "n4"]
