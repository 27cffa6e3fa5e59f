"""How many control messages and bytes a round costs, as a run grows."""

from __future__ import annotations

from dataclasses import dataclass

from prime_async.machines.ballot import Ballot
from prime_async.messages import Member, View
from prime_async.testing.host import Disk, SimNode, Traffic
from prime_async.testing.settings import SimulationSettings
from prime_async.testing.simulation import STARTS_APART, Simulation

INNER_STEPS = 20
STEP_S = 1.0
START_LIMIT_S = 120.0
ROUND_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Of one node in one round: control messages and their bytes, and chunks got."""

    sent: float
    sent_bytes: float
    received: float
    received_bytes: float
    gets: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A run of ``nodes``: the mean over all members but the leader, and the leader."""

    nodes: int
    rounds: int
    round_s: float
    member: Load
    leader: Load


def scale_settings(nodes: int, chunks_per_node: int = 1) -> SimulationSettings:
    """Rounds of about 20 s without anything that goes wrong, at least as many chunks as nodes."""
    return SimulationSettings(
        chunk_count=nodes * chunks_per_node,
        inner_steps=INNER_STEPS,
        step_s=STEP_S,
        min_members=nodes,
        latency_s=(0.02, 0.1),
        measured=True,
    )


def measure_scale(nodes: int, rounds: int, *, seed: int = 1, chunks_per_node: int = 1) -> Scale:
    """Start ``nodes`` nodes, let them do a round, and count through the next ``rounds`` of them."""
    simulation = begun(nodes, seed, scale_settings(nodes, chunks_per_node))
    _reach(simulation, 1, START_LIMIT_S)
    before, began = _loads(simulation), simulation.now
    _reach(simulation, 1 + rounds, rounds * ROUND_LIMIT_S)
    loads = {name: _difference(load, before[name], rounds) for name, load in _loads(simulation).items()}
    leader = _leader(simulation)
    others = [load for name, load in loads.items() if name != leader]
    return Scale(
        nodes=nodes,
        rounds=rounds,
        round_s=(simulation.now - began) / rounds,
        member=_mean(others),
        leader=loads[leader],
    )


def begun(nodes: int, seed: int, settings: SimulationSettings) -> Simulation:
    """A run whose nodes all start again, with ballots that say that they are its members: nobody has to join."""
    simulation = Simulation(0, seed, settings)
    names = [f"n{i}" for i in range(nodes)]
    view = View(
        lineage=bytes(32),
        epoch=1,
        number=1,
        previous=bytes(32),
        leader=names[0],
        members=tuple(_member(name) for name in names),
    )
    ballot = Ballot(
        incarnations=(STARTS_APART,),
        promised=1,
        promised_to=names[0],
        accepted=1,
        view=view,
        decided=True,
    )
    for name in names:
        simulation.disks[name] = Disk(chunk_count=simulation.settings.chunk_count, ballot=ballot)
        simulation.start(name, contacts=names[:1] if name != names[0] else names[1:2])
    return simulation


def _member(name: str) -> Member:
    return Member(
        id=name,
        name=name,
        incarnation=STARTS_APART,
        control=f"sim://{name}",
        bulk=f"sim://{name}",
        active=True,
        voter=True,
        reachable=True,
    )


def _reach(simulation: Simulation, round: int, limit_s: float) -> None:
    """Until the slowest node is there. Who has arrived is not looked at again."""
    left: list[SimNode] = list(simulation.nodes.values())

    def there() -> bool:
        while left and left[-1].state[0] >= round:
            left.pop()
        return not left

    simulation.run_until(there, limit_s)


def _leader(simulation: Simulation) -> str:
    ballot = simulation.nodes["n0"].disk.ballot
    view = ballot.decided_view if ballot else None
    return view.leader if view else "n0"


def _loads(simulation: Simulation) -> dict[str, Load]:
    return {name: _load(simulation.network.traffic[name]) for name in simulation.nodes}


def _load(traffic: Traffic) -> Load:
    return Load(
        sent=traffic.sent.total(),
        sent_bytes=traffic.sent_bytes.total(),
        received=traffic.received.total(),
        received_bytes=traffic.received_bytes.total(),
        gets=traffic.gets,
    )


def _difference(after: Load, before: Load, rounds: int) -> Load:
    return Load(
        sent=(after.sent - before.sent) / rounds,
        sent_bytes=(after.sent_bytes - before.sent_bytes) / rounds,
        received=(after.received - before.received) / rounds,
        received_bytes=(after.received_bytes - before.received_bytes) / rounds,
        gets=(after.gets - before.gets) / rounds,
    )


def _mean(loads: list[Load]) -> Load:
    count = max(1, len(loads))
    return Load(
        sent=sum(x.sent for x in loads) / count,
        sent_bytes=sum(x.sent_bytes for x in loads) / count,
        received=sum(x.received for x in loads) / count,
        received_bytes=sum(x.received_bytes for x in loads) / count,
        gets=sum(x.gets for x in loads) / count,
    )
