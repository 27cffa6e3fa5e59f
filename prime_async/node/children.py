"""Node processes that a command starts, listens to, and never leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from prime_async.actors.groups import single_errors
from prime_async.config.schema import Config
from prime_async.config.template import node_toml
from prime_async.errors import EnvironmentFault
from prime_async.machines.facts import Fact, RoundFinished
from prime_async.node.meter import Meter

F = TypeVar("F")
GRACE_S = 8.0
"""How long a process has to end by itself before it is killed."""

PATIENCE_S = 15.0
"""How long one that was started again may still be on its way when the others are done."""


@dataclass(slots=True)
class Child:
    """One node process, and what it has told so far.

    The meter, and what was sent, go on from those of the process ``before`` it, if a node was started again.
    """

    name: str
    directory: Path
    process: trio.Process
    meter: Meter = field(default_factory=Meter)
    contact: str = ""
    parameters: int = 0
    sent_before: int = 0
    tokens_before: int = 0
    bytes_sent: int = 0
    state: str = "starting"
    has_ended: bool = False  # it tells no more
    started: trio.Event = field(default_factory=trio.Event)
    facts: list[Fact] = field(default_factory=list)
    lost_tokens: int = 0  # when it last finished a round: what it had trained on that no round counts
    _changed: trio.Event = field(default_factory=trio.Event)

    def take(self, item: dict[str, Any]) -> None:
        """One line of its output."""
        match item["type"]:
            case "started":
                self.contact, self.parameters, self.state = item["contact"], item["parameters"], "joining"
                self.started.set()
            case "traffic":
                self.bytes_sent = self.sent_before + item["sent"]
            case _:
                fact: Fact = msgspec.convert(item, Fact)
                self.meter.add(fact, trio.current_time())
                self.state = STATES.get(item["type"], self.state)
                if item["type"] != "inner_step_done":
                    self.facts.append(fact)
                if isinstance(fact, RoundFinished):
                    self.lost_tokens = (
                        self.meter.tokens - self.tokens_before - sum(f.tokens for f in self.told(RoundFinished))
                    )

    def told(self, kind: type[F]) -> list[F]:
        """The facts of one kind, the first one first. (Of inner steps, only the meter is kept.)"""
        return [fact for fact in self.facts if isinstance(fact, kind)]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds, which is looked at whenever the node tells something."""
        while not condition():
            await self._changed.wait()

    def tell(self) -> None:
        """There is something new."""
        self._changed.set()
        self._changed = trio.Event()

    @property
    def error_output(self) -> str:
        """The end of what it wrote to stderr."""
        return "\n".join(_log_path(self.directory).read_text(errors="replace").splitlines()[-20:])


STATES = {
    "inner_step_done": "training",
    "waiting_for_members": "waiting",
    "round_planned": "exchanging",
    "round_finished": "training",
    "evaluation_started": "evaluating",
    "state_saved": "leaving",
}


def _log_path(directory: Path) -> Path:
    return directory / "node.log"


@asynccontextmanager
async def node_process(
    config: Config,
    directory: Path,
    on_change: Callable[[], None],
    before: Child | None = None,
    command: Callable[[list[str]], list[str]] = lambda words: words,
) -> AsyncIterator[Child]:
    """Run ``prime-async run`` on ``config``, written to ``directory``, for as long as the block lasts.

    The process ends with the block, whatever ends that: its stdin is closed, which stops the node at once, and if that
    is not enough it is killed. If we are killed ourselves, the system closes its stdin. ``before``: a process of the
    same node that has ended. ``command``: the command line that runs another elsewhere.
    """
    path = directory / "node.toml"
    path.write_text(node_toml(config), encoding="utf-8")
    with _log_path(directory).open("ab" if before else "wb") as log:
        process = await trio.lowlevel.open_process(
            command([sys.executable, "-m", "prime_async", "run", str(path), "--events", "--stop-on-eof"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
    child = Child(config.node.name, directory, process)
    if before is not None:
        child.meter, child.tokens_before = before.meter, before.meter.tokens
        child.sent_before = child.bytes_sent = before.bytes_sent
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
        child.tell()
        on_change()
    child.has_ended = True
    child.tell()


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


async def wait_for_all(children: Sequence[Child], late: Child | None = None) -> None:
    """Until all have ended well; ``late``, which may never come to an end, is waited for a little longer than them."""
    with single_errors():
        async with trio.open_nursery() as nursery:
            for child in children:
                if child is not late:
                    nursery.start_soon(wait_for, child)
    if late is not None:
        with trio.move_on_after(PATIENCE_S):
            await wait_for(late)


async def wait_started(child: Child) -> None:
    """Until the node listens. Raises :class:`EnvironmentFault` if it ends before."""
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await wait_for(child)
            raise EnvironmentFault(f"node {child.name} ended before it listened:\n{child.error_output}")

        nursery.start_soon(watch)
        await child.started.wait()
        nursery.cancel_scope.cancel()
