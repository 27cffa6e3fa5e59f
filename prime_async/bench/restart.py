"""How fast a node that was killed is back, and how much memory it takes: a real process, ``prime-async run``, alone.

It trains a few rounds with a snapshot after each, is killed with SIGKILL in the middle of the next, and starts again
from its disk. Time runs from the start of the new process until the node leads its run again: Python and torch are
imported, the model built, the snapshot read and verified, and the means since applied.
"""

from __future__ import annotations

import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prime_async.bench.nodes import LOOPBACK, start_node
from prime_async.bench.proc import peak_bytes
from prime_async.machines.facts import LedgerRestored, RoundFinished, SnapshotWritten, ViewAdopted
from prime_async.node.children import Child

SNAPSHOT_EVERY = 2
ROUNDS = 3
"""One snapshot, and the means of one round since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartBench:
    """What is measured. ``model``: a named size."""

    model: str
    runs: int


async def measure(bench: RestartBench) -> dict[str, Any]:
    """The figures of one model, as ``prime-async bench restart --json`` prints them.

    Raises :class:`~prime_async.errors.EnvironmentFault` if the process ends; on cancellation no process is left.
    """
    seconds, restoring, peaks = [], [], []
    with TemporaryDirectory(prefix="prime-async-bench-") as directory:
        home = Path(directory)
        async with AsyncExitStack() as stack:
            child = await _started(stack, home, bench.model)
            await child.until(lambda: len(child.told(RoundFinished)) >= ROUNDS and bool(child.told(SnapshotWritten)))
            for _ in range(bench.runs):
                parameters = child.parameters
                peaks.append(peak_bytes(child.process.pid))
                child.process.kill()
                await child.process.wait()
                began = time.monotonic()
                child = await _started(stack, home, bench.model)
                await child.until(lambda: bool(child.told(ViewAdopted)))  # noqa: B023  (awaited here)
                seconds.append(time.monotonic() - began)
                restoring.append(child.told(LedgerRestored)[0].seconds)
    return {
        "parameters": parameters,
        "seconds": [round(s, 3) for s in seconds],
        "median_s": round(statistics.median(seconds), 3),
        "restoring_s": round(statistics.median(restoring), 3),
        "peak_bytes": max(peaks),
    }


async def _started(stack: AsyncExitStack, home: Path, model: str) -> Child:
    run = {
        "name": "restart",
        "model": model,
        "sequence_length": 16,
        "round": {"inner_steps": 1},
        "inner": {"batch_size": 1, "warmup_steps": 2},
    }
    return await start_node(stack, home, run, {**LOOPBACK, "threads": 0, "snapshot_every": SNAPSHOT_EVERY})
