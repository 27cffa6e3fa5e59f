"""``prime-async run``: one node, until it is told to stop or the run ends."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import structlog
import trio

from prime_async.cli.logs import configure_logging
from prime_async.cli.options import Flag, NotNegative
from prime_async.config.load import load_config
from prime_async.config.schema import Config

TRAFFIC_EVERY_S = 0.5
EXIT_AT_ONCE = 130
log = structlog.get_logger(__name__)


def run(
    config: Path,
    /,
    *,
    events: Flag = False,
    stop_on_eof: Flag = False,
    leave_within: NotNegative = math.inf,
) -> int:
    """Run a node.

    SIGINT and SIGTERM finish the round, say goodbye and exit with 0; a second one stops at once. Either way the outer
    state is saved to node.directory, and the next start goes on from it.

    Parameters
    ----------
    config
        The node's TOML file, as `prime-async init` writes it.
    events
        Print every event as a JSON line on stdout.
    stop_on_eof
        Also stop, at once, when stdin ends: then whoever started this node is gone.
    leave_within
        Seconds that a signal waits for the round to end; then the node leaves after the inner step under way. Less than
        what starts the node waits before it kills it: Kubernetes 30, systemd 90, Docker 10 by default.
    """
    settings = load_config(config)
    configure_logging(settings.node.log_format, settings.node.log_level)
    return trio.run(_run, settings, events, stop_on_eof, leave_within)


async def _run(config: Config, events: bool, stop_on_eof: bool, leave_within_s: float) -> int:
    from prime_async.node import open_node

    printer = _Printer() if events else None
    with trio.CancelScope() as scope:
        async with open_node(config) as node, trio.open_nursery() as nursery:
            log.info("node_started", contact=node.contact, directory=str(config.node.directory))
            nursery.start_soon(_stop_on_signals, node, scope, leave_within_s)
            if stop_on_eof:
                nursery.start_soon(_cancel_on_eof, scope)
            if printer is not None:
                await printer.write({"type": "started", "id": node.id, "contact": node.contact, **_parameters(node)})
                nursery.start_soon(_print_traffic, node, printer)
                async for fact in node.events:
                    await printer.write(msgspec.to_builtins(fact))
            await node.wait()
            if printer is not None:
                await printer.write(_traffic(node))
            nursery.cancel_scope.cancel()
    return EXIT_AT_ONCE if scope.cancelled_caught else 0


async def _stop_on_signals(node: Any, scope: trio.CancelScope, leave_within_s: float) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            async for number in signals:
                if node.stopping:
                    log.warning("stopping_at_once", signal=signal.Signals(number).name)
                    scope.cancel()
                    return
                log.info("stopping_after_the_round", signal=signal.Signals(number).name, again="stops at once")
                node.stop()
                nursery.start_soon(_leave_after, node, leave_within_s)


async def _leave_after(node: Any, seconds: float) -> None:
    """The round takes too long: leave without it, and say goodbye."""
    await trio.sleep(seconds)
    log.warning("leaving_before_the_end_of_the_round", after_s=seconds)
    node.stop(at_once=True)


async def _cancel_on_eof(scope: trio.CancelScope) -> None:
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stdin:
        while await stdin.receive_some(4096):
            pass
    scope.cancel()


def _parameters(node: Any) -> dict[str, int]:
    return {"parameters": node.workload.elements}


def _traffic(node: Any) -> dict[str, Any]:
    return {"type": "traffic", "sent": node.traffic.sent, "received": node.traffic.received}


async def _print_traffic(node: Any, printer: _Printer) -> None:
    while True:
        await printer.write(_traffic(node))
        await trio.sleep(TRAFFIC_EVERY_S)


class _Printer:
    """JSON lines on stdout. A reader that is slow, or went away, is no reason to stop training."""

    def __init__(self) -> None:
        self._open = True

    async def write(self, item: dict[str, Any]) -> None:
        """Wait until the line is written, in a thread: the pipe may be full, and the node goes on meanwhile."""
        if self._open:
            line = json.dumps(item).encode() + b"\n"
            await trio.to_thread.run_sync(self._write_now, line, abandon_on_cancel=True)

    def _write_now(self, line: bytes) -> None:
        """Past Python's buffer, whose lock a write that was given up would keep until the end."""
        data = memoryview(line)
        try:
            while data:
                data = data[os.write(sys.stdout.fileno(), data) :]
        except BrokenPipeError:
            self._open = False
