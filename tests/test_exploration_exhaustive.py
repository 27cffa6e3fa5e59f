"""Not by chance: every fault at every step of a round, two of them; and every way to split four nodes in halves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import pytest

from prime_async.testing import SimulationSettings
from prime_async.testing.schedules import MODES, Chaos, mode_settings
from tests.simulation_harness import newest_round, points, reach, steady

NAMES = ("n0", "n1", "n2")
KINDS = ("crash", "restart", "wipe", "pause", "cut")
SMALL = SimulationSettings(chunk_count=1, inner_steps=2, step_s=0.3, latency_s=(0.02, 0.06))
EVERY = 12
"""Two faults are tried at every so many-th event of a round, in each mode."""
OUT_S = 14.0
"""How long a fault that passes lasts: longer than the failure timeout."""


@dataclass(frozen=True, slots=True)
class Fault:
    kind: str
    node: str

    def begin(self, chaos: Chaos) -> None:
        match self.kind:
            case "crash":
                chaos.crash(self.node)
            case "restart":
                chaos.restart(self.node)
            case "wipe":
                chaos.restart(self.node, wiped=True)
            case "pause":
                chaos.simulation.pause(self.node)
            case _:
                for other in NAMES:
                    if other != self.node:
                        chaos.simulation.cut(self.node, other, both_ways=True)


FAULTS = tuple(Fault(kind, node) for kind, node in product(KINDS, NAMES))


def run_faults(data: bytes, first: Fault, second: Fault, steps_between: int, where: str) -> None:
    """Both faults; what passes ends after a while, and who crashed is started again. Then all is well.

    Not a lost disk of one node while another is out: of three voters that is two lost, and may need ``recover``.
    """
    if "wipe" in (first.kind, second.kind) and first.node != second.node:
        return
    chaos = Chaos.restored(data)
    chaos.simulation.hint = f", {where}: {first}, {steps_between} events, {second}"
    first.begin(chaos)
    for _ in range(steps_between):
        chaos.simulation.step()
    second.begin(chaos)
    chaos.simulation.run_for(OUT_S)
    chaos.heal()
    for name in NAMES:
        if not chaos.simulation.nodes[name].alive:
            chaos.restart(name)
    if not chaos.why_stuck():
        chaos.expect_progress(2)


def explore_pairs(pairs: Iterable[tuple[Fault, Fault, int]], data: bytes, event: int) -> None:
    for first, second, steps_between in pairs:
        run_faults(data, first, second, steps_between, f"{event} events into the round")


OFFSETS = (0, 3, 8, 20, 60, 150)


def some_pairs(event: int) -> list[tuple[Fault, Fault, int]]:
    """Every fault comes first at every event; what comes second, and when, takes turns."""
    pairs = []
    for i, first in enumerate(FAULTS):
        turn = 7 * event + i
        pairs.append((first, FAULTS[turn % len(FAULTS)], OFFSETS[(turn // len(FAULTS) + i) % len(OFFSETS)]))
    return pairs


@pytest.mark.parametrize("mode", MODES)
def test_two_faults_of_three_nodes_beginning_at_many_steps_of_a_round(mode: str) -> None:
    """The modes begin at steps of their own."""
    for event, data in points(steady(3, settings=mode_settings(SMALL, mode))):
        if event % EVERY == MODES.index(mode) * EVERY // len(MODES):
            explore_pairs(some_pairs(event), data, event)


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_two_faults_of_three_nodes_beginning_at_every_step_of_a_round(mode: str) -> None:
    for event, data in points(steady(3, settings=mode_settings(SMALL, mode))):
        explore_pairs(some_pairs(event), data, event)


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", FAULTS, ids=str)
def test_every_two_faults_of_three_nodes_at_every_two_steps(first: Fault, mode: str) -> None:
    for event, data in points(steady(3, settings=mode_settings(SMALL, mode))):
        explore_pairs(product([first], FAULTS, range(0, 160, 2)), data, event)


HALVES = (("n0", "n1"), ("n0", "n2"), ("n0", "n3"))


def split_in_halves(data: bytes, half: tuple[str, str], seconds: float, where: str) -> None:
    chaos = Chaos.restored(data)
    others = [n for n in chaos.simulation.nodes if n not in half]
    chaos.simulation.hint = f", {half} | {others} for {seconds:g} s, {where}"
    chaos.simulation.split(half, others)
    before = newest_round(chaos)
    chaos.simulation.run_for(seconds)
    ahead = [n.id for n in chaos.simulation.running if n.state[0] > before + 1]
    assert set(ahead) <= set(half) or set(ahead) <= set(others), f"both halves went on: {ahead}"
    chaos.simulation.split()
    reach(chaos, newest_round(chaos) + 2, 60)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_four_nodes_split_in_halves_at_every_point_of_a_round(half: tuple[str, str]) -> None:
    for event, data in points(steady(4, settings=SMALL), every=3):
        split_in_halves(data, half, 25.0, f"{event} events into the round")


@pytest.mark.long
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_four_nodes_split_in_halves_at_every_event_for_any_time(half: tuple[str, str]) -> None:
    for event, data in points(steady(4, settings=SMALL)):
        for seconds in (1.0, 5.0, 9.5, 10.5, 12.0, 25.0, 40.0):
            split_in_halves(data, half, seconds, f"{event} events into the round")
