"""The simulator's own parts, with machines that do nothing by themselves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from prime_async.machines.ballot import Ballot
from prime_async.machines.vocabulary import (
    ActorName,
    AdoptMean,
    BallotStored,
    CancelFetch,
    CancelFetches,
    Dial,
    Effect,
    Encode,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Heard,
    Reached,
    Reduce,
    Reduced,
    RunSteps,
    Send,
    Settle,
    StateAt,
    StepsDone,
    StopSteps,
    StoreBallot,
    Tick,
    WakeAt,
)
from prime_async.messages import Accepted, ChunkInfo, ChunkKey, Commit, positions
from prime_async.testing import Simulation, SimulationSettings
from prime_async.testing.store import BrokenModelError

QUIET = SimulationSettings(chunk_count=2, latency_s=(0.1, 0.1), disk_s=(0.05, 0.05))
HELLO = Accepted(epoch=1, number=1, incarnations=(1,))
MEAN = ChunkKey(kind="mean", round=0, chunk=0, epoch=1)
INFO = ChunkInfo(digest=bytes(32))


@dataclass(slots=True)
class Script:
    """Writes down what it is given."""

    events: list[Event] = field(default_factory=list)

    def handle(self, _now: float, event: Event) -> list[Effect]:
        if not isinstance(event, StateAt):
            self.events.append(event)
        return []


def idle(nodes: int, settings: SimulationSettings = QUIET, *, dialled: bool = True) -> Simulation:
    """Nodes without a will of their own."""
    simulation = Simulation(nodes, 1, settings)
    for node in simulation.nodes.values():
        make_idle(simulation, node.id)
        if dialled:
            node.dialled = dict.fromkeys(simulation.nodes, 0)
    simulation.run_for(0.0)
    return simulation


def make_idle(simulation: Simulation, name: str) -> None:
    node = simulation.nodes[name]
    node.machines = {actor: Script() for actor in node.machines}


def do(simulation: Simulation, name: str, actor: ActorName, *effects: Effect) -> None:
    for effect in effects:
        simulation.kernel.perform(simulation.nodes[name], actor, effect)


def events(simulation: Simulation, name: str, actor: ActorName) -> list[Event]:
    machine = simulation.nodes[name].machines[actor]
    assert isinstance(machine, Script)
    return machine.events


def ballot(promised: int) -> Ballot:
    return Ballot(incarnations=(1000,), promised=promised)


# --- the disk -------------------------------------------------------------------------------------------------------


def test_a_ballot_is_on_disk_after_a_moment_and_then_the_node_is_told() -> None:
    simulation = idle(1)
    do(simulation, "n0", "membership", StoreBallot(seq=1, ballot=ballot(3)), StoreBallot(seq=2, ballot=ballot(4)))
    assert simulation.disks["n0"].ballot is None
    simulation.run_for(0.06)
    assert simulation.disks["n0"].ballot == ballot(3)
    assert events(simulation, "n0", "membership") == []
    simulation.run_for(0.2)
    assert simulation.disks["n0"].ballot == ballot(4)
    assert events(simulation, "n0", "membership") == [BallotStored(seq=1), BallotStored(seq=2)]


def test_a_crash_loses_what_is_on_its_way_to_the_disk_and_a_start_reads_what_is_there() -> None:
    simulation = idle(1)
    do(simulation, "n0", "membership", StoreBallot(seq=1, ballot=ballot(3)), StoreBallot(seq=2, ballot=ballot(4)))
    simulation.run_for(0.06)
    simulation.crash("n0")
    simulation.run_for(1.0)
    assert simulation.start("n0").settings.membership.ballot == ballot(3)
    assert simulation.start("n0", wiped=True).settings.membership.ballot is None


# --- messages and links ---------------------------------------------------------------------------------------------


def test_a_message_arrives_after_the_latency_at_the_machine_that_it_is_for() -> None:
    simulation = idle(2)
    do(simulation, "n0", "membership", Send(peer="n1", message=HELLO))
    simulation.run_for(0.09)
    assert events(simulation, "n1", "membership") == []
    simulation.run_for(0.02)
    assert events(simulation, "n1", "membership") == [Heard(peer="n0", message=HELLO)]
    assert events(simulation, "n1", "exchange") == []


def test_a_cut_of_one_direction_leaves_the_other() -> None:
    simulation = idle(2)
    simulation.cut("n0", "n1")
    do(simulation, "n0", "membership", Send(peer="n1", message=HELLO))
    do(simulation, "n1", "membership", Send(peer="n0", message=HELLO))
    simulation.run_for(1.0)
    assert events(simulation, "n1", "membership") == []
    assert events(simulation, "n0", "membership") == [Heard(peer="n1", message=HELLO)]


def test_a_link_that_flaps_is_down_at_the_beginning_of_each_period() -> None:
    simulation = idle(2)
    simulation.flap("n0", "n1", period_s=10.0, down_s=2.0)
    for _ in range(2):
        do(simulation, "n0", "membership", Send(peer="n1", message=HELLO))
        simulation.run_for(5.0)
    assert len(events(simulation, "n1", "membership")) == 1


def test_lost_and_doubled_messages_are_as_many_as_told() -> None:
    simulation = idle(2, replace(QUIET, loss=0.25, doubled=0.5))
    do(simulation, "n0", "membership", *[Send(peer="n1", message=HELLO)] * 2000)
    simulation.run_for(1.0)
    assert 0.9 * 2250 < len(events(simulation, "n1", "membership")) < 1.1 * 2250


def test_nobody_reaches_a_node_behind_nat_that_has_not_dialled_and_two_such_never_meet() -> None:
    simulation = idle(3, replace(QUIET, nat=frozenset({"n1", "n2"})), dialled=False)
    do(simulation, "n0", "membership", Dial(peer="n1", control=""), Send(peer="n1", message=HELLO))
    do(simulation, "n2", "membership", Dial(peer="n1", control=""), Send(peer="n1", message=HELLO))
    simulation.run_for(3.0)
    assert events(simulation, "n1", "membership") == []
    assert events(simulation, "n0", "membership") == [Reached(peer="n1", reachable=False)]
    do(simulation, "n1", "membership", Dial(peer="n0", control=""), Send(peer="n0", message=HELLO))
    do(simulation, "n0", "membership", Send(peer="n1", message=HELLO))
    simulation.run_for(3.0)
    assert Heard(peer="n0", message=HELLO) in events(simulation, "n1", "membership")
    assert Reached(peer="n0", reachable=True) in events(simulation, "n1", "membership")


def test_a_paused_node_hears_what_came_before_its_clock_rings() -> None:
    simulation = idle(2)
    do(simulation, "n1", "membership", WakeAt(at=0.5))
    simulation.pause("n1")
    simulation.run_for(1.0)
    do(simulation, "n0", "membership", Send(peer="n1", message=HELLO))
    simulation.run_for(1.0)
    assert events(simulation, "n1", "membership") == []
    simulation.resume("n1")
    simulation.run_for(0.0)
    assert events(simulation, "n1", "membership") == [Heard(peer="n0", message=HELLO), Tick()]


def test_messages_and_their_bytes_are_counted_by_kind() -> None:
    simulation = idle(2, replace(QUIET, measured=True))
    do(simulation, "n0", "membership", *[Send(peer="n1", message=HELLO)] * 3)
    simulation.run_for(1.0)
    sent, received = simulation.network.traffic["n0"], simulation.network.traffic["n1"]
    assert sent.sent["Accepted"] == received.received["Accepted"] == 3
    assert sent.sent_bytes["Accepted"] == received.received_bytes["Accepted"] > 30


# --- gets -----------------------------------------------------------------------------------------------------------


def get(simulation: Simulation, key: ChunkKey = MEAN, timeout_s: float = 30.0) -> None:
    do(simulation, "n0", "exchange", Fetch(peer="n1", key=key, timeout_s=timeout_s))


def put(simulation: Simulation, name: str, key: ChunkKey = MEAN) -> None:
    simulation.store.put(simulation.nodes[name], key, INFO)


def outcome(simulation: Simulation) -> list[Event]:
    return events(simulation, "n0", "exchange")


def test_a_get_waits_at_its_server_until_the_chunk_is_there() -> None:
    simulation = idle(2)
    get(simulation)
    simulation.run_for(5.0)
    assert outcome(simulation) == []
    put(simulation, "n1")
    simulation.run_for(0.2)
    assert outcome(simulation) == [Fetched(peer="n1", key=MEAN, info=INFO, size=1 << 20)]
    assert simulation.nodes["n0"].chunks[MEAN] == INFO


@pytest.mark.parametrize("fault", ["gone", "late", "unreachable"])
def test_a_get_fails_in_the_three_ways_of_the_transport(fault: str) -> None:
    simulation = idle(2)
    if fault == "gone":
        do(simulation, "n1", "exchange", Forget(means_before=1, contributions_before=0))
    elif fault == "unreachable":
        simulation.crash("n1")
    get(simulation, timeout_s=2.0)
    simulation.run_for(3.0)
    assert [e.fault for e in outcome(simulation) if isinstance(e, FetchFailed)] == [fault]


def test_a_get_that_is_cancelled_has_no_outcome() -> None:
    for cancel in (CancelFetches(), CancelFetch(peer="n1", key=MEAN)):
        simulation = idle(2)
        put(simulation, "n1")
        get(simulation)
        simulation.run_for(0.15)
        do(simulation, "n0", "exchange", cancel)
        simulation.run_for(5.0)
        assert outcome(simulation) == []
        assert MEAN not in simulation.nodes["n0"].chunks


def test_what_a_cut_holds_up_arrives_after_it_or_is_noticed() -> None:
    simulation = idle(2)
    put(simulation, "n1")
    get(simulation)
    simulation.cut("n1", "n0")
    simulation.run_for(5.0)
    assert outcome(simulation) == []
    simulation.network.heal()
    simulation.run_for(2.0)
    assert [type(e) for e in outcome(simulation)] == [Fetched]


def test_a_transfer_takes_as_long_as_a_slow_link_needs_and_the_next_one_waits_for_it() -> None:
    simulation = idle(2, replace(QUIET, chunk_bytes=1000, bytes_per_s_of={"n1": 500.0}))
    for chunk in range(2):
        key = ChunkKey(kind="contribution", round=0, chunk=chunk)
        put(simulation, "n1", key)
        get(simulation, key)
    for waited_s, arrived in ((2.1, 0), (0.2, 1), (1.8, 1), (0.2, 2)):
        simulation.run_for(waited_s)
        assert len(outcome(simulation)) == arrived


def test_a_node_that_does_what_a_real_one_could_not_is_stopped() -> None:
    simulation = idle(2)
    commit = Commit(round=0, epoch=1, attempt=0, state=bytes(32), digest=bytes(32), chain=bytes(32), view=1)
    with pytest.raises(BrokenModelError, match="not here"):
        do(simulation, "n0", "exchange", Settle(round=0, epoch=1, attempt=0, commit=commit, previous=bytes(32)))
    with pytest.raises(BrokenModelError, match="not here"):
        do(simulation, "n0", "exchange", AdoptMean(found=MEAN, key=MEAN))
    get(simulation)
    with pytest.raises(BrokenModelError, match="twice"):
        get(simulation)


# --- work -----------------------------------------------------------------------------------------------------------


def test_inner_steps_take_their_time_and_stop_after_the_one_under_way() -> None:
    simulation = idle(1, replace(QUIET, step_s=1.0))
    do(simulation, "n0", "training", RunSteps(round=0, steps=10))
    simulation.run_for(3.0)
    do(simulation, "n0", "training", StopSteps())
    simulation.run_for(1.3)
    (done,) = events(simulation, "n0", "training")
    assert isinstance(done, StepsDone)
    assert done.steps in (3, 4)
    assert simulation.nodes["n0"].steps == done.steps


def test_a_mean_says_whose_contributions_are_in_it_and_a_missing_own_one_is_left_out() -> None:
    simulation = idle(2)
    do(simulation, "n1", "training", Encode(round=0))
    contribution = ChunkKey(kind="contribution", round=0, chunk=0)
    get(simulation, contribution)
    simulation.run_for(1.0)
    made = Reduce(key=MEAN, contributors=("n0", "n1"), weights=(3, 5), members=("n0", "n1"))
    do(simulation, "n0", "exchange", made)
    simulation.run_for(1.0)
    reduced = outcome(simulation)[-1]
    assert isinstance(reduced, Reduced)
    assert reduced.left_out == ("n0",)
    assert positions(reduced.info.contributors) == (1,)
    assert reduced.info.total_weight == 5
