"""trio's side of an asyncio loop: one guest run of trio in the loop's own thread, and the ways across.

``trio.lowlevel.start_guest_run`` does trio's work in callbacks of asyncio's loop, and waits for trio's sockets and
deadlines in a thread, so neither loop holds up the other. Both are in one thread: what either touches between two
``await``\\ s the other does not touch meanwhile, and synchronous calls need no lock.

What holds:

* A thread can have one run of trio only. Whoever opens something here shares that of the loop; the last one to leave
  ends it, and waits for its end.
* Cancelling a task that waits for trio cancels what it waits for, and the task goes on when that has ended. Errors
  cross as they are.
* A trio context manager stays in a trio task of its own while its block runs in an asyncio task. If the manager fails,
  the block is cancelled and the error raised in its place, as trio would do it. If the block ends by an error, by
  cancellation or by the close of its generator, the manager is cancelled.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeVar

import trio

from prime_async.errors import LocalError

T = TypeVar("T")


class TrioSide:
    """One run of trio inside the asyncio loop that is running now. Made by :func:`trio_side`."""

    def __init__(self) -> None:
        self.users = 0
        self.loop = asyncio.get_running_loop()
        self.ended = self.loop.create_future()
        self.ending = False
        self._quit = trio.Event()
        self._lost: list[asyncio.Future[Any]] = []  # calls that end with the run

    def start(self) -> None:
        """Raises :class:`LocalError` if this thread has a run of trio that is not ours."""
        try:
            trio.lowlevel.start_guest_run(
                self._quit.wait,
                run_sync_soon_threadsafe=self.loop.call_soon_threadsafe,
                run_sync_soon_not_threadsafe=self.loop.call_soon,
                done_callback=self._on_done,
                host_uses_signal_set_wakeup_fd=True,
            )
        except RuntimeError as error:
            raise LocalError(
                "trio runs in this thread already, and not by prime_async.guest: open the node from there, with "
                "prime_async.open_node"
            ) from error

    async def end(self) -> None:
        """Returns when nothing of it is left. Cancellation is put off until then."""
        self.ending = True
        self._quit.set()
        await _until_done([self.ended])

    def _on_done(self, result: Any) -> None:
        """``result`` is an ``outcome.Outcome``."""
        self.ending = True
        error: BaseException = LocalError("trio's run in this asyncio loop has ended, and what was opened in it")
        try:
            result.unwrap()
        except BaseException as raised:  # Ctrl-C, where nobody but trio handles it, or a bug
            error = raised
        for call in self._lost:
            call.set_exception(error)
        self.ended.set_result(None)

    async def run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Await a trio function from asyncio. Cancellation is passed on, and waits until the function has ended."""
        if self.ending:
            raise LocalError("this is closed: its `async with` block has ended")
        call: asyncio.Future[T] = self.loop.create_future()
        scope = trio.CancelScope()
        trio.lowlevel.spawn_system_task(self._carry, call, scope, function, args, context=contextvars.copy_context())
        try:
            await _until_done([call], on_cancel=scope.cancel)
        except asyncio.CancelledError:
            if not call.cancelled() and call.exception() is not None:
                call.result()  # it failed while it was cancelled, and that is what is to be known
            raise
        return call.result()

    async def _carry(
        self,
        call: asyncio.Future[T],
        scope: trio.CancelScope,
        function: Callable[..., Awaitable[T]],
        args: tuple[Any, ...],
    ) -> None:
        try:
            with scope:
                result = await function(*args)
        except trio.Cancelled:
            self._lost.append(call)
            raise
        except BaseException as error:
            call.set_exception(error)
        else:
            if scope.cancelled_caught:
                call.cancel()
            else:
                call.set_result(result)

    @asynccontextmanager
    async def holding(self, manager: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
        """``async with manager``, of trio, around a block of asyncio's. See the module's rules."""
        entered: asyncio.Future[T] = self.loop.create_future()
        leave = trio.Event()

        async def hold() -> None:
            async with manager as value:
                if not entered.done():
                    entered.set_result(value)
                await leave.wait()

        holder = self.loop.create_task(self.run(hold))
        await self._until_entered(entered, holder)
        interruption = _Interruption(holder)
        try:
            yield entered.result()
        except BaseException as error:
            interruption.block_ended = True
            holder.cancel()
            with suppress(asyncio.CancelledError):
                await _until_done([holder])
            interruption.judge(error)
            raise
        interruption.block_ended = True
        leave.set()
        try:
            await _until_done([holder], on_cancel=holder.cancel)
        finally:
            interruption.judge(None)

    async def _until_entered(self, entered: asyncio.Future[T], holder: asyncio.Task[None]) -> None:
        """Cancelled meanwhile, or if it cannot be entered, nothing is left of it."""
        try:
            await _until_done([entered, holder], on_cancel=holder.cancel, first=True)
        except asyncio.CancelledError:
            holder.cancel()
            await _until_done([holder])
            if not holder.cancelled():
                holder.result()
            raise
        if not entered.done():
            holder.result()  # raises: the manager did
            raise AssertionError("the manager's block ended before it began")


class _Interruption:
    """Ends the block of a task when ``holder`` ends first; the task's count of cancellations stays right.

    As :func:`asyncio.timeout` does it.
    """

    def __init__(self, holder: asyncio.Task[None]) -> None:
        block = asyncio.current_task()
        assert block is not None
        self.block_ended = False
        self._block = block
        self._holder = holder
        self._cancelling = block.cancelling()
        self._interrupted = False
        holder.add_done_callback(self._on_holder_done)

    def _on_holder_done(self, _holder: asyncio.Task[None]) -> None:
        if not self.block_ended:
            self._interrupted = True
            self._block.cancel()

    def judge(self, error: BaseException | None) -> None:
        """Both have ended, the block with ``error``: raises what is to be raised in its place, if anything is."""
        others = self._block.uncancel() > self._cancelling if self._interrupted else True
        failure = None if self._holder.cancelled() else self._holder.exception()
        if failure is None:
            return
        if error is None or isinstance(error, asyncio.CancelledError | GeneratorExit):
            raise failure from (error if others else None)
        raise BaseExceptionGroup("the block failed, and so did what it was in", [error, failure])


async def _until_done(
    futures: Sequence[asyncio.Future[Any]], *, on_cancel: Callable[[], object] | None = None, first: bool = False
) -> None:
    """Wait for all of them, or for the ``first``, also if this is cancelled: that is raised afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not (any if first else all)(future.done() for future in futures):
        try:
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED if first else asyncio.ALL_COMPLETED)
        except asyncio.CancelledError as error:
            cancelled = error
            if on_cancel is not None:
                on_cancel()
    if cancelled is not None:
        raise cancelled


_SIDES: dict[asyncio.AbstractEventLoop, TrioSide] = {}
"""Of each loop that has one. State of the module, against the house rule: trio allows one run in a thread, and who
opens a second node in a loop has nothing else in common with who opened the first."""


@asynccontextmanager
async def trio_side() -> AsyncIterator[TrioSide]:
    """trio's side of the running loop, shared with all others that use it at the time.

    Raises :class:`LocalError` if trio runs in this thread for somebody else.
    """
    loop = asyncio.get_running_loop()
    while (side := _SIDES.get(loop)) is not None and side.ending:
        await asyncio.wait([side.ended])
    if side is None:
        side = TrioSide()
        side.start()
        _SIDES[loop] = side
        side.ended.add_done_callback(lambda _: _SIDES.pop(loop, None))
    side.users += 1
    try:
        yield side
    finally:
        side.users -= 1
        if not side.users:
            await side.end()
