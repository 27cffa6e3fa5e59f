"""When a node did what, in one exchange."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal, TypeAlias

import trio

from prime_async.bench.figures import Busy, Phases
from prime_async.messages import ChunkKey, Message
from prime_async.transport.base import Chunk, Notice, Provider, Traffic, Transport

Work: TypeAlias = Literal["encode", "contribution", "reduce", "mean", "state", "apply"]
PHASES: dict[str, Work] = {"contribution": "contribution", "mean": "mean"}


class Journal:
    """Begin and end of each piece of work of a round, from any thread, on the monotonic clock."""

    def __init__(self) -> None:
        self._entries: list[tuple[Work, float, float]] = []

    @contextmanager
    def entry(self, work: Work) -> Iterator[None]:
        """Write down what the block does, if it ends well."""
        began = time.monotonic()
        yield
        self._entries.append((work, began, time.monotonic()))

    def clear(self) -> None:
        """Before the next round."""
        self._entries = []

    def phases(self, began: float, ended: float) -> Phases:
        """Of a round of these bounds. What was over before the phase before it ended took no time."""
        marks = [began]
        for mark in (
            self._last("encode"),
            min((b for w, b, _ in self._entries if w in ("contribution", "mean")), default=began),
            self._last("contribution"),
            self._last("reduce"),
            self._last("mean"),
            min((b for w, b, _ in self._entries if w == "apply"), default=began),
            ended,
        ):
            marks.append(max(mark, marks[-1]))
        encode, plan, contributions, reduce, means, commit, apply = (
            after - before for before, after in pairwise(marks)
        )
        return Phases(
            encode=encode,
            plan=plan,
            contributions=contributions,
            reduce=reduce,
            means=means,
            commit=commit,
            apply=apply,
        )

    def busy(self) -> Busy:
        """Of the round so far."""
        return Busy(encode=self._sum("encode"), reduce=self._sum("reduce"), apply=self._sum("apply"))

    def _last(self, work: Work) -> float:
        return max((ended for w, _, ended in self._entries if w == work), default=0.0)

    def _sum(self, work: Work) -> float:
        return sum(ended - began for w, began, ended in self._entries if w == work)


class JournalTransport:
    """A transport whose gets are written down; everything else is the other transport's."""

    def __init__(self, inner: Transport, journal: Journal) -> None:
        self._inner = inner
        self._journal = journal

    @property
    def id(self) -> str:
        return self._inner.id

    @property
    def control_address(self) -> str:
        return self._inner.control_address

    @property
    def bulk_address(self) -> str:
        return self._inner.bulk_address

    @property
    def traffic(self) -> Traffic:
        return self._inner.traffic

    @property
    def notices(self) -> trio.MemoryReceiveChannel[Notice]:
        return self._inner.notices

    def locate(self, peer: str, host: str, port: int) -> str:
        return self._inner.locate(peer, host, port)

    def dial(self, peer: str, control: str, bulk: str) -> None:
        self._inner.dial(peer, control, bulk)

    def hang_up(self, peer: str) -> None:
        self._inner.hang_up(peer)

    def send(self, peer: str, message: Message) -> bool:
        return self._inner.send(peer, message)

    def accuse(self, peer: str, reason: str) -> None:
        self._inner.accuse(peer, reason)

    def serve(self, provider: Provider) -> None:
        self._inner.serve(provider)

    async def get(self, peer: str, key: ChunkKey, timeout_s: float) -> Chunk:
        with self._journal.entry(PHASES.get(key.kind, "state")):
            return await self._inner.get(peer, key, timeout_s)


def mean_of(rows: Sequence[Phases] | Sequence[Busy]) -> dict[str, float]:
    """Field by field."""
    fields = rows[0].__struct_fields__
    return {name: sum(getattr(row, name) for row in rows) / len(rows) for name in fields}
