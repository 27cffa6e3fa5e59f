"""A node that averages a vector again and again, and writes down what it did when.

What a round is here: the inner steps of the workload are what happens *between* two exchanges. From the moment that
``train`` returns, encoding, plan, transfers, reduction, commit and the outer step are those of any run.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Protocol

from torch import Tensor

from prime_async.bench.figures import VectorSpec
from prime_async.bench.journal import Journal, JournalTransport
from prime_async.bench.nodes import home_of
from prime_async.config.load import config_from
from prime_async.config.schema import CodecName, Config
from prime_async.node import Node, open_node
from prime_async.node.build import allow_list, largest_payload, open_transport
from prime_async.transport.base import Traffic
from prime_async.work.buffer_workload import BufferWorkload
from prime_async.work.codec import Codec
from prime_async.work.inner import Span
from prime_async.work.workload import Reduction, StepReport

UNTIMED_ROUNDS: Final = 2
"""They open the connections, allocate the buffers, and let the nodes measure their links."""


class BenchWorkload(BufferWorkload):
    """A vector to average, whose inner steps are ``between``, and whose pieces of work are written down.

    Without ``keep`` it has nothing to keep on disk.
    """

    def __init__(
        self,
        values: Tensor,
        chunk_elements: int,
        journal: Journal,
        between: Callable[[], None],
        codec: Codec,
        keep: bool = True,
    ) -> None:
        super().__init__(values, chunk_elements, codec)
        self._keep = keep
        self._journal = journal
        self._between = between
        self.ended_at = 0.0

    @property
    def spans(self) -> Sequence[Span]:
        return super().spans if self._keep else ()

    def train(self, steps: int, on_step: Callable[[StepReport], None]) -> None:  # noqa: ARG002  (no steps to report)
        self._between()

    def encode(self, chunk: int, out: memoryview) -> None:
        with self._journal.entry("encode"):
            super().encode(chunk, out)

    def reduce(
        self, chunk: int, payloads: Sequence[memoryview], weights: Sequence[int], out: memoryview, round: int
    ) -> Reduction:
        with self._journal.entry("reduce"):
            return super().reduce(chunk, payloads, weights, out, round)

    def apply(self, chunk: int, mean: memoryview, included: bool, own: memoryview | None = None) -> None:
        with self._journal.entry("apply"):
            super().apply(chunk, mean, included, own)

    def end_round(self) -> bytes:
        digest = super().end_round()
        self.ended_at = time.monotonic()
        return digest


def config_of(spec: VectorSpec, contact: str, node: Mapping[str, object], codec: CodecName = "int8") -> Config:
    """``contact``: of the first node; not looked at by that itself. ``node``: more settings of ``[node]``."""
    home = home_of(Path(spec.directory), spec.rank)
    usual = {
        "key": str(home / "node.key"),
        "directory": str(home),
        "join": [contact] if spec.rank else [],
        "allow": list(spec.ids),
        "encrypt": spec.encrypt,
        "snapshot_every": 0,  # they would read the vector while it is filled for the next exchange
        "threads": 1,
    }
    run = {
        "name": "bench",
        "rounds": UNTIMED_ROUNDS + spec.iterations,
        "min_members": spec.nodes,
        "exchange": {"chunk_elements": spec.chunk_elements, "codec": codec},
    }
    return config_from({"run": run, "node": {**usual, **node}})


class Rounds(Protocol):
    """What a process measures between two exchanges."""

    @property
    def workload(self) -> BenchWorkload: ...

    @property
    def journal(self) -> Journal: ...

    traffic: Traffic
    """The node's counters, once it is open."""


@asynccontextmanager
async def open_measured(config: Config, rounds: Rounds) -> AsyncIterator[Node]:
    """A node with the workload of ``rounds``, whose transfers go into their journal."""
    async with open_transport(config.node, largest_payload(rounds.workload), allow_list(config.node)) as transport:
        rounds.traffic = transport.traffic
        timed = JournalTransport(transport, rounds.journal)
        async with open_node(config, transport=timed, workload=rounds.workload) as node:
            yield node
