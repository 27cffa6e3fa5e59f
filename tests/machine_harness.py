"""What the tests of the machines have in common: members, views, and effects by kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from prime_async.machines.facts import Fact
from prime_async.machines.vocabulary import Effect, Event, Report, Send, Tell
from prime_async.messages import ChunkInfo, ChunkKey, Commit, Member, Message, View

E = TypeVar("E", bound=Effect)
F = TypeVar("F", bound=Fact)
M = TypeVar("M", bound=Message)

LINEAGE = b"l" * 32


def member(
    id: str,
    *,
    active: bool = True,
    incarnation: int = 1,
    weight: int = 1,
    witness: bool = False,
    voter: bool = False,
    reachable: bool = False,
    rejected: int = 0,
) -> Member:
    return Member(
        id=id,
        name=id,
        incarnation=incarnation,
        control=f"sim://{id}",
        bulk=f"sim://{id}",
        weight=weight,
        active=active,
        witness=witness,
        voter=voter,
        reachable=reachable,
        rejected=rejected,
    )


def full_member(
    id: str, *, active: bool = True, incarnation: int = 1, weight: int = 1, witness: bool = False, rejected: int = 0
) -> Member:
    """One that has completed a round and can be dialled."""
    return member(
        id,
        active=active,
        incarnation=incarnation,
        weight=weight,
        witness=witness,
        voter=active,
        reachable=True,
        rejected=rejected,
    )


def view(number: int, *members: Member, leader: str = "n0", epoch: int = 1, commit: Commit | None = None) -> View:
    return View(
        lineage=LINEAGE,
        previous=bytes(32),
        epoch=epoch,
        number=number,
        leader=leader,
        members=members,
        commit=commit,
    )


def of(kind: type[E], effects: Iterable[Effect]) -> list[E]:
    return [e for e in effects if isinstance(e, kind)]


def facts(kind: type[F], effects: Iterable[Effect]) -> list[F]:
    return [e.fact for e in effects if isinstance(e, Report) and isinstance(e.fact, kind)]


def told(effects: Iterable[Effect], actor: str) -> list[Event]:
    return [e.event for e in effects if isinstance(e, Tell) and e.actor == actor]


def sent(effects: Iterable[Effect], kind: type[M]) -> list[tuple[str, M]]:
    return [(e.peer, e.message) for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def key(kind: str, chunk: int, *, round: int = 0, epoch: int = 0, attempt: int = 0) -> ChunkKey:
    assert kind in ("contribution", "mean", "state")
    return ChunkKey(kind=kind, round=round, chunk=chunk, epoch=epoch, attempt=attempt)  # type: ignore[arg-type]


def info(fill: int) -> ChunkInfo:
    """A chunk whose digest is 32 times the byte ``fill``."""
    return ChunkInfo(digest=bytes([fill]) * 32)
