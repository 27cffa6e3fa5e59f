"""The heap of events, and the one place where machines are called."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from prime_async.machines.vocabulary import ActorName, Effect, Event, Tick
from prime_async.testing.host import SimNode

Observer: TypeAlias = Callable[[SimNode, ActorName, Event, list[Effect]], None]
Record: TypeAlias = tuple[str, ActorName, float, Event, tuple[Effect, ...]]
"""Node, machine, time, event, effects."""

RUNAWAY = 100_000
"""Things that happen without time going on."""


class Kernel:
    """Virtual time. What happens at one time happens in the order in which it was asked for.

    Everything in the heap is a bound method with its arguments, never a closure: a simulation can be pickled, and
    gone on with from there as often as one likes. ``trace`` is filled once it is a deque.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now = 0.0
        self.events = 0
        self.random = random.Random(seed)
        self.observers: list[Observer] = []
        self.trace: deque[Record] | None = None
        self.perform: Callable[[SimNode, ActorName, Effect], None]
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._tie = 0
        self._at_once = 0  # things that happened without time going on

    def later(self, delay_s: float, function: Callable[..., None], *args: object) -> None:
        """Call ``function`` after ``delay_s``."""
        self._tie += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._tie, function, args))

    def step(self, until: float) -> bool:
        """Go on to the next thing that happens. ``False``: there is none up to ``until``."""
        if not self._heap or self._heap[0][0] > until:
            return False
        at, _, function, args = heapq.heappop(self._heap)
        self._at_once = 0 if at > self.now else self._at_once + 1
        if self._at_once > RUNAWAY:
            raise AssertionError(f"the machines never rest: {function} {args}; seed {self.seed}, at {at:.3f} s")
        self.now = at
        function(*args)
        return True

    def on(self, node: SimNode, function: Callable[..., None], *args: object) -> None:
        """Call ``function`` at ``node`` now, or when it is run again."""
        if not node.alive:
            return
        if node.paused:
            node.backlog.append((function, args))
        else:
            function(*args)

    def post(self, node: SimNode, actor: ActorName, event: Event, delay_s: float = 0.0) -> None:
        self.later(delay_s, self.give, node, actor, event)

    def give(self, node: SimNode, actor: ActorName, event: Event) -> None:
        """Give an event to a machine, and have its effects performed."""
        if not node.running:
            return
        if node.paused:
            node.backlog.append((self.give, (node, actor, event)))
            return
        self.events += 1
        try:
            effects = node.machines[actor].handle(self.now, event)
        except Exception as error:
            error.add_note(f"seed {self.seed}, at {self.now:.3f} s: {actor} of {node.id} was given {event!r}")
            raise
        if self.trace is not None:
            self.trace.append((node.id, actor, self.now, event, tuple(effects)))
        for observer in self.observers:
            observer(node, actor, event, effects)
        for effect in effects:
            self.perform(node, actor, effect)

    # --- the clocks of the machines -----------------------------------------------------------------------------

    def wake_at(self, node: SimNode, actor: ActorName, at: float) -> None:
        node.wake[actor] = at
        self.later(max(0.0, at - self.now), self._tick, node, actor, at)

    def _tick(self, node: SimNode, actor: ActorName, at: float) -> None:
        if not node.paused and node.wake.get(actor) == at:
            del node.wake[actor]
            self.give(node, actor, Tick())

    def go_on(self, node: SimNode) -> None:
        """Run a paused node again: what came for it first, then its clocks."""
        node.paused = False
        backlog, node.backlog = node.backlog, []
        for function, args in backlog:
            self.later(0.0, self.on, node, function, *args)
        for actor, at in list(node.wake.items()):
            if at <= self.now:
                self.later(0.0, self._tick, node, actor, at)
