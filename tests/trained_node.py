"""A node's directory with the weights of a real, short run of one node: trained in this process, without sockets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from prime_async.config.load import config_from, load_config
from prime_async.config.schema import Config
from prime_async.config.template import node_toml
from prime_async.machines.facts import HeldOutLoss
from prime_async.node import open_node
from prime_async.transport.memory import MemoryNetwork
from prime_async.work.diloco import build_workload

LIMIT_S = 60.0
SHORT: dict[str, Any] = {
    "name": "short",
    "model": "llama-360k",
    "sequence_length": 16,
    "rounds": 3,
    "round": {"inner_steps": 2},
    "inner": {"batch_size": 2, "learning_rate": 5e-3, "warmup_steps": 1},
    "exchange": {"chunk_elements": 2**15},
}


def train(folder: Path, *, node: dict[str, Any] | None = None, **run: Any) -> float:
    """Do all rounds of a run, whose node.toml is in ``folder``, which is made. Gives the last held-out loss."""
    settings = {"threads": 1, "device": "cpu", "snapshot_every": 2, "keep_snapshots": 2, **(node or {})}
    config = config_from({"run": {**SHORT, **run}, "node": {**settings, "directory": "state"}})
    folder.mkdir(exist_ok=True)
    (folder / "node.toml").write_text(node_toml(config))
    losses = trio.run(_run, load_config(folder / "node.toml"))
    return losses[-1]


async def _run(config: Config) -> list[float]:
    workload = build_workload(config.run, config.node, stream=1)
    with trio.fail_after(LIMIT_S):
        async with (
            MemoryNetwork(seed=1).open("a" * 64) as transport,
            open_node(config, transport=transport, workload=workload) as done,
        ):
            return [fact.loss async for fact in done.events if isinstance(fact, HeldOutLoss)]
