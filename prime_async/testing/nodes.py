"""Real nodes in one process, over the network in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from prime_async.config.load import config_from
from prime_async.config.schema import Config
from prime_async.node.node import Node, open_node
from prime_async.testing.scripted import ScriptedStep, ScriptedTrainer, scripted_workload
from prime_async.transport.memory import MemoryNetwork

DEFAULTS: Final[dict[str, Any]] = {
    "name": "test",
    "heartbeat_s": 0.1,
    "failure_timeout_s": 5.0,  # a slow machine is not taken for a dead one
    "round": {"inner_steps": 2},
    "fragments": 2,
    "exchange": {"chunk_elements": 256},
}


class MemoryRun:
    """A run whose nodes live in the test: n0, which founds it, n1, and so on, with what they keep in ``directory``.

    ``settings`` are those of ``[run]``, over short rounds of two inner steps. ``network`` can be cut and healed, and
    loses control messages by chance if it was made so. A node that is opened again goes on from its directory.
    """

    def __init__(self, directory: Path, network: MemoryNetwork | None = None, **settings: Any) -> None:
        self.network = network or MemoryNetwork(seed=1)
        self._directory = directory
        self._settings = {**DEFAULTS, **settings}

    def id(self, number: int) -> str:
        """The id of a node, which stands for its public key: 64 hexadecimal digits."""
        return f"{number:064x}"

    def config(self, number: int) -> Config:
        """The configuration of node ``number``. Raises :class:`ConfigError` if the settings are wrong."""
        node = {
            "name": f"n{number}",
            "directory": str(self._directory / f"n{number}"),
            "join": [] if number == 0 else [f"{self.id(0)}@127.0.0.1:1"],
        }
        return config_from({"run": self._settings, "node": node})

    @asynccontextmanager
    async def node(
        self, number: int, script: Callable[[int], ScriptedStep] = lambda _: ScriptedStep()
    ) -> AsyncIterator[Node]:
        """Run node ``number`` for as long as the block lasts, training by ``script``; as :func:`open_node`."""
        config = self.config(number)
        workload = scripted_workload(config.run, ScriptedTrainer(script))
        async with (
            self.network.open(self.id(number)) as transport,
            open_node(config, transport=transport, workload=workload) as node,
        ):
            yield node
