"""Processes of a benchmark, started, listened to, and never left behind.

A worker's standard input is a pipe of the benchmark's; it ends when that does. What it has to report is the last line
of its standard output.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from prime_async.actors.groups import single_errors
from prime_async.errors import EnvironmentFault

GRACE_S = 5.0
"""How long a worker has to end by itself before it is killed."""


@dataclass(frozen=True, slots=True)
class Worker:
    """The benchmark's side of one process. ``log``: its standard error."""

    rank: int
    process: trio.Process
    log: Path


@asynccontextmanager
async def worker_process(
    rank: int, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Worker]:
    """A process that ends with the block, and with us, as do those that it started. ``environment``: beside our own."""
    with log.open("wb") as stderr:
        process = await trio.lowlevel.open_process(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C is ours to pass on
            env={**os.environ, **(environment or {})},
        )
    try:
        yield Worker(rank, process, log)
    finally:
        with trio.CancelScope(shield=True):
            assert process.stdin is not None
            await process.stdin.aclose()
            with trio.move_on_after(GRACE_S):
                await process.wait()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            await process.wait()


async def reports_of(workers: Sequence[Worker], on_line: Callable[[int, bytes], None] = lambda *_: None) -> list[bytes]:
    """The last line that each has written, when all have ended. ``on_line`` gets the rank and every line as it comes.

    Raises :class:`EnvironmentFault`, with the last words of the worker, if one ends badly.
    """
    reports: dict[int, bytes] = {}
    with single_errors():
        async with trio.open_nursery() as nursery:
            for worker in workers:
                nursery.start_soon(_read_report, worker, on_line, reports)
    return [reports[worker.rank] for worker in workers]


async def _read_report(worker: Worker, on_line: Callable[[int, bytes], None], reports: dict[int, bytes]) -> None:
    assert worker.process.stdout is not None
    begun = b""
    async for data in worker.process.stdout:
        *lines, begun = (begun + data).split(b"\n")
        for line in filter(None, lines):
            reports[worker.rank] = line
            on_line(worker.rank, line)
    code = await worker.process.wait()
    if code != 0 or worker.rank not in reports:
        raise EnvironmentFault(
            f"process {worker.rank} of the benchmark ended with exit status {code}. Its last words:\n{_end(worker.log)}"
        )


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


# --- the worker's side ----------------------------------------------------------------------------------------------


def begin_worker() -> None:
    """Warnings go to stderr, and this process ends with whoever started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger("warning"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def keep_stdout() -> int:
    """The pipe to the benchmark, for :func:`report`; what others print goes to stderr from now on.

    Processes that are forked do not have it: it ends with this one.
    """
    pipe = os.dup(1)
    os.dup2(2, 1)
    os.register_at_fork(after_in_child=lambda: os.close(pipe))
    return pipe


def report(line: bytes, pipe: int = 1) -> None:
    """Write one line, at once, on a line of its own whatever others wrote before."""
    sys.stdout.flush()
    with open(pipe, "wb", closefd=False) as out:
        out.write(b"\n" + line + b"\n")


def _end_with_parent() -> None:
    """stdin ends when whoever started us does. At once: a collective cannot be cancelled."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # what we started, too
    os._exit(1)
