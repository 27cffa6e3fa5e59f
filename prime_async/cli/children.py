"""Node processes that a command starts, listens to, and never leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio

from prime_async.config.schema import Config
from prime_async.config.template import node_toml
from prime_async.errors import EnvironmentFault
from prime_async.machines.facts import Fact
from prime_async.node.meter import Meter

GRACE_S = 8.0
"""How long a process has to end by itself before it is killed."""


@dataclass(slots=True)
class Child:
    """One node process, and what it has told so far."""

    name: str
    directory: Path
    process: trio.Process
    meter: Meter = field(default_factory=Meter)
    contact: str = ""
    parameters: int = 0
    bytes_sent: int = 0
    state: str = "starting"
    started: trio.Event = field(default_factory=trio.Event)
    facts: list[Fact] = field(default_factory=list)

    def take(self, item: dict[str, Any]) -> None:
        """One line of its output."""
        match item["type"]:
            case "started":
                self.contact, self.parameters, self.state = item["contact"], item["parameters"], "joining"
                self.started.set()
            case "traffic":
                self.bytes_sent = item["sent"]
            case _:
                fact: Fact = msgspec.convert(item, Fact)
                self.meter.add(fact, trio.current_time())
                self.state = STATES.get(item["type"], self.state)
                if item["type"] != "inner_step_done":
                    self.facts.append(fact)

    @property
    def error_output(self) -> str:
        """The end of what it wrote to stderr."""
        return "\n".join(_log_path(self.directory).read_text(errors="replace").splitlines()[-20:])


STATES = {
    "inner_step_done": "training",
    "waiting_for_members": "waiting",
    "round_planned": "exchanging",
    "round_finished": "training",
    "held_out_loss": "evaluating",
    "state_saved": "leaving",
}


def _log_path(directory: Path) -> Path:
    return directory / "node.log"


@asynccontextmanager
async def node_process(config: Config, directory: Path, on_change: Callable[[], None]) -> AsyncIterator[Child]:
    """Run ``prime-async run`` on ``config``, written to ``directory``, for as long as the block lasts.

    The process ends with the block, whatever ends that: its stdin is closed, which stops the node at once, and if that
    is not enough it is killed. If we are killed ourselves, the system closes its stdin.
    """
    path = directory / "node.toml"
    path.write_text(node_toml(config), encoding="utf-8")
    with _log_path(directory).open("wb") as log:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "prime_async", "run", str(path), "--events", "--stop-on-eof"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
    child = Child(config.node.name, directory, process)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_listen, child, on_change)
            yield child
            nursery.cancel_scope.cancel()
    finally:
        await _end(process)


async def _listen(child: Child, on_change: Callable[[], None]) -> None:
    assert child.process.stdout is not None
    buffer = b""
    async for data in child.process.stdout:
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            child.take(json.loads(line))
        on_change()


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        assert process.stdin is not None
        await process.stdin.aclose()
        with trio.move_on_after(GRACE_S):
            await process.wait()
        if process.poll() is None:
            process.kill()
            await process.wait()


async def wait_for(child: Child) -> None:
    """Until the process has ended well. Raises :class:`EnvironmentFault` with its last words if it did not."""
    code = await child.process.wait()
    if code != 0:
        raise EnvironmentFault(
            f"node {child.name} ended with exit status {code}. Its last words:\n{child.error_output}"
        )
    child.state = "done"


async def wait_started(child: Child) -> None:
    """Until the node listens. Raises :class:`EnvironmentFault` if it ends before."""
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await wait_for(child)
            raise EnvironmentFault(f"node {child.name} ended before it listened:\n{child.error_output}")

        nursery.start_soon(watch)
        await child.started.wait()
        nursery.cancel_scope.cancel()
