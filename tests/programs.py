"""README's programs: their text, and as processes of members of a group."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from prime_async.config.schema import Config
from prime_async.config.template import node_toml
from prime_async.docs import PAGES
from prime_async.log import read_log, replay
from tests.processes import ROOT

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PROGRAMS = README + (PAGES / "embedding.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", PROGRAMS, re.MULTILINE | re.DOTALL)
    return next(text for text in blocks if containing in text)


class Program:
    """README's program in a process of its own, and what it has printed so far."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.said = ""

    async def until(self, text: str) -> str:
        """The rest of the line in which it says ``text``."""
        assert self.process.stdout is not None
        while not (found := re.search(re.escape(text) + r"(.*)\n", self.said)):
            data = await self.process.stdout.receive_some()
            assert data, f"it ended before it said {text!r}:\n{self.said}"
            self.said += data.decode()
        return found.group(1)


@asynccontextmanager
async def program(home: Path, config: Config, file: str, *arguments: str) -> AsyncIterator[Program]:
    """``file``: of README's, in ``home``. It is killed at the end of the block."""
    path = home / config.node.name / "node.toml"
    path.write_text(node_toml(config), encoding="utf-8")
    process = await trio.lowlevel.open_process(
        [sys.executable, "-u", str(home / file), str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        yield Program(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


def replayed(log: Path) -> int:
    return sum(1 for _ in replay(read_log(log)))
