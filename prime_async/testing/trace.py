"""Events and effects as lines that a person can read: digests by their first digits, views by their members."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from prime_async.machines.ballot import Ballot
from prime_async.machines.vocabulary import WakeAt
from prime_async.messages import ChunkKey, Member, View
from prime_async.testing.kernel import Record

SHORT_BYTES = 4


def lines_of(records: Iterable[Record]) -> list[str]:
    """One line for each event, and one for each of its effects but the wish to be woken."""
    lines = []
    for node, actor, now, event, effects in records:
        lines.append(f"{now:9.3f} {node} {actor} <- {text_of(event)}")
        lines += [f"{'':13}-> {text_of(effect)}" for effect in effects if not isinstance(effect, WakeAt)]
    return lines


def text_of(value: object) -> str:
    match value:
        case bytes():
            return value[:SHORT_BYTES].hex() + ("..." if len(value) > SHORT_BYTES else "")
        case ChunkKey():
            return str(value)
        case View():
            return text_of_view(value)
        case Ballot():
            view = f"{text_of_view(value.view)}, accepted in {value.accepted}" if value.view else "none"
            return f"promised {value.promised} to {value.promised_to}, {'' if value.decided else 'un'}decided {view}"
        case Member():
            return f"{value.id}/{value.incarnation}{_marks(value)}"
        case tuple():
            return f"({', '.join(map(text_of, value))})"
        case Struct():
            fields = [f"{name}={text_of(getattr(value, name))}" for name in value.__struct_fields__]
            return f"{type(value).__name__}({', '.join(fields)})"
        case _:
            return repr(value)


def text_of_view(view: View) -> str:
    """Its leader with a star; a member that is not active with a minus, one that has no vote with a tilde."""
    members = " ".join(("*" if m.id == view.leader else "") + text_of(m) for m in view.members)
    commit = view.commit.round if view.commit else None
    return f"view {view.number} of epoch {view.epoch} [{members}] commit {commit}"


def _marks(member: Member) -> str:
    return ("" if member.active else "-") + ("" if member.voter else "~")
