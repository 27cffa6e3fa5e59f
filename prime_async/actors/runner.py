"""The one caller of ``handle``: it gives a machine its events, one at a time, and has its effects performed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from prime_async.machines.facts import Fact
from prime_async.machines.vocabulary import ActorName, Effect, Event, Machine, Report, Tell, Tick, WakeAt

INBOX_EVENTS = 16_384
OFFERED_EVENTS = INBOX_EVENTS // 2
"""From here on what peers say is dropped: the rest is for this node's own events."""


class Recorder(Protocol):
    """Where the calls of machines are written down."""

    def record(self, actor: ActorName, seq: int, now: float, event: Event, effects: Sequence[Effect]) -> None:
        """Write down one call."""
        ...


class Runner:
    """Runs one machine.

    ``perform`` is called with every effect that is not the runner's own business (``WakeAt``, ``Tell``, ``Report``);
    it returns at once: what takes time it starts as a task that posts its outcome back.
    """

    def __init__(
        self,
        name: ActorName,
        machine: Machine,
        *,
        tell: Callable[[ActorName, Event], None],
        report: Callable[[Fact], None],
        recorder: Recorder | None = None,
    ) -> None:
        self.name = name
        self._machine = machine
        self._tell = tell
        self._report = report
        self._recorder = recorder
        self._inbox: deque[Event] = deque()
        self._something = trio.Event()
        self._wake_at = math.inf
        self._seq = 0

    def post(self, event: Event) -> None:
        """Give the machine an event of this node's own. Never lost, so it must be bounded by what is under way.

        Raises ``RuntimeError`` when the inbox is full: then something produces events without end, which is a bug.
        """
        if len(self._inbox) >= INBOX_EVENTS:
            raise RuntimeError(f"{self.name}: more than {INBOX_EVENTS} events wait; the last is {event!r}")
        self._inbox.append(event)
        self._something.set()

    def offer(self, event: Event) -> bool:
        """Give the machine an event that may be lost, such as a message from a peer. ``False``: the inbox is full."""
        if len(self._inbox) >= OFFERED_EVENTS:
            return False
        self.post(event)
        return True

    def retract(self, which: Callable[[Event], bool]) -> None:
        """Take back the events that wait for which ``which`` holds: the machine has given up what they come of."""
        self._inbox = deque(event for event in self._inbox if not which(event))

    async def run(self, perform: Callable[[Effect], None]) -> None:
        """Run until cancelled. Events that wait are handled before the clock: a late node listens first."""
        while True:
            if not self._inbox:
                self._something = trio.Event()
                with trio.move_on_at(self._wake_at):
                    await self._something.wait()
            now = trio.current_time()
            if self._inbox:
                self._step(now, self._inbox.popleft(), perform)
                await trio.lowlevel.checkpoint()
            elif now >= self._wake_at:
                self._wake_at = math.inf
                self._step(now, Tick(), perform)

    def _step(self, now: float, event: Event, perform: Callable[[Effect], None]) -> None:
        effects = self._machine.handle(now, event)
        if self._recorder is not None:
            self._recorder.record(self.name, self._seq, now, event, effects)
        self._seq += 1
        for effect in effects:
            match effect:
                case WakeAt(at=at):
                    self._wake_at = at
                case Tell(actor=actor, event=told):
                    self._tell(actor, told)
                case Report(fact=fact):
                    self._report(fact)
                case _:
                    perform(effect)
