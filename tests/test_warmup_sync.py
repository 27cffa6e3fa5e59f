"""Synchronous steps at the beginning of a run: whole nodes, and what goes wrong around the round that ends them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from prime_async.audit import audit
from prime_async.config.load import config_from
from prime_async.config.schema import Config
from prime_async.lab.team import Team
from prime_async.log import read_log, replay
from prime_async.machines.facts import RoundFinished, ViewAdopted
from prime_async.node.build import data_stream
from prime_async.node.node import open_node
from prime_async.testing.schedules import Chaos, mode_settings
from prime_async.transport.memory import MemoryNetwork
from prime_async.work.diloco import build_workload
from tests.node_processes import delays_in
from tests.simulation_harness import AIM_S, STEADY, are_at, assert_counted, begin, newest_round, points, reach, steps_of
from tests.tiny_models import committed, ignore, run_spec, tiny_witness, tiny_workload

MODES: Final = ("blocking", "overlapped", "eager")
SYNC: Final = 2
ROUNDS: Final = 5
IDS: Final = tuple(f"{number:064x}" for number in range(3))


def config_of(directory: Path, name: str, mode: str) -> Config:
    run: dict[str, Any] = {
        "name": "warmup",
        "model": "llama-360k",
        "sequence_length": 16,
        "rounds": ROUNDS,
        "warmup_sync_steps": SYNC,
        "min_members": 3,
        "mode": mode,
        "heartbeat_s": 0.1,
        "round": {"inner_steps": 4},
        "inner": {"batch_size": 2, "learning_rate": 4e-3, "warmup_steps": 4},
        "exchange": {"chunk_elements": 2**15, "reduce": "rda"},
    }
    here = directory / name[-1]
    here.mkdir(exist_ok=True)
    node = {
        "name": name,
        "directory": str(here / "state"),
        "record": str(here / "node.log"),
        "audit": str(here / "audit"),
        "threads": 1,
        "join": [] if name == IDS[0] else [f"{IDS[0]}@127.0.0.1:1"],
    }
    return config_from({"run": run, "node": node})


@pytest.mark.parametrize("mode", MODES)
async def test_nodes_agree_through_the_first_round_after_them_and_do_what_the_lab_does(
    tmp_path: Path, mode: str
) -> None:
    network, found = MemoryNetwork(seed=1, latency_s=(0.0005, 0.002)), dict[str, dict[int, str]]()
    orders: list[list[str]] = []

    async def train(name: str) -> None:
        config, mine = config_of(tmp_path, name, mode), found.setdefault(name, {})
        workload = build_workload(config.run, config.node, data_stream(name))
        async with network.open(name) as transport, open_node(config, transport=transport, workload=workload) as node:
            async for fact in node.events:
                if isinstance(fact, RoundFinished):
                    mine[fact.round] = fact.state_digest
                elif isinstance(fact, ViewAdopted) and len(fact.members) == 3:
                    orders.append(list(fact.members))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for name in IDS:
                nursery.start_soon(train, name)
    assert found[IDS[0]].keys() == set(range(ROUNDS))
    assert found[IDS[0]] == found[IDS[1]] == found[IDS[2]]

    run, logs = config_of(tmp_path, IDS[0], mode).run, {name: tmp_path / name[-1] / "node.log" for name in IDS}
    delays = [dict(delays_in(logs[name])) for name in orders[0]]
    assert all(set(of_one) == (set() if mode == "blocking" else set(range(SYNC, ROUNDS))) for of_one in delays)
    team = Team(run, [data_stream(name) for name in orders[0]], delay=lambda worker, round: delays[worker][round])
    assert {round: digest.hex() for round, digest in enumerate(team.rounds(ROUNDS))} == found[IDS[0]]

    checked = audit([tmp_path / name[-1] / "audit" for name in IDS])
    assert (checked.differences, checked.unchecked) == ([], [])
    assert checked.rounds == set(range(ROUNDS))
    for log in logs.values():
        assert sum(1 for _ in replay(read_log(log))) > 50


def test_who_comes_in_the_midst_of_them_takes_the_same_outer_steps() -> None:
    """A witness that has the state after one of three, and so no round of its own to count from."""
    run = run_spec().model_copy(update={"warmup_sync_steps": 3})
    nodes, late = [tiny_workload(run, stream) for stream in range(2)], tiny_witness(run)
    for round in range(5):
        for node in nodes:
            node.train(1 if round < 3 else 3, ignore)
        if round == 1:
            for chunk in range(late.chunk_count):
                late.import_state(chunk, memoryview(nodes[0].export_state(chunk)))
            late.end_import(1)
        if round:
            committed(late, nodes)  # looks that the digests are equal
        else:
            committed(nodes[0], nodes[1:])
    assert late.round == 5


# --- failures around the switch -------------------------------------------------------------------------------------

SIMULATED_SYNC: Final = 4
EVERY: Final = 50
"""Sweeps look at every so many-th event of a round."""


def rounds_around_the_switch(mode: str) -> list[tuple[int, bytes]]:
    """Points of the last synchronous round and the first one after it."""
    settings = replace(mode_settings(STEADY, mode), sync_rounds=SIMULATED_SYNC)
    chaos = begin(4, settings=settings)
    reach(chaos, SIMULATED_SYNC - 1, 120)
    assert newest_round(chaos) == SIMULATED_SYNC - 1
    found = [(event, data) for _ in range(2) for event, data in points(chaos, every=EVERY)]
    assert newest_round(chaos) == SIMULATED_SYNC + 1
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("victim", ["n0", "n2"])
def test_a_crash_around_the_switch_ends_the_round_in_time_and_costs_no_step(mode: str, victim: str) -> None:
    """Of the leader, or of a contributor that owns chunks; it then comes back."""
    for event, data in rounds_around_the_switch(mode):
        chaos = Chaos.restored(data)
        goal = newest_round(chaos) + 1
        chaos.simulation.crash(victim)
        survivors = chaos.simulation.running
        steps = steps_of(survivors)
        chaos.simulation.hint = f", {victim} crashes {event} events into the round"
        chaos.simulation.run_until(are_at(survivors, goal), AIM_S)
        chaos.simulation.run_until(are_at(survivors, goal + 3), 60.0)
        assert_counted(survivors, steps, chaos.simulation.hint)
        chaos.simulation.start(victim)
        reach(chaos, newest_round(chaos) + 2, 60)


@pytest.mark.parametrize("mode", MODES)
def test_who_hangs_through_the_switch_comes_back_by_itself(mode: str) -> None:
    """Its contribution to a synchronous round may have been counted: that is given up, whatever the form is now."""
    for _, data in rounds_around_the_switch(mode)[::2]:
        chaos = Chaos.restored(data)
        chaos.simulation.pause("n2")
        others = [n for n in chaos.simulation.running if n.id != "n2"]
        chaos.simulation.run_until(are_at(others, SIMULATED_SYNC + 2), 60.0)
        chaos.simulation.resume("n2")
        reach(chaos, newest_round(chaos) + 3, 60)
