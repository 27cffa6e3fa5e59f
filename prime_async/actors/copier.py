"""Keeps a remote copy of the ledger up to date, behind the training and never in its way."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

from prime_async.errors import ConfigError, StorageError
from prime_async.ledger import Ledger, RemoteCopy
from prime_async.machines.facts import Fact, RemoteCopied, RemoteCopyFailed
from prime_async.machines.units import to_ms


class Copier:
    """After each snapshot the copy is made anew: the newest snapshots, and the means since the older one of them.

    One push at a time; a snapshot that is written meanwhile is pushed after it. A push that fails is told of, and done
    again after the next snapshot.
    """

    def __init__(self, remote: RemoteCopy, ledger: Ledger, report: Callable[[Fact], None]) -> None:
        self._remote = remote
        self._ledger = ledger
        self._report = report
        self._due = trio.Event()
        self._limiter = trio.CapacityLimiter(1)

    def wake(self) -> None:
        """There is something new to copy."""
        self._due.set()

    async def run(self) -> None:
        """Until cancelled; a push that is under way is finished first."""
        while True:
            await self._due.wait()
            self._due = trio.Event()
            await self.push()

    async def push(self) -> None:
        """Make the copy what the ledger is now."""
        with trio.CancelScope(shield=True):
            fact = await trio.to_thread.run_sync(self._push_now, limiter=self._limiter)
        if fact is not None:
            self._report(fact)

    def _push_now(self) -> Fact | None:
        holdings = self._ledger.holdings
        if not holdings.snapshots:
            return None
        means = [round for round in holdings.means if round >= holdings.snapshots[0]]
        began = time.perf_counter()
        try:
            pushed = self._remote.push(holdings.snapshots, means)
        except (StorageError, ConfigError) as error:
            return RemoteCopyFailed(round=holdings.snapshots[-1], text=str(error)[:1024])
        seconds = to_ms(time.perf_counter() - began)
        return RemoteCopied(round=holdings.snapshots[-1], sent_bytes=pushed.sent_bytes, seconds=seconds)
