"""The pytest plugin: the fixture ``replay_log``, and ``--record-failures``.

Every pytest of an environment in which prime-async is installed loads it. So it imports nothing of it, and does nothing
in a test, until it is used.

``replay_log(path)`` replays a message log, and fails the test where the machines answer otherwise than recorded. With
``--prime-async-record-failures DIRECTORY`` (or ``--record-failures``, unless another plugin has that) the nodes that a
test opens in pytest's process write their message logs to ``DIRECTORY/TEST/NODE.log``, if their configuration names no
file. Those of a test that fails are kept, and its report says where; the others are deleted after the test.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from prime_async.config.schema import Config
    from prime_async.log import ReplayedStep
    from prime_async.machines.own import OwnActor

OPTION = "--prime-async-record-failures"
ALIAS = "--record-failures"
HELP = "keep the message logs of the prime-async nodes of failing tests in this directory"
DEST = "prime_async_record_failures"
LONGEST = 120
"""Characters of a test's folder, of the end of its name: file systems take 255 bytes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option; under its short name too, if no other plugin has taken that."""
    group = parser.getgroup("prime-async")
    try:
        group.addoption(OPTION, ALIAS, dest=DEST, metavar="DIRECTORY", default=None, help=HELP)
    except (ValueError, argparse.ArgumentError):
        group.addoption(OPTION, dest=DEST, metavar="DIRECTORY", default=None, help=HELP)


def pytest_configure(config: pytest.Config) -> None:
    """Record only where that was asked for."""
    directory = config.getoption(DEST)
    if directory is not None:
        config.pluginmanager.register(RecordFailures(config.invocation_params.dir / directory), "prime-async-recorder")


class ReplayLog(Protocol):
    """What the fixture ``replay_log`` gives."""

    def __call__(self, path: str | Path, actors: Sequence[OwnActor] = ()) -> tuple[ReplayedStep, ...]:
        """See :func:`replay_log`."""
        ...


@pytest.fixture
def replay_log() -> ReplayLog:
    """Call it with the path of a message log: the log is replayed, and all its events are given with their effects.

    ``actors``: those of your own that the log has events of, as they were given to ``open_node``. If a machine answers
    otherwise than recorded the test fails, with the number of the event, and what the machine was given, was expected
    to answer, and answers, in words. So it does if the file is not a log, or has no event.
    """

    def replay_or_fail(path: str | Path, actors: Sequence[OwnActor] = ()) -> tuple[ReplayedStep, ...]:
        __tracebackhide__ = True
        from prime_async.errors import PrimeAsyncError
        from prime_async.log import read_log, replay

        try:
            steps = tuple(replay(read_log(Path(path)), actors))
        except PrimeAsyncError as error:
            pytest.fail(str(error) if str(path) in str(error) else f"{path}: {error}", pytrace=False)
        if not steps:
            pytest.fail(f"{path}: no event is in this log: record a node that has run", pytrace=False)
        return steps

    return replay_or_fail


class RecordFailures:
    """Gives each test a folder for the logs of its nodes, and deletes it if the test passes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._logs: list[Path] = []  # of the test that runs
        self._failed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """From the test's first fixture to its last."""
        folder = self._directory / re.sub(r"[^\w.-]+", "-", item.nodeid)[-LONGEST:].strip("-")
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run of the same test
        self._logs, self._failed = [], False
        with self._recording(folder):
            result = yield
        if not self._failed:
            shutil.rmtree(folder, ignore_errors=True)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        """Say in the report of a failure where the logs are."""
        report: pytest.TestReport = yield  # type: ignore[assignment]
        if report.failed:
            self._failed = True
            logs = [f"{path}\n  see it with: prime-async replay {path} --show" for path in self._logs]
            if logs:
                report.sections.append(("message logs of prime-async nodes", "\n".join(logs)))
        return report  # type: ignore[return-value]

    @contextmanager
    def _recording(self, folder: Path) -> Iterator[None]:
        """Nodes that are opened meanwhile record."""
        from prime_async.node import participant
        from prime_async.node.build import record_path as configured

        def record_path(config: Config, node_id: str) -> Path | None:
            path = configured(config, node_id) or _free(folder, config.node.name or node_id[:8])
            self._logs.append(path)
            return path

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(participant, "record_path", record_path)
            yield


def _free(folder: Path, name: str) -> Path:
    """Where no log is yet: a node may be opened again, and several may have one name."""
    folder.mkdir(parents=True, exist_ok=True)
    safe = re.sub(r"[^\w.-]+", "-", name)
    candidates = (folder / f"{safe}{suffix}.log" for suffix in ("", *(f"-{n}" for n in range(2, 10_000))))
    path = next(path for path in candidates if not path.exists())
    path.touch()
    return path
