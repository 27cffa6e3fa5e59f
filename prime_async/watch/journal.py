"""The file that keeps a node's history of the run over restarts: JSON lines, appended to, and written anew when long.

A line is a fact with its time, or the whole state in the place of all lines before it. A crash can tear the last line:
what is no line is passed over, and gone when the file is written anew, at each start. The file is for this node alone,
and no part of the protocol.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct

from prime_async.machines.facts import Fact
from prime_async.watch.history import History, State

MAX_JOURNAL_BYTES = 8 << 20
FIGURES_EVERY_S = 10.0
"""Figures alone are written down so often: after a restart the curves are as fine as that."""

log = structlog.get_logger(__name__)


class Line(Struct, omit_defaults=True):
    """One of the two."""

    at: float
    fact: Fact | None = None
    state: State | None = None


class Journal:
    """Adds facts to ``history``, and to the file. A disk that is full ends the file, not the node."""

    def __init__(self, path: Path, history: History, max_bytes: int = MAX_JOURNAL_BYTES) -> None:
        self.history = history
        self._path = path
        self._max_bytes = max_bytes
        self._size = 0
        self._kept_at = 0.0
        self._broken = False
        self._encoder = msgspec.json.Encoder()

    def load(self) -> None:
        """Bring back what the file holds. It is written anew: what is torn at its end would spoil the next line."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self._give_up(error)
            return
        passed_over = self._replay(data)
        if passed_over:
            log.warning("run_history_damaged", path=str(self._path), lines=passed_over)
        self.history.take_delta()
        self.history.connected = False
        self._compact()

    def _replay(self, data: bytes) -> int:
        """How many lines of it are none."""
        decoder = msgspec.json.Decoder(Line)
        passed_over = 0
        for text in data.split(b"\n"):
            try:
                line = decoder.decode(text) if text else Line(at=0.0)
            except msgspec.MsgspecError:
                passed_over += 1
                continue
            if line.state is not None:
                self.history.state = line.state
            elif line.fact is not None:
                self.history.add(line.fact, line.at)
        return passed_over

    def add(self, fact: Fact, at: float) -> None:
        """A fact, at a time of day in seconds since 1970."""
        keep = self.history.add(fact, at)
        name = fact.__struct_config__.tag
        if name == "inner_step_done" or (not keep and at < self._kept_at + FIGURES_EVERY_S):
            return
        self._kept_at = at
        self._append(Line(at=round(at, 3), fact=fact))
        if self._size > self._max_bytes:
            self._compact()

    def _append(self, line: Line) -> None:
        if self._broken:
            return
        data = self._encoder.encode(line) + b"\n"
        try:
            with self._path.open("ab") as file:
                file.write(data)
        except OSError as error:
            self._give_up(error)
        self._size += len(data)

    def _compact(self) -> None:
        """Write the state in the place of what led to it."""
        if self._broken:
            return
        data = self._encoder.encode(Line(at=0.0, state=self.history.state)) + b"\n"
        fresh = self._path.with_name(self._path.name + ".new")
        try:
            with fresh.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
        except OSError as error:
            self._give_up(error)
        self._size = len(data)

    def _give_up(self, error: OSError) -> None:
        self._broken = True
        log.error("run_history_not_kept", path=str(self._path), error=error.strerror)
