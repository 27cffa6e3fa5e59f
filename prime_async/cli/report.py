"""What commands that measure have in common: how they run, and how they show what they found."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import trio
from rich import box
from rich.console import Console
from rich.table import Column, Table

from prime_async.actors.groups import single_errors

Figures: TypeAlias = dict[str, Any]
Measure: TypeAlias = Callable[[Console], Awaitable[Figures]]


def report(measure: Measure, tables: tuple[Callable[[Figures], Table], ...], json_: bool) -> int:
    """Measure, telling a console how it goes, and print what was found: tables, and as JSON if that is wanted.

    ``cores``, how many it was measured on, is added to it. The JSON is the last line of stdout; all else goes to stderr
    then. Returns the exit status.
    """
    console = Console(stderr=json_, highlight=False)
    result = trio.run(_measured, measure, console)
    for table in tables:
        console.print(table(result))
    if json_:
        print(json.dumps(result))
    return 0


async def _measured(measure: Measure, console: Console) -> Figures:
    async with interruptible():
        result = await measure(console)
    return {**result, "cores": len(os.sched_getaffinity(0))}


@asynccontextmanager
async def interruptible() -> AsyncIterator[None]:
    """SIGTERM is taken for Ctrl-C inside, so that whatever was started there is ended in either case."""
    with single_errors():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_interrupt_on_sigterm)
            yield
            nursery.cancel_scope.cancel()


async def _interrupt_on_sigterm() -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            raise KeyboardInterrupt


def figures_table(title: str, labels: Iterable[str], figures: Iterable[str], *, no_wrap: bool = False) -> Table:
    """An empty table, whose rows begin with ``labels``, on the left, and go on with ``figures``, on the right."""
    return Table(
        *(Column(name, no_wrap=no_wrap) for name in labels),
        *(Column(name, no_wrap=no_wrap, justify="right") for name in figures),
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
