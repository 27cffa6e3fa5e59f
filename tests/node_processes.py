"""Nodes as processes of their own, ``prime-async run`` on a TOML file, on loopback or in hosts of the network lab."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
import trio

from prime_async.bench.netlab import Lab, address
from prime_async.bench.nodes import PORTS
from prime_async.config.load import config_from
from prime_async.config.schema import RunSpec
from prime_async.config.template import node_toml
from prime_async.log import read_log
from prime_async.machines.vocabulary import Captured, Merged, StepsDone
from prime_async.transport.keys import read_key_file, write_key_file
from tests.processes import ROOT

if TYPE_CHECKING:
    from torch import nn

    from prime_async.config.schema import RunSpec

PATIENCE_S: Final = 120.0
"""How long a test waits for what must happen."""

SMALL_RUN: Final[Mapping[str, Any]] = {
    "name": "node-processes",
    "sequence_length": 32,
    "inner": {"batch_size": 2, "warmup_steps": 2},
    "round": {"inner_steps": 3},
    "exchange": {"chunk_elements": 65536},
}
"""Settings of a run whose rounds take a second."""

PACE_S: Final = 0.1
PACED_RUN: Final[Mapping[str, Any]] = {
    "model": "tests.node_processes:paced_model",
    "round": {"inner_steps": 4},
    "exchange": {"chunk_elements": 16384},
}
"""Changes to it: inner steps that take time and no CPU, so that many nodes keep their pace on few cores; 8 chunks."""

MODES: Final[Mapping[str, Mapping[str, Any]]] = {
    "blocking": {"mode": "blocking"},
    "overlapped": {"mode": "overlapped"},
    "streaming": {"mode": "streaming", "fragments": 2, "round": {"inner_steps": 8}},
    "eager": {"mode": "eager"},
}
"""Changes to that. Rounds last equally long in all of them."""


def modes(*usual: str) -> list[Any]:
    """All modes, as parameters of a test; all but the ``usual`` ones are long."""

    return [pytest.param(mode, marks=() if mode in usual else pytest.mark.long) for mode in MODES]


def pairs(usual: Collection[tuple[str, str]], others: Iterable[str]) -> list[Any]:
    """Each of ``others`` in each mode, as parameters of a test; all but the ``usual`` pairs are long."""

    every = itertools.product(others, MODES)
    return [pytest.param(*pair, marks=() if pair in usual else pytest.mark.long) for pair in every]


def paced_model(run: RunSpec, vocab_size: int) -> nn.Module:
    """131,072 parameters for the 256 byte tokens. An inner step lasts ``PACE_S``, which it sleeps."""

    torch.manual_seed(run.seed)
    width = 256
    model = torch.nn.Sequential(torch.nn.Embedding(vocab_size, width), torch.nn.Linear(width, vocab_size, bias=False))
    model.register_forward_pre_hook(lambda module, _: time.sleep(PACE_S) if module.training else None)
    return model


class NodeProcess:
    """One node process, and what it has told so far. ``host``: in the lab."""

    def __init__(self, name: str, host: int, directory: Path, process: trio.Process, run: RunSpec) -> None:
        self.name = name
        self.run = run
        self.host = host
        self.directory = directory
        self.process = process
        self.id = read_key_file(directory / "node.key").id
        self.contact = ""  # KEY@HOST:PORT, once it listens
        self.facts: list[tuple[float, dict[str, Any]]] = []  # (when, as `--events` prints it), on trio's clock
        self.has_ended = False
        self._changed = trio.Event()

    def told(self, kind: str, **fields: object) -> list[dict[str, Any]]:
        """The facts of one kind with these fields, the first one first."""
        return [fact for _, fact in self.facts if fact["type"] == kind and fields.items() <= fact.items()]

    async def until(self, condition: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
        """Wait until ``condition`` holds, which is looked at whenever the node tells something."""
        with trio.move_on_after(limit_s) as scope:
            while not condition():
                if self.has_ended:
                    raise AssertionError(f"{self.name} ended before that. Its last words:\n{self.last_words}")
                await self._changed.wait()
        assert not scope.cancelled_caught, f"{self.name} did not get there in {limit_s} s:\n{self.last_words}"

    async def next(self, kind: str, limit_s: float = PATIENCE_S, **fields: object) -> dict[str, Any]:
        """The first fact of this kind with these fields that it tells from now on."""
        before = len(self.told(kind, **fields))
        await self.until(lambda: len(self.told(kind, **fields)) > before, limit_s)
        return self.told(kind, **fields)[before]

    async def rounds(self, count: int, limit_s: float = PATIENCE_S) -> None:
        """Wait until it has finished ``count`` rounds more."""
        done = len(self.told("round_finished"))
        await self.until(lambda: len(self.told("round_finished")) >= done + count, limit_s)

    def pause(self) -> None:
        """It stands still, with all its threads and sockets, until :meth:`resume`."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        """It is gone, without a word."""
        self.process.kill()
        await self.process.wait()

    async def leave(self, limit_s: float = PATIENCE_S) -> int:
        """Ask it to leave well, and wait until it has. Gives its exit status."""
        self.process.send_signal(signal.SIGTERM)
        with trio.fail_after(limit_s):
            return await self.process.wait()

    @property
    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join((self.directory / "node.log").read_text(errors="replace").splitlines()[-20:])

    async def listen(self) -> None:
        """Read what it tells, until it ends."""
        assert self.process.stdout is not None
        buffer = b""
        async for data in self.process.stdout:
            *lines, buffer = (buffer + data).split(b"\n")
            now = trio.current_time()
            self.facts += [(now, json.loads(line)) for line in lines]
            self._tell()
        self.has_ended = True
        self._tell()

    def _tell(self) -> None:
        for fact in self.told("started"):
            self.contact = fact["contact"]
        self._changed.set()
        self._changed = trio.Event()


class Nodes:
    """The node processes of one test. Each has a folder of its own name in ``directory``."""

    def __init__(self, directory: Path, run: Mapping[str, Any], lab: Lab | None, nursery: trio.Nursery) -> None:
        self.started: list[NodeProcess] = []
        self._directory = directory
        self._run = run
        self._lab = lab
        self._nursery = nursery

    async def start(
        self,
        name: str,
        host: int = 0,
        *,
        join: NodeProcess | None = None,
        run: Mapping[str, Any] | None = None,
        **node: Any,
    ) -> NodeProcess:
        """Start a node, for the first time or again, and wait until it listens.

        It joins ``join``, or else the first that was started, or founds the run. ``run`` and ``node``: settings that
        differ from those of the others.
        """
        home = self._directory / name
        home.mkdir(exist_ok=True)
        if not (home / "node.key").exists():
            write_key_file(home / "node.key")
        contact = join or next((known for known in self.started if known.name != name), None)
        settings = self._node_settings(name, host, home, [] if contact is None else [contact.contact])
        config = config_from({"run": merged(self._run, run or {}), "node": merged(settings, node)})
        (home / "node.toml").write_text(node_toml(config), encoding="utf-8")
        process = await self._open(host, home)
        started = NodeProcess(name, host, home, process, config.run)
        self.started.append(started)
        self._nursery.start_soon(started.listen)
        await started.until(lambda: bool(started.contact))
        return started

    async def kill_all(self) -> None:
        for node in self.started:
            await node.kill()

    def _node_settings(self, name: str, host: int, home: Path, join: list[str]) -> dict[str, Any]:
        here = "127.0.0.1" if self._lab is None else address(host)
        control, bulk = (0, 0) if self._lab is None else PORTS
        return {
            "name": name,
            "key": str(home / "node.key"),
            "directory": str(home / "state"),
            "host": here,
            "advertise": here,
            "port": control,
            "bulk_port": bulk,
            "join": join,
            "allow": ["any"],
            "threads": 1,
        }

    async def _open(self, host: int, home: Path) -> trio.Process:
        words = [sys.executable, "-m", "prime_async", "run", str(home / "node.toml"), "--events", "--stop-on-eof"]
        command = words if self._lab is None else self._lab.command(host, words)
        with (home / "node.log").open("ab") as log:
            return await trio.lowlevel.open_process(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, start_new_session=True
            )


@asynccontextmanager
async def node_processes(
    directory: Path, run: Mapping[str, Any] | None = None, lab: Lab | None = None
) -> AsyncIterator[Nodes]:
    """Start nodes with :meth:`Nodes.start`; those that still run at the end of the block are killed.

    ``run``: settings of the run, over those of ``SMALL_RUN``. ``lab``: where nodes run in its hosts.
    """
    async with trio.open_nursery() as nursery:
        nodes = Nodes(directory, merged(SMALL_RUN, run or {}), lab, nursery)
        try:
            yield nodes
        finally:
            with trio.CancelScope(shield=True):
                await nodes.kill_all()
            nursery.cancel_scope.cancel()


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with ``changes``, table by table."""
    result = dict(settings)
    for name, value in changes.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def assert_digests_are_equal(nodes: Iterable[NodeProcess]) -> None:
    """No two nodes have ever had different weights after the same round."""
    digests: dict[int, str] = {}
    for node in nodes:
        for fact in node.told("round_finished"):
            known = digests.setdefault(fact["round"], fact["state_digest"])
            assert fact["state_digest"] == known, f"{node.name} differs after round {fact['round']}"


def assert_no_step_is_lost(node: NodeProcess) -> None:
    """Whenever its work counts in a round, all of it does that it had done up to its contribution.

    What it did since is less than another contribution; in mode blocking, nothing. Each fragment counts all of it.
    """
    allowed = node.run.steps_per_round if node.run.overlaps else 0
    done = 0
    counted = [0] * node.run.fragment_count
    steps_at = {0: 0}  # tokens done -> inner steps done
    for _, fact in node.facts:
        if fact["type"] == "inner_step_done":
            done += fact["tokens"]
            steps_at[done] = len(steps_at)
        elif fact["type"] == "round_finished" and fact["tokens"]:
            fragment = fact["round"] % len(counted)
            counted[fragment] += fact["tokens"]
            since = steps_at[done] - steps_at[counted[fragment]]
            assert since <= allowed, f"{node.name} after round {fact['round']}"


def delays_in(path: Path) -> Iterator[tuple[int, int]]:
    steps = 0
    for record in read_log(path).records:
        match record.event:
            case Captured():
                steps = 0
            case StepsDone(steps=more):
                steps += more
            case Merged(round=round):
                yield round, steps
