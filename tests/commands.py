"""The command, as a user runs it, in a process; and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIMIT_S = 240.0
SMALL = (
    "--set=run.sequence_length=32",
    "--set=run.inner.batch_size=2",
    "--set=run.inner.warmup_steps=2",
    "--set=run.round.inner_steps=3",
    "--set=run.exchange.chunk_elements=65536",
    "--set=node.host=127.0.0.1",
    "--set=node.advertise=127.0.0.1",
    "--set=node.port=0",
    "--set=node.bulk_port=0",
    "--set=node.threads=1",
)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "prime_async", *map(str, arguments)]


def run(*arguments: str | Path, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=LIMIT_S, check=False, **options)
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


PIPED: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}


def lines_of(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def wait_for(lines: Iterator[dict[str, Any]], kind: str) -> dict[str, Any]:
    for item in lines:
        if item["type"] == kind:
            return item
    raise AssertionError(f"the node ended without {kind}")
