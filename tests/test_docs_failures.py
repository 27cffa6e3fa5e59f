"""What the page on operating says of failures, row by row: the real machines, in virtual time, say just that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final, get_args

import pytest

from prime_async.docs import read_page
from prime_async.machines.facts import Fact, RoundPlanned
from prime_async.testing import Simulation
from prime_async.testing.settings import SimulationSettings

NODES: Final = ("n0", "n1", "n2", "n3")
PEER: Final = "n2"
LEADER: Final = "n0"
NOT_SIMULATED: Final = {
    "a slow node misses a round": "an event with other figures in it; tests/test_coordinator.py",
    "a bit flips on disk": "files; tests/test_checkpoint.py and test_simulation_ledger.py",
    "a disk is full": "files; tests/test_checkpoint.py and test_ledger_ballots.py",
    "a peer sends nonsense": "sockets; tests/test_transport.py and test_node_zeromq.py",
    "a joiner is not let in": "sockets and settings; tests/test_node_zeromq.py and test_door.py",
    "the remote copy fails": "files; tests/test_remote.py",
}
OF_THE_NODE: Final = {"ledger_restored"}
"""Reported by the node around the machines, which is not simulated."""


def rows() -> Iterator[tuple[str, str, str]]:
    """What happens, what the node itself says, what the others say."""
    for line in read_page("operating").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if line.startswith("| ") and len(cells) == 4:
            yield cells[0], cells[1], cells[2]


def events_in(cell: str) -> set[str]:
    tags = {str(kind.__struct_config__.tag) for kind in get_args(Fact)}
    return set(re.findall(r"`([a-z_]+)`", cell)) & tags - OF_THE_NODE


def crash(name: str) -> Callable[[Simulation], None]:
    return lambda run: run.crash(name)


def crash_in_the_exchange(run: Simulation) -> None:
    def plans() -> int:
        return sum(isinstance(fact, RoundPlanned) and fact.chunks_owned > 0 for fact in run.nodes[PEER].facts)

    before = plans()
    run.run_until(lambda: plans() > before, 60.0)
    run.crash(PEER)


def come_back(run: Simulation) -> None:
    run.crash(PEER)
    run.run_for(30.0)
    run.start(PEER)


def suspend(name: str) -> Callable[[Simulation], None]:
    def act(run: Simulation) -> None:
        run.pause(name)
        run.run_for(40.0)
        run.resume(name)

    return act


def cut_off(run: Simulation) -> None:
    run.split([PEER], [n for n in NODES if n != PEER])


def garble_all(run: Simulation) -> None:
    for name in NODES:
        run.garble(name)


def lose_half(run: Simulation) -> None:
    run.crash(LEADER)
    run.crash("n1")


def lose_one_of_too_few(run: Simulation) -> None:
    run.crash("n1")


SCENARIOS: Final[dict[str, tuple[str, Callable[[Simulation], None], SimulationSettings]]] = {
    "a node dies in training": (PEER, crash(PEER), SimulationSettings()),
    "a node dies in the exchange": (PEER, crash_in_the_exchange, SimulationSettings(chunk_count=12)),
    "the leader dies": (LEADER, crash(LEADER), SimulationSettings()),
    "a node comes back": (PEER, come_back, SimulationSettings()),
    "a machine was suspended": (PEER, suspend(PEER), SimulationSettings()),
    "the leader was suspended": (LEADER, suspend(LEADER), SimulationSettings()),
    "a link is cut, the smaller side": (PEER, cut_off, SimulationSettings()),
    "the larger side": (PEER, cut_off, SimulationSettings()),
    "half of the voters are gone for good": (PEER, lose_half, SimulationSettings()),
    "too few train": (PEER, lose_one_of_too_few, SimulationSettings(min_members=4)),
    "training blows up at one node": (PEER, lambda run: run.spoil(PEER), SimulationSettings()),
    "a bit flips in memory": (PEER, lambda run: run.corrupt(PEER), SimulationSettings()),
    "a contribution is broken on its way": (PEER, lambda run: run.garble(PEER), SimulationSettings()),
    "nobody's contribution can be used": (PEER, garble_all, SimulationSettings()),
}


def test_every_row_is_simulated_or_has_a_reason_not_to_be() -> None:
    names = [name for name, _, _ in rows() if name not in ("what happens", "---")]

    assert len(names) > 15
    assert [name for name in names if name not in {*SCENARIOS, *NOT_SIMULATED}] == []
    assert {*SCENARIOS, *NOT_SIMULATED} <= set(names)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_failure_looks_as_the_page_says(name: str) -> None:
    """Given four nodes that train, when it happens, then the node and the others say what its row names."""
    _, itself, others = next(row for row in rows() if row[0] == name)
    node, act, settings = SCENARIOS[name]
    run = Simulation(len(NODES), 7, settings)
    run.run_for(40.0)
    before = {id(n): len(n.facts) for n in run.processes}

    act(run)
    run.run_for(60.0)

    said: dict[bool, set[str]] = {True: set(), False: set()}
    for process in run.processes:
        new = process.facts[before.get(id(process), 0) :]
        mine = process.id == run.nodes[node].id
        said[mine] |= {str(type(fact).__struct_config__.tag) for fact in new}
    assert events_in(itself) <= said[True], run.hint
    assert events_in(others) <= said[False], run.hint
