"""The one caller of ``handle``: order, time, and what happens when events come faster than they are handled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from prime_async.actors.runner import INBOX_EVENTS, OFFERED_EVENTS, Recorder, Runner
from prime_async.machines.facts import Fact, Founded
from prime_async.machines.vocabulary import (
    ActorName,
    Effect,
    Event,
    Fetched,
    FetchFailed,
    Finish,
    Halt,
    Halted,
    Leave,
    Progress,
    Report,
    Tell,
    Tick,
    WakeAt,
)
from tests.machine_harness import info, key


@dataclass
class Scripted:
    """Answers each kind of event with the effects it was told, and notes what it was given."""

    script: dict[type[Event], list[Effect]] = field(default_factory=dict)
    given: list[tuple[float, Event]] = field(default_factory=list)

    def handle(self, now: float, event: Event) -> list[Effect]:
        self.given.append((now, event))
        return self.script.get(type(event), [])

    @property
    def events(self) -> list[Event]:
        return [event for _, event in self.given]


@dataclass
class Notes:
    """Everything that a runner does."""

    performed: list[Effect] = field(default_factory=list)
    told: list[tuple[ActorName, Event]] = field(default_factory=list)
    reported: list[Fact] = field(default_factory=list)
    recorded: list[tuple[ActorName, int, Event, list[Effect]]] = field(default_factory=list)

    def tell(self, actor: ActorName, event: Event) -> None:
        self.told.append((actor, event))

    def record(self, actor: ActorName, seq: int, now: float, event: Event, effects: Sequence[Effect]) -> None:
        assert now >= 0
        self.recorded.append((actor, seq, event, list(effects)))


def make(machine: Scripted, notes: Notes, recorder: Recorder | None = None) -> Runner:
    return Runner("exchange", machine, tell=notes.tell, report=notes.reported.append, recorder=recorder)


@asynccontextmanager
async def running(runner: Runner, perform: Callable[[Effect], None]) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner.run, perform)
        await trio.testing.wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


def steps(count: int) -> list[Event]:
    return [Progress(inner_steps=i) for i in range(count)]


async def test_events_are_handled_one_at_a_time_in_the_order_in_which_they_came() -> None:
    machine, notes = Scripted(), Notes()
    runner = make(machine, notes)
    async with running(runner, notes.performed.append):
        for event in steps(100):
            runner.post(event)
        await trio.testing.wait_all_tasks_blocked()
    assert machine.events == steps(100)


async def test_effects_are_performed_in_order_and_each_by_whom_it_concerns() -> None:
    wishes: list[Effect] = [Finish(), Report(fact=Founded()), Tell(actor="training", event=Halt()), Finish()]
    machine, notes = Scripted({Leave: wishes}), Notes()
    runner = make(machine, notes)
    async with running(runner, notes.performed.append):
        runner.post(Leave())
        await trio.testing.wait_all_tasks_blocked()
    assert notes.performed == [Finish(), Finish()]
    assert notes.reported == [Founded()]
    assert notes.told == [("training", Halt())]


async def test_every_call_is_recorded_with_its_number_before_its_effects_are_performed() -> None:
    machine, notes = Scripted({Leave: [Finish()]}), Notes()
    runner = make(machine, notes, notes)
    seen: list[int] = []
    async with running(runner, lambda _: seen.append(len(notes.recorded))):
        for event in (Halt(), Leave(), Halt()):
            runner.post(event)
        await trio.testing.wait_all_tasks_blocked()
    assert notes.recorded == [
        ("exchange", 0, Halt(), []),
        ("exchange", 1, Leave(), [Finish()]),
        ("exchange", 2, Halt(), []),
    ]
    assert seen == [2]


async def test_a_tick_comes_at_the_time_that_was_asked_for_and_once(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    start = trio.current_time()
    machine, notes = Scripted({Leave: [WakeAt(at=start + 5.0)]}), Notes()
    runner = make(machine, notes)
    async with running(runner, notes.performed.append):
        runner.post(Leave())
        await trio.sleep(100)
    assert machine.events == [Leave(), Tick()]
    assert machine.given[1][0] == pytest.approx(start + 5.0)


async def test_a_new_wish_replaces_the_one_before(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    start = trio.current_time()
    script: dict[type[Event], list[Effect]] = {Leave: [WakeAt(at=start + 5.0)], Halt: [WakeAt(at=start + 50.0)]}
    machine, notes = Scripted(script), Notes()
    runner = make(machine, notes)
    async with running(runner, notes.performed.append):
        runner.post(Leave())
        await trio.sleep(1)
        runner.post(Halt())
        await trio.sleep(100)
    assert [t for t, event in machine.given if event == Tick()] == [pytest.approx(start + 50.0)]


async def test_a_late_node_listens_before_it_looks_at_the_clock(autojump_clock: trio.testing.MockClock) -> None:
    """The tick is long due, and all that waits in the inbox is handled before it."""
    machine, notes = Scripted({Leave: [WakeAt(at=trio.current_time() + 1.0)]}), Notes()
    runner = make(machine, notes)
    async with running(runner, notes.performed.append):
        runner.post(Leave())
        await trio.testing.wait_all_tasks_blocked()
        for event in steps(20):
            runner.post(event)
        autojump_clock.jump(60.0)
        await trio.testing.wait_all_tasks_blocked()
    assert machine.events == [Leave(), *steps(20), Tick()]


async def test_a_wish_in_the_past_ticks_at_once() -> None:
    machine, notes = Scripted({Leave: [WakeAt(at=-1.0)]}), Notes()
    runner = make(machine, notes)
    async with running(runner, notes.performed.append):
        runner.post(Leave())
        await trio.testing.wait_all_tasks_blocked()
        assert machine.events == [Leave(), Tick()]


async def test_what_peers_say_is_dropped_when_too_much_waits_and_our_own_events_are_not() -> None:
    """Defect: a flood of messages filled the inbox, and the node's next own event ended the node."""
    machine, notes = Scripted(), Notes()
    runner = make(machine, notes)
    for i in range(OFFERED_EVENTS):
        assert runner.offer(Progress(inner_steps=i))
    assert not runner.offer(Halt())
    runner.post(Halted())
    async with running(runner, notes.performed.append):
        await trio.testing.wait_all_tasks_blocked()
    assert len(machine.events) == OFFERED_EVENTS + 1
    assert machine.events[-1] == Halted()


def test_own_events_without_end_are_a_mistake_and_say_which() -> None:
    runner = make(Scripted(), Notes())
    for event in steps(INBOX_EVENTS):
        runner.post(event)
    with pytest.raises(RuntimeError, match=r"exchange: more than 16384 events wait; the last is Halt"):
        runner.post(Halt())


async def test_what_is_retracted_is_not_given_and_the_rest_keeps_its_order() -> None:
    """Defect: the outcome of an abandoned fetch was taken for that of the next, whose chunk was not there yet."""
    machine, notes = Scripted(), Notes()
    runner = make(machine, notes)
    what = key("contribution", 1)
    for event in (
        Halt(),
        Fetched(peer="n1", key=what, info=info(1)),
        Halted(),
        FetchFailed(peer="n1", key=what, fault="late"),
        Leave(),
    ):
        runner.post(event)
    runner.retract(lambda event: isinstance(event, Fetched | FetchFailed))
    async with running(runner, notes.performed.append):
        await trio.testing.wait_all_tasks_blocked()
    assert machine.events == [Halt(), Halted(), Leave()]


async def test_a_machine_that_raises_ends_the_runner_with_its_error() -> None:
    class Broken:
        def handle(self, now: float, event: Event) -> list[Effect]:
            raise ZeroDivisionError(now, event)

    runner = Runner("training", Broken(), tell=Notes().tell, report=Notes().reported.append)
    runner.post(Halt())
    with pytest.raises(ZeroDivisionError):
        await runner.run(lambda _: None)
