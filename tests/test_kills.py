"""Processes that are killed or stopped in the middle of an exchange: the others lose nothing, and every value is right.

After each, :func:`prime_async.audit.audit` makes all means anew from the contributions that their headers name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from prime_async.audit import audit
from tests.node_processes import (
    MODES,
    PACED_RUN,
    NodeProcess,
    Nodes,
    assert_digests_are_equal,
    assert_no_step_is_lost,
    merged,
    modes,
    node_processes,
    pairs,
)
from tests.processes import processes_about, written_by

pytestmark = pytest.mark.xdist_group("real time")

FAILURE_S: Final = 2.0
PAUSE_S: Final = 15.0
CHUNKS: Final = 32
RUN: Final = merged(
    PACED_RUN, {"heartbeat_s": 0.5, "failure_timeout_s": FAILURE_S, "exchange": {"chunk_elements": 131072 // CHUNKS}}
)
"""Small chunks, so that a kill hits the middle of an exchange; but each costs time, and a joiner fetches them all."""
PATIENT: Final = {"failure_timeout_s": 20.0}
"""Of a run in which many rounds go by before anybody misses a member."""
LIMIT_S: Final = 60.0
"""How long a test waits for any one thing, on a busy machine too."""
ROLES: Final = ("leader", "owner", "contributor")
USUAL: Final = {("leader", "overlapped"), ("owner", "streaming"), ("contributor", "blocking"), ("leader", "eager")}
"""Of who is killed in which mode: each role, and each mode. The others take minutes more."""
HEARD_S: Final = 0.05
"""What a node told before it was stopped has been heard after this."""
NAMES: Final = "abcd"
TORCH_CACHE: Final = "torchinductor_"
"""What torch keeps for all programs of a user."""
UNREACHABLE: Final = {"advertise": "127.0.0.9"}
"""Nobody listens there: as if it were behind NAT."""


class Scene:
    """Nodes in ``home``, and those of them that are to have lost nothing."""

    def __init__(self, home: Path, nodes: Nodes) -> None:
        self.home = home
        self.nodes = nodes

    def __getitem__(self, name: str) -> NodeProcess:
        return next(node for node in reversed(self.nodes.started) if node.name == name)

    def all_but(self, *names: str) -> list[NodeProcess]:
        return [self[name] for name in NAMES if name not in names and (self.home / name).exists()]

    async def start(self, name: str, settings: Mapping[str, Any] | None = None) -> NodeProcess:
        return await self.nodes.start(name, audit=str(self.home / name / "audit"), **(settings or {}))

    @property
    def leader(self) -> str:
        """As the last view says that any of them has adopted."""
        views = [view for node in self.nodes.started for view in node.told("view_adopted")]
        leader = max(views, key=lambda v: (v["epoch"], v["view"]))["leader"]
        assert isinstance(leader, str)
        return leader


@asynccontextmanager
async def scene(
    home: Path,
    names: str = NAMES,
    last: Mapping[str, Any] | None = None,
    mode: str = "blocking",
    changes: Mapping[str, Any] | None = None,
) -> AsyncIterator[Scene]:
    """Nodes that all take part in the rounds. ``last``: settings of the last one that are not as for the others.

    ``changes``: to the settings of the run.
    """
    run = merged(merged(RUN, MODES[mode]), changes or {})
    async with node_processes(home, run) as nodes:
        scene = Scene(home, nodes)
        await scene.start(names[0])
        async with trio.open_nursery() as nursery:
            for name in names[1:]:
                nursery.start_soon(scene.start, name, last if name == names[-1] else None)
        for name in names:
            await shared_rounds(scene[name], 2, len(names))
        yield scene


async def has_finished(node: NodeProcess, round: int) -> None:
    """Wait until it has."""
    await node.until(lambda: node.told("round_finished", round=round) != [], LIMIT_S)


async def shared_rounds(node: NodeProcess, count: int, contributors: int) -> None:
    """Wait until it has finished so many rounds that were planned with so many contributors."""
    await node.until(lambda: len(shared(node, contributors)) >= count, LIMIT_S)


def shared(node: NodeProcess, contributors: int) -> set[int]:
    """The rounds that it has finished, and that were planned with so many contributors."""
    planned = {fact["round"] for fact in node.told("round_planned", contributors=contributors)}
    return planned & {fact["round"] for fact in node.told("round_finished")}


async def kill_in_mid_exchange(
    victim: NodeProcess, others: Sequence[NodeProcess], *, owns: bool | None = None
) -> dict[str, Any]:
    """Kill it as soon as it has begun an exchange, in which it owns chunks, or does not. Gives what it told of that.

    It is stopped first: on a busy machine the exchange may be over when we hear of it, and then it is the next one.
    """
    left = written_by(victim.process.pid)
    with trio.fail_after(LIMIT_S):
        while True:
            plan = await victim.next("round_planned")
            if owns not in (None, plan["chunks_owned"] > 0):  # shares follow the measured bandwidth, and may be 0
                continue
            victim.pause()
            await trio.sleep(HEARD_S)
            ended = [n for n in (victim, *others) if n.told("round_committed", round=plan["round"])]
            if not ended:
                break
            victim.resume()
    await victim.kill()
    assert {path for path in left if victim.directory not in path.parents} == set()
    return plan


async def assert_they_went_on(nodes: Sequence[NodeProcess], from_round: int, then: int = 2) -> None:
    """Each finishes that round, and some then, with all its steps in them, and with the same weights as the others."""
    for node in nodes:
        await has_finished(node, from_round + then)
    for node in nodes:
        finished = {fact["round"]: fact["tokens"] for fact in node.told("round_finished")}
        assert list(finished) == list(range(min(finished), max(finished) + 1)), f"{node.name} missed a round"
        assert all(tokens > 0 for round, tokens in finished.items() if round >= from_round)
        assert_no_step_is_lost(node)
    assert_digests_are_equal(nodes)


def assert_it_is_lost_in_time(victim: NodeProcess, others: Iterable[NodeProcess]) -> None:
    """One of the others, the leader, has removed it, neither at once nor much later than it has to."""
    (lost,) = [fact for node in others for fact in node.told("member_lost", name=victim.name)]
    assert FAILURE_S <= lost["silent_s"] < 2 * FAILURE_S


def assert_nothing_is_wrong(home: Path, victim: NodeProcess, before_round: int) -> None:
    """All means are those of their contributions, the victim's too, and it has left nothing anywhere else."""
    found = audit([home])
    assert (found.differences, found.unchecked) == ([], [])
    count = CHUNKS // victim.run.fragment_count
    assert found.means >= count * (before_round + 2)
    earlier = [count for round, count in found.counted[victim.id].items() if round < before_round]
    assert len(earlier) >= 2
    assert set(earlier) == {count}
    assert_nothing_is_left(home)


def assert_nothing_is_left(home: Path) -> None:
    assert processes_about(home) == []
    left = {path.name for path in (home / "tmp").iterdir()}
    assert {name for name in left if not name.startswith(TORCH_CACHE)} == set()
    assert {path.name for path in home.iterdir()} <= {*NAMES, "tmp"}


@pytest.fixture(autouse=True)
def _no_other_place_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))


@pytest.mark.parametrize(("role", "mode"), pairs(USUAL, ROLES))
async def test_who_is_killed_in_mid_exchange_costs_the_others_nothing(tmp_path: Path, role: str, mode: str) -> None:
    """Given four nodes, when one is killed in the middle of an exchange, then the others lose no step of theirs."""
    async with scene(tmp_path, last=UNREACHABLE if role == "contributor" else None, mode=mode) as nodes:
        name = nodes.leader if role == "leader" else "d"
        victim, others = nodes[name], nodes.all_but(name)
        owns = {"leader": None, "owner": True, "contributor": False}[role]
        plan = await kill_in_mid_exchange(victim, others, owns=owns)
        assert (nodes.leader == name) == (role == "leader")
        await assert_they_went_on(others, plan["round"])
        assert_it_is_lost_in_time(victim, others)
        if role == "leader":
            assert nodes.leader != name
    assert_nothing_is_wrong(tmp_path, victim, plan["round"])


@pytest.mark.parametrize("mode", modes("streaming"))
async def test_a_joiner_that_is_killed_while_it_fetches_the_state_holds_nobody_up(tmp_path: Path, mode: str) -> None:
    """Given three nodes, when a fourth is killed as it fetches the state, then rounds go on before it is missed."""
    async with scene(tmp_path, NAMES[:3], mode=mode, changes=PATIENT) as nodes:
        joiner = await nodes.start("d")
        left = written_by(joiner.process.pid)
        await joiner.until(lambda: joiner.told("catch_up_started") != [], LIMIT_S)
        await joiner.kill()
        assert joiner.told("caught_up") == []
        assert {path for path in left if joiner.directory not in path.parents} == set()
        killed_in = joiner.told("catch_up_started")[0]["run_round"]
        reached = max(fact["round"] for node in nodes.all_but("d") for fact in node.told("round_finished"))
        await assert_they_went_on(nodes.all_but("d"), killed_in, then=reached - killed_in + 2)
        assert [node.name for node in nodes.all_but("d") if node.told("member_lost")] == []
        again = await nodes.start("d")
        await shared_rounds(again, 1, 4)
        back_in = again.told("round_planned", contributors=4)[0]["round"]
        await assert_they_went_on(nodes.all_but(), back_in)
    found = audit([tmp_path])
    assert (found.differences, found.unchecked) == ([], [])
    assert found.counted[again.id].total() >= CHUNKS // again.run.fragment_count
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(("role", "mode"), pairs({("leader", "overlapped")}, ("leader", "member")))
async def test_who_is_stopped_in_mid_exchange_comes_back_by_itself(tmp_path: Path, role: str, mode: str) -> None:
    """Given four nodes, when one stands still for a while, then the others go on, and when it wakes it joins them."""
    async with scene(tmp_path, mode=mode) as nodes:
        name = nodes.leader if role == "leader" else "d"
        victim, others = nodes[name], nodes.all_but(name)
        plan = await victim.next("round_planned", LIMIT_S)
        victim.pause()
        wakes_at = trio.current_time() + PAUSE_S
        await assert_they_went_on(others, plan["round"])
        assert_it_is_lost_in_time(victim, others)
        await trio.sleep_until(wakes_at)  # the time that it stands still is what is tested
        done = len(shared(victim, 4))
        victim.resume()
        await shared_rounds(victim, done + 1, 4)
        await assert_they_went_on(others, max(shared(victim, 4)), then=0)
        assert_digests_are_equal(nodes.all_but())
    assert_nothing_is_wrong(tmp_path, victim, plan["round"])
