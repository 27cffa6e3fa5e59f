"""How fast a node joins: whole nodes in hosts of the network lab, with an uplink each, and a joiner with a downlink.

The members keep no means but the last, so the joiner fetches a snapshot, 8 bytes per parameter, from all of them at
once, while they train on. Their inner steps sleep, so that the CPUs are free for the links. The rate is what came
divided by the time from the joiner's first question to the state of the run, reading and hashing included; the share is
that rate over what the links allow, the sum of the uplinks or the downlink, whatever is less.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import trio

from prime_async.bench.netlab import Lab, Links, address
from prime_async.bench.nodes import lab_doors, start_node, still_here
from prime_async.machines.facts import CatchUpStarted, CaughtUp, SnapshotWritten
from prime_async.node.children import Child, wait_started

if TYPE_CHECKING:
    from torch import nn

    from prime_async.config.schema import RunSpec

STATE_BYTES: Final = 8
"""Per parameter of a snapshot: outer weights and momentum."""
WIDTH: Final = 512
TOKEN_PARAMETERS: Final = 2 * WIDTH
"""Of the model, for each token that it knows."""
LEAST_TOKENS: Final = 256
"""What the bundled text needs."""
PACE_S: Final = 0.5
"""Of an inner step, long enough that the two cores of a small machine have time for all nodes and the links."""
KEPT: Final[Mapping[str, object]] = {"snapshot_every": 1, "keep_snapshots": 1, "keep_rounds": 0}
LEAST_ROUND_S: Final = 3.0
STALL_S: Final = 120.0
"""Beyond two rounds, or the time that the links need: then the run is stuck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinBench:
    """What is measured. ``up_mbit``: of each member. ``down_mbit``: of the joiner. ``rtt_ms``: without queues.

    ``tokens``: that the model knows, ``TOKEN_PARAMETERS`` each.
    """

    tokens: int
    up_mbit: tuple[float, ...]
    down_mbit: float
    rtt_ms: float

    @property
    def limit_mbit(self) -> float:
        """What the links allow."""
        return min(sum(self.up_mbit), self.down_mbit)

    @property
    def ideal_s(self) -> float:
        """In which the links could bring the snapshot."""
        return self.tokens * TOKEN_PARAMETERS * STATE_BYTES * 8 / 1e6 / self.limit_mbit

    @property
    def round_s(self) -> float:
        """So long that the snapshot that the joiner fetches is not replaced meanwhile: the members keep one."""
        return max(LEAST_ROUND_S, 4 * self.ideal_s)


def tokens_for(parameters: float) -> int:
    """Of a model with about so many parameters."""
    return max(LEAST_TOKENS, round(parameters / TOKEN_PARAMETERS))


def paced_model(run: RunSpec, vocab_size: int) -> nn.Module:
    """``TOKEN_PARAMETERS`` parameters for each token, whose inner steps sleep for ``PACE_S``."""
    import torch

    torch.manual_seed(run.seed)
    model = torch.nn.Sequential(torch.nn.Embedding(vocab_size, WIDTH), torch.nn.Linear(WIDTH, vocab_size, bias=False))
    model.register_forward_pre_hook(lambda module, _: time.sleep(PACE_S) if module.training else None)
    return model


async def measure(bench: JoinBench, congestion: str) -> dict[str, Any]:
    """The figures of one join, as ``prime-async bench join --json`` prints them.

    Raises :class:`~prime_async.errors.EnvironmentFault` if a process ends, :class:`trio.TooSlowError` if nothing goes
    on, and :class:`~prime_async.bench.netlab.LabError` if there can be no lab; then, and on cancellation, no process is
    left.
    """
    members = len(bench.up_mbit)
    links = Links(hosts=members + 1, delay_ms=bench.rtt_ms / 2, congestion=congestion)
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="prime-async-bench-")))
        lab = stack.enter_context(Lab(links))
        for host, rate in enumerate((*bench.up_mbit, bench.down_mbit)):
            lab.set_rate(host, rate, rate)
        nodes: list[Child] = []
        for host in range(members):
            nodes.append(await _started(stack, bench, directory, lab, host, nodes))
        for node in nodes:
            await _until_told(node, SnapshotWritten, 2, 2 * bench.round_s)
        before = lab.bytes_sent()
        joiner = await _started(stack, bench, directory, lab, members, nodes)
        await _until_told(joiner, CaughtUp, 1, bench.round_s)
        after = lab.bytes_sent()
        passed = [after.get((host, members), 0) - before.get((host, members), 0) for host in range(members)]
        return figures(bench, joiner.told(CatchUpStarted)[-1], joiner.told(CaughtUp)[0], passed)


def figures(bench: JoinBench, began: CatchUpStarted, done: CaughtUp, passed: list[int]) -> dict[str, Any]:
    """``passed``: bytes of packets from each member to the joiner. ``snapshot``: after so many rounds; -1: none."""
    rate = done.fetched_bytes * 8 / 1e6 / done.seconds
    return {
        "snapshot": began.snapshot,
        "fetched_bytes": done.fetched_bytes,
        "seconds": round(done.seconds, 3),
        "rate_mbit": round(rate, 2),
        "share": round(rate / bench.limit_mbit, 4),
        "wire_bytes_by_member": passed,
    }


async def _started(
    stack: AsyncExitStack, bench: JoinBench, directory: Path, lab: Lab, host: int, others: list[Child]
) -> Child:
    own = {**lab_doors(address(host)), "join": [others[0].contact] if others else [], **KEPT}
    home = directory / f"node-{host}"
    node = await start_node(stack, home, _run(bench), own, command=partial(lab.command, host))
    await wait_started(node)
    return node


async def _until_told(node: Child, kind: type[Any], count: int, usual_s: float) -> None:
    with trio.fail_after(usual_s + STALL_S):
        await node.until(lambda: len(node.told(kind)) >= count or node.has_ended)
    if len(node.told(kind)) < count:
        still_here(node)


def _run(bench: JoinBench) -> Mapping[str, Any]:
    return {
        "name": "join",
        "model": f"{__name__}:paced_model",
        "vocab_size": bench.tokens,
        "sequence_length": 8,
        "round": {"seconds": bench.round_s, "inner_steps": 0},
        "inner": {"batch_size": 1, "warmup_steps": 2, "schedule": "constant"},
        "exchange": {"chunk_elements": 2**18},
    }
