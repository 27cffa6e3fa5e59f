"""What goes wrong in explored runs, kind by kind."""

from __future__ import annotations

import random
from collections.abc import Callable

from prime_async.testing import SimulationSettings
from prime_async.testing.schedules import MODES, Chaos, mode_settings
from tests.simulation_harness import begin


def several_at_once(chaos: Chaos, count: int) -> None:
    for name in chaos.chance.sample(list(chaos.simulation.nodes), count):
        chaos.crash(name)
        chaos.wait(0, 0.3)


def one_after_another(chaos: Chaos) -> None:
    names = list(chaos.simulation.nodes)
    chaos.chance.shuffle(names)
    for name in names[:-1]:
        chaos.crash(name)
        chaos.wait(0, 40)
    for name in names[:-1]:
        if chaos.chance.random() < 0.6:
            chaos.restart(name, wiped=chaos.chance.random() < 0.3)


def whole_cluster(chaos: Chaos) -> None:
    names = list(chaos.simulation.nodes)
    for name in names:
        chaos.crash(name)
        chaos.wait(0, 0.5)
    for name in names:
        chaos.wait(0, 3)
        chaos.restart(name)


def split_while_others_crash(chaos: Chaos) -> None:
    names = list(chaos.simulation.nodes)
    chaos.chance.shuffle(names)
    middle = chaos.chance.randint(1, len(names) // 2)
    chaos.simulation.split(names[:middle], names[middle:])
    chaos.wait(0, 15)
    chaos.crash(names[0])
    chaos.wait(0, 15)
    chaos.simulation.split()
    chaos.wait(0, 5)
    chaos.restart(names[0])


def flapping(chaos: Chaos) -> None:
    for _ in range(3):
        chaos.simulation.flap(*chaos.chance.sample(list(chaos.simulation.nodes), 2))
    chaos.wait(20, 60)


def joiners(chaos: Chaos) -> None:
    chaos.join(10)
    chaos.wait(0, 3)
    chaos.crash(chaos.some())


def leavers(chaos: Chaos) -> None:
    names = list(chaos.simulation.nodes)
    for name in chaos.chance.sample(names, len(names) // 2):
        chaos.leave(name, at_once=chaos.chance.random() < 0.5)
        chaos.wait(0, 2)
    chaos.crash(chaos.some())


def islands_that_move(chaos: Chaos) -> None:
    for _ in range(3):
        names = list(chaos.simulation.nodes)
        chaos.chance.shuffle(names)
        chaos.simulation.split(names[:2], names[2:])
        chaos.wait(0, 25)


KINDS: dict[str, tuple[int, Callable[[Chaos], None]]] = {
    "one": (4, lambda c: several_at_once(c, 1)),
    "two": (5, lambda c: several_at_once(c, 2)),
    "five of twelve": (12, lambda c: several_at_once(c, 5)),
    "one after another": (5, one_after_another),
    "whole cluster": (4, whole_cluster),
    "split and crash": (4, split_while_others_crash),
    "split and crash of five": (5, split_while_others_crash),
    "flapping": (4, flapping),
    "joiners": (3, joiners),
    "leavers": (5, leavers),
    "islands": (4, islands_that_move),
}


def run_kind(kind: str, seed: int) -> None:
    """The modes take turns with the seeds."""
    nodes, act = KINDS[kind]
    chance = random.Random(seed)
    settings = SimulationSettings(
        chunk_count=chance.randint(1, 6),
        inner_steps=chance.randint(1, 6),
        loss=chance.choice([0, 0.05]),
        doubled=chance.choice([0, 0.05]),
        nat=frozenset(chance.choice([(), ("n2",)])),
        witnesses=frozenset(chance.choice([(), ("n1",)])),
    )
    chaos = begin(nodes, seed, mode_settings(settings, MODES[seed % len(MODES)]))
    try:
        chaos.wait(5, 20)
        act(chaos)
        chaos.wait(0, 30)
        chaos.heal()
        if not chaos.why_stuck():
            chaos.expect_progress()
    except Exception as error:
        error.add_note("\n".join([f"run_kind({kind!r}, {seed}):", *chaos.done]))
        raise
