"""Whole nodes over the real network, on loopback: their configurations, keys, and a vector to average."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prime_async.config.load import config_from
from prime_async.config.schema import Config
from prime_async.transport.keys import write_key_file
from prime_async.work.buffer_workload import BufferWorkload
from prime_async.work.codec import make_codec
from prime_async.work.workload import StepReport

ELEMENTS, CHUNK = 5000, 1024
STEP_S = 0.05


class SteadyWorkload(BufferWorkload):
    """A buffer whose inner steps take a moment, so that a test can act while rounds go by."""

    def train(self, steps: int, on_step: Any) -> None:
        for i in range(steps):
            time.sleep(STEP_S)  # the work: a joiner takes an outer step in less
            on_step(StepReport(step=i, loss=0.0, tokens=1, seconds=STEP_S))


def workload(seed: int) -> BufferWorkload:
    return SteadyWorkload.random(ELEMENTS, CHUNK, make_codec("int8"), seed)


def configuration(home: Path, name: str, *, join: tuple[str, ...] = (), **run: Any) -> Config:
    """A node on loopback, on free ports, that lets in whom its allowed-keys.txt names."""
    directory = home / name
    directory.mkdir(exist_ok=True)
    if not (directory / "node.key").exists():
        write_key_file(directory / "node.key")
    (directory / "allowed.txt").touch()
    settings = {"name": "test", "heartbeat_s": 0.1, "failure_timeout_s": 3.0, "round": {"inner_steps": 2}}
    return config_from(
        {
            "run": {**settings, "exchange": {"chunk_elements": CHUNK}, **run},
            "node": {
                "name": name,
                "key": str(directory / "node.key"),
                "directory": str(directory),
                "host": "127.0.0.1",
                "advertise": "127.0.0.1",
                "port": 0,
                "bulk_port": 0,
                "join": list(join),
                "allow_file": str(directory / "allowed.txt"),
                "record": str(directory / "messages.log"),
            },
        }
    )


def allow(home: Path, name: str, *keys: str) -> None:
    (home / name / "allowed.txt").write_text("\n".join(keys) + "\n", encoding="utf-8")


def key_of(home: Path, name: str) -> str:
    from prime_async.transport.keys import read_key_file

    return read_key_file(home / name / "node.key").id
