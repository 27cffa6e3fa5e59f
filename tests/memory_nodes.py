"""Whole nodes over the network in memory, and the steps that they pretend to do."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from prime_async.config.load import config_from
from prime_async.config.schema import Config
from prime_async.log import read_log, replay
from prime_async.machines.facts import Fact
from prime_async.node import Node, open_node
from prime_async.transport.memory import MemoryNetwork
from prime_async.work.buffer_workload import BufferWorkload
from prime_async.work.codec import make_codec
from prime_async.work.workload import StepReport, Workload

LIMIT_S = 30.0
"""A test that takes so long hangs. None waits for it."""
ELEMENTS, CHUNK = 1000, 256
STEPS = 2
F = TypeVar("F", bound=Fact)


class Walker(BufferWorkload):
    """Its vector moves by ``pace`` in each inner step, and each round by the mean of all nodes' moves.

    An inner step takes ``step_s``, so that a round takes long enough for others to join.
    """

    def __init__(self, pace: float = 1.0, step_s: float = 0.01, fetch: Callable[[int], None] | None = None) -> None:
        super().__init__(torch.zeros(ELEMENTS), CHUNK, make_codec("fp32"))
        self.pace = pace
        self.step_s = step_s
        self.moved = 0.0
        self.kept = False
        self.steps = 0
        self.on_import = fetch
        self.broken = False

    def train(self, steps: int, on_step: Callable[[StepReport], None]) -> None:
        for _ in range(steps):
            time.sleep(self.step_s)  # this is the work
            self.moved += self.pace
            self.steps += 1
            on_step(StepReport(step=self.steps, loss=1.0, tokens=10, seconds=self.step_s))

    def encode(self, chunk: int, out: memoryview) -> None:
        with self._codec.work_on(chunk) as (scratch, _):
            torch.add(self._view(chunk), math.nan if self.broken else self.moved, out=scratch)
            self._codec.encode(scratch, out, scratch)

    def apply(self, chunk: int, mean: memoryview, included: bool, own: memoryview | None = None) -> None:
        super().apply(chunk, mean, included, own)
        self.kept = not included

    def end_round(self) -> bytes:
        self.moved = self.moved if self.kept else 0.0
        return super().end_round()

    def restore(self) -> None:
        self.moved = 0.0

    def import_state(self, chunk: int, data: memoryview) -> None:
        super().import_state(chunk, data)
        if self.on_import is not None:
            self.on_import(chunk)

    def end_import(self, round: int) -> bytes:
        self.moved = 0.0
        return super().end_import(round)


@dataclass
class Place:
    """A network, and where its nodes keep things. ``settings``: under ``[node]``, of all of them."""

    directory: Path
    network: MemoryNetwork = field(default_factory=lambda: MemoryNetwork(seed=1, latency_s=(0.0005, 0.002)))
    settings: dict[str, Any] = field(default_factory=dict)

    def id(self, name: int) -> str:
        return f"{name:x}" * 64

    def config(self, name: int, **run: Any) -> Config:
        """The failure timeout is long: a slow machine is not taken for a dead one, unless a test is about that."""
        values = {
            "name": "x",
            "heartbeat_s": 0.1,
            "failure_timeout_s": 5.0,
            "round": {"inner_steps": STEPS},
            "exchange": {"chunk_elements": CHUNK},
            **run,
        }
        node = {
            "name": f"n{name}",
            "directory": str(self.directory / f"n{name}"),
            "join": [] if name == 0 else [f"{self.id(0)}@127.0.0.1:1"],
            "record": str(self.directory / f"n{name}.log"),
            **self.settings,
        }
        return config_from({"run": values, "node": node})

    @asynccontextmanager
    async def node(self, name: int, workload: Workload | None = None, **run: Any) -> AsyncIterator[Node]:
        async with (
            self.network.open(self.id(name)) as transport,
            open_node(
                self.config(name, **run), transport=transport, workload=workload or Walker(pace=name + 1.0)
            ) as node,
        ):
            yield node

    def replayed(self, name: int) -> int:
        """Replay a node's log: how many events it has."""
        log = read_log(self.directory / f"n{name}.log")
        assert log.torn_bytes == 0
        return sum(1 for _ in replay(log))


async def until(node: Node, kind: type[F], when: Callable[[F], bool] = lambda _: True) -> F:
    """Read the node's events until one is as wanted."""
    async for fact in node.events:
        if isinstance(fact, kind) and when(fact):
            return fact
    raise AssertionError(f"the node ended without {kind.__name__}")
