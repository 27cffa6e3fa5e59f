"""Node processes that are killed and start again from their disks: what they come back with, and what they fetch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from prime_async.cli.restore import restore
from prime_async.config.spec import run_id
from prime_async.ledger import MeansFiles
from tests.node_processes import (
    MODES,
    PACED_RUN,
    NodeProcess,
    assert_digests_are_equal,
    assert_no_step_is_lost,
    merged,
    modes,
    node_processes,
)
from tests.processes import unused_tcp_ports

pytestmark = pytest.mark.xdist_group("real time")

LIMIT_S: Final = 40.0
RUN: Final = merged(PACED_RUN, {"heartbeat_s": 0.5, "failure_timeout_s": 2.0})
PARAMETERS: Final = 131_072
CHUNKS: Final = 8
MEAN_BYTES: Final = PARAMETERS * (1 + 4 / 256)
KEPT: Final[dict[str, Any]] = {"snapshot_every": 3, "keep_snapshots": 2, "keep_rounds": 100}

ALL_MEANS: Final[dict[str, Any]] = {"snapshot_every": 0, "keep_rounds": 1000}
"""Rounds take half a second, and a start several: a snapshot would be cheaper than so many means."""


def newest(node: NodeProcess) -> int:
    """Outer steps in the newest state that it told of."""
    return max((fact["round"] + 1 for fact in node.told("round_finished")), default=0)


async def restored(node: NodeProcess) -> dict[str, Any]:
    await node.until(lambda: node.told("ledger_restored") != [], LIMIT_S)
    return node.told("ledger_restored")[0]


@pytest.mark.parametrize("mode", modes("overlapped"))
async def test_a_node_that_was_killed_comes_back_from_its_disk_and_fetches_what_it_missed(
    tmp_path: Path, mode: str
) -> None:
    """Given three nodes, when one is killed and starts again later, then it fetches the rounds between, and no more.

    Means are on disk before it is known that they are committed: of the round that was open some may lie there.
    """
    async with node_processes(tmp_path, merged(RUN, MODES[mode])) as nodes:
        first, second, victim = [await nodes.start(name, **ALL_MEANS) for name in "abc"]
        await victim.until(lambda: len(victim.told("round_finished")) >= 4, LIMIT_S)
        await victim.kill()
        had = newest(victim)
        shutil.copytree(victim.directory / "state" / "means", kept := tmp_path / "kept" / "means")
        await first.until(lambda: first.told("member_lost", name="c") != [], LIMIT_S)
        await first.rounds(3, LIMIT_S)
        again = await nodes.start("c", **ALL_MEANS)
        came_back = await restored(again)
        assert had - 1 <= came_back["round"] <= had + 1
        assert came_back["snapshot"] == 0
        await again.until(lambda: again.told("caught_up") != [], LIMIT_S)
        started, caught_up = again.told("catch_up_started")[0], again.told("caught_up")[0]
        assert (started["round"], started["snapshot"]) == (came_back["round"], -1)
        missed = range(came_back["round"], caught_up["round"])
        assert len(missed) >= 2
        assert {int(path.stem) for path in kept.iterdir()} <= {*range(missed.start + 1)}
        lacked = CHUNKS // first.run.fragment_count * len(missed) - chunks_on_disk(kept.parent, first, missed.start)
        needed = MEAN_BYTES / CHUNKS * lacked
        assert needed <= caught_up["fetched_bytes"] <= needed + 4096 * len(missed)
        await again.rounds(2, LIMIT_S)
        assert_digests_are_equal([first, second, again])
        for node in (first, second):
            assert_no_step_is_lost(node)


@pytest.mark.parametrize("mode", modes("eager"))
async def test_a_run_whose_nodes_are_all_killed_goes_on_from_their_disks(tmp_path: Path, mode: str) -> None:
    """Given three nodes, when all are killed at once, then no committed round is lost, also the newest."""
    ports = iter(unused_tcp_ports(6))
    doors: dict[str, dict[str, Any]] = {n: {"port": next(ports), "bulk_port": next(ports)} for n in "abc"}
    async with node_processes(tmp_path, merged(RUN, MODES[mode])) as nodes:
        before = [await nodes.start(name, **KEPT, **doors[name]) for name in "abc"]
        for node in before:
            await node.until(lambda node=node: len(node.told("round_finished")) >= 4, LIMIT_S)  # type: ignore[misc]
        for node in before:
            node.process.kill()
        for node in before:
            await node.process.wait()
        committed = max(fact["round"] for node in before for fact in node.told("round_committed"))
        digests = {f["round"]: f["state_digest"] for node in before for f in node.told("round_finished")}
        after: list[NodeProcess] = []
        async with trio.open_nursery() as nursery:

            async def start(name: str) -> None:
                after.append(await nodes.start(name, **KEPT, **doors[name]))

            for name in "abc":
                nursery.start_soon(start, name)
        for node in after:
            await node.rounds(2, LIMIT_S)
            assert min(fact["round"] for fact in node.told("round_finished")) >= committed
            for fact in node.told("round_finished"):
                assert digests.get(fact["round"], fact["state_digest"]) == fact["state_digest"]
        assert_digests_are_equal(after)


async def test_damage_on_disk_is_found_and_mended_from_a_peer(tmp_path: Path) -> None:
    """Given a node that was killed, when bits of its newest snapshot and means have flipped, then peers mend them."""
    async with node_processes(tmp_path, RUN) as nodes:
        first = await nodes.start("a", **KEPT)
        victim = await nodes.start("b", **KEPT)
        directory = victim.directory / "state"
        await victim.until(lambda: len(list((directory / "snapshots").glob("*.safetensors"))) > 0, LIMIT_S)
        await victim.rounds(2, LIMIT_S)
        await victim.kill()
        snapshot = sorted((directory / "snapshots").glob("*.safetensors"))[-1]
        flip(snapshot, snapshot.stat().st_size - 100)
        for means in sorted((directory / "means").glob("*.means"))[-2:]:
            flip(means, means.stat().st_size // 2)
        again = await nodes.start("b", **KEPT)
        await again.until(lambda: again.told("caught_up") != [], LIMIT_S)
        await again.rounds(2, LIMIT_S)
        assert_digests_are_equal([first, again])
        assert "snapshot_damaged" in (again.directory / "node.log").read_text()


async def test_a_run_goes_on_from_one_nodes_directory_with_another_number_of_nodes(tmp_path: Path) -> None:
    """Given two nodes that have left, when a new one founds with a copy of one's ledger, then others join it."""
    for home in ("old", "new"):
        (tmp_path / home).mkdir()
    async with node_processes(tmp_path / "old", RUN) as nodes:
        old = [await nodes.start(name, **KEPT) for name in "ab"]
        await old[0].until(lambda: newest(old[0]) >= 4, LIMIT_S)
        for node in old:
            await node.leave()
        reached = newest(old[0])
        digest = old[0].told("round_finished", round=reached - 1)[0]["state_digest"]
    for kind in ("snapshots", "means"):
        shutil.copytree(tmp_path / "old" / "a" / "state" / kind, tmp_path / "new" / "x" / "state" / kind)
    async with node_processes(tmp_path / "new", RUN) as nodes:
        new = [await nodes.start(name, **KEPT) for name in "xyz"]
        assert (await restored(new[0]))["round"] == reached
        for node in new:
            await node.rounds(2, LIMIT_S)
            assert min(fact["round"] for fact in node.told("round_finished")) >= reached
        assert_digests_are_equal(new)
        assert digest


async def test_a_run_goes_on_from_a_remote_copy_after_its_only_disk_is_lost(tmp_path: Path) -> None:
    """Given a node that copies its ledger, when its directory is lost, then a restored one founds the run anew."""
    settings = {**KEPT, "remote": f"file://{tmp_path}/copy"}
    async with node_processes(tmp_path, RUN) as nodes:
        lost = await nodes.start("a", **settings)
        await lost.until(lambda: lost.told("remote_copied") != [], LIMIT_S)
        assert await lost.leave() == 0
        reached = newest(lost)
        shutil.rmtree(lost.directory / "state")
        assert await trio.to_thread.run_sync(restore, lost.directory / "node.toml") == 0
        again = await nodes.start("a", **settings)
        assert (await restored(again))["round"] == reached
        await again.rounds(2, LIMIT_S)
        assert min(fact["round"] for fact in again.told("round_finished")) == reached


def chunks_on_disk(directory: Path, member: NodeProcess, round: int) -> int:
    """How many of the means of ``round`` that were committed, as ``member`` has them, lie in ``directory``."""

    def means(directory: Path) -> MeansFiles:
        sizes = [int(MEAN_BYTES / CHUNKS)] * CHUNKS
        return MeansFiles(directory, run_id(member.run), sizes, fragments=member.run.fragment_count)

    record = means(member.directory / "state").record(round)
    assert record is not None
    return len(means(directory).present(round, record.means))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
