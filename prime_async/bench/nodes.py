"""Whole nodes, as the benchmarks start them: on loopback, or in hosts of the network lab."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from prime_async.config.load import config_from
from prime_async.config.schema import Config
from prime_async.errors import EnvironmentFault
from prime_async.node.children import Child, node_process
from prime_async.transport.keys import write_key_file

PORTS: Final = (7700, 7701)
"""Control and bulk, in a lab, where each host has all ports to itself."""
LOOPBACK: Final[Mapping[str, object]] = {"host": "127.0.0.1", "advertise": "127.0.0.1", "port": 0, "bulk_port": 0}


def lab_doors(address: str) -> Mapping[str, object]:
    """Where a node of the lab is found, as settings of ``[node]``."""
    return {"host": address, "advertise": address, "port": PORTS[0], "bulk_port": PORTS[1]}


def make_homes(directory: Path, count: int) -> tuple[list[Path], tuple[str, ...]]:
    """A folder for each node, with its key in it; and the public keys."""
    homes = [home_of(directory, rank) for rank in range(count)]
    for home in homes:
        home.mkdir()
    return homes, tuple(write_key_file(home / "node.key").id for home in homes)


def home_of(directory: Path, rank: int) -> Path:
    return directory / f"node-{rank}"


async def start_node(
    stack: AsyncExitStack,
    home: Path,
    run: Mapping[str, Any],
    node: Mapping[str, object],
    before: Child | None = None,
    command: Callable[[list[str]], list[str]] = lambda words: words,
) -> Child:
    """A process that runs as long as ``stack``, named like its folder ``home``, with a thread and few words.

    ``run``, ``node``: settings; those of the node are beside, or instead of, these. ``before``, ``command``: see
    :func:`~prime_async.node.children.node_process`. Makes ``home`` and the key if they are not there.
    """
    config = _config(home, run, node)
    return await stack.enter_async_context(node_process(config, home, lambda: None, before, command))


def still_here(node: Child) -> None:
    """Raises :class:`EnvironmentFault`, with its last words, if the process of ``node`` has ended."""
    if node.has_ended:
        raise EnvironmentFault(f"node {node.name} ended:\n{node.error_output}")


def _config(home: Path, run: Mapping[str, Any], node: Mapping[str, object]) -> Config:
    key = home / "node.key"
    home.mkdir(exist_ok=True)
    if not key.exists():
        write_key_file(key)
    usual = {
        "name": home.name,
        "key": str(key),
        "directory": str(home),
        "allow": ["any"],
        "threads": 1,
        "evaluate_every": 0,
        "log_level": "warning",
    }
    return config_from({"run": run, "node": {**usual, **node}})
