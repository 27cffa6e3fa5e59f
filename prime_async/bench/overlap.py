"""How much of the time goes into training, by mode: real node processes in hosts of the network lab.

First the trainers run side by side without any exchange, each in a run of its own whose only round does not end. Then
they train together, over links that are as slow as is wanted, in each mode. The share of a mode is the inner steps per
second with the exchange over those without it, so all that an exchange costs is in it: waiting, the CPU that encoding,
encryption and the links themselves take from the trainers, and the outer step.

Each figure is taken over whole rounds, from the end of one to the end of another, after a first one. The links' rate is
such that the payloads of a blocking exchange, both halves of it, take the wanted share of the time.
"""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from prime_async.bench.netlab import Lab, Links, address
from prime_async.bench.nodes import lab_doors, start_node, still_here
from prime_async.bench.proc import cpu_seconds
from prime_async.machines.facts import RoundFinished
from prime_async.node.children import Child, wait_started
from prime_async.work.codec import make_codec

LINK_SHARE = 0.92
"""Of a link's rate, what payloads get of it, headers and acknowledgements taken off."""
STALL_S = 120.0
"""Without a round for so long, the run is stuck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapBench:
    """What is measured. ``exchange_share``: of the time of a blocking run that the links are to take.

    ``rounds``: measured exchanges of the whole model. ``slow_down``: how many times slower the links are in the second
    half of the measurement.
    """

    nodes: int
    model: str
    inner_steps: int
    rounds: int
    exchange_share: float
    slow_down: float
    fragments: int
    rtt_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A way to exchange. ``slow``: over links that are slower by ``slow_down``."""

    name: str
    run: Mapping[str, Any]
    slow: bool = False


def modes_of(bench: OverlapBench) -> list[Mode]:
    """Those that are compared."""
    streaming = {"mode": "streaming", "fragments": bench.fragments}
    int4 = {"exchange": {"codec": "int4"}}
    return [
        Mode(name="blocking", run={"mode": "blocking"}),
        Mode(name="overlapped", run={"mode": "overlapped"}),
        Mode(name="streaming", run=streaming),
        Mode(name="blocking, slow link", run={"mode": "blocking"}, slow=True),
        Mode(name="streaming int4, slow link", run={**streaming, **int4}, slow=True),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How far the nodes were at a time."""

    at: float
    steps: int
    cpu_s: float

    def rate_until(self, later: Mark) -> float:
        """Inner steps per second, of all nodes together."""
        return (later.steps - self.steps) / (later.at - self.at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """``exchange_s``: median over rounds and nodes, from the end of encoding until the means are applied."""

    steps_per_s: float
    cpu_s_per_step: float
    round_s: float
    exchange_s: float


async def measure_alone(bench: OverlapBench) -> tuple[Measured, int]:
    """The trainers without any exchange; and the parameters of the model."""
    steps = bench.inner_steps
    run = {"mode": "blocking", "round": {"inner_steps": 2**20}}
    with TemporaryDirectory(prefix="prime-async-bench-") as directory, _lab(bench, 1000.0) as lab:
        async with _nodes(bench, Path(directory), lab, run, together=False) as nodes:
            for node in nodes:
                await _until_steps(node, steps)
            before = _mark(nodes)
            for node in nodes:
                await _until_steps(node, steps * (1 + bench.rounds))
            after = _mark(nodes)
            parameters = nodes[0].parameters
    return _measured(before, after, bench, []), parameters


async def measure_mode(bench: OverlapBench, mode: Mode, rate_mbit: float) -> Measured:
    """They train together. Raises :class:`~prime_async.errors.EnvironmentFault` if a process ends, or no round does."""
    fragments = bench.fragments if mode.run["mode"] == "streaming" else 1
    rate = rate_mbit / bench.slow_down if mode.slow else rate_mbit
    with TemporaryDirectory(prefix="prime-async-bench-") as directory, _lab(bench, rate) as lab:
        async with _nodes(bench, Path(directory), lab, mode.run, together=True) as nodes:
            first = await _until_together(nodes, fragments)
            before = _mark(nodes)
            await _until_round(nodes, first + bench.rounds * fragments)
            after = _mark(nodes)
            facts = [f for n in nodes for f in n.told(RoundFinished) if f.round > first]
    return _measured(before, after, bench, facts)


def rate_for(bench: OverlapBench, alone: Measured, parameters: int) -> float:
    """Mbit/s of each node, each way, so that a blocking int8 exchange takes the wanted share of a round.

    A node sends its contribution to the owners of the other nodes' chunks, and the means that it owns to all others:
    together 2 (n - 1) / n times a payload (DESIGN of a round: two halves, which run together).
    """
    training_s = bench.inner_steps * bench.nodes / alone.steps_per_s
    exchange_s = training_s * bench.exchange_share / (1 - bench.exchange_share)
    payload = make_codec("int8").payload_bytes(parameters)
    return 2 * (bench.nodes - 1) / bench.nodes * payload * 8 / 1e6 / exchange_s / LINK_SHARE


def share(alone: Sequence[Measured], together: Sequence[Measured]) -> float:
    """Of the time that goes into training: medians over the repetitions."""
    with_it = statistics.median(m.steps_per_s for m in together)
    return with_it / statistics.median(m.steps_per_s for m in alone)


def _lab(bench: OverlapBench, rate_mbit: float) -> Lab:
    return Lab(Links(hosts=bench.nodes, rate_mbit=rate_mbit, delay_ms=bench.rtt_ms / 2))


@asynccontextmanager
async def _nodes(
    bench: OverlapBench, directory: Path, lab: Lab, run: Mapping[str, Any], *, together: bool
) -> AsyncIterator[list[Child]]:
    """One in each host; the first is the one that the others join."""
    settings = _run(bench, run, bench.nodes if together else 1)
    async with AsyncExitStack() as stack:
        nodes: list[Child] = []
        for host in range(bench.nodes):
            contact = [nodes[0].contact] if together and nodes else []
            own = {**lab_doors(address(host)), "join": contact, "snapshot_every": 0}
            inside = partial(lab.command, host)
            nodes.append(await start_node(stack, directory / f"node-{host}", settings, own, command=inside))
            await wait_started(nodes[-1])
        yield nodes


def _run(bench: OverlapBench, mode: Mapping[str, Any], min_members: int) -> Mapping[str, Any]:
    return {
        "name": "overlap",
        "model": bench.model,
        "sequence_length": 64,
        "round": {"inner_steps": bench.inner_steps},
        "inner": {"batch_size": 2, "warmup_steps": 2, "schedule": "constant"},
        "min_members": min_members,
        **mode,
        "exchange": {"chunk_elements": 2**17, **mode.get("exchange", {})},
    }


async def _until_steps(node: Child, steps: int) -> None:
    with _patience():
        await node.until(lambda: node.meter.inner_steps >= steps or node.has_ended)
    still_here(node)


async def _until_together(nodes: Sequence[Child], rounds: int) -> int:
    """Until all have been in so many rounds. Gives the last of them."""
    for node in nodes:
        with _patience():
            await node.until(lambda: len(_with_work(node)) >= rounds or node.has_ended)  # noqa: B023  (awaited here)
        still_here(node)
    last = max(_with_work(node)[rounds - 1].round for node in nodes)
    await _until_round(nodes, last)
    return last


def _with_work(node: Child) -> list[RoundFinished]:
    return [fact for fact in node.told(RoundFinished) if fact.tokens]


async def _until_round(nodes: Sequence[Child], round: int) -> None:
    for node in nodes:
        while not any(f.round >= round for f in node.told(RoundFinished)):
            with _patience():
                done = len(node.told(RoundFinished))
                await node.until(lambda: len(node.told(RoundFinished)) > done or node.has_ended)  # noqa: B023
            still_here(node)


def _patience() -> AbstractContextManager[object]:
    return trio.fail_after(STALL_S)


def _mark(nodes: Sequence[Child]) -> Mark:
    return Mark(
        at=trio.current_time(),
        steps=sum(node.meter.inner_steps for node in nodes),
        cpu_s=sum(cpu_seconds(node.process.pid) for node in nodes),
    )


def _measured(before: Mark, after: Mark, bench: OverlapBench, facts: Sequence[RoundFinished]) -> Measured:
    steps = after.steps - before.steps
    return Measured(
        steps_per_s=before.rate_until(after),
        cpu_s_per_step=(after.cpu_s - before.cpu_s) / steps,
        round_s=(after.at - before.at) / bench.rounds,
        exchange_s=statistics.median(f.exchange_s for f in facts) if facts else 0.0,
    )
