"""Whole runs in the modes in which training goes on during an exchange: what goes wrong costs them no more.

As ``tests.test_simulation`` and its neighbours have it for mode blocking, at fewer moments of a round.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from prime_async.machines.facts import (
    CatchUpStarted,
    CaughtUp,
    ContributionRejected,
    ContributorLeftOut,
    NonFiniteProgress,
)
from prime_async.testing import SimNode, SimulationSettings
from prime_async.testing.schedules import MODES, Chaos, mode_settings
from tests.simulation_harness import (
    AIM_S,
    ALL_MEANS,
    STEADY,
    agree,
    are_at,
    assert_counted,
    begin,
    facts_of,
    newest_round,
    points,
    reach,
    steady,
    steps_of,
)

EVERY = 40
"""Sweeps look at every so many-th event of a round."""
in_each_mode = pytest.mark.parametrize("mode", MODES[1:])


def steady_in(mode: str, nodes: int = 4, settings: SimulationSettings = STEADY) -> Chaos:
    return steady(nodes, settings=mode_settings(settings, mode))


def all_count(chaos: Chaos, nodes: list[SimNode], steps: dict[str, int], where: str) -> None:
    """Soon all these steps are in means: after the open round, and one of each fragment, and the one after it."""
    rounds = 2 + 2 * chaos.simulation.settings.fragments
    chaos.simulation.run_until(are_at(nodes, newest_round(chaos) + rounds), 20.0 * rounds)
    assert_counted(nodes, steps, where)


@in_each_mode
@pytest.mark.parametrize("victim", ["n0", "n2"])
def test_a_crash_at_any_point_ends_the_round_in_time_and_costs_no_step(mode: str, victim: str) -> None:
    """Of the leader, or of an owner."""
    for event, data in points(steady_in(mode), every=EVERY):
        chaos = Chaos.restored(data)
        goal = newest_round(chaos) + 1
        chaos.simulation.crash(victim)
        survivors = chaos.simulation.running
        steps = steps_of(survivors)
        chaos.simulation.hint = f", {victim} crashes {event} events into the round"
        chaos.simulation.run_until(are_at(survivors, goal), AIM_S)
        all_count(chaos, survivors, steps, chaos.simulation.hint)


@in_each_mode
def test_a_contributor_that_can_only_dial_out_counts_and_its_crash_costs_the_others_no_step(mode: str) -> None:
    chaos = begin(4, settings=mode_settings(replace(STEADY, nat=frozenset({"n3"})), mode))
    reach(chaos, 4, 60)
    assert_counted([chaos.simulation.nodes["n3"]], {"n3": STEADY.inner_steps}, "n3")
    for _, data in points(chaos, every=3 * EVERY):
        one = Chaos.restored(data)
        one.simulation.crash("n3")
        survivors, steps = one.simulation.running, steps_of(one.simulation.running)
        one.simulation.run_until(are_at(survivors, newest_round(one) + 1), AIM_S)
        all_count(one, survivors, steps, "n3 crashed")


@in_each_mode
@pytest.mark.parametrize("victim", ["n0", "n2"])
def test_a_node_that_hangs_for_thirty_seconds_is_removed_and_comes_back_by_itself(mode: str, victim: str) -> None:
    for _, data in points(steady_in(mode), every=3 * EVERY):
        chaos = Chaos.restored(data)
        goal = newest_round(chaos) + 1
        chaos.simulation.pause(victim)
        others = [n for n in chaos.simulation.running if n.id != victim]
        chaos.simulation.run_until(are_at(others, goal), AIM_S)
        chaos.simulation.run_for(30.0)
        chaos.simulation.resume(victim)
        reach(chaos, newest_round(chaos) + 3, 40)


@in_each_mode
@pytest.mark.parametrize("alone", ["n0", "n3"])
def test_who_is_cut_off_keeps_its_work_and_comes_back(mode: str, alone: str) -> None:
    """What others took of its contribution before they were cut off may have been counted: that is given up."""
    for event, data in points(steady_in(mode), every=3 * EVERY):
        chaos = Chaos.restored(data)
        simulation = chaos.simulation
        away, majority = simulation.nodes[alone], [n for n in simulation.running if n.id != alone]
        goal = newest_round(chaos) + 1
        simulation.split([n.id for n in majority], [alone])
        simulation.hint = f", {alone} cut off {event} events into the round"
        simulation.run_until(are_at(majority, goal + 1), 2 * AIM_S)
        simulation.run_for(20.0)
        assert away.state[0] <= goal
        steps = steps_of([away])
        simulation.split()
        reach(chaos, newest_round(chaos) + 3, 60)
        all_count(chaos, [away], steps, simulation.hint)


@in_each_mode
def test_a_joiner_in_mid_round_holds_nobody_up_and_takes_part(mode: str) -> None:
    for _, data in points(steady_in(mode), every=3 * EVERY):
        chaos = Chaos.restored(data)
        others, steps = chaos.simulation.running, steps_of(chaos.simulation.running)
        chaos.join()
        reach(chaos, newest_round(chaos) + 4, 60)
        all_count(chaos, others, steps, "one joined")
        assert chaos.simulation.nodes["n4"].counted


@in_each_mode
def test_who_was_away_for_some_rounds_fetches_their_means_and_nothing_else(mode: str) -> None:
    """From its own disk it has the rounds before; a round has the chunks of one fragment, and its record."""
    chaos = steady_in(mode, 3, ALL_MEANS)
    settings = chaos.simulation.settings
    chaos.simulation.crash("n2")
    reach(chaos, newest_round(chaos) + 4, 100)
    node = chaos.simulation.start("n2")
    chaos.simulation.run_until(lambda: bool(facts_of(node, CaughtUp)), 40)
    started, caught_up = facts_of(node, CatchUpStarted)[0], facts_of(node, CaughtUp)[0]
    assert (started.snapshot, caught_up.round >= started.run_round) == (-1, True)
    per_round = (len(settings.chunks(0)) + 1) * settings.chunk_bytes
    assert 0 < caught_up.fetched_bytes <= (caught_up.round - started.round) * per_round
    agree(chaos)


@in_each_mode
def test_a_run_whose_nodes_all_crash_goes_on_from_their_disks(mode: str) -> None:
    for _, data in points(steady_in(mode), every=3 * EVERY):
        chaos = Chaos.restored(data)
        names = list(chaos.simulation.nodes)
        for name in names:
            chaos.simulation.crash(name)
        committed = max(chaos.properties.rounds.commits)
        for name in names:
            chaos.simulation.start(name)
        reach(chaos, committed + 3, 60)


@in_each_mode
def test_a_straggler_keeps_its_progress_and_counts_in_a_later_round(mode: str) -> None:
    chaos = begin(3, settings=mode_settings(replace(STEADY, step_s_of={"n2": 2.0}, straggler_timeout_s=1.0), mode))
    chaos.simulation.run_for(60.0)
    slow, quick = chaos.simulation.nodes["n2"], chaos.simulation.nodes["n1"]
    assert quick.state[0] > 12  # nobody waits eight seconds a round for it
    assert len(slow.counted) > 2
    steps, chunks = slow.steps, range(STEADY.chunk_count)
    # It is as chance has it whose turn it is, of two fragments, when a slow node is ready.
    chaos.simulation.run_until(lambda: min(slow.base.get(c, 0) for c in chunks) >= steps, 150)


# --- contributions that cannot be counted ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("victim", ["n0", "n2"])
def test_inner_steps_that_end_in_nan_are_in_no_mean_and_cost_the_others_nothing(mode: str, victim: str) -> None:
    """It begins again from the outer weights, once, and what it does then counts."""
    for _, data in points(steady_in(mode), every=3 * EVERY):
        chaos = Chaos.restored(data)
        node = chaos.simulation.nodes[victim]
        others = [n for n in chaos.simulation.running if n is not node]
        steps = steps_of(others)
        chaos.simulation.spoil(victim)
        chaos.simulation.run_until(lambda: bool(facts_of(node, NonFiniteProgress)), 30)  # noqa: B023
        chaos.simulation.run_until(lambda: not node.not_finite, 1)  # noqa: B023
        first = node.steps
        all_count(chaos, others, steps, f"the steps of {victim} end in NaN")
        all_count(chaos, [node], {victim: first + 1}, "after that")
        made = [c for c in chaos.simulation.work.contributions.values() if c.node == victim and c.end > first]
        assert made
        assert all(c.first >= first for c in made)
        assert [f.times for f in facts_of(node, NonFiniteProgress)] == [1]
        assert chaos.simulation.running == list(chaos.simulation.nodes.values())


@pytest.mark.parametrize("mode", MODES)
def test_a_contribution_that_owners_reject_is_left_out_and_the_others_count(mode: str) -> None:
    """Also if one of the others dies in the midst of it. What it did is still in its next contribution."""
    for _, data in points(steady_in(mode), every=3 * EVERY):
        chaos = Chaos.restored(data)
        node = chaos.simulation.nodes["n2"]
        chaos.simulation.garble("n2")
        chaos.simulation.run_until(lambda: not node.garbles, 30)  # noqa: B023
        chaos.simulation.run_for(0.1)
        chaos.simulation.crash("n3")
        survivors, steps = chaos.simulation.running, steps_of(chaos.simulation.running)
        all_count(chaos, survivors, steps, "one that was rejected")
        left_out = {f.peer for n in survivors for f in facts_of(n, ContributorLeftOut) if f.reason != "left the run"}
        assert left_out == {"n2"}


@pytest.mark.parametrize("mode", MODES)
def test_a_round_whose_contributions_can_all_not_be_used_is_made_of_later_ones(mode: str) -> None:
    """Defect: the owners asked for them for ever. Everybody begins again from the outer weights, and that counts."""
    for _, data in points(steady_in(mode), every=6 * EVERY):
        chaos = Chaos.restored(data)
        nodes = chaos.simulation.running
        for node in nodes:
            chaos.simulation.garble(node.id)
        chaos.simulation.run_until(lambda: all(facts_of(n, ContributionRejected) for n in nodes), 60)  # noqa: B023
        chaos.simulation.run_for(1.0)
        steps = steps_of(nodes)
        all_count(chaos, nodes, steps, "all were rejected")
        assert not any(facts_of(n, NonFiniteProgress) for n in nodes)
        assert chaos.simulation.running == list(chaos.simulation.nodes.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("leader", [True, False])
def test_the_only_trainer_of_a_run_contributes_anew_if_its_bytes_can_not_be_used(mode: str, leader: bool) -> None:
    """Twice in a row, and whether it is its own leader or not; its owners are witnesses."""
    trainer = "n0" if leader else "n1"
    witnesses = frozenset({"n0", "n1", "n2"}) - {trainer}
    chaos = begin(3, settings=mode_settings(replace(STEADY, witnesses=witnesses), mode))
    reach(chaos, 3, 60)
    node = chaos.simulation.nodes[trainer]
    for times in (1, 2):
        chaos.simulation.garble(trainer)
        again = [ContributionRejected(round=newest_round(chaos), peer=trainer, times=times)]
        chaos.simulation.run_until(lambda: facts_of(node, ContributionRejected)[-1:] == again, 30)  # noqa: B023
        chaos.simulation.run_for(1.0)
        all_count(chaos, [node], steps_of([node]), f"rejected {times} times")
    told = [f for n in chaos.simulation.running for f in facts_of(n, ContributionRejected)]
    assert {(f.peer, f.times) for f in told} == {(trainer, 1), (trainer, 2)}
