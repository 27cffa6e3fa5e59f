"""Two message logs of one run, side by side: where do they part?

*Of two nodes.* Each saw its own events in its own order, so what they must agree on is compared, by its name: a view by
its number, a plan by round, epoch and attempt, a commit by its round, an outer state by the rounds that it is after.
What only one of them has is no difference: nobody sees everything. The first that both have and that is not equal, in
the order of the first log, is where they part.

*Of one node*, in two recordings. A machine sees nothing but its own events, so the calls of each are compared, one by
one: what it was given, and what it answered. When that was is no difference, nor how the calls of different machines
alternate; wake-ups are compared by how far off they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final, Literal, NamedTuple, TypeAlias

from msgspec import Struct

from prime_async.errors import LocalError
from prime_async.log import LogRecord, MessageLog, effects_digest, words_of
from prime_async.machines.vocabulary import (
    ActorName,
    Applied,
    Effect,
    Event,
    Heard,
    Imported,
    Machine,
    Send,
    StateAt,
    Tell,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import Commit, Plan, View, encode
from prime_async.words import Words

CONTEXT: Final = 3
"""Rows before and after the place."""
WAKE_DIGITS: Final = 6

Kind: TypeAlias = Literal["view", "plan", "commit", "state"]
Value: TypeAlias = View | Plan | Commit | bytes


class Name(NamedTuple):
    """Of a thing that nodes agree on. ``number``: of a view, else a round; the rest is set where it is needed."""

    kind: Kind
    number: int
    epoch: int = 0
    attempt: int = 0
    lineage: bytes = b""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing as the two logs have it, in words; "": it is not in that log."""

    what: str
    first: str
    second: str
    equal: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """``what`` was compared, whether the logs ``part``, and where: the ``rows`` around the place."""

    what: str
    part: bool
    rows: tuple[Row, ...]
    verdict: str


def compare(first: MessageLog, second: MessageLog) -> Comparison:
    """Where two logs of one run part. Raises :class:`LocalError` if they are of two runs."""
    ours, theirs = (log.header.machines.membership.run_id for log in (first, second))
    if ours != theirs:
        raise LocalError(
            f"the logs are of two runs, {ours.hex()[:8]} and {theirs.hex()[:8]}: give two logs of one run, that is, of "
            "nodes whose [run] is the same"
        )
    if first.header.node == second.header.node:
        return _compare_recordings(first, second)
    return _compare_nodes(first, second)


# --- one call after the other ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """A recorded call, and what it was answered; ``None`` where this program answers otherwise than the recorded."""

    index: int
    record: LogRecord
    effects: tuple[Effect, ...] | None


def calls_of(log: MessageLog) -> Iterator[Call]:
    """Drive fresh machines as far as each of them answers as recorded."""
    machines = log.header.machines.build()
    for index, record in enumerate(log.records):
        machine = machines.get(record.actor)
        effects = None
        if machine is not None:
            effects = _answer(machine, record)
            if effects is None:
                del machines[record.actor]  # what it would answer from here on means nothing
        yield Call(index, record, effects)


def _answer(machine: Machine, record: LogRecord) -> tuple[Effect, ...] | None:
    try:
        effects = machine.handle(record.now, record.event)
    except Exception:  # of a machine in a state that it never was in
        return None
    return tuple(effects) if effects_digest(effects) == record.effects else None


# --- two nodes ------------------------------------------------------------------------------------------------------


def landmarks(log: MessageLog) -> dict[Name, Value]:
    """What nodes of a run agree on, as this log first has it, in its order."""
    found: dict[Name, Value] = {}
    actors = log.header.machines.build().keys()
    for call in calls_of(log):
        # What a machine tells one that the node does not have is no event: of a group without rounds, its views.
        effects = [e for e in call.effects or () if not isinstance(e, Tell) or e.actor not in actors]
        for name, value in chain(_of_event(call.record.event), *map(_of_effect, effects)):
            found.setdefault(name, value)
    return found


def _of_event(event: Event) -> Iterator[tuple[Name, Value]]:
    match event:
        case ViewChanged(view=view):
            yield Name("view", view.number, lineage=view.lineage), view
            if view.commit is not None:
                yield Name("commit", view.commit.round), view.commit
        case Heard(message=Plan() as plan):
            yield Name("plan", plan.round, plan.epoch, plan.attempt), plan
        case StateAt(round=round, digest=digest) | Applied(round=round, digest=digest):
            yield Name("state", round), digest
        case Imported(round=round, digest=digest):
            yield Name("state", round), digest
        case _:
            pass


def _of_effect(effect: Effect) -> Iterator[tuple[Name, Value]]:
    match effect:
        case Send(message=Plan() as plan):
            yield Name("plan", plan.round, plan.epoch, plan.attempt), plan
        case Tell(event=event):
            yield from _of_event(event)
        case _:
            pass


def _compare_nodes(first: MessageLog, second: MessageLog) -> Comparison:
    ours, theirs = landmarks(first), landmarks(second)
    words = words_of(first)
    both = [name for name in ours if name in theirs]
    place = next((i for i, name in enumerate(both) if ours[name] != theirs[name]), None)
    names = " and ".join(words.name(log.header.node) for log in (first, second))
    what = f"nodes {names}: views, plans, commits and outer states that both have"
    counted = (
        f"both have {_count(both)}; only A has {_count(ours.keys() - theirs)}, only B {_count(theirs.keys() - ours)}"
    )
    if place is None:
        return Comparison(what, False, (), f"They do not part: all that both have is equal ({counted}).")
    shown = both[max(0, place - CONTEXT) : place + CONTEXT + 1]
    rows = tuple(_landmark_row(words, name, ours[name], theirs[name]) for name in shown)
    equal = f"{place} before it {'is' if place == 1 else 'are'} equal"
    return Comparison(what, True, rows, f"They part at {_title(both[place])}; {equal} ({counted}).")


def _landmark_row(words: Words, name: Name, ours: Value, theirs: Value) -> Row:
    if ours == theirs:
        return Row(_title(name), _shown(words, ours), "the same", True)
    if isinstance(ours, Struct) and isinstance(theirs, Struct):
        differing = words.differences(ours, theirs)
        a, b = ("\n".join(f"{d[0]}: {d[side]}" for d in differing) for side in (1, 2))
        return Row(_title(name), a, b, False)
    return Row(_title(name), _shown(words, ours), _shown(words, theirs), False)


def _shown(words: Words, value: Value) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else words.of_part(value)


def _title(name: Name) -> str:
    match name.kind:
        case "view":
            return f"view {name.number} of lineage {name.lineage.hex()[:8]}"
        case "plan":
            return f"the plan of round {name.number}, ({name.epoch}, {name.attempt})"
        case "commit":
            return f"the commit of round {name.number}"
        case "state":
            return f"the outer state after {name.number} rounds"


def _count(names: Collection[Name]) -> str:
    kinds = ("view", "plan", "commit", "state")
    counts = {kind: sum(1 for name in names if name.kind == kind) for kind in kinds}
    return ", ".join(f"{count} {kind}{'s' if count != 1 else ''}" for kind, count in counts.items() if count) or "none"


# --- two recordings of one node -------------------------------------------------------------------------------------


def _compare_recordings(first: MessageLog, second: MessageLog) -> Comparison:
    ours, theirs = _by_machine(first), _by_machine(second)
    words = words_of(first)
    what = f"node {words.name(first.header.node)} in two recordings: the calls of each machine"
    what += _settings_that_differ(words, first, second)
    places = [
        (a.index, actor, i)
        for actor in ours
        for i, (a, b) in enumerate(zip(ours[actor], theirs.get(actor, []), strict=False))
        if not same(a, b)
    ]
    if not places:
        return Comparison(what, False, (), _lengths(ours, theirs))
    index, actor, i = min(places)
    rows = tuple(
        _call_row(words, actor, ours[actor][k : k + 1], theirs[actor][k : k + 1], k)
        for k in range(max(0, i - CONTEXT), i + CONTEXT + 1)
        if k < max(len(ours[actor]), len(theirs[actor]))
    )
    a, b = ours[actor][i], theirs[actor][i]
    how = "were given different things" if encode(a.record.event) != encode(b.record.event) else "answer differently"
    return Comparison(
        what, True, rows, f"They part at number {i} of {actor} (event {index} of A, {b.index} of B): the two {how}."
    )


def _by_machine(log: MessageLog) -> dict[ActorName, list[Call]]:
    calls: dict[ActorName, list[Call]] = {}
    for call in calls_of(log):
        calls.setdefault(call.record.actor, []).append(call)
    return calls


def same(one: Call, other: Call) -> bool:
    """Whether a machine was given, and answered, the same in two recordings, whenever that was."""
    if encode(one.record.event) != encode(other.record.event):  # in which NaN equals NaN
        return False
    if one.record.effects == other.record.effects:
        return True
    ours, theirs = _relative(one), _relative(other)
    return ours is not None and ours == theirs


def _relative(call: Call) -> list[bytes] | None:
    if call.effects is None:
        return None
    now = call.record.now
    return [encode(WakeAt(at=round(e.at - now, WAKE_DIGITS)) if isinstance(e, WakeAt) else e) for e in call.effects]


def _settings_that_differ(words: Words, first: MessageLog, second: MessageLog) -> str:
    a, b = first.header.machines, second.header.machines
    differing = [
        line for name in a.__struct_fields__ for line in _differences(words, name, getattr(a, name), getattr(b, name))
    ]
    return f"\nthey were made with different settings: {'; '.join(differing)}" if differing else ""


def _differences(words: Words, name: str, ours: Struct | None, theirs: Struct | None) -> list[str]:
    """Of the settings of one machine, which a node need not have."""
    if ours is None or theirs is None:
        return [] if ours is theirs else [f"{name}: there in one of them alone"]
    return [f"{name}.{field}: {a} and {b}" for field, a, b in words.differences(ours, theirs)]


def _call_row(words: Words, actor: ActorName, ours: list[Call], theirs: list[Call], number: int) -> Row:
    equal = bool(ours and theirs and same(ours[0], theirs[0]))
    first, second = (_said(words, calls[0]) if calls else "(the log ends)" for calls in (ours, theirs))
    return Row(f"{actor} {number}", first, "the same" if equal else second, equal)


def _said(words: Words, call: Call) -> str:
    record = call.record
    if call.effects is None:
        answer = f"effects with digest {record.effects.hex()[:16]}, which this program does not answer"
    else:
        answer = words.of_all(call.effects, record.now)
    return f"{words.of(record.event)}\n-> {answer}"


def _lengths(ours: dict[ActorName, list[Call]], theirs: dict[ActorName, list[Call]]) -> str:
    counts = {actor: (len(ours.get(actor, [])), len(theirs.get(actor, []))) for actor in {**ours, **theirs}}
    longer = [f"{actor} has {a} calls in A and {b} in B" for actor, (a, b) in counts.items() if a != b]
    both = sum(min(pair) for pair in counts.values())
    return f"They do not part: {both} calls are equal{'; ' if longer else ''}{', '.join(longer)}."
