"""Schedules that went wrong once, each named for what it found; the later ones sweep the moments at which it may come.

What a seed does changes with the simulator; so what chance found is written down as a schedule of its own, too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from prime_async.messages import HeartbeatAck, Message, Plan, Propose, Welcome
from prime_async.testing.schedules import MODES, Chaos, run_schedule
from tests.simulation_harness import STEADY, begin, newest_round, points, reach, steady

FOUND_BY_CHANCE = {
    13: "what a missed commit had counted was contributed again after the state was fetched",
    50: "a mean was adopted and reported at once",
    100: "all who held the means of the last round were started again, and who lacked one round waited for ever",
    126: "the same, of two nodes",
    194: "a mean that nobody else had was damaged, and who joined could not catch up",
    205: "two candidates stood for the same epoch, and the loser could never follow the winner",
    385: "a leader that was just voted out said that a commit is ready",
    419: "a restarted leader planned afresh under the same ids",
    454: "a node that was a member by a view, and not by a welcome, never began to train",
    514: "the same, with two nodes left",
    564: "a chunk was made again after its owner had started anew",
    908: "a leader one round behind had nobody active to fetch from",
    1247: "a leader that was behind made the only holder of the state go back",
    1578: "a restarted owner made its chunks again under the old number",
    2017: "a leader that left handed over to members without a vote",
    2874: "a leader that left was gone before it had left out a member that had died just then",
    2956: "who was behind got a snapshot of each round, and none before it was gone",
    8818: "a leader that had missed the newest commit told nobody, itself included, what that leads to",
    12901: "who joined was right where the leader was wrong, and neither was told",
    15004: "the only snapshot was of the newest state, which nobody had asked the leader about",
    15235: "three members had three different states",
    3672: "the only voter that stayed could not be dialled",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", FOUND_BY_CHANCE, ids=[f"{s}: {what}" for s, what in FOUND_BY_CHANCE.items()])
def test_schedules_that_chance_found(seed: int, mode: str) -> None:
    run_schedule(seed, mode, spoils=False)


def test_one_who_is_a_round_behind_catches_up_when_nobody_has_the_means_any_more() -> None:
    """All start again while some have applied the last round, and some have not: the means are gone with the memory."""
    for _, data in points(steady(3), every=3):
        chaos = Chaos.restored(data)
        at = newest_round(chaos)
        for name in list(chaos.simulation.nodes):
            chaos.crash(name)
        for name in list(chaos.simulation.nodes):
            chaos.restart(name)
        if not chaos.why_stuck():
            reach(chaos, at + 2, 90)


def test_two_candidates_of_one_epoch_end_up_with_one_leader() -> None:
    """The leader is lost while one member is cut off: both sides count on from the same epoch."""
    for away in ("n1", "n2", "n3", "n4"):
        for later_s in (0.0, 0.3, 1.0, 3.0):
            chaos = steady(5)
            names = list(chaos.simulation.nodes)
            chaos.simulation.run_for(later_s)
            chaos.crash("n0")
            chaos.simulation.run_for(11.0)
            chaos.simulation.split([n for n in names if n != away], [away])
            chaos.simulation.run_for(5.0)
            chaos.simulation.split()
            reach(chaos, newest_round(chaos) + 2, 60)


class LosesWelcomes:
    """To one node; views reach it."""

    def __init__(self, receiver: str) -> None:
        self.receiver = receiver

    def __call__(self, _sender: str, receiver: str, message: Message) -> bool:
        return receiver == self.receiver and isinstance(message, Welcome)


def test_who_is_a_member_by_a_view_alone_trains_once_it_is_welcomed() -> None:
    chaos = steady(3)
    chaos.simulation.network.drops = LosesWelcomes("n2")
    chaos.restart("n2")
    chaos.simulation.run_for(5.0)
    chaos.simulation.heal()
    chaos.simulation.network.drops = LosesWelcomes("nobody")
    reach(chaos, newest_round(chaos) + 3, 40)


def test_an_owner_that_starts_again_at_once_makes_no_mean_of_its_earlier_start() -> None:
    for victim in ("n1", "n2"):
        for _, data in points(steady(4), every=2):
            chaos = Chaos.restored(data)
            chaos.restart(victim)
            reach(chaos, newest_round(chaos) + 2, 40)


@pytest.mark.parametrize("snapshot_every", [1, 1000])
def test_nobody_goes_back_to_the_state_of_a_leader_that_starts_again(snapshot_every: int) -> None:
    settings = replace(STEADY, snapshot_every=snapshot_every)
    for nodes in (2, 3):
        for later_s in (0.2, 1.0, 2.0, 2.6, 3.0):
            chaos = steady(nodes, settings=settings)
            chaos.simulation.run_for(later_s)
            at = newest_round(chaos)
            chaos.restart("n0")
            chaos.simulation.run_for(15.0)
            assert all(n.state[0] >= at for n in chaos.simulation.running if n.id != "n0")
            chaos.simulation.split(["n0"], ["n1", "n2"])
            chaos.simulation.run_for(12.0)
            chaos.simulation.split()
            if not chaos.why_stuck():
                reach(chaos, at + 2, 60)


def test_a_founder_that_leaves_at_once_leaves_a_run_that_goes_on() -> None:
    for later_s in (0.0, 0.1, 0.5, 1.0, 2.0, 4.0):
        chaos = begin(3, settings=replace(STEADY, inner_steps=6))
        chaos.simulation.run_for(0.3 + later_s)
        chaos.leave("n0", at_once=True)
        chaos.simulation.run_for(20.0)
        others = [chaos.simulation.nodes[n] for n in ("n1", "n2")]
        goal = max(n.state[0] for n in others) + 2
        chaos.simulation.run_until(lambda: all(n.state[0] >= goal for n in others), 60)  # noqa: B023


def test_a_leader_that_leaves_as_a_member_dies_leaves_that_one_out_before_it_goes() -> None:
    """Else those who stay are half of the voters, or wait for one that is dead. (Of two that are left none may die.)"""
    moments = {3: (-3.0, -0.5, -0.01), 4: (-3.0, -0.5, -0.01, 0.01, 0.3, 0.6, 1.0)}
    for nodes, times in moments.items():
        for dies_s in times:
            chaos = steady(nodes)
            if dies_s < 0:
                chaos.crash("n1")
                chaos.simulation.run_for(-dies_s)
                chaos.leave("n0", at_once=True)
            else:
                chaos.leave("n0", at_once=True)
                chaos.simulation.run_for(dies_s)
                chaos.crash("n1")
            others = [n for n in chaos.simulation.running if n.id not in ("n0", "n1")]
            goal = newest_round(chaos) + 2
            chaos.simulation.run_until(lambda: all(n.state[0] >= goal for n in others), 60)  # noqa: B023


class LosesDecisions:
    """Between two times: nobody hears what was proposed, or that it is decided."""

    def __init__(self, kinds: tuple[type[Message], ...], count: int) -> None:
        self.kinds, self.count = kinds, count

    def __call__(self, _sender: str, _receiver: str, message: Message) -> bool:
        hit = self.count > 0 and isinstance(message, self.kinds)
        self.count -= hit
        return hit


@pytest.mark.parametrize("kind", [Propose, HeartbeatAck, Plan])
def test_a_leader_lost_with_what_it_has_just_decided(kind: type[Message]) -> None:
    """The next one must find out from those that had stored it."""
    for _, data in points(steady(4), every=6):
        chaos = Chaos.restored(data)
        chaos.simulation.network.drops = LosesDecisions((kind,), 2)
        for _ in range(20):
            chaos.simulation.step()
        chaos.crash("n0")
        reach(chaos, newest_round(chaos) + 2, 40)


def test_a_commit_that_was_ready_is_not_made_under_a_view_in_which_it_is_not() -> None:
    """Those who hold the means are cut off one after the other, while the leader lacks one of them."""
    for chunk_count in (2, 4):
        for _, data in points(steady(4, settings=replace(STEADY, chunk_count=chunk_count)), every=5):
            chaos = Chaos.restored(data)
            for other in ("n1", "n2"):
                chaos.simulation.cut("n0", other, both_ways=True)
                chaos.simulation.run_for(0.05)
            chaos.simulation.run_for(12.0)
            chaos.simulation.heal()
            reach(chaos, newest_round(chaos) + 2, 60)
