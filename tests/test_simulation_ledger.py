"""Whole runs in which somebody is behind, has another state, or has lost what was on its disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from prime_async.machines.checkpoint import Checkpoint
from prime_async.machines.facts import CatchUpStarted, CaughtUp, LedgerTrouble, StateDiverged, StateMended
from prime_async.messages import ChunkInfo, ChunkKey
from prime_async.testing import SimNode, SimulationSettings
from prime_async.testing.schedules import Chaos
from tests.lies import LIES
from tests.simulation_harness import (
    ALL_MEANS,
    KEEPS,
    SOON_S,
    STEADY,
    agree,
    are_at,
    facts_of,
    newest_round,
    reach,
    steady,
)

# --- who is behind --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [2, 3, 4, 5])
@pytest.mark.parametrize("missed", [1, 2, 8])
def test_who_was_away_for_some_rounds_fetches_their_means_and_nothing_else(nodes: int, missed: int) -> None:
    chaos = steady(nodes, settings=ALL_MEANS)
    away = f"n{nodes - 1}"
    chaos.simulation.crash(away)
    reach(chaos, newest_round(chaos) + missed, 20.0 * (missed + 1))
    was_at = chaos.simulation.nodes[away].state[0]
    node = chaos.simulation.start(away)
    chaos.simulation.run_until(lambda: bool(facts_of(node, CaughtUp)), SOON_S)
    caught_up = facts_of(node, CaughtUp)[0]
    started = facts_of(node, CatchUpStarted)[0]
    assert started.snapshot == -1
    assert was_at - 1 <= started.round <= was_at
    assert caught_up.round >= started.run_round
    per_round = (ALL_MEANS.chunk_count + 1) * ALL_MEANS.chunk_bytes  # its record, too
    assert 0 < caught_up.fetched_bytes <= (caught_up.round - started.round) * per_round
    agree(chaos)


def test_a_run_of_one_comes_back_to_where_it_was_without_anybody() -> None:
    chaos = steady(1)
    at = chaos.simulation.nodes["n0"].state
    chaos.simulation.crash("n0")
    node = chaos.simulation.start("n0")
    assert node.state[0] >= at[0] - 1
    agree(chaos)
    assert not facts_of(node, CatchUpStarted)


def test_who_joins_late_gets_a_snapshot_if_that_is_less_and_the_means_since() -> None:
    chaos = steady(3, settings=KEEPS)
    reach(chaos, 21, 100)
    node = chaos.simulation.start("n3")
    agree(chaos)
    started = facts_of(node, CatchUpStarted)[0]
    assert started.snapshot >= 16
    assert node.disk.snapshots
    assert min(node.disk.means) >= started.snapshot


@pytest.mark.parametrize("settings", [KEEPS, ALL_MEANS], ids=["snapshot", "means"])
@pytest.mark.parametrize("nodes", [3, 4, 5])
def test_providers_that_die_meanwhile_are_replaced_by_others(nodes: int, settings: SimulationSettings) -> None:
    """One, at every hundredth event of the catching up."""
    chaos = steady(nodes, settings=settings)
    reach(chaos, 13, 80)
    joiner = chaos.simulation.start(f"n{nodes}")
    start, event = chaos.snapshot(), 0
    done = False
    while not done:
        chaos = Chaos.restored(start)
        joiner = chaos.simulation.nodes[f"n{nodes}"]
        for _ in range(event):
            chaos.simulation.step()
        done = bool(facts_of(joiner, CaughtUp))
        chaos.simulation.crash(f"n{1 + event // 100 % (nodes - 1)}")
        agree(chaos, 60.0)
        event += 100


def test_who_crashes_while_it_catches_up_goes_on_with_what_came() -> None:
    chaos = steady(3, settings=replace(ALL_MEANS, latency_s=(0.1, 0.3)))
    reach(chaos, 13, 120)
    node = chaos.simulation.start("n3")
    six = set(range(6))
    chaos.simulation.run_until(lambda: six <= {r for r, m in node.disk.means.items() if m.commit is not None}, SOON_S)
    chaos.simulation.crash("n3")
    came = {r for r, m in node.disk.means.items() if m.commit is not None}
    there = set(range(min(set(range(99)) - came)))
    again = chaos.simulation.start("n3")
    assert again.state[0] == max(there) + 1, "it begins with what came"
    asked: list[ChunkKey] = []
    chaos.simulation.store.lies = lambda _server, key, info: (asked.append(key), info)[1]  # type: ignore[func-returns-value]
    agree(chaos, 60.0)
    assert not [k for k in asked if k.kind == "mean" and k.round in there and (k.epoch, k.attempt) == (0, 0)]


def test_when_all_crash_right_after_a_commit_its_means_are_on_their_disks() -> None:
    chaos = steady(4)
    for _ in range(3):
        known = set(chaos.properties.rounds.commits)
        chaos.simulation.run_until(lambda: set(chaos.properties.rounds.commits) != known, SOON_S)  # noqa: B023
        committed = max(chaos.properties.rounds.commits)
        for name in chaos.simulation.nodes:
            chaos.simulation.crash(name)
        for name in list(chaos.simulation.nodes):
            chaos.simulation.start(name)
        reach(chaos, committed + 2, SOON_S)


# --- full disks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", ["n0", "n3"])
def test_with_one_disk_full_a_run_goes_on_and_no_crash_of_all_loses_a_commit(full: str) -> None:
    """Defect: what was in the memory of that node alone counted as safe. ``full``: the leader's, or another's."""
    chaos = steady(3 if full == "n0" else 4)
    chaos.simulation.fill(full)
    goal = newest_round(chaos) + 3
    chaos.simulation.run_until(are_at(chaos.simulation.running, goal), 40.0)
    assert facts_of(chaos.simulation.nodes[full], LedgerTrouble)
    for _ in range(2):
        known = set(chaos.properties.rounds.commits)
        chaos.simulation.run_until(lambda: set(chaos.properties.rounds.commits) != known, SOON_S)  # noqa: B023
        for name in chaos.simulation.nodes:
            chaos.simulation.crash(name)
        chaos.simulation.fill(full, full=False)
        for name in list(chaos.simulation.nodes):
            chaos.simulation.start(name)
        reach(chaos, max(chaos.properties.rounds.commits) + 2, SOON_S)
        chaos.simulation.fill(full)


@pytest.mark.parametrize("full", [("n0", "n1", "n2"), ("n0", "n1", "n2", "n3")])
def test_with_most_disks_full_a_run_goes_on_and_so_does_it_without_whoever_dies(full: tuple[str, ...]) -> None:
    """What a committed round needs is with all that vote; when there is room again it is on disks, too."""
    chaos = steady(4)
    for name in full:
        chaos.simulation.fill(name)
    for victim in ("n3", "n0"):
        reach(chaos, newest_round(chaos) + 3, 60)
        chaos.simulation.crash(victim)
    survivors = chaos.simulation.running
    chaos.simulation.run_until(are_at(survivors, newest_round(chaos) + 3), 80)
    for name in full:
        chaos.simulation.fill(name, full=False)
    for victim in ("n3", "n0"):
        chaos.simulation.start(victim)
    agree(chaos, 80)
    assert all(n.disk.means[newest_round(chaos) - 2].commit for n in survivors)


# --- another state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["n0", "n1"])
@pytest.mark.parametrize("nodes", [3, 4, 5])
def test_a_state_that_silently_goes_wrong_is_found_and_mended(nodes: int, victim: str) -> None:
    """The leader's, or another member's."""
    chaos = steady(nodes)
    right = {r: c.state for r, c in chaos.properties.rounds.commits.items()}
    chaos.simulation.corrupt(victim)
    wrong = chaos.simulation.nodes[victim].state[1]
    agree(chaos)
    node = chaos.simulation.nodes[victim]
    commits = chaos.properties.rounds.commits
    assert wrong not in {c.state for c in commits.values()}
    assert {r: c.state for r, c in commits.items() if r in right} == right
    assert [f for n in chaos.simulation.nodes.values() for f in facts_of(n, StateDiverged)]
    assert [f for f in node.facts if isinstance(f, StateMended | CaughtUp)]


@pytest.mark.parametrize("victim", ["n0", "n1"])
def test_of_two_that_differ_the_leaders_state_counts_and_the_run_goes_on(victim: str) -> None:
    chaos = steady(2)
    chaos.simulation.corrupt(victim)
    agree(chaos)


@pytest.mark.parametrize(("nodes", "wrong"), [(3, 2), (3, 3), (4, 2), (4, 3), (4, 4), (5, 3), (5, 5)])
@pytest.mark.parametrize("leader_too", [True, False])
def test_when_no_state_has_a_majority_one_of_them_counts_and_the_run_goes_on(
    nodes: int, wrong: int, leader_too: bool
) -> None:
    """Defect: with three different states nobody was told that its own is wrong, and nothing could be committed."""
    chaos = steady(nodes)
    names = list(chaos.simulation.nodes)
    for name in names[:wrong] if leader_too else names[nodes - wrong :]:
        chaos.simulation.corrupt(name)
        chaos.simulation.run_for(0.01)
    agree(chaos)


def test_a_snapshot_of_the_newest_state_helps_who_joins_while_the_run_waits_for_it() -> None:
    """Defect: what the newest commit leads to was not asked for by who has another base to begin with, or none."""
    for crashes_s in (1.0, 2.0, 2.5):
        for joins_s in (8.5, 9.0, 9.5, 9.9, 10.5):
            chaos = steady(2, settings=replace(ALL_MEANS, min_members=2))
            chaos.simulation.nodes["n0"].disk.means[0].damaged.add(0)
            chaos.simulation.run_for(crashes_s)
            chaos.simulation.crash("n1")
            chaos.simulation.run_for(joins_s)
            chaos.simulation.start("n2")
            agree(chaos)


def test_a_node_alone_does_not_notice_and_goes_on() -> None:
    chaos = steady(1)
    chaos.simulation.corrupt("n0")
    agree(chaos)


def test_a_state_that_goes_wrong_while_the_leader_dies_is_mended_all_the_same() -> None:
    chaos = steady(4)
    chaos.simulation.corrupt("n2")
    chaos.simulation.run_for(0.5)
    chaos.simulation.crash("n0")
    agree(chaos, 60.0)


@pytest.mark.parametrize("victim", ["n0", "n1"])
@pytest.mark.parametrize("nodes", [2, 3])
def test_a_wrong_state_that_is_on_disk_too_is_mended_after_a_restart(nodes: int, victim: str) -> None:
    chaos = steady(nodes, settings=replace(STEADY, snapshot_every=1))
    chaos.simulation.corrupt(victim)
    node = chaos.simulation.nodes[victim]
    at = node.state[0]
    chaos.simulation.run_until(lambda: at + 1 in node.disk.snapshots, SOON_S)
    chaos.simulation.crash(victim)
    chaos.simulation.start(victim)
    agree(chaos)


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_leader_that_starts_again_behind_and_wrong_learns_from_the_others_where_the_run_is(nodes: int) -> None:
    """Defect: it asked itself for the state that the newest commit leads to, and waited for ever."""
    for later_s in (0.0, 1.0, 2.0, 4.0):
        chaos = steady(nodes, settings=ALL_MEANS)
        chaos.simulation.corrupt("n0")
        chaos.simulation.run_for(8.0 + later_s)
        chaos.simulation.crash("n0")
        chaos.simulation.start("n0")
        agree(chaos, 60.0)


# --- a disk that loses something ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("settings", [KEEPS, ALL_MEANS], ids=["snapshots", "means"])
def test_what_is_damaged_on_one_disk_stops_nobody(nodes: int, settings: SimulationSettings) -> None:
    chaos = steady(nodes, settings=settings)
    reach(chaos, 10, 60)
    name = f"n{nodes - 1}"
    for _ in range(3):
        chaos.simulation.damage(name)
    if nodes > 1:  # alone it has lost what it had, which the next test is about
        chaos.simulation.crash(name)
        chaos.simulation.start(name)
    chaos.simulation.start("joiner", contacts=["n0"])
    agree(chaos, 60.0)


def test_a_node_alone_whose_ledger_is_damaged_writes_a_snapshot_as_soon_as_it_knows() -> None:
    chaos = steady(1, settings=ALL_MEANS)
    node = chaos.simulation.nodes["n0"]
    node.disk.means[1].damaged.add(0)
    assert not node.disk.snapshots
    joiner = chaos.simulation.start("n1")
    agree(chaos)
    assert node.disk.snapshots
    assert [f.snapshot for f in facts_of(joiner, CatchUpStarted)][-1] > 1


@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_mean_of_the_last_rounds_that_is_damaged_stops_nobody_who_waits_for_one_that_needs_it(back: int) -> None:
    """Defect: those of the last two might be on their way to the disk; no more came, and no snapshot was written."""
    chaos = steady(2, settings=replace(ALL_MEANS, min_members=2))
    chaos.simulation.crash("n1")
    chaos.simulation.run_for(15.0)
    node = chaos.simulation.nodes["n0"]
    assert not node.disk.snapshots
    node.disk.means[node.state[0] - back].damaged.add(0)
    chaos.simulation.start("n1", wiped=True)
    agree(chaos)
    assert node.disk.snapshots or back == 1  # those of the very last round are in memory, too


def test_damage_that_is_found_while_a_node_catches_up_is_mended_from_others() -> None:
    chaos = steady(3, settings=ALL_MEANS)
    chaos.simulation.crash("n2")
    reach(chaos, newest_round(chaos) + 5, 60)
    node = chaos.simulation.start("n2")
    chaos.simulation.run_until(lambda: any(m.wanted and not m.missing for m in node.disk.means.values()), SOON_S)
    round = max(r for r, m in node.disk.means.items() if m.wanted and not m.missing)
    node.disk.means[round].damaged.add(0)
    agree(chaos)
    assert [f.round for f in facts_of(node, LedgerTrouble)] in ([round], [])


@pytest.mark.parametrize("lost", [{"n0": (1,), "n1": (2,)}, {"n0": (1, 4), "n1": (0, 3)}])
def test_nodes_that_were_all_stopped_have_together_what_none_of_them_has_alone(
    lost: dict[str, tuple[int, ...]],
) -> None:
    """Given that different means are damaged on each disk, when all start again, then the run goes on.

    Defect: all were behind, and who was behind gave nobody what it had.
    """
    chaos = steady(2, settings=ALL_MEANS)
    reach(chaos, 6, 60)
    for name, rounds in lost.items():
        for round in rounds:
            chaos.simulation.nodes[name].disk.means[round].damaged.add(0)
    for name in lost:
        chaos.restart(name)
    agree(chaos)


@pytest.mark.parametrize("later", [1, 3])
def test_the_snapshot_of_one_and_the_means_of_others_lead_together_to_the_runs_state(later: int) -> None:
    """Given that the leader's state went wrong, so that the means on disk lead to another than the run's, and that one
    who left has a snapshot, but not the last means, when all start again, then the run goes on.

    Defect: all were behind; who had the snapshot gave it to nobody, and the others gave nobody the means.
    """
    chaos = steady(2, settings=ALL_MEANS)
    chaos.simulation.corrupt("n0")
    agree(chaos)
    chaos.join()
    reach(chaos, newest_round(chaos) + 1, 60)
    chaos.leave("n2", at_once=False)
    chaos.simulation.run_until(lambda: not chaos.simulation.nodes["n2"].running, 60)
    names = ("n0", "n1")
    reach(chaos, newest_round(chaos) + later, 60)
    for name in names:
        chaos.crash(name)
    for name in (*names, "n2"):
        chaos.restart(name)
    assert not chaos.why_stuck()
    assert len({n.state[1] for n in chaos.simulation.running}) == 2
    agree(chaos)


# --- liars ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "false", "settings"), LIES)
def test_what_a_liar_gives_is_asked_of_the_others(
    kind: str, false: Callable[[Chaos, ChunkInfo], ChunkInfo], settings: SimulationSettings
) -> None:
    chaos = steady(4, settings=settings)
    reach(chaos, 13, 80)
    liars: list[str] = []

    def lies(server: SimNode, key: ChunkKey, info: ChunkInfo) -> ChunkInfo:
        """Whoever is asked first gives something else from then on. (Means of newer rounds the exchange asks for.)"""
        if key.kind != kind or (kind == "mean" and key.round > 11) or liars not in ([], [server.id]):
            return info
        liars[:] = [server.id]
        return false(chaos, info)

    chaos.simulation.store.lies = lies
    joiner = chaos.simulation.start("n4")
    chaos.simulation.run_until(lambda: bool(facts_of(joiner, CaughtUp)), SOON_S)
    checkpoint = joiner.machines["checkpoint"]
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.providers.liars == set(liars) != set()
    agree(chaos)
