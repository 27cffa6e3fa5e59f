"""The gets of an exchange machine: which are under way, and which are to be tried again, and when."""

from __future__ import annotations

from dataclasses import dataclass, field

from prime_async.machines.bandwidth import Meter
from prime_async.machines.vocabulary import CancelFetch, CancelFetches, Effect, Fetch
from prime_async.messages import ChunkKey


@dataclass(slots=True)
class Fetches:
    """An outcome of a get that is not under way here is that of one that was given up."""

    timeout_s: float
    retry_s: float
    meter: Meter = field(default_factory=Meter)
    under_way: set[tuple[str, ChunkKey]] = field(default_factory=set)
    again: list[tuple[float, str, ChunkKey]] = field(default_factory=list)

    def begin(self, now: float, peer: str, key: ChunkKey, out: list[Effect], timeout_s: float | None = None) -> None:
        self.under_way.add((peer, key))
        if key.kind == "contribution":
            self.meter.began(now, peer)
        out.append(Fetch(peer=peer, key=key, timeout_s=timeout_s or self.timeout_s))

    def ended(self, now: float, peer: str, key: ChunkKey, size: int = 0) -> bool:
        """Whether it was under way; it is not any more."""
        if (peer, key) not in self.under_way:
            return False
        self.under_way.discard((peer, key))
        if key.kind == "contribution":
            self.meter.ended(now, peer, size)
        return True

    def later(self, now: float, peer: str, key: ChunkKey) -> None:
        """Try again, or for the first time from this peer, a little later."""
        self.again.append((now + self.retry_s, peer, key))

    def due(self, now: float) -> list[tuple[str, ChunkKey]]:
        """What to try again now; it is the caller's to do."""
        due = [(peer, key) for at, peer, key in self.again if at <= now]
        self.again = [item for item in self.again if item[0] > now]
        return due

    def cancel(self, now: float, peer: str, key: ChunkKey, out: list[Effect]) -> None:
        """Give up one, be it under way, waiting to be tried again, or come and not used yet."""
        self.ended(now, peer, key)
        self.again = [item for item in self.again if item[1:] != (peer, key)]
        out.append(CancelFetch(peer=peer, key=key))

    def cancel_all(self, out: list[Effect]) -> None:
        """Give up all, and what they brought that was not used yet."""
        out.append(CancelFetches())
        self.under_way.clear()
        self.again.clear()
        self.meter = Meter()

    @property
    def next_at(self) -> float | None:
        return min((item[0] for item in self.again), default=None)
