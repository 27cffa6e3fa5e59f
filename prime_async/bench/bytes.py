"""Bytes on the wire of real node processes, against data-parallel training of the same inner steps.

Counted are all frames that the nodes hand to their sockets, of both planes: payloads, their headers, heartbeats, plans,
votes and commits; not what TCP, IP and encryption add to either side of the comparison. A count begins when all nodes
have finished a round, and ends when all have finished another: joining is not in it.

Data-parallel is fp32 with a ring all-reduce of the gradients at every step: 2 (n - 1) / n of 4 bytes per parameter
sent by each node, payloads alone.

The model is whole, and so is H. What is small is the batch, so that H inner steps of four nodes take minutes on a few
cores: how much is sent does not depend on it, but for the heartbeats, which are sent by time. Their rate is measured
while nobody exchanges, and from it follows what a round would send whose inner steps take as long as a real one's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import trio

from prime_async.bench.nodes import LOOPBACK, start_node, still_here
from prime_async.config.schema import CodecName
from prime_async.errors import EnvironmentFault
from prime_async.machines.facts import RoundFinished
from prime_async.node.children import Child, wait_started

FP32_BYTES: Final = 4
SETTLE_S: Final = 2.5
"""Nodes tell each second what they have sent; by then a count has all of a round that is over."""
IDLE_S: Final = 5.0
"""For so long heartbeats are counted, before the next exchange."""
STALL_S: Final = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesBench:
    """What is measured. ``inner_steps``: H. ``step_s``: of a real inner step, for the reckoned figures."""

    nodes: int
    model: str
    inner_steps: int
    rounds: int
    sequence_length: int
    step_s: float
    error_feedback: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What all nodes together had sent at a time."""

    at: float
    sent_bytes: int
    round: int
    steps: int


async def measure(bench: BytesBench, codec: CodecName) -> dict[str, Any]:
    """The figures of one codec, both ways, as ``prime-async bench bytes --json`` prints them.

    Raises :class:`EnvironmentFault` if a node ends; then, and on cancellation, none is left.
    """
    with TemporaryDirectory(prefix="prime-async-bench-") as directory:
        async with _nodes(bench, codec, Path(directory)) as nodes:
            before = await _count(bench, nodes, await _until_together(nodes))
            heartbeats = await _heartbeats(nodes, before.round)
            await _until_round(nodes, before.round + bench.rounds)
            after = await _count(bench, nodes, before.round + bench.rounds)
            parameters = nodes[0].parameters
            digests = _digests(nodes, before.round + bench.rounds)
    return figures(bench, parameters, before, after, heartbeats, digests)


def figures(
    bench: BytesBench, parameters: int, before: Count, after: Count, heartbeats: float | None, digests: Sequence[str]
) -> dict[str, Any]:
    """``heartbeats``: bytes per second of all nodes, None if the rounds were too short to see them alone."""
    rounds = after.round - before.round
    sent = after.sent_bytes - before.sent_bytes
    round_s = (after.at - before.at) / rounds
    parallel = data_parallel_bytes(bench, parameters) * rounds
    real_s = bench.inner_steps * bench.step_s
    reckoned = None if heartbeats is None else sent + heartbeats * (real_s - round_s) * rounds
    return {
        "parameters": parameters,
        "rounds": rounds,
        "round_s": round_s,
        "inner_steps_done": after.steps - before.steps,
        "sent_bytes": sent,
        "data_parallel_bytes": parallel,
        "reduction": parallel / sent,
        "heartbeat_bytes_per_s": heartbeats,
        "real_round_s": real_s,
        "reckoned_reduction": None if reckoned is None else parallel / reckoned,
        "bitwise_equal": len(set(digests)) == 1 and len(digests) == bench.nodes,
    }


def data_parallel_bytes(bench: BytesBench, parameters: int) -> int:
    """Sent by all nodes together in H inner steps: fp32, ring all-reduce."""
    return bench.inner_steps * 2 * (bench.nodes - 1) * FP32_BYTES * parameters


def _have_gone_on(nodes: Sequence[Child], round: int) -> bool:
    """Whether the exchange after ``round`` has begun."""
    last = max(f.round for node in nodes for f in node.told(RoundFinished))
    return last > round or any(node.state == "exchanging" for node in nodes)


async def _heartbeats(nodes: Sequence[Child], round: int) -> float | None:
    """Bytes per second of all nodes; None if the next exchange begins too soon to see them alone."""
    began, sent = trio.current_time(), sum(node.bytes_sent for node in nodes)
    await trio.sleep(IDLE_S)
    seconds, more = trio.current_time() - began, sum(node.bytes_sent for node in nodes) - sent
    return None if _have_gone_on(nodes, round) else more / seconds


def _digests(nodes: Sequence[Child], round: int) -> list[str]:
    return [fact.state_digest for node in nodes for fact in node.told(RoundFinished) if fact.round == round]


async def _count(bench: BytesBench, nodes: Sequence[Child], round: int) -> Count:
    """When all have finished ``round``, after a pause in which they tell how much they have sent.

    Raises :class:`EnvironmentFault` if the next exchange begins meanwhile.
    """
    at = trio.current_time()
    # Those that the rounds count, not those that nodes have done by now: some are in the next round already.
    tokens = sum(fact.tokens for node in nodes for fact in node.told(RoundFinished) if fact.round <= round)
    await trio.sleep(SETTLE_S)
    if _have_gone_on(nodes, round):
        raise EnvironmentFault(
            f"the inner steps of a round took less than {SETTLE_S:g} s, too short to count what each round sends: "
            "take more inner steps, or a larger model"
        )
    return Count(
        at=at, sent_bytes=sum(node.bytes_sent for node in nodes), round=round, steps=tokens // bench.sequence_length
    )


@asynccontextmanager
async def _nodes(bench: BytesBench, codec: CodecName, directory: Path) -> AsyncIterator[list[Child]]:
    """On loopback; the others join the first."""
    async with AsyncExitStack() as stack:
        nodes: list[Child] = []
        for number in range(bench.nodes):
            own = {**LOOPBACK, "join": [nodes[0].contact] if nodes else [], "snapshot_every": 0}
            nodes.append(await start_node(stack, directory / f"node-{number}", _run(bench, codec), own))
            await wait_started(nodes[-1])
        yield nodes


def _run(bench: BytesBench, codec: CodecName) -> Mapping[str, Any]:
    return {
        "name": "bytes",
        "model": bench.model,
        "sequence_length": bench.sequence_length,
        "round": {"inner_steps": bench.inner_steps},
        "inner": {"batch_size": 1, "warmup_steps": 2, "schedule": "constant"},
        "exchange": {"codec": codec, "error_feedback": bench.error_feedback},
        "min_members": bench.nodes,
    }


async def _until_together(nodes: Sequence[Child]) -> int:
    """Until all have finished a round that all contributed to. Gives that round."""
    for node in nodes:
        await _until(node, lambda node=node: any(f.tokens for f in node.told(RoundFinished)))
    last = max(next(f.round for f in node.told(RoundFinished) if f.tokens) for node in nodes)
    await _until_round(nodes, last)
    return last


async def _until_round(nodes: Sequence[Child], round: int) -> None:
    for node in nodes:
        await _until(node, lambda node=node: any(f.round >= round for f in node.told(RoundFinished)))


async def _until(node: Child, condition: Any) -> None:
    with trio.fail_after(STALL_S):
        await node.until(lambda: condition() or node.has_ended)
    still_here(node)
