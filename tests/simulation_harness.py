"""What the tests of whole runs have in common: a steady run to start from, and its points."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

from prime_async.machines.facts import Fact
from prime_async.messages import Message
from prime_async.testing import SimNode, Simulation, SimulationSettings
from prime_async.testing.properties import Properties
from prime_async.testing.schedules import Chaos

TIMEOUT_S = 10.0
AIM_S = TIMEOUT_S + 2.0
"""After a crash, the open round ends on all others within this."""

STEADY = SimulationSettings(chunk_count=8, inner_steps=4, latency_s=(0.02, 0.06), failure_timeout_s=TIMEOUT_S)


def begin(nodes: int, seed: int = 1, settings: SimulationSettings = STEADY) -> Chaos:
    simulation = Simulation(nodes, seed, settings)
    return Chaos(simulation, Properties(simulation).watch(), random.Random(seed))


def reach(chaos: Chaos, round: int, limit_s: float) -> None:
    """Until every node that runs has applied the rounds before ``round``, and is active."""
    chaos.simulation.run_until(
        lambda: all(n.state[0] >= round and chaos.is_active(n) for n in chaos.simulation.running), limit_s
    )


def are_at(nodes: list[SimNode], round: int) -> Callable[[], bool]:
    return lambda: all(n.state[0] >= round for n in nodes)


@cache
def _steady(nodes: int, seed: int, settings: SimulationSettings) -> bytes:
    chaos = begin(nodes, seed, settings)
    reach(chaos, 3, 120)
    return chaos.snapshot()


def steady(nodes: int = 4, seed: int = 1, settings: SimulationSettings = STEADY) -> Chaos:
    """All nodes are active, vote, and have just applied the same round."""
    return Chaos.restored(_steady(nodes, seed, settings))


def points(chaos: Chaos, *, every: int = 1) -> Iterator[tuple[int, bytes]]:
    """The run as it is after each ``every``-th event of one round, and the number of the event."""
    goal = max(n.state[0] for n in chaos.simulation.running) + 1
    done = are_at(chaos.simulation.running, goal)
    event = 0
    while not done():
        if event % every == 0:
            yield event, chaos.snapshot()
        chaos.simulation.step()
        event += 1


def newest_round(chaos: Chaos) -> int:
    return max(n.state[0] for n in chaos.simulation.nodes.values())


def steps_of(nodes: list[SimNode]) -> dict[str, int]:
    return {n.id: n.steps for n in nodes}


def assert_counted(nodes: list[SimNode], steps: dict[str, int], where: str) -> None:
    """All inner steps that they had done by then are in committed means, in every chunk."""
    for node in nodes:
        exchange = node.settings.exchange
        assert exchange is not None
        counted = min(node.base.get(c, 0) for c in range(exchange.chunk_count))
        assert counted >= steps[node.id], f"{where}: {node.id} did {steps[node.id]} steps, {counted} are counted"


@dataclass(slots=True)
class Drops:
    """Loses the first ``count`` messages of one kind to one node."""

    kind: type[Message]
    receiver: str
    count: int

    def __call__(self, _sender: str, receiver: str, message: Message) -> bool:
        hit = self.count > 0 and receiver == self.receiver and isinstance(message, self.kind)
        self.count -= hit
        return hit


F = TypeVar("F", bound=Fact)
SOON_S = 40.0
"""Some rounds of 2 to 3 s, and the failure timeout, and then some."""
KEEPS = replace(STEADY, snapshot_every=4, keep_snapshots=2, keep_rounds=6)
ALL_MEANS = replace(STEADY, snapshot_every=1000, keep_rounds=1000)


def facts_of(node: SimNode, kind: type[F]) -> list[F]:
    return [fact for fact in node.facts if isinstance(fact, kind)]


def agree(chaos: Chaos, limit_s: float = SOON_S) -> None:
    """Everybody goes on, and at some time all have the same state."""
    reach(chaos, newest_round(chaos) + 2, limit_s)
    chaos.simulation.run_until(lambda: len({n.state for n in chaos.simulation.running}) == 1, limit_s)
