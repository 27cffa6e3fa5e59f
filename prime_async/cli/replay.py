"""``prime-async replay``: drive a node's machines again from its message log, say what they did, compare two logs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from prime_async.cli.options import Flag
from prime_async.comparison import Comparison, compare
from prime_async.errors import ConfigError
from prime_async.log import MessageLog, ReplayedStep, read_log, words_of
from prime_async.log import replay as replay_log
from prime_async.machines.own import OwnActor
from prime_async.machines.vocabulary import MACHINES, OWN, ActorName

EXIT_APART = 1
NUMBER = Number(gte=0)


def replay(
    log: Path,
    /,
    *,
    show: Flag = False,
    from_: Annotated[int, Parameter(name="--from", validator=NUMBER)] = 0,
    until: Annotated[int | None, Parameter(validator=NUMBER)] = None,
    actor: ActorName | None = None,
    own: tuple[str, ...] = (),
    against: Path | None = None,
) -> int:
    """Drive the machines of a recorded node again, and compare every effect.

    Needs no network, no model and no clock. Ends with an error at the first event whose effects are not the recorded
    ones.

    Parameters
    ----------
    log
        A file that a node with `record = "..."` wrote.
    show
        Print a line for each event, in words: its number, the seconds since the first, the machine, what it was given,
        and after an arrow what it answered.
    from_
        Show no event before this number; they are driven all the same.
    until
        Drive no event after this number.
    own
        A function that makes an actor of your own, as "module:function"; for each that the log has events of.
    actor
        Show the events of this machine alone.
    against
        Another log of the same run: print where the two part, side by side. Of two nodes, their views, plans, commits
        and outer states are compared; of one node, all events and effects. Exit status 1 if they part.
    """
    if until is not None and until < from_:
        raise ConfigError([f"--until {until} is before --from {from_}: give the smaller number to --from"])
    if actor is not None and actor not in MACHINES and not actor.startswith(OWN):
        raise ConfigError([f"--actor {actor}: give one of {', '.join(MACHINES)}, or {OWN}NAME for one of your own"])
    recorded = read_log(log)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if against is not None:
        return _compare(log, against, recorded)
    _drive(console, log, recorded, _Shown(show, from_, until, actor), [load_actor(name) for name in own])
    return 0


class _Shown:
    """Which events are driven, and which are shown."""

    def __init__(self, show: bool, first: int, last: int | None, actor: ActorName | None) -> None:
        self.last = last
        self._show, self._first, self._actor = show, first, actor

    def has(self, step: ReplayedStep) -> bool:
        return self._show and step.index >= self._first and self._actor in (None, step.record.actor)


def load_actor(name: str) -> OwnActor:
    """The actor that the function ``module:function`` makes. Raises :class:`ConfigError` if there is no such function.

    The current folder is looked in, too, as Python does it for a program there.
    """
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            [f"--own {name}: give it as module:function, in a module that Python finds: {error}"]
        ) from error
    if not callable(make):
        raise ConfigError([f"--own {name}: {make!r} is no function: name one that makes an OwnActor"])
    try:
        signature(make).bind()
    except TypeError as error:
        raise ConfigError([f"--own {name}: the function is called without arguments: {error}"]) from error
    actor = make()
    if not isinstance(actor, OwnActor):
        raise ConfigError([f"--own {name}: the function gives {actor!r}, and not an OwnActor"])
    return actor


def _drive(console: Console, path: Path, log: MessageLog, shown: _Shown, actors: Sequence[OwnActor]) -> None:
    words = words_of(log)
    calls: Counter[str] = Counter()
    effects = 0
    began = log.records[0].now if log.records else 0.0
    for step in islice(replay_log(log, actors), None if shown.last is None else shown.last + 1):
        record = step.record
        calls[record.actor] += 1
        effects += len(step.effects)
        if shown.has(step):
            said = f"{words.of(record.event)} -> {words.of_all(step.effects, record.now)}"
            console.print(f"{step.index:>6} {record.now - began:>10.3f} s  {record.actor:<10}  {said}")
    driven = sum(calls.values())
    of_all = "" if driven == len(log.records) else f" of {len(log.records)}"
    console.print(f"{path}: node {log.header.node[:8]}, {driven}{of_all} events, {effects} effects, all as recorded")
    for actor, count in sorted(calls.items()):
        console.print(f"  {actor}: {count} events")
    if log.torn_bytes:
        console.print(f"  the last {log.torn_bytes} bytes are a torn record, and were left out")


def _compare(first: Path, second: Path, log: MessageLog) -> int:
    found = compare(log, read_log(second))
    console = Console(highlight=False, markup=False)
    console.print(f"A: {first}\nB: {second}\n{found.what}", soft_wrap=True)
    if found.rows:
        console.print(_table(found))
    console.print(found.verdict, soft_wrap=True)
    return EXIT_APART if found.part else 0


def _table(found: Comparison) -> Table:
    table = Table("", "", "A", "B", show_lines=True)
    for row in found.rows:
        table.add_row("" if row.equal else "!", row.what, row.first, row.second)
    return table
