"""What commands that measure do with what they found."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import trio
from rich.console import Console
from rich.table import Table

from prime_async.actors.groups import single_errors

Figures: TypeAlias = dict[str, Any]


def report(
    measure: Callable[[Console], Awaitable[Figures]], tables: tuple[Callable[[Figures], Table], ...], json_: bool
) -> int:
    """Measure, telling a console how it goes, and print what was found: tables, and as JSON if that is wanted.

    The JSON is the last line of stdout; all else goes to stderr then. Returns the exit status.
    """
    console = Console(stderr=json_, highlight=False)
    with single_errors():
        result = trio.run(measure, console)
    for table in tables:
        console.print(table(result))
    if json_:
        print(json.dumps(result))
    return 0
