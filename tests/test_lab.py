"""The lab computes what nodes compute; and what the modes are, proven on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from prime_async.config.schema import (
    ExchangeSettings,
    InnerSettings,
    OuterSettings,
    ReducerName,
    RoundSettings,
    RunSpec,
)
from prime_async.lab.team import DataParallel, LabError, Team, no_delay
from prime_async.node.build import data_stream
from tests.node_processes import NodeProcess, delays_in, node_processes

STREAMS = (11, 12, 13)
H = 4


def run_of(**settings: Any) -> RunSpec:
    values: dict[str, Any] = {
        "name": "lab",
        "model": "llama-360k",
        "sequence_length": 32,
        "rounds": 8,
        "round": RoundSettings(inner_steps=H),
        "inner": InnerSettings(batch_size=2, learning_rate=4e-3, warmup_steps=4),
        "exchange": ExchangeSettings(chunk_elements=2**16),
    }
    return RunSpec(**values | settings)


def digests(team: Team, rounds: int = 4) -> list[bytes]:
    return list(team.rounds(rounds))


def weights_of(team: Team) -> torch.Tensor:
    """The local weights of the first worker."""
    return team.workers[0].workload.trainer.flat


def test_one_plain_step_per_round_and_an_outer_step_of_1_are_data_parallel_training() -> None:
    inner = InnerSettings(optimizer="sgd", batch_size=2, learning_rate=0.5, warmup_steps=0, clip_norm=0)
    run = run_of(
        round=RoundSettings(inner_steps=1),
        inner=inner,
        outer=OuterSettings(learning_rate=1.0, momentum=0.0),
        exchange=ExchangeSettings(codec="fp32", chunk_elements=2**16),
    )
    team, together = Team(run, STREAMS), DataParallel(run, STREAMS)
    start = together.trainer.flat.clone()
    for _ in team.rounds(6):
        together.train(1)
        torch.testing.assert_close(weights_of(team), together.trainer.flat, rtol=0, atol=2e-6)
    assert (together.trainer.flat - start).abs().max() > 1e-2


def momentum_of(team: Team) -> bytes:
    workload = team.workers[0].workload
    return b"".join(workload.export_state(c)[workload.state_bytes(c) // 2 :] for c in range(workload.chunk_count))


def test_synchronous_steps_are_data_parallel_training_and_then_the_nodes_part() -> None:
    """The outer optimiser, which would go elsewhere, begins after them, without a momentum."""
    run = run_of(
        inner=InnerSettings(optimizer="sgd", batch_size=2, learning_rate=0.3, warmup_steps=0, clip_norm=0),
        outer=OuterSettings(learning_rate=0.7, momentum=0.9),
        exchange=ExchangeSettings(codec="fp32", chunk_elements=2**16),
        warmup_sync_steps=5,
    )
    team, together = Team(run, STREAMS), DataParallel(run, STREAMS)
    start = together.trainer.flat.clone()
    for _ in team.rounds(5):
        together.train(1)
        torch.testing.assert_close(weights_of(team), together.trainer.flat, rtol=0, atol=2e-6)
    assert (together.trainer.flat - start).abs().max() > 1e-2
    assert not any(momentum_of(team))
    digests(team, 1)
    together.train(H)
    assert (weights_of(team) - together.trainer.flat).abs().max() > 1e-3
    assert any(momentum_of(team))


def test_synchronous_steps_are_the_same_in_every_mode_and_with_every_reducer() -> None:
    """The first round after them begins with equal weights: without a delay it is blocking in overlapped, too."""
    rda = ExchangeSettings(reduce="rda", chunk_elements=2**16)
    blocking = digests(Team(run_of(warmup_sync_steps=2), STREAMS))
    assert len(set(blocking)) == 4
    assert digests(Team(run_of(warmup_sync_steps=2, mode="overlapped"), STREAMS)) == blocking
    late = digests(Team(run_of(warmup_sync_steps=2, mode="overlapped"), STREAMS, delay=lambda worker, _: worker))
    assert (late[:3], late[3] == blocking[3]) == (blocking[:3], False)
    eager = digests(Team(run_of(warmup_sync_steps=2, mode="eager"), STREAMS, delay=lambda worker, _: worker))
    assert (eager[:3], eager[3] == blocking[3]) == (blocking[:3], False)
    reduced = digests(Team(run_of(warmup_sync_steps=2, exchange=rda), STREAMS))
    assert (reduced[:2], reduced[2] == blocking[2]) == (blocking[:2], False)


def test_streaming_with_one_fragment_and_no_delay_is_blocking_bit_for_bit() -> None:
    blocking = Team(run_of(), STREAMS)
    streaming = Team(run_of(mode="streaming", fragments=1), STREAMS)
    overlapped = Team(run_of(mode="overlapped"), STREAMS)
    expected = digests(blocking)
    assert len(set(expected)) == 4
    assert digests(streaming) == digests(overlapped) == expected
    assert torch.equal(weights_of(streaming), weights_of(blocking))


@pytest.mark.parametrize(("mode", "fragments"), [("overlapped", 1), ("streaming", 2), ("eager", 1)])
def test_workers_of_any_delay_have_the_same_outer_weights(mode: str, fragments: int) -> None:
    run = run_of(mode=mode, fragments=fragments)
    late = Team(run, STREAMS, delay=lambda worker, round: (worker + round) % (run.steps_per_round + 1))
    assert len(set(digests(late))) == 4  # the team itself looks that they are equal
    assert digests(Team(run, STREAMS)) != digests(Team(run, STREAMS, delay=lambda *_: 1))


@pytest.mark.parametrize("reduce", ["rda", "trimmed_mean", "median"])
def test_whoever_reduces_a_chunk_in_another_way_all_workers_have_the_same_outer_weights(
    reduce: ReducerName,
) -> None:
    run = run_of(mode="overlapped", exchange=ExchangeSettings(reduce=reduce, chunk_elements=2**16))
    found = digests(Team(run, STREAMS, delay=lambda worker, _: worker), 3)
    assert len(set(found)) == 3
    mean = run.model_copy(update={"exchange": ExchangeSettings(chunk_elements=2**16)})
    assert found[0] != digests(Team(mean, STREAMS), 1)[0]


def test_a_run_is_the_same_in_pieces() -> None:
    whole, pieces = Team(run_of(), STREAMS), Team(run_of(), STREAMS)
    assert digests(whole, 4) == digests(pieces, 1) + digests(pieces, 3)


def test_means_that_are_a_round_late_go_with_blocking_alone() -> None:
    with pytest.raises(LabError, match="mode blocking, not overlapped"):
        Team(run_of(mode="overlapped"), STREAMS, rounds_late=1)


def losses(run: RunSpec, rounds: int) -> dict[str, float]:
    """Held-out loss after the same steps on the same data."""
    whole = run.model_copy(update={"mode": "overlapped"})
    teams = {
        "blocking": Team(run, STREAMS),
        "overlapped": Team(whole, STREAMS, delay=lambda *_: 1),
        "a whole round": Team(whole, STREAMS, delay=lambda *_: run.steps_per_round),
        "naive": Team(run, STREAMS, rounds_late=1),
    }
    found = {}
    for name, team in teams.items():
        digests(team, rounds)
        found[name] = team.evaluate(8)
    return found


def test_the_naive_delay_of_a_whole_round_loses() -> None:
    """As a control: a correction that does nothing would lose as much."""
    run = run_of(
        rounds=24,
        round=RoundSettings(inner_steps=10),
        inner=InnerSettings(batch_size=4, learning_rate=4e-3, warmup_steps=20),
        outer=OuterSettings(learning_rate=0.7, momentum=0.5),
    )
    found = losses(run, 24)
    print(found)
    assert found["blocking"] < 3.0
    assert found["overlapped"] < found["blocking"] + 0.1
    assert found["naive"] > found["a whole round"] + 0.15
    assert found["naive"] > found["blocking"] + 0.3


# --- real processes -------------------------------------------------------------------------------------------------


def delays_of(node: NodeProcess) -> dict[int, int]:
    """By round: the inner steps that it did between the boundary and the moment at which its local weights moved."""
    return dict(delays_in(node.directory / "node.log.cbor"))


def run_lab(nodes: Sequence[NodeProcess]) -> dict[int, str]:
    """The digest after each round, of a team that does what these nodes did."""
    run = nodes[0].run
    delays = [delays_of(node) for node in nodes] if run.overlaps else []
    team = Team(
        run, [data_stream(node.id) for node in nodes], delay=(lambda w, r: delays[w][r]) if delays else no_delay
    )
    return {round: digest.hex() for round, digest in enumerate(team.rounds(run.rounds))}


@pytest.mark.xdist_group("real time")
@pytest.mark.parametrize("mode", ["blocking", "overlapped", "streaming", "eager"])
async def test_real_processes_compute_what_the_lab_computes_bit_for_bit(tmp_path: Path, mode: str) -> None:
    run = {
        "name": "lab",
        "model": "llama-360k",
        "sequence_length": 32,
        "rounds": 6,
        "warmup_sync_steps": 0 if mode == "streaming" else 2,
        "min_members": 3,
        "mode": mode,
        "fragments": 2,
        "round": {"inner_steps": 20 if mode == "streaming" else 10},
        "inner": {"batch_size": 2, "learning_rate": 4e-3, "warmup_steps": 4},
        "exchange": {"chunk_elements": 2**14},
    }
    async with node_processes(tmp_path, run) as processes:
        for name in "abc":
            await processes.start(name, threads=1, record="node.log.cbor")
        nodes = processes.started
        with trio.fail_after(120):
            for node in nodes:
                await node.process.wait()
        for node in nodes:
            await node.until(lambda: node.has_ended)  # noqa: B023
    planned = [fact["contributors"] for fact in nodes[0].told("round_planned")]
    assert planned == [3] * 6
    members = next(fact["members"] for fact in nodes[0].told("view_adopted") if len(fact["members"]) == 3)
    told = {fact["round"]: fact["state_digest"] for fact in nodes[0].told("round_finished")}
    ordered = sorted(nodes, key=lambda node: members.index(node.name))
    assert run_lab(ordered) == told
    if mode != "blocking":
        assert sum(sum(delays_of(node).values()) for node in nodes) > 0  # there was something to correct
