"""An actor of a user: it greets who comes, and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta, Struct

from prime_async.machines import vocabulary as v
from prime_async.machines.own import Heard, OwnActor, OwnEffect, OwnEvent, Send
from prime_async.machines.vocabulary import Tick, ViewChanged, WakeAt
from prime_async.messages import Own, View, encode


class Greeting(Struct, frozen=True, kw_only=True, tag=True):
    text: Annotated[str, Meta(max_length=16)]


class Count(Struct, frozen=True, kw_only=True, tag=True):
    seen: int


class Greet(Struct, frozen=True, kw_only=True, tag=True):
    """From the program: greet all others."""

    text: str


class Say(Struct, frozen=True, kw_only=True, tag=True):
    """To the program."""

    who: str
    text: str


@dataclass
class Greeter:
    """Greets all members when it is told to, and again a moment later; says who greeted it."""

    me: str
    view: View | None = None
    text: str = ""
    heard: int = 0

    def handle(self, now: float, event: OwnEvent) -> Sequence[OwnEffect]:
        match event:
            case ViewChanged(view=view):
                self.view = view
            case Greet(text=text):
                self.text = text
                return [*self._greet(), WakeAt(at=now + 0.05)]
            case Tick():
                return [*self._greet(), WakeAt(at=now + 0.05)]
            case Heard(peer=peer, message=Greeting(text=text)):
                self.heard += 1
                return [Say(who=peer, text=text)] if self.heard == 1 else []
            case _:
                pass
        return []

    def _greet(self) -> list[OwnEffect]:
        others = [m.id for m in self.view.members if m.id != self.me] if self.view else []
        return [Send(peer=peer, message=Greeting(text=self.text)) for peer in others]


def greeter(perform: Callable[[Any], None] = lambda _: None) -> OwnActor:
    return OwnActor(
        name="greeter", machine=Greeter, messages=Greeting | Count, events=Greet, effects=Say, perform=perform
    )


def heard(message: Struct | bytes, peer: str = "n1") -> v.Heard:
    body = message if isinstance(message, bytes) else encode(message)
    return v.Heard(peer=peer, message=Own(actor="greeter", body=body))
