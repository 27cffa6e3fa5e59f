"""Actors of users, beside ours: a pure machine of their own, whose messages are recorded and replayed as ours are.

The rules:

* What crosses the wire or enters a log is encoded as all messages are, and checked in the same way: size (64 KiB),
  depth, trailing bytes, then the type and bounds of every field. Names are in a namespace of their own.
* A user's machine hears members of the view alone, and each view when it is decided.
* Messages to an actor that a node does not have are ignored, and counted; that is no offence. A message that is not one
  of the actor's kinds is one.
* Control messages may be lost or come twice: a machine must bear both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, get_args

from msgspec import Struct

from prime_async.errors import LocalError, ProtocolError
from prime_async.machines import vocabulary
from prime_async.machines.vocabulary import Effect, Event, Perform, Tick, Told, ViewChanged, WakeAt
from prime_async.messages import MAX_OWN_BYTES, Own, View, decode, encode


class Heard(Struct, frozen=True, kw_only=True):
    """A message came from the actor of this name on ``peer``, a member."""

    peer: str
    message: Struct


class Send(Struct, frozen=True, kw_only=True):
    """Send a message to the actor of this name on ``peer``. It may be lost."""

    peer: str
    message: Struct


OwnEvent: TypeAlias = Tick | ViewChanged | Heard | Struct
"""What a user's machine is given: time, views, messages, and its own kinds of events."""
OwnEffect: TypeAlias = WakeAt | Send | Struct
"""What it answers: when to wake it, messages, and its own kinds of effects."""


class OwnMachine(Protocol):
    """Pure, as ours: no clock, chance, network or files; the same events give the same effects."""

    def handle(self, now: float, event: OwnEvent) -> Sequence[OwnEffect]:
        """The effects of ``event`` at ``now``, seconds of a monotonic clock."""
        ...


def _nothing(_effect: Any) -> None:
    """There is nothing to be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnActor:
    """A user's actor. ``machine(me)`` makes a fresh machine on the node with that id.

    ``messages``, ``events`` and ``effects``: its own kinds, each a tagged ``msgspec.Struct`` or a union of several;
    ``None``: it has none. ``perform`` is called in the event loop with each of its effects, and returns at once.

    Raises :class:`LocalError` for a name that is not one, and for kinds that cannot be told apart.
    """

    name: str
    machine: Callable[[str], OwnMachine]
    messages: Any = None
    events: Any = None
    effects: Any = None
    perform: Callable[[Any], None] = _nothing

    def __post_init__(self) -> None:
        if re.fullmatch("[a-z][a-z0-9_]{0,31}", self.name) is None:
            raise LocalError(f"the name of an actor is {self.name!r}: take up to 32 of a-z, 0-9, _, a letter first")
        for what in ("messages", "events", "effects"):
            for kind in kinds(getattr(self, what)):
                if not (isinstance(kind, type) and issubclass(kind, Struct) and kind.__struct_config__.tag is not None):
                    raise LocalError(
                        f"actor {self.name}: {kind!r} in {what} is not a tagged msgspec.Struct: give it tag=True, and "
                        "join several with |"
                    )


def kinds(union: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type; none of ``None``."""
    return () if union is None else get_args(union) or (union,)


def read(actor: OwnActor, what: str, body: bytes) -> Struct:
    """The value that ``body`` encodes. Raises :class:`ProtocolError` if it is none of the actor's ``what``."""
    union = getattr(actor, what)
    if union is None:
        raise ProtocolError(f"the actor {actor.name} has no {what}")
    value: Struct = decode(body, union, limit=MAX_OWN_BYTES)
    return value


def write(actor: OwnActor, what: str, value: Any) -> bytes:
    """Raises :class:`LocalError` for what is none of the actor's ``what``, or would be refused where it is read."""
    if not isinstance(value, kinds(getattr(actor, what))):
        raise LocalError(f"actor {actor.name}: {value!r} is none of its {what}: declare its type there")
    body = encode(value)
    try:
        read(actor, what, body)
    except ProtocolError as error:
        raise LocalError(f"actor {actor.name}: nobody would take this {type(value).__name__}: {error}") from error
    return body


class Hosted:
    """A user's machine as one of ours: what it is given and answers is what logs and the wire hold."""

    def __init__(self, actor: OwnActor, me: str) -> None:
        self._actor = actor
        self._machine = actor.machine(me)
        self._view: View | None = None

    def handle(self, now: float, event: Event) -> list[Effect]:
        given = self._given(event)
        return [] if given is None else [self._answer(effect) for effect in self._machine.handle(now, given)]

    def _given(self, event: Event) -> OwnEvent | None:
        """In the user's words; ``None``: it is not for the user's machine."""
        match event:
            case Tick():
                return event
            case ViewChanged(view=view):
                self._view = view
                return event
            case Told(body=body):
                return read(self._actor, "events", body)
            case vocabulary.Heard(peer=peer, message=Own(body=body)):
                if self._view is None or self._view.member(peer) is None:
                    return None
                return Heard(peer=peer, message=read(self._actor, "messages", body))
            case _:
                raise TypeError(f"an actor of a user has no use for {type(event).__name__}")

    def _answer(self, effect: OwnEffect) -> Effect:
        match effect:
            case WakeAt():
                return effect
            case Send(peer=peer, message=message):
                own = Own(actor=self._actor.name, body=write(self._actor, "messages", message))
                return vocabulary.Send(peer=peer, message=own)
            case _:
                return Perform(body=write(self._actor, "effects", effect))
