"""Whole runs of the real machines: how soon, and with what, a run goes on after what goes wrong in it.

Whatever a test does, the properties of ``prime_async.testing`` are watched after every event.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from prime_async.machines.facts import StateDiverged
from prime_async.messages import Message, Plan, ViewUpdate
from prime_async.testing import SimulationSettings
from prime_async.testing.schedules import Chaos
from tests.simulation_harness import (
    AIM_S,
    STEADY,
    TIMEOUT_S,
    Drops,
    are_at,
    assert_counted,
    begin,
    newest_round,
    points,
    reach,
    steady,
    steps_of,
)

EVERY = 4
"""Sweeps look at every so many-th event of a round."""


def crash_and_go_on(data: bytes, victims: tuple[str, ...], where: str, limit_s: float) -> None:
    """The others end the open round in ``limit_s``, and lose no inner step."""
    chaos = Chaos.restored(data)
    simulation = chaos.simulation
    goal = newest_round(chaos) + 1
    for victim in victims:
        simulation.crash(victim)
    survivors = simulation.running
    steps = steps_of(survivors)
    simulation.hint = f", {where}"
    simulation.run_until(are_at(survivors, goal), limit_s)
    simulation.run_until(are_at(survivors, goal + 2), 30)
    assert_counted(survivors, steps, where)


# --- crashes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["n0", "n1", "n2", "n3"])
def test_a_crash_of_any_one_of_four_at_any_point_ends_the_round_in_time_and_costs_no_step(victim: str) -> None:
    for event, data in points(steady(), every=EVERY):
        crash_and_go_on(data, (victim,), f"{victim} crashes {event} events into the round", AIM_S)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("victim", ["n0", "n1", "n2", "n3"])
def test_a_crash_of_any_one_of_four_at_each_single_event(victim: str, seed: int) -> None:
    for event, data in points(steady(seed=seed)):
        crash_and_go_on(data, (victim,), f"{victim} crashes {event} events into the round", AIM_S)


@pytest.mark.parametrize("victims", [("n0", "n1"), ("n0", "n4"), ("n1", "n3"), ("n3", "n4")])
def test_two_crashes_at_once_of_five_cost_no_more(victims: tuple[str, ...]) -> None:
    for event, data in points(steady(5), every=2 * EVERY):
        election_s = 1.0 if "n0" in victims else 0.0  # it waits a moment for the other one that is silent
        crash_and_go_on(data, victims, f"{victims} crash {event} events into the round", AIM_S + election_s)


def test_half_of_an_even_number_may_be_lost_if_the_leader_is_not() -> None:
    for event, data in points(steady(4), every=2 * EVERY):
        crash_and_go_on(data, ("n1", "n3"), f"half crashes {event} events into the round", AIM_S)


def test_five_of_twelve_at_once_and_then_three_of_the_seven() -> None:
    chaos = steady(12, settings=replace(STEADY, chunk_count=12))
    for victims in (range(5), range(5, 8)):
        goal = newest_round(chaos) + 2
        for i in victims:
            chaos.simulation.crash(f"n{i}")
        reach(chaos, goal, 2 * AIM_S)
    assert len(chaos.simulation.running) == 4


def test_one_after_another_down_to_a_single_node_which_is_refilled() -> None:
    chaos = steady(5)
    for victim in ("n0", "n3", "n1", "n4"):
        chaos.simulation.crash(victim)
        if len(chaos.simulation.running) == 1:
            break
        reach(chaos, newest_round(chaos) + 2, 2 * AIM_S)
    # of two, the one that does not lead cannot know that it is not the one cut off
    view = chaos.properties.newest
    assert view is not None
    if view.leader == chaos.simulation.running[0].id:
        reach(chaos, newest_round(chaos) + 2, 2 * AIM_S)


def test_a_survivor_of_two_that_led_goes_on_alone() -> None:
    for event, data in points(steady(2), every=EVERY):
        crash_and_go_on(data, ("n1",), f"the other crashes {event} events into the round", AIM_S)


def test_a_survivor_of_two_that_did_not_lead_waits_and_goes_on_once_the_leader_is_back() -> None:
    chaos = steady(2)
    chaos.simulation.run_for(1.0)
    chaos.simulation.crash("n0")
    left = chaos.simulation.nodes["n1"]
    chaos.simulation.run_for(30.0)
    before = left.state
    steps = steps_of([left])
    chaos.simulation.run_for(60.0)
    assert left.state == before
    assert left.running
    chaos.simulation.start("n0")
    reach(chaos, before[0] + 3, 60)
    assert_counted([left], steps, "the survivor")


# --- hung, cut off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["n0", "n2"])
def test_a_node_that_hangs_for_thirty_seconds_is_removed_and_comes_back_by_itself(victim: str) -> None:
    for event, data in points(steady(), every=3 * EVERY):
        chaos = Chaos.restored(data)
        simulation = chaos.simulation
        goal = newest_round(chaos) + 1
        simulation.pause(victim)
        others = [n for n in simulation.running if n.id != victim]
        simulation.hint = f", {victim} hangs {event} events into the round"
        simulation.run_until(are_at(others, goal), AIM_S)
        simulation.run_for(30.0)
        simulation.resume(victim)
        reach(chaos, newest_round(chaos) + 3, 40)


def test_a_pause_shorter_than_the_timeout_changes_no_view() -> None:
    for victim in ("n0", "n2"):
        chaos = steady()
        view = chaos.properties.newest
        assert view is not None
        chaos.pause(victim, TIMEOUT_S - 3)
        reach(chaos, newest_round(chaos) + 2, 20)
        after = chaos.properties.newest
        assert after is not None
        assert (after.epoch, [m.incarnation for m in after.members]) == (
            view.epoch,
            [m.incarnation for m in view.members],
        )


@pytest.mark.parametrize("minority", [("n3",), ("n0",)])
def test_the_majority_goes_on_and_the_minority_keeps_its_work_and_comes_back(minority: tuple[str, ...]) -> None:
    for event, data in points(steady(), every=4 * EVERY):
        chaos = Chaos.restored(data)
        simulation = chaos.simulation
        majority = [n for n in simulation.running if n.id not in minority]
        cut_off = [n for n in simulation.running if n.id in minority]
        goal = newest_round(chaos) + 1
        simulation.split([n.id for n in majority], minority)
        simulation.hint = f", {minority} cut off {event} events into the round"
        simulation.run_until(are_at(majority, goal + 1), 2 * AIM_S)
        simulation.run_for(20.0)
        at = newest_round(chaos)
        assert all(n.state[0] <= goal for n in cut_off)
        steps = steps_of(cut_off)
        simulation.split()
        reach(chaos, at + 4, 60)
        assert_counted(cut_off, steps, simulation.hint)


def test_of_equal_halves_that_with_the_leader_goes_on() -> None:
    for event, data in points(steady(), every=4 * EVERY):
        chaos = Chaos.restored(data)
        simulation = chaos.simulation
        view = chaos.properties.newest
        assert view is not None
        others = [m.id for m in view.members if m.id != view.leader]
        here, away = (view.leader, others[0]), (others[1], others[2])
        goal = newest_round(chaos) + 2
        simulation.split(here, away)
        simulation.hint = f", split {event} events into the round"
        simulation.run_until(are_at([simulation.nodes[n] for n in here], goal), 2 * AIM_S)
        assert all(simulation.nodes[n].state[0] < goal for n in away)
        simulation.split()
        reach(chaos, newest_round(chaos) + 3, 60)


def test_a_link_that_drops_for_two_seconds_every_ten_changes_no_view() -> None:
    for a, b in (("n0", "n2"), ("n1", "n3")):
        chaos = steady()
        view = chaos.properties.newest
        assert view is not None
        chaos.simulation.flap(a, b)
        chaos.simulation.run_for(120.0)
        after = chaos.properties.newest
        assert after is not None
        assert after.epoch == view.epoch
        assert [(m.id, m.incarnation) for m in after.members] == [(m.id, m.incarnation) for m in view.members]
        assert newest_round(chaos) > 10


def test_one_dead_direction_of_one_link_stops_nobody_for_long() -> None:
    for a, b in (("n0", "n2"), ("n2", "n0"), ("n1", "n3")):
        chaos = steady()
        chaos.simulation.cut(a, b)
        chaos.simulation.run_for(60.0)
        chaos.simulation.heal()
        reach(chaos, newest_round(chaos) + 3, 60)


# --- coming and going -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaver", ["n0", "n2"])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_node_that_leaves_hands_over_at_once(leaver: str, at_once: bool) -> None:
    for _, data in points(steady(), every=3 * EVERY):
        chaos = Chaos.restored(data)
        chaos.leave(leaver, at_once=at_once)
        others = [n for n in chaos.simulation.running if n.id != leaver]
        steps = steps_of(others)
        goal = newest_round(chaos) + 2
        chaos.simulation.run_until(are_at(others, goal), TIMEOUT_S - 1.0)
        chaos.simulation.run_until(lambda: chaos.simulation.nodes[leaver].finished, 3.0)  # noqa: B023
        reach(chaos, goal + 1, 10)
        assert_counted(others, steps, f"{leaver} left")


def test_a_run_drained_to_one_node_and_refilled_goes_on_from_where_it_was() -> None:
    chaos = steady()
    for leaver in ("n0", "n1", "n2"):
        chaos.leave(leaver, at_once=False)
        chaos.simulation.run_until(lambda: chaos.simulation.nodes[leaver].finished, 15)  # noqa: B023
    at = newest_round(chaos)
    reach(chaos, at + 2, 20)
    for name in ("n0", "n1", "n2", "n4"):
        chaos.simulation.start(name)
    reach(chaos, newest_round(chaos) + 3, 60)
    assert len(chaos.simulation.running) == 5


def test_all_leave_one_by_one_and_the_last_one_too() -> None:
    chaos = steady()
    for leaver in ("n0", "n1", "n2", "n3"):
        chaos.leave(leaver, at_once=False)
        chaos.simulation.run_until(lambda: chaos.simulation.nodes[leaver].finished, 20)  # noqa: B023


def test_all_leave_together() -> None:
    chaos = steady()
    for leaver in ("n0", "n1", "n2", "n3"):
        chaos.leave(leaver, at_once=False)
    chaos.simulation.run_until(lambda: all(n.finished for n in chaos.simulation.nodes.values()), 60)


def test_a_joiner_is_active_soon_and_ten_at_once_are() -> None:
    for joiners in (1, 10):
        chaos = steady()
        steps, others = steps_of(chaos.simulation.running), chaos.simulation.running
        chaos.join(joiners)
        reach(chaos, newest_round(chaos) + 4, 60)
        assert_counted(others, steps, f"{joiners} joined")


def test_the_whole_run_stops_and_starts_again_from_its_disks() -> None:
    chaos = steady()
    names = list(chaos.simulation.nodes)
    for name in names:
        chaos.simulation.crash(name)
    at = newest_round(chaos)
    for name in names:
        chaos.simulation.start(name)
    reach(chaos, at + 3, 60)


def test_a_member_that_starts_again_at_once_takes_part_again() -> None:
    for victim in ("n0", "n2"):
        for wiped in (False, True):
            for pause_s in (0.0, 2.0, 15.0):
                chaos = steady()
                chaos.simulation.run_for(1.0)
                chaos.crash(victim)
                chaos.simulation.run_for(pause_s)
                chaos.restart(victim, wiped=wiped)
                reach(chaos, newest_round(chaos) + 4, 60)


def test_a_run_of_so_many_rounds_ends_for_everybody_with_the_same_state() -> None:
    for seed in range(5):
        chaos = begin(4, seed, SimulationSettings(rounds=5, loss=0.1, min_members=4))
        nodes = chaos.simulation.nodes.values()
        chaos.simulation.run_until(lambda: all(n.finished for n in nodes), 150)  # noqa: B023
        assert {n.state[0] for n in nodes} == {5}
        assert len({n.state for n in nodes}) == 1


def test_while_there_are_too_few_members_nobody_advances_and_then_all_do() -> None:
    chaos = steady(3, settings=replace(STEADY, min_members=3))
    chaos.simulation.crash("n2")
    chaos.simulation.run_for(30.0)
    stuck = {n.state[0] for n in chaos.simulation.running}
    chaos.simulation.run_for(30.0)
    assert {n.state[0] for n in chaos.simulation.running} == stuck
    chaos.simulation.start("n2")
    reach(chaos, max(stuck) + 2, 40)


# --- unequal nodes --------------------------------------------------------------------------------------------------


def test_a_straggler_keeps_its_progress_and_counts_in_a_later_round() -> None:
    chaos = begin(3, settings=replace(STEADY, step_s_of={"n2": 2.0}, straggler_timeout_s=1.0))
    simulation = chaos.simulation
    simulation.run_for(60.0)
    slow, quick = simulation.nodes["n2"], simulation.nodes["n1"]
    assert quick.state[0] > 12  # nobody waits eight seconds a round for it
    steps = steps_of([slow])
    assert len(slow.counted) > 2
    simulation.run_for(30.0)
    assert_counted([slow], steps, "the straggler")


def test_rounds_of_so_many_seconds_count_unequal_steps() -> None:
    chaos = begin(3, settings=replace(STEADY, seconds=3.0, step_s_of={"n2": 1.0}))
    reach(chaos, 6, 60)
    slow, quick = chaos.simulation.nodes["n2"], chaos.simulation.nodes["n1"]
    assert slow.steps < quick.steps
    assert set(slow.counted) >= {3, 4, 5}


def test_chunks_follow_measured_bandwidth() -> None:
    fast, slow = 40e6, 4e6
    links = {"n0": fast, "n1": fast, "n2": fast, "n3": slow}
    settings = replace(STEADY, chunk_count=24, bytes_per_s_of=links, fetch_timeout_s=300.0)
    chaos = begin(4, settings=settings)
    chaos.simulation.run_until(are_at(chaos.simulation.running, 10), 900)
    view = chaos.properties.newest
    assert view is not None
    weights = {m.id: m.weight for m in view.members}
    assert weights["n3"] < min(weights["n0"], weights["n1"], weights["n2"]) / 2


def test_a_witness_votes_and_lets_one_of_two_trainers_go_on_without_the_leader() -> None:
    chaos = steady(3, settings=replace(STEADY, witnesses=frozenset({"n2"})))
    chaos.simulation.crash("n0")
    reach(chaos, newest_round(chaos) + 2, 2 * AIM_S)
    assert chaos.simulation.nodes["n2"].steps == 0


@pytest.mark.parametrize("hidden", [("n3",), ("n1", "n2", "n3")])
def test_nodes_behind_nat_take_part(hidden: tuple[str, ...]) -> None:
    chaos = begin(4, settings=replace(STEADY, nat=frozenset(hidden)))
    reach(chaos, 4, 60)
    for name in hidden:
        node = chaos.simulation.nodes[name]
        assert_counted([node], {name: STEADY.inner_steps}, name)
    chaos.simulation.crash(hidden[0])
    reach(chaos, newest_round(chaos) + 2, 2 * AIM_S)


# --- single messages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Plan, ViewUpdate])
def test_a_lost_message_is_repaired_by_repeats_in_seconds(kind: type[Message]) -> None:
    for receiver in ("n1", "n3"):
        chaos = steady()
        chaos.simulation.network.drops = Drops(kind, receiver, 2)
        reach(chaos, newest_round(chaos) + 2, 3 * 3.0 + 6.0)


def test_a_second_plan_that_is_lost_is_repaired_too() -> None:
    for _, data in points(steady(), every=4 * EVERY):
        chaos = Chaos.restored(data)
        chaos.simulation.crash("n3")
        chaos.simulation.network.drops = Drops(Plan, "n1", 2)
        goal = newest_round(chaos) + 1
        chaos.simulation.run_until(are_at(chaos.simulation.running, goal), AIM_S + 3)


def test_without_corruption_nobody_ever_says_that_states_differ() -> None:
    chaos = steady()
    chaos.pause("n2", 40.0)
    reach(chaos, newest_round(chaos) + 3, 40)
    assert not [f for n in chaos.simulation.processes for f in n.facts if isinstance(f, StateDiverged)]
