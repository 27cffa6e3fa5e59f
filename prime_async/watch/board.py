"""What this node knows of the run, and those who look at it live."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import trio

from prime_async.machines.facts import Fact
from prime_async.watch.history import History
from prime_async.watch.journal import Journal

DELTAS_EVERY_S = 0.5
MAX_VIEWERS = 64
VIEWER_BACKLOG = 32
"""Deltas that wait for a viewer; one that is further behind is let go, and begins anew when it comes again."""


class TooManyViewersError(Exception):
    """More than 64 look at it."""


class Board:
    """The history of the run as this node knows it. ``about``: what never changes, for the page."""

    def __init__(self, journal: Journal, about: Mapping[str, Any]) -> None:
        self.journal = journal
        self.about = dict(about)
        self._viewers: set[trio.MemorySendChannel[str]] = set()

    @property
    def history(self) -> History:
        return self.journal.history

    def add(self, fact: Fact) -> None:
        self.journal.add(fact, time.time())

    def whole(self) -> dict[str, Any]:
        """Everything there is to show."""
        return {"about": self.about, "now": time.time(), **self.history.whole()}

    def status(self) -> dict[str, Any]:
        """Without the curves and rounds."""
        history = self.history
        events = history.whole()["events"][-20:]
        return {
            "about": self.about,
            "now": time.time(),
            "totals": history.totals(),
            "members": history.table(),
            "events": events,
        }

    def readiness(self) -> tuple[bool, str]:
        """Whether this node is an active member that holds the run's state, and why not."""
        mine = self.history.mine
        if not self.history.connected or mine is None:
            return False, "this node hears no leader yet"
        if mine.gone or not mine.active:
            return False, "this node is not active yet: it fetches the run's outer state, or waits for the next round"
        return True, "this node is an active member that holds the run's outer state"

    # --- live ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send what changed to all viewers, twice a second, until cancelled."""
        while True:
            await trio.sleep(DELTAS_EVERY_S)
            delta = self.history.take_delta()
            if delta is not None and self._viewers:
                self._send(json.dumps({"now": time.time(), **delta}))

    def _send(self, text: str) -> None:
        for viewer in tuple(self._viewers):
            try:
                viewer.send_nowait(text)
            except (trio.WouldBlock, trio.BrokenResourceError):
                viewer.close()
                self._viewers.discard(viewer)

    def close(self) -> None:
        """Let all viewers go."""
        for viewer in tuple(self._viewers):
            viewer.close()
        self._viewers.clear()

    @property
    def is_full(self) -> bool:
        return len(self._viewers) >= MAX_VIEWERS

    @contextmanager
    def viewer(self) -> Iterator[trio.MemoryReceiveChannel[str]]:
        """The deltas from now on, as JSON. Raises :class:`TooManyViewersError`."""
        if self.is_full:
            raise TooManyViewersError
        send, receive = trio.open_memory_channel[str](VIEWER_BACKLOG)
        self._viewers.add(send)
        try:
            yield receive
        finally:
            self._viewers.discard(send)
            send.close()
            receive.close()


async def events(board: Board, still_here_s: float = 15.0) -> AsyncIterator[str]:
    """Server-sent events: first the whole, then what changes. https://html.spec.whatwg.org/#server-sent-events"""
    with board.viewer() as deltas:
        yield f"retry: 2000\nevent: whole\ndata: {json.dumps(board.whole())}\n\n"
        while True:
            text = None
            with trio.move_on_after(still_here_s):
                try:
                    text = await deltas.receive()
                except trio.EndOfChannel:
                    return
            yield ": still here\n\n" if text is None else f"event: delta\ndata: {text}\n\n"
