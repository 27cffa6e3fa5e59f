"""What it costs the others when a node is killed in the middle of an exchange: real processes, ``prime-async run``.

Time runs from the SIGKILL until the last of the others has told that it finished the round. In between lie the failure
timeout, without which nobody can tell a dead node from a slow one; of a dead leader, the election; the chunks that it
owned, done again; and the outer step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

import trio

from prime_async.actors.groups import single_errors
from prime_async.bench.nodes import LOOPBACK, start_node
from prime_async.errors import EnvironmentFault
from prime_async.machines.facts import RoundFinished, RoundPlanned, ViewAdopted
from prime_async.node.children import Child, wait_for, wait_started
from prime_async.transport.keys import write_key_file

Role: TypeAlias = Literal["leader", "member"]
ROLES: tuple[Role, ...] = ("leader", "member")

RUN: dict[str, Any] = {
    "name": "failover",
    "sequence_length": 32,
    "round": {"inner_steps": 50},
    "inner": {"batch_size": 2, "warmup_steps": 2},
    # A million parameters in a thousand chunks: an exchange takes long enough to be hit in its middle.
    "exchange": {"chunk_elements": 1024},
}
"""The run of the benchmark: what differs from the defaults, and why."""


# --- killing a node -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kill:
    """Who was killed in the exchange of which round (from 0), and when, on the monotonic clock."""

    victim: Child
    round: int
    at: float


async def kill_in_mid_exchange(children: Sequence[Child], role: Role, first_round: int = 0) -> Kill:
    """Kill the leader, or another one that owns chunks, when it has begun a round that all of them contribute to.

    Not the first such round: from the second on all of them vote. Raises :class:`EnvironmentFault` if the run ends
    before that.
    """
    async with _watched(children):
        victim, number = await _in_mid_exchange(children, role, first_round)
    victim.process.kill()
    at = time.monotonic()
    await victim.process.wait()
    victim.state = "killed"
    return Kill(victim, number, at)


async def end_of_round(others: Sequence[Child], kill: Kill) -> float:
    """Seconds from the kill until the last one of the others has finished the round."""
    async with _watched(others):
        for child in others:
            while not _has_finished(child, kill.round):
                await _until_one_tells([child])
    return time.monotonic() - kill.at


def leader_of(children: Sequence[Child]) -> str:
    """The name of the one that the newest view names; "" if there is no view yet."""
    views = [view for child in children for view in child.told(ViewAdopted)]
    return max(views, key=lambda v: (v.epoch, v.view)).leader if views else ""


async def _in_mid_exchange(children: Sequence[Child], role: Role, first_round: int) -> tuple[Child, int]:
    while True:
        leader = leader_of(children)
        for child in children:
            plan = _open_plan(child, len(children)) if (child.name == leader) == (role == "leader") else None
            if plan is not None and plan.round >= first_round and (role == "leader" or plan.chunks_owned):
                return child, plan.round
        await _until_one_tells(children)
        if all(child.has_ended for child in children):
            raise EnvironmentFault("the run ended before all nodes had taken part in it: give it more rounds")


def _open_plan(child: Child, contributors: int) -> RoundPlanned | None:
    """The plan that it goes by, if so many contribute to it, and did to one before that."""
    plans = [plan for plan in child.told(RoundPlanned) if plan.contributors == contributors]
    if len({plan.round for plan in plans}) < 2 or _has_finished(child, plans[-1].round):
        return None
    return plans[-1]


def _has_finished(child: Child, round: int) -> bool:
    return any(fact.round == round for fact in child.told(RoundFinished))


async def _until_one_tells(children: Sequence[Child]) -> None:
    def told() -> int:
        return sum(len(child.facts) + child.has_ended for child in children)

    before = told()
    async with trio.open_nursery() as nursery:

        async def watch(child: Child) -> None:
            await child.until(lambda: told() > before)
            nursery.cancel_scope.cancel()

        for child in children:
            nursery.start_soon(watch, child)


@asynccontextmanager
async def _watched(children: Sequence[Child]) -> AsyncIterator[None]:
    """Raises :class:`EnvironmentFault` if one of them ends badly meanwhile."""
    with single_errors():
        async with trio.open_nursery() as nursery:
            for child in children:
                nursery.start_soon(wait_for, child)
            yield
            nursery.cancel_scope.cancel()


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverBench:
    """What is measured."""

    nodes: int
    runs: int
    failure_timeout_s: float


async def measure(bench: FailoverBench, role: Role) -> dict[str, Any]:
    """The figures of one role, as ``prime-async bench failover --json`` prints them.

    One run of training, in which again and again a node is killed, and started again. Raises :class:`EnvironmentFault`
    if another process ends; then, and on cancellation, no process is left.
    """
    with TemporaryDirectory(prefix="prime-async-bench-") as directory:
        cluster = _Cluster(bench, Path(directory))
        async with cluster.running() as children:
            seconds = [await _one_kill(cluster, children, role) for _ in range(bench.runs)]
    return {
        "seconds": [round(s, 3) for s in seconds],
        "median_s": round(statistics.median(seconds), 3),
        "lost_tokens": cluster.lost_tokens,
    }


class _Cluster:
    """Node processes; ``lost_tokens``: what nodes trained on that no round counts, those that were killed apart."""

    def __init__(self, bench: FailoverBench, directory: Path) -> None:
        self.bench = bench
        self.lost_tokens = 0
        self._homes = [directory / f"node-{i + 1}" for i in range(bench.nodes)]
        for home in self._homes:
            home.mkdir()
        self._keys = [write_key_file(home / "node.key").id for home in self._homes]
        self._stack = AsyncExitStack()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[list[Child]]:
        async with self._stack:
            children: list[Child] = []
            for home in self._homes:
                children.append(await self.start(home, children[0] if children else None))
                if len(children) == 1:
                    await wait_started(children[0])  # the others join it
            yield children

    async def start(self, home: Path, contact: Child | None, before: Child | None = None) -> Child:
        run = {
            **RUN,
            "failure_timeout_s": self.bench.failure_timeout_s,
            "min_members": self.bench.nodes,  # a round that is planned goes on with fewer; the next one waits
        }
        own = {**LOOPBACK, "join": [contact.contact] if contact else [], "allow": list(self._keys)}
        return await start_node(self._stack, home, run, own, before)


async def _one_kill(cluster: _Cluster, children: list[Child], role: Role) -> float:
    """Seconds; afterwards the node is on its way back."""
    kill = await kill_in_mid_exchange(children, role)
    others = [child for child in children if child is not kill.victim]
    seconds = await end_of_round(others, kill)
    cluster.lost_tokens += sum(child.lost_tokens for child in others)
    children[children.index(kill.victim)] = await cluster.start(kill.victim.directory, others[0], kill.victim)
    return seconds
