"""From a configuration to what shows the run: the board, its file, the web server, the sinks."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import structlog
import trio

from prime_async.config.schema import Config
from prime_async.config.spec import run_id
from prime_async.errors import ConfigError
from prime_async.machines.facts import Fact
from prime_async.watch.board import Board
from prime_async.watch.history import History
from prime_async.watch.journal import Journal
from prime_async.watch.sinks import Feeder, open_sink

JOURNAL = "history.jsonl"
PACKAGES = ("starlette", "hypercorn", "prometheus_client")

log = structlog.get_logger(__name__)


class Station:
    """Give it every fact. ``run`` it in a nursery: what fails in it ends there, and not in the node."""

    def __init__(self, board: Board, listener: socket.socket | None, feeders: tuple[Feeder, ...]) -> None:
        self.board = board
        self._listener = listener
        self._feeders = feeders
        self._failed = False

    def add(self, fact: Fact) -> None:
        """Never raises: what is shown of a run is no reason to end it."""
        if self._failed:
            return
        try:
            self.board.add(fact)
            for feeder in self._feeders:
                feeder.add(fact)
        except Exception:  # a mistake of ours, whatever it is
            self._failed = True
            log.exception("dashboard_failed")

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            for feeder in self._feeders:
                nursery.start_soon(feeder.run)
            if self._listener is not None:
                from prime_async.watch.app import build_app
                from prime_async.watch.server import serve_until_cancelled, url_of

                log.info("dashboard_at", url=url_of(self._listener))
                nursery.start_soon(self._send)
                nursery.start_soon(serve_until_cancelled, self._listener, build_app(self.board))

    async def _send(self) -> None:
        try:
            await self.board.run()
        except Exception:  # as above
            self._failed = True
            log.exception("dashboard_failed")


@contextmanager
def open_station(config: Config, node_id: str) -> Iterator[Station]:
    """What ``node.dashboard`` and ``node.sinks`` ask for. The address is taken here, before the node begins.

    Raises :class:`ConfigError` if a package is missing, :class:`AddressInUseError` if the address is taken.
    """
    node = config.node
    name = node.name or node_id[:8]
    history = History(node_id, name)
    journal = Journal(node.directory / JOURNAL, history)
    listener = open_listener(config)
    try:
        with suppress(OSError):  # the journal says it, and the ledger ends the node if it has to
            node.directory.mkdir(parents=True, exist_ok=True)
        journal.load()
        steps_before = history.mine.total("inner_steps") if history.mine is not None else 0
        about = _about(config, node_id, name)
        feeders = tuple(
            Feeder(text, partial(open_sink, text, name, about, node.directory), steps_before) for text in node.sinks
        )
        yield Station(Board(journal, about), listener, feeders)
    finally:
        if listener is not None:
            listener.close()


def open_listener(config: Config) -> socket.socket | None:
    """What ``node.dashboard`` listens on, if anything. Raises as :func:`open_station`."""
    if not config.node.dashboard:
        return None
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        packages = ", ".join(missing)
        raise ConfigError([f"node.dashboard: {packages} not installed: `pip install 'prime-async[dashboard]'`"])
    from prime_async.watch.server import listen

    host, _, port = config.node.dashboard.rpartition(":")
    return listen(host.removeprefix("[").removesuffix("]"), int(port))


def _about(config: Config, node_id: str, name: str) -> dict[str, Any]:
    """What everybody may know: names and sizes, no paths, addresses or keys but our public one."""
    run = config.run
    return {
        "run": run.name,
        "run_id": run_id(run).hex(),
        "model": run.model,
        "data": run.data,
        "mode": run.mode,
        "codec": run.exchange.codec,
        "rounds": run.rounds,
        "inner_steps": run.steps_per_round,
        "round_seconds": run.seconds_per_round,
        "failure_timeout_s": run.failure_timeout_s,
        "heartbeat_s": run.heartbeat_s,
        "node": name,
        "node_id": node_id,
        "witness": config.node.witness,
        "version": version("prime-async"),
    }
