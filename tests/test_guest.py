"""trio as a guest of asyncio's loop: what crosses over, and that nothing is left behind.

These tests are synchronous functions that run asyncio: the suite's own loop is trio.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
import trio.lowlevel

import prime_async.guest
from prime_async.errors import LocalError, NonFiniteError
from prime_async.guest.side import trio_side
from prime_async.machines.facts import Fact, InnerStepDone, RoundFinished
from prime_async.machines.own import OwnActor
from prime_async.transport.memory import MemoryNetwork
from tests.greeter import Greet, Say, greeter
from tests.memory_nodes import Place, Walker

LIMIT_S = 30.0
T = TypeVar("T")


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """In a loop of its own, and no longer than a hung test may take."""

    async def limited() -> T:
        async with asyncio.timeout(LIMIT_S):
            result = await main()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    for _ in iter(condition, True):
        await asyncio.sleep(0)


def no_trio() -> None:
    """There is no run of trio in this thread any more."""
    with pytest.raises(RuntimeError):
        trio.lowlevel.current_trio_token()


class Manager:
    """A trio context manager that writes down what happens to it, and fails when it is told to."""

    def __init__(self) -> None:
        self.history: list[str] = []
        self.fail = trio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Manager]:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                self.history.append("entered")
                yield self
                self.history.append("left")
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()  # cleaning up may take time
                self.history.append("closed")

    async def _watch(self) -> None:
        await self.fail.wait()
        raise NonFiniteError("it failed")


# --- calls ----------------------------------------------------------------------------------------------------------


def test_a_trio_function_runs_beside_asyncios_tasks_and_gives_its_result() -> None:
    """Given a trio function that waits for an asyncio task that runs on, when it is awaited, then neither loop stands.

    The thread is the same, and so are the context variables.
    """
    here = contextvars.ContextVar[str]("here")

    async def wait_for(event: trio.Event) -> tuple[int, str]:
        await event.wait()
        return threading.get_ident(), here.get()

    async def main() -> tuple[int, str]:
        event = trio.Event()

        async def count() -> None:
            for _ in range(100):
                await asyncio.sleep(0)
            event.set()

        here.set("there")
        async with trio_side() as side, asyncio.TaskGroup() as group:
            group.create_task(count())
            return await side.run(wait_for, event)

    assert run(main) == (threading.get_ident(), "there")
    no_trio()


def test_an_error_crosses_over_as_it_is() -> None:
    error = NonFiniteError("as it is")

    async def fail() -> None:
        raise error

    async def main() -> None:
        async with trio_side() as side:
            await side.run(fail)

    with pytest.raises(NonFiniteError) as caught:
        run(main)
    assert caught.value is error
    no_trio()


def test_cancelling_an_asyncio_task_cancels_the_trio_function_and_waits_for_its_end() -> None:
    history: list[str] = []

    async def sleep() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.01)
                history.append("cleaned up")

    async def main() -> None:
        async with trio_side() as side:
            task = asyncio.create_task(side.run(sleep))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()  # again, while it cleans up
            with pytest.raises(asyncio.CancelledError):
                await task
            history.append("cancelled")

    run(main)
    assert history == ["cleaned up", "cancelled"]


def test_an_error_while_it_is_cancelled_is_told() -> None:
    async def fail() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise NonFiniteError("while cleaning up")

    async def main() -> None:
        async with trio_side() as side:
            task = asyncio.create_task(side.run(fail))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(NonFiniteError):
                await task

    run(main)


def test_all_users_of_a_loop_share_one_run_and_the_last_one_ends_it() -> None:
    """Given two users at once, and another that comes while the run ends, when all have left, then no run is there."""

    async def token() -> trio.lowlevel.TrioToken:
        return trio.lowlevel.current_trio_token()

    async def use(entered: asyncio.Event, leave: asyncio.Event) -> trio.lowlevel.TrioToken:
        async with trio_side() as side:
            entered.set()
            await leave.wait()
            return await side.run(token)

    async def main() -> None:
        entered, leave = [asyncio.Event() for _ in range(3)], [asyncio.Event() for _ in range(3)]
        tasks = [asyncio.create_task(use(e, w)) for e, w in zip(entered[:2], leave, strict=False)]
        await asyncio.gather(*(e.wait() for e in entered[:2]))
        leave[0].set()
        first = await tasks[0]
        leave[1].set()
        third = asyncio.create_task(use(entered[2], leave[2]))
        leave[2].set()
        assert await tasks[1] is first
        await third

    run(main)
    no_trio()


def test_a_run_of_trio_that_is_not_ours_is_told_of() -> None:
    async def main() -> None:
        ended = asyncio.get_running_loop().create_future()
        quit = trio.Event()
        trio.lowlevel.start_guest_run(
            quit.wait,
            run_sync_soon_threadsafe=asyncio.get_running_loop().call_soon_threadsafe,
            done_callback=lambda _: ended.set_result(None),
            host_uses_signal_set_wakeup_fd=True,
        )
        try:
            with pytest.raises(LocalError, match=r"trio runs in this thread already.*prime_async\.open_node"):
                async with trio_side():
                    pass
        finally:
            quit.set()
            await ended

    run(main)


def test_what_is_closed_says_so() -> None:
    async def main() -> None:
        async with trio_side() as side:
            pass
        with pytest.raises(LocalError, match="closed"):
            await side.run(trio.sleep, 0)

    run(main)


# --- context managers -----------------------------------------------------------------------------------------------


def test_a_block_that_ends_leaves_the_manager() -> None:
    manager = Manager()

    async def main() -> None:
        async with trio_side() as side, side.holding(manager.open()) as value:
            assert value is manager
            await asyncio.sleep(0)

    run(main)
    assert manager.history == ["entered", "left", "closed"]
    no_trio()


@pytest.mark.parametrize("error", [ValueError("mine"), asyncio.CancelledError()])
def test_a_block_that_fails_cancels_the_manager_and_its_error_stays(error: BaseException) -> None:
    manager = Manager()

    async def main() -> None:
        async with trio_side() as side, side.holding(manager.open()):
            raise error

    with pytest.raises(type(error)):
        run(main)
    assert manager.history == ["entered", "closed"]
    no_trio()


def test_a_task_that_is_cancelled_in_its_block_cancels_the_manager_first() -> None:
    manager = Manager()

    async def hold() -> None:
        async with trio_side() as side, side.holding(manager.open()):
            await asyncio.sleep(LIMIT_S)

    async def main() -> None:
        task = asyncio.create_task(hold())
        await until(lambda: "entered" in manager.history)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert manager.history == ["entered", "closed"]

    run(main)
    no_trio()


@pytest.mark.parametrize("swallows", [False, True])
def test_a_manager_that_fails_cancels_the_block_and_raises_in_its_place(swallows: bool) -> None:
    """Given a block that waits for ever, when the manager fails, then its error comes, and the task is not cancelled.

    Also if the block takes the cancellation for its own and ends.
    """
    manager = Manager()

    async def main() -> None:
        with pytest.raises(NonFiniteError, match="it failed"):
            async with trio_side() as side, side.holding(manager.open()):
                manager.fail.set()
                try:
                    await asyncio.sleep(LIMIT_S)
                except asyncio.CancelledError:
                    if not swallows:
                        raise
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0.001)

    run(main)
    no_trio()


def test_a_manager_that_cannot_be_entered_raises_its_error() -> None:
    @asynccontextmanager
    async def refuse() -> AsyncIterator[None]:
        await trio.lowlevel.checkpoint()
        raise NonFiniteError("not today")
        yield

    async def main() -> None:
        async with trio_side() as side, side.holding(refuse()):
            raise AssertionError

    with pytest.raises(NonFiniteError, match="not today"):
        run(main)
    no_trio()


def test_a_task_that_is_cancelled_while_it_enters_leaves_nothing() -> None:
    history: list[str] = []

    @asynccontextmanager
    async def slow() -> AsyncIterator[None]:
        try:
            await trio.sleep_forever()
            yield
        finally:
            history.append("closed")

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), trio_side() as side, side.holding(slow()):
                raise AssertionError

    run(main)
    assert history == ["closed"]
    no_trio()


def test_block_and_manager_that_fail_for_reasons_of_their_own_are_both_told_of() -> None:
    @asynccontextmanager
    async def bad() -> AsyncIterator[None]:
        try:
            yield
        finally:
            raise NonFiniteError("theirs")

    async def main() -> None:
        async with trio_side() as side, side.holding(bad()):
            raise ValueError("mine")

    with pytest.raises(BaseExceptionGroup) as caught:
        run(main)
    assert [type(error) for error in caught.value.exceptions] == [ValueError, NonFiniteError]


@pytest.mark.parametrize("collected", [False, True])
def test_closing_a_generator_that_is_in_a_block_closes_the_manager(collected: bool) -> None:
    """Also if nobody closes it, and asyncio does so, in another task, when it is collected."""
    manager = Manager()

    async def numbers() -> AsyncGenerator[int, None]:
        async with trio_side() as side, side.holding(manager.open()):
            for number in range(10):
                yield number

    async def main() -> None:
        if not collected:
            async with aclosing(numbers()) as generator:
                assert await anext(generator) == 0
            return
        assert await anext(numbers()) == 0
        gc.collect()
        await until(lambda: "closed" in manager.history and len(asyncio.all_tasks()) == 1)

    run(main)
    assert manager.history == ["entered", "closed"]
    no_trio()


# --- nodes ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def opened(
    place: Place, name: int, workload: Walker, *actors: OwnActor, **run: Any
) -> AsyncIterator[prime_async.guest.GuestNode]:
    """As ``Place.node``, in asyncio."""
    async with trio_side() as side, side.holding(place.network.open(place.id(name))) as transport:
        config = place.config(name, **run)
        async with prime_async.guest.open_node(config, transport=transport, workload=workload, actors=actors) as node:
            yield node


def test_two_nodes_in_one_loop_train_together_and_agree(tmp_path: Path) -> None:
    """Given two nodes in asyncio tasks, when their run is over, then the events end, and every digest is equal."""
    found: dict[int, list[Fact]] = {0: [], 1: []}

    async def main() -> None:
        place = Place(tmp_path, MemoryNetwork(seed=1))

        async def watch(name: int) -> None:
            async with opened(place, name, Walker(), rounds=3, min_members=2) as node:
                async for event in node.events:
                    found[name].append(event)
                await node.wait()
                assert node.round == 3
                assert node.meter.round == 3

        async with asyncio.TaskGroup() as group:
            group.create_task(watch(0))
            group.create_task(watch(1))

    run(main)
    digests = [[f.state_digest for f in facts if isinstance(f, RoundFinished)] for facts in found.values()]
    assert len(digests[0]) == 3
    assert digests[0] == digests[1]
    no_trio()


def test_actors_of_two_nodes_in_asyncio_talk_and_their_program_is_told_in_its_own_thread(tmp_path: Path) -> None:
    """Given nodes with an actor in one loop, when one is told to greet, then the other's program hears, in asyncio.

    What cannot be told is refused where it is told.
    """
    said: list[tuple[Say, threading.Thread]] = []

    async def main() -> None:
        place = Place(tmp_path, MemoryNetwork(seed=1))
        heard = asyncio.Event()

        def hear(effect: Say) -> None:
            said.append((effect, threading.current_thread()))
            heard.set()

        async with (
            opened(place, 0, Walker(), greeter()) as first,
            opened(place, 1, Walker(), greeter(hear)),
        ):
            first.tell("greeter", Greet(text="hello"))
            with pytest.raises(LocalError, match="no actor other, it has greeter"):
                first.tell("other", Greet(text="hello"))
            await heard.wait()

    run(main)
    assert said == [(Say(who="0" * 64, text="hello"), threading.current_thread())]
    no_trio()


def test_a_node_that_cannot_go_on_raises_its_error_in_the_block(tmp_path: Path) -> None:
    async def main() -> None:
        walker = Walker()
        walker.broken = True
        async with opened(Place(tmp_path, MemoryNetwork(seed=1)), 0, walker) as node:
            await node.wait()

    with pytest.raises(NonFiniteError, match="learning_rate"):
        run(main)
    no_trio()


def test_inner_steps_do_not_hold_up_asyncio(tmp_path: Path) -> None:
    """Given inner steps that take 0.3 s each, when asyncio counts, then it counts on while one is under way."""

    async def main() -> int:
        walker = Walker(step_s=0.3)
        async with opened(Place(tmp_path, MemoryNetwork(seed=1)), 0, walker) as node:
            await until(lambda: walker.steps > 0)
            steps, turns = walker.steps, 0
            for _ in iter(lambda: walker.steps > steps, True):
                turns += 1
                await asyncio.sleep(0)
            node.stop(at_once=True)
            await node.wait()
            assert any([isinstance(event, InnerStepDone) async for event in node.events])
            return turns

    assert run(main) > 100
    no_trio()
