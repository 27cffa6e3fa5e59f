"""Whole runs of the real machines: what must hold after every event, and how soon a run goes on after what went wrong.

A schedule is made from its seed alone. ``pytest -m long`` runs many more of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest
from blake3 import blake3

from prime_async.machines.attempt import Attempt
from prime_async.machines.coordinator import Answer, Coordinator
from prime_async.machines.exchange import Exchange
from prime_async.machines.facts import RoundPlanned, StateDiverged
from prime_async.machines.membership import PATIENCE, Membership
from prime_async.machines.vocabulary import Apply, ContributionFixed, Effect, Event, Reduce
from prime_async.messages import ChunkKey, Commit, Message, Plan, Ready, positions
from prime_async.testing import Simulation, SimulationSettings
from prime_async.testing.simulation import SimNode
from tests.machine_harness import facts


class BrokenRuleError(AssertionError):
    """A property does not hold."""


@dataclass(slots=True)
class Rules:
    """What must hold after every event of a simulation."""

    simulation: Simulation
    commits: dict[tuple[int, int], Commit] = field(default_factory=dict)  # by epoch of the leader, and round
    applied: dict[int, bytes] = field(default_factory=dict)
    contributors: dict[tuple[str, ChunkKey], tuple[str, ...]] = field(default_factory=dict)
    contributed: set[tuple[int, int]] = field(default_factory=set)  # (a process, round)
    planned: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def watch(self) -> Rules:
        self.simulation.observers.append(self.check)
        return self

    def check(self, node: SimNode, event: Event, effects: list[Effect]) -> None:
        if isinstance(event, ContributionFixed):
            self.contributed.add((id(node), event.round))
        for effect in effects:
            if isinstance(effect, Reduce):
                self._on_reduce(node, effect)
            elif isinstance(effect, Apply):
                self._on_apply(node, effect)
        for fact in facts(RoundPlanned, effects):
            self._on_planned(node, fact)
        self._note_commits(node)

    def _require(self, holds: bool, text: str) -> None:
        if not holds:
            raise BrokenRuleError(f"{text}; seed {self.simulation.seed}, at {self.simulation.now:.3f} s")

    def _note_commits(self, node: SimNode) -> None:
        exchange = node.machines["exchange"]
        assert isinstance(exchange, Exchange)
        if not exchange.coordinator.leads:
            return
        for round, commit in exchange.coordinator.commits.items():
            known = self.commits.setdefault((commit.epoch, round), commit)
            self._require(known == commit, f"two commits of round {round}: {known}, {commit}")

    def _on_reduce(self, node: SimNode, reduce: Reduce) -> None:
        names = reduce.contributors
        self._require(len(set(names)) == len(names), f"{reduce.key} counts a contribution twice: {names}")
        self.contributors[node.id, reduce.key] = names

    def _on_planned(self, node: SimNode, fact: RoundPlanned) -> None:
        number = (fact.epoch, fact.attempt)
        before = self.planned.setdefault((id(node), fact.round), number)
        self._require(before <= number, f"{node.id} went from attempt {before} of round {fact.round} to {number}")
        self.planned[id(node), fact.round] = number

    def _on_apply(self, node: SimNode, apply: Apply) -> None:
        keys = [
            ChunkKey(kind="mean", round=apply.round, chunk=c, epoch=apply.epoch, attempt=apply.attempt)
            for c in range(self.simulation.settings.chunk_count)
        ]
        digest = blake3(b"".join(node.chunks[k].digest for k in keys)).digest()
        commit = self.commits.get((apply.epoch, apply.round))
        committed = commit is not None and (commit.attempt, commit.digest) == (apply.attempt, digest)
        self._require(committed, f"{node.id} applies means of round {apply.round} that were not committed")
        same = self.applied.setdefault(apply.round, digest) == digest
        self._require(same, f"{node.id} applies other means of round {apply.round} than others did")
        for chunk_key in keys:
            self._used_up_if_counted(node, apply, chunk_key)

    def _used_up_if_counted(self, node: SimNode, apply: Apply, chunk_key: ChunkKey) -> None:
        makers = [names for (_, k), names in self.contributors.items() if k == chunk_key]
        in_it = any(node.id in names for names in makers) and (id(node), apply.round) in self.contributed
        used_up = apply.position in positions(node.chunks[chunk_key].contributors)
        text = "is in it and is kept for the next round" if in_it else "is not in it and is given up"
        self._require(in_it == used_up, f"{node.id}, {chunk_key}: its contribution {text}")


# --- random schedules -----------------------------------------------------------------------------------------------


def random_settings(chance: random.Random) -> SimulationSettings:
    """A joiner must be able to fetch the state within a round: slow networks have long rounds."""
    latency_s = chance.choice([(0.001, 0.01), (0.01, 0.1), (0.05, 0.5)])
    slow = latency_s[1] > 0.2
    return SimulationSettings(
        min_members=chance.choice([1, 2]),
        loss=chance.choice([0, 0.05, 0.2]),
        doubled=chance.choice([0, 0.1]),
        chunk_count=chance.randint(1, 4 if slow else 6),
        inner_steps=chance.randint(6, 10) if slow else chance.randint(2, 8),
        latency_s=latency_s,
    )


def disturb(simulation: Simulation, chance: random.Random, leaving: set[str]) -> None:
    """One thing that goes wrong, with anybody; only the leader, which ends a run with it, does not crash or leave."""
    name = chance.choice(list(simulation.nodes))
    what = chance.choice(["crash", "restart", "pause", "split", "new", "leave"])
    if what == "new":
        simulation.start(f"n{len(simulation.nodes)}")
    elif what == "pause" or name == "n0":
        simulation.pause(name)
        simulation.run_for(chance.uniform(0, 30))
        simulation.resume(name)
    elif what == "split":
        simulation.split(tuple(n for n in simulation.nodes if n != name), (name,))
        simulation.run_for(chance.uniform(0, 25))
        simulation.split()
    elif what == "leave":
        leaving.add(name)
        simulation.leave(name, at_once=chance.random() < 0.5)
    else:
        simulation.crash(name)
        if what == "restart":
            simulation.run_for(chance.choice([0, 0.1, 5, 15]))
            simulation.start(name)
            leaving.discard(name)


def is_active(simulation: Simulation, node: SimNode) -> bool:
    leader = simulation.nodes["n0"].machines["membership"]
    assert isinstance(leader, Membership)
    mine = leader.view.member(node.id) if leader.view else None
    return mine is not None and mine.active


def all_caught_up(simulation: Simulation, round: int) -> bool:
    return all(n.state[0] >= round and is_active(simulation, n) for n in simulation.running)


def run_schedule(seed: int) -> Simulation:
    """Some disturbances; then all is well, and everybody must be active and three rounds further in good time."""
    chance = random.Random(seed)
    simulation = Simulation(chance.randint(2, 5), seed, random_settings(chance))
    Rules(simulation).watch()
    simulation.run_for(chance.uniform(0, 20))
    leaving: set[str] = set()
    for _ in range(chance.randint(1, 5)):
        disturb(simulation, chance, leaving)
        simulation.run_for(chance.uniform(0, 20))
    simulation.settings = replace(simulation.settings, loss=0.0, doubled=0.0)
    leader = simulation.nodes["n0"]
    failures = [(n.id, n.failure) for n in simulation.nodes.values() if n.alive and n.failure]
    assert not failures, f"seed {seed}: {failures}"
    if sum(n.id not in leaving for n in simulation.running) >= simulation.settings.min_members:
        goal = leader.state[0] + 3
        simulation.run_until(lambda: all_caught_up(simulation, goal), 150)
    return simulation


@pytest.mark.parametrize("block", range(15))
def test_runs_go_on_after_crashes_pauses_splits_and_lost_messages(block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        run_schedule(seed)


@pytest.mark.long
@pytest.mark.parametrize("block", range(100))
def test_many_more_runs_go_on(block: int) -> None:
    for seed in range(1000 + 50 * block, 1050 + 50 * block):
        run_schedule(seed)


def test_a_seed_decides_everything() -> None:
    first, second, other = run_schedule(7), run_schedule(7), run_schedule(8)
    assert (first.now, first.messages) == (second.now, second.messages)
    assert {n.id: n.state for n in first.nodes.values()} == {n.id: n.state for n in second.nodes.values()}
    assert first.messages != other.messages


def test_without_corruption_nobody_ever_says_that_states_differ() -> None:
    """Defect: every node that had missed a round said so, for its chain of commits had a gap."""
    for seed in range(200, 220):
        said = [f for n in run_schedule(seed).nodes.values() for f in n.facts if isinstance(f, StateDiverged)]
        assert not said, f"seed {seed}: {said}"


def test_a_run_that_does_not_go_on_says_its_seed() -> None:
    with pytest.raises(AssertionError, match="seed 77"):
        Simulation(2, 77).run_until(lambda: False, 5.0)


# --- a crash at every point of a round ------------------------------------------------------------------------------

STEADY = SimulationSettings(min_members=1, chunk_count=8, inner_steps=4, latency_s=(0.02, 0.06))
FEW_S = 4.0
"""To notice, to agree and to exchange once more, beyond the failure timeout."""


def steady(seed: int = 1, nodes: int = 4, settings: SimulationSettings = STEADY) -> Simulation:
    """All nodes are active and have just applied the same round."""
    simulation = Simulation(nodes, seed, settings)
    Rules(simulation).watch()
    simulation.run_until(lambda: all_caught_up(simulation, 3), 120)
    return simulation


def period_s() -> float:
    simulation = steady()
    start = simulation.now
    goal = simulation.nodes["n0"].state[0] + 1
    simulation.run_until(lambda: all_caught_up(simulation, goal), 20)
    return simulation.now - start


def in_it_whole(node: SimNode, round: int, chunks: int) -> bool:
    return node.counted.get(round) == set(range(chunks))


@pytest.mark.parametrize("victim", ["n1", "n2", "n3"])
def test_a_crash_at_any_point_of_a_round_costs_no_survivor_its_steps(victim: str) -> None:
    length_s, points = period_s(), 40
    for point in range(points):
        simulation = steady()
        simulation.run_for(length_s * point / points)
        crashed_in = simulation.nodes["n0"].state[0]
        rounds = {n.id: n.state[0] for n in simulation.running}
        simulation.crash(victim)
        survivors = simulation.running
        simulation.run_until(lambda: all(n.state[0] >= crashed_in + 2 for n in survivors), 30)  # noqa: B023
        for node in survivors:
            for round in range(rounds[node.id], crashed_in + 2):
                counted = node.counted.get(round)
                where = f"{victim} crashed {point}/{points} into round {crashed_in}"
                assert in_it_whole(node, round, STEADY.chunk_count), f"{where}: {node.id}, {round}: {counted}"


@pytest.mark.parametrize("victim", ["n1", "n2", "n3"])
def test_nobody_waits_for_the_dead_much_longer_than_the_failure_timeout(victim: str) -> None:
    length_s, points = period_s(), 20
    for point in range(points):
        simulation = steady(seed=2)
        simulation.run_for(length_s * point / points)
        goal = max(n.state[0] for n in simulation.running) + 1
        simulation.crash(victim)
        limit_s = STEADY.failure_timeout_s + length_s + FEW_S
        simulation.run_until(lambda: all(n.state[0] >= goal for n in simulation.running), limit_s)  # noqa: B023


def test_two_crashes_at_once_cost_no_more() -> None:
    length_s = period_s()
    for point in range(20):
        simulation = steady(seed=3)
        simulation.run_for(length_s * point / 20)
        goal = max(n.state[0] for n in simulation.running) + 1
        simulation.crash("n1")
        simulation.crash("n3")
        limit_s = STEADY.failure_timeout_s + length_s + FEW_S
        simulation.run_until(lambda: all(n.state[0] >= goal for n in simulation.running), limit_s)  # noqa: B023
        assert len(simulation.running) == 2


# --- the leader -----------------------------------------------------------------------------------------------------


def test_without_their_leader_members_end_with_the_same_state_after_four_timeouts() -> None:
    simulation = steady()
    simulation.run_for(1.0)
    simulation.crash("n0")
    others = [simulation.nodes[n] for n in ("n1", "n2", "n3")]
    simulation.run_until(lambda: all(n.failure is not None for n in others), PATIENCE * 10 + 5)
    assert {n.failure.kind for n in others if n.failure} == {"leader_lost"}
    assert len({n.state for n in others}) == 1


def restarted_leader(*, with_state: bool) -> Simulation:
    """The leader starts again a few seconds after a crash, with the state that the members have, or with none."""
    simulation = steady()
    simulation.run_for(1.0)
    simulation.crash("n0")
    simulation.run_for(3.0)
    state = simulation.nodes["n1"].state
    simulation.start("n0", state if with_state else None)
    return simulation


def test_a_leader_that_starts_again_with_the_state_goes_on_with_the_same_members() -> None:
    """Defect: its views have low numbers and were ignored, and the run hung without a word."""
    simulation = restarted_leader(with_state=True)
    goal = simulation.nodes["n1"].state[0] + 3
    simulation.run_until(lambda: all_caught_up(simulation, goal), 60)
    assert len(simulation.running) == 4


def test_a_leader_that_starts_again_from_nothing_does_not_take_the_members_rounds() -> None:
    """Defect: all of them fetched round 0, and every round that was done was lost."""
    simulation = restarted_leader(with_state=False)
    simulation.observers.clear()  # the leader, alone, does the first rounds of another run
    held = simulation.nodes["n1"].state
    simulation.run_for(60)
    for name in ("n1", "n2", "n3"):
        node = simulation.nodes[name]
        assert node.state == held
        assert node.failure is not None
        assert node.failure.kind == "leader_lost"


def test_a_run_of_so_many_rounds_ends_for_everybody_with_the_same_state() -> None:
    for seed in range(5):
        simulation = Simulation(4, seed, SimulationSettings(rounds=5, loss=0.1, min_members=4))
        Rules(simulation).watch()
        simulation.run_until(lambda: all(n.finished for n in simulation.nodes.values()), 120)  # noqa: B023
        assert len({n.state for n in simulation.nodes.values()}) == 1
        assert {n.state[0] for n in simulation.nodes.values()} == {5}


def test_the_leader_is_the_last_to_leave() -> None:
    simulation = steady()
    simulation.leave("n0")
    simulation.run_until(lambda: all(n.finished for n in simulation.nodes.values()), 30)


def test_a_member_that_leaves_does_not_hold_up_the_others() -> None:
    for at_once in (False, True):
        for point in range(10):
            simulation = steady(seed=4)
            simulation.run_for(0.35 * point)
            simulation.leave("n2", at_once=at_once)
            goal = max(n.state[0] for n in simulation.running) + 2
            simulation.run_until(lambda: all(n.state[0] >= goal for n in simulation.running), 12)  # noqa: B023
            assert simulation.nodes["n2"].finished


# --- what went wrong once -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Drops:
    """Loses the first ``count`` messages of one kind to one node."""

    kind: type[Message]
    receiver: str
    count: int
    when: Callable[[Message], bool]

    def __call__(self, _sender: str, receiver: str, message: Message) -> bool:
        hit = self.count > 0 and receiver == self.receiver and isinstance(message, self.kind) and self.when(message)
        self.count -= hit
        return hit


def test_a_lost_plan_or_commit_is_repaired_by_repeats_in_seconds() -> None:
    for kind in (Plan, Commit):
        for receiver in ("n1", "n3"):
            simulation = steady()
            simulation.drops = Drops(kind, receiver, 2, lambda _: True)
            goal = simulation.nodes["n0"].state[0] + 2
            simulation.run_until(lambda: all_caught_up(simulation, goal), 3 * 3.0 + 6.0)  # noqa: B023


def test_a_lost_second_plan_is_repaired_too() -> None:
    """Once, a node that held all means of the first attempt asked for nothing any more."""
    for seed in range(8):
        simulation = in_mid_exchange(seed)
        simulation.drops = Drops(Plan, "n1", 2, lambda m: isinstance(m, Plan) and m.attempt > 0)
        simulation.crash("n3")
        goal = max(n.state[0] for n in simulation.running) + 1
        simulation.run_until(lambda: all(n.state[0] >= goal for n in simulation.running), 20)  # noqa: B023


def test_a_contributor_that_hears_of_the_commit_and_not_of_the_plan_is_counted_once() -> None:
    """Defect: it took itself for left out, kept its progress, and contributed it again; see ``Rules``."""
    simulation = steady(settings=replace(STEADY, chunk_count=2))  # n0 and n1 own them
    simulation.drops = Drops(Plan, "n3", 3, lambda _: True)
    goal = simulation.nodes["n0"].state[0] + 3
    simulation.run_until(lambda: all_caught_up(simulation, goal), 30)
    for round in range(goal - 3, goal):
        assert in_it_whole(simulation.nodes["n3"], round, 2)


def test_a_joiner_is_active_from_the_next_round_on() -> None:
    """Once, it was activated so late that it was always a round behind."""
    simulation = steady()
    simulation.start("n4")
    start = simulation.nodes["n0"].state[0]
    simulation.run_until(lambda: is_active(simulation, simulation.nodes["n4"]), 20)
    assert simulation.nodes["n0"].state[0] <= start + 3
    first = simulation.nodes["n0"].state[0]
    simulation.run_until(lambda: all_caught_up(simulation, first + 2), 20)
    assert in_it_whole(simulation.nodes["n4"], first + 1, STEADY.chunk_count)


def test_a_plan_of_a_view_that_a_member_never_saw_is_understood() -> None:
    """The member sleeps while the view changes twice; the plan is of the one between."""
    for pause_s in (0.5, 1.5, 2.5, 3.5):
        simulation = steady(settings=replace(STEADY, failure_timeout_s=3.0))
        simulation.run_for(1.0)
        simulation.pause("n2")
        simulation.start("n4")
        simulation.crash("n3")
        simulation.run_for(pause_s)
        simulation.start("n5")
        simulation.run_for(0.2)
        simulation.resume("n2")
        goal = simulation.nodes["n0"].state[0] + 3
        simulation.run_until(lambda: all_caught_up(simulation, goal), 60)  # noqa: B023


def test_a_node_that_slept_fetches_what_it_missed_and_takes_part_again() -> None:
    simulation = steady()
    simulation.pause("n2")
    simulation.run_for(40.0)
    simulation.resume("n2")
    goal = simulation.nodes["n0"].state[0] + 3
    simulation.run_until(lambda: all_caught_up(simulation, goal), 30)


def test_a_leader_that_slept_removes_nobody() -> None:
    simulation = steady()
    simulation.pause("n0")
    simulation.run_for(8.0)
    simulation.resume("n0")
    goal = simulation.nodes["n0"].state[0] + 2
    simulation.run_until(lambda: all_caught_up(simulation, goal), 20)
    assert not any(n.machines["membership"].incarnation > 1 for n in simulation.running)  # type: ignore[attr-defined]


def test_while_there_are_too_few_members_nobody_advances_and_then_all_do() -> None:
    simulation = steady(nodes=3, settings=replace(STEADY, min_members=3))
    simulation.crash("n2")
    simulation.run_for(20.0)
    stuck = {n.state[0] for n in simulation.running}
    simulation.run_for(30.0)
    assert {n.state[0] for n in simulation.running} == stuck
    simulation.start("n2")
    simulation.run_until(lambda: all_caught_up(simulation, max(stuck) + 2), 30)


# --- the properties can fail ----------------------------------------------------------------------------------------


def breaks(match: str, seeds: Iterable[int], run: Callable[[int], object]) -> None:
    with pytest.raises(BrokenRuleError, match=match):
        for seed in seeds:
            run(seed)


def in_mid_exchange(seed: int) -> Simulation:
    """The leader works on a plan."""
    simulation = steady(seed)
    exchange = simulation.nodes["n0"].machines["exchange"]
    assert isinstance(exchange, Exchange)
    simulation.run_until(lambda: exchange.attempt is not None and exchange.commit is None, 10)
    return simulation


def crash_in_mid_exchange(seed: int) -> None:
    simulation = in_mid_exchange(seed)
    simulation.crash("n3")
    simulation.run_for(30.0)


def test_applying_before_the_commit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    say_have = Exchange._say_have

    def eager(self: Exchange, now: float, out: list[Effect]) -> None:
        say_have(self, now, out)
        attempt = self.attempt
        if attempt is not None and attempt.digest is not None and self.commit is None:
            early = Commit(
                round=attempt.round,
                epoch=attempt.epoch,
                attempt=attempt.attempt,
                digest=attempt.digest,
                chain=bytes(32),
            )
            self.chain, self.commit = None, early
            self._hand_over(out)

    monkeypatch.setattr(Exchange, "_say_have", eager)
    breaks("not committed", range(5), crash_in_mid_exchange)


def test_accepting_a_lower_attempt_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    on_plan = Exchange._on_plan

    def credulous(self: Exchange, peer: str, plan: Plan, out: list[Effect]) -> None:
        attempt = self.attempt
        lower = attempt is not None and (plan.epoch, plan.attempt) < attempt.number
        self.attempt = None if lower else attempt
        on_plan(self, peer, plan, out)
        self.attempt = self.attempt or attempt

    def late_copies(seed: int) -> None:
        """Answers to repeated messages are slow enough to arrive after the next plan."""
        simulation = in_mid_exchange(seed)
        simulation.crash("n3")
        simulation.settings = replace(STEADY, latency_s=(0.05, 2.5))
        simulation.run_for(40.0)

    monkeypatch.setattr(Exchange, "_on_plan", credulous)
    breaks("went from attempt", range(20), late_copies)


def test_counting_a_member_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce = Exchange._reduce_if_all_here

    def doubled(self: Exchange, attempt: Attempt, chunk: int, out: list[Effect]) -> None:
        before = len(out)
        reduce(self, attempt, chunk, out)
        for i in range(before, len(out)):
            made = out[i]
            if isinstance(made, Reduce):
                out[i] = Reduce(
                    key=made.key,
                    contributors=(*made.contributors, made.contributors[0]),
                    weights=(*made.weights, made.weights[0]),
                    members=made.members,
                )

    monkeypatch.setattr(Exchange, "_reduce_if_all_here", doubled)
    breaks("counts a contribution twice", [1], steady)


def test_keeping_progress_that_is_counted_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """This was a defect: who heard of a commit before its plan followed it at once, in no place of it."""
    on_commit = Exchange._on_commit

    def hasty(self: Exchange, commit: Commit, out: list[Effect]) -> None:
        weight = self.weight
        if self._planned(commit) is None:
            self.weight = None
        on_commit(self, commit, out)
        self.weight = weight

    def lost_plan(seed: int) -> None:
        """The last plan before a crash is lost by a node that owns nothing, so that the others commit without it."""
        simulation = steady(seed, settings=replace(STEADY, chunk_count=2))
        simulation.drops = Drops(Plan, "n3", 3, lambda _: True)
        simulation.run_for(20.0)

    monkeypatch.setattr(Exchange, "_on_commit", hasty)
    breaks("is kept for the next round", range(3), lost_plan)


def test_committing_without_a_majority_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that commits what the first member says, and forgets it, commits twice."""
    try_commit = Coordinator._try_commit

    def forgetful(self: Coordinator) -> list[Answer]:
        answers = try_commit(self)
        if answers and self.plan is not None:
            self.commits.pop(self.plan.round, None)
        return answers

    monkeypatch.setattr(Coordinator, "_try_commit", forgetful)
    breaks("not committed|two commits", range(3), steady)


def test_a_run_that_hangs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that does not repeat its plan: whoever misses it is waited for until the limit."""
    on_ready = Coordinator.on_ready

    def deaf(self: Coordinator, peer: str, ready: Ready) -> list[Answer]:
        return [] if self.plan is not None else on_ready(self, peer, ready)

    monkeypatch.setattr(Coordinator, "on_ready", deaf)
    with pytest.raises(AssertionError, match="not within 150 s; seed"):
        for seed in range(30):
            run_schedule(seed)
