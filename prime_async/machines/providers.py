"""Which member gives what of the ledger, and how much is asked of each at once.

The rules:

* Every member is asked what it has on disk (``AskLedger``), again and again while something is missing.
* Each gives a few chunks at a time, and the next when one has come: so each gives as much as it can deliver.
* When nothing is left to ask for, a member that has nothing to do is asked for what another was asked for and has not
  come to yet, or is slow with: for twice as long as this one needed for its last. The first to come counts, and the
  other is told to leave it.
* No more is asked for while too many chunks that came are not in their place yet: where the disk is slower than the
  network, memory does not fill up.
* Who says that a chunk is gone is not asked for it again before it has said anew what it has. Who is late or cannot be
  reached is left alone for a while. Who sends what does not fit is not asked any more, unless nobody else is left: an
  honest node whose state was damaged in memory may have written a snapshot of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from prime_async.machines.vocabulary import CancelFetch, CancelFetches, Effect, Fetch, FetchFault
from prime_async.messages import ChunkKey, Holdings, View

LOOK_AHEAD = 64
"""So many of the chunks that are wanted are looked at for one that a member with time has."""
MAX_PLACING = 16
"""Chunks that have come and are not in their place yet. Those that are under way then may still come."""


@dataclass(slots=True)
class Providers:
    """The members, and what they have."""

    me: str
    window: int
    pause_s: float
    members: tuple[str, ...] = ()
    holdings: dict[str, Holdings] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)  # gets under way
    needed_s: dict[str, float] = field(default_factory=dict)  # for the last chunk that came
    away_until: dict[str, float] = field(default_factory=dict)
    gone: set[tuple[str, ChunkKey]] = field(default_factory=set)
    liars: set[str] = field(default_factory=set)

    def see(self, view: View) -> None:
        self.members = tuple(m.id for m in view.members if m.id != self.me)
        self.holdings = {id: h for id, h in self.holdings.items() if id in self.members}

    def heard(self, peer: str, holdings: Holdings) -> None:
        if peer in self.members:
            self.holdings[peer] = holdings
            self.gone = {item for item in self.gone if item[0] != peer}

    def has(self, peer: str, key: ChunkKey) -> bool:
        """Whether it has said so."""
        holdings = self.holdings.get(peer)
        if holdings is None or peer in self.liars or (peer, key) in self.gone:
            return False
        if key.kind in ("state", "manifest"):
            return key.round in holdings.snapshots or (holdings.state and key.round == holdings.round)
        if holdings.means_from <= key.round < holdings.round:
            return True
        return any(stretch.first <= key.round < stretch.end for stretch in holdings.above)

    def somebody_has(self, key: ChunkKey) -> bool:
        return any(self.has(peer, key) for peer in self.members)

    @property
    def snapshots(self) -> list[int]:
        """Rounds of which somebody has a snapshot, ascending. (What a member has in memory is gone a round later.)"""
        trusted = [h for peer, h in self.holdings.items() if peer not in self.liars]
        return sorted({round for h in trusted for round in h.snapshots})

    def free(self, now: float) -> list[str]:
        """Those that can be asked for something now, the least busy first."""
        able = [p for p in self.members if p in self.holdings and p not in self.liars]
        able = [p for p in able if self.away_until.get(p, now) <= now and self.busy.get(p, 0) < self.window]
        return sorted(able, key=lambda p: self.busy.get(p, 0))

    def blame(self, now: float, peer: str, key: ChunkKey, fault: FetchFault) -> None:
        if fault == "gone":
            self.gone.add((peer, key))
        elif fault == "invalid":
            self.liars.add(peer)
        else:
            self.away_until[peer] = now + self.pause_s


@dataclass(slots=True)
class Download:
    """Gets of the ledger's chunks from whoever has them.

    ``wanted``: until it is where it belongs (``done``). ``placing``: the chunks of these that have come.
    """

    providers: Providers
    timeout_s: float
    waiting: deque[ChunkKey] = field(default_factory=deque)
    under_way: dict[ChunkKey, dict[str, float]] = field(default_factory=dict)  # who is asked, at most two, since when
    wanted: set[ChunkKey] = field(default_factory=set)
    placing: set[ChunkKey] = field(default_factory=set)
    bytes_come: int = 0

    def want(self, keys: Iterable[ChunkKey], *, first: bool = False) -> None:
        """Get these; ``first``: before all else."""
        new = [k for k in keys if k not in self.wanted]
        self.wanted.update(new)
        if first:
            self.waiting.extendleft(reversed(new))
        else:
            self.waiting.extend(new)

    def pump(self, now: float, out: list[Effect]) -> None:
        """Ask for as much as the windows allow, unless what came has not been placed."""
        if len(self.placing) >= MAX_PLACING:
            return
        while self.waiting:
            chosen = self._choose(now)
            if chosen is None:
                return
            at, peer = chosen
            key = self.waiting[at]
            del self.waiting[at]
            self._ask(now, peer, key, out)
        self._ask_again_at_the_end(now, out)

    def _ask(self, now: float, peer: str, key: ChunkKey, out: list[Effect]) -> None:
        self.under_way.setdefault(key, {})[peer] = now
        self.providers.busy[peer] = self.providers.busy.get(peer, 0) + 1
        out.append(Fetch(peer=peer, key=key, timeout_s=self.timeout_s))

    def _ask_again_at_the_end(self, now: float, out: list[Effect]) -> None:
        for idle in [p for p in self.providers.free(now) if not self.providers.busy.get(p)]:
            needed_s = self.providers.needed_s.get(idle, math.inf)
            for key, asked in reversed(self.under_way.items()):
                (peer, since), *others = asked.items()
                late = self.providers.busy[peer] > 1 or now - since > 2 * needed_s
                if late and not others and _is_chunk(key) and self.providers.has(idle, key):
                    self._ask(now, idle, key, out)
                    break

    def _choose(self, now: float) -> tuple[int, str] | None:
        free = self.providers.free(now)
        if not free:
            return None
        for at in range(min(LOOK_AHEAD, len(self.waiting))):
            peer = next((p for p in free if self.providers.has(p, self.waiting[at])), None)
            if peer is not None:
                return at, peer
        return None

    def came(self, now: float, peer: str, key: ChunkKey, size: int, out: list[Effect]) -> bool:
        """Whether it was asked for. Who else was asked for it need not send it any more."""
        since = self.under_way.get(key, {}).get(peer)
        if since is None:
            return False
        self._ended(peer, key)
        self.providers.needed_s[peer] = now - since
        for other in tuple(self.under_way.get(key, ())):
            out.append(CancelFetch(peer=other, key=key))
            self._ended(other, key)
        self.bytes_come += size
        if _is_chunk(key):
            self.placing.add(key)
        return True

    def done(self, key: ChunkKey) -> None:
        """It is where it belongs."""
        self.wanted.discard(key)
        self.placing.discard(key)

    def drop(self, key: ChunkKey) -> None:
        """It was here all the time: nobody else is asked for it."""
        self.wanted.discard(key)
        if key in self.waiting:
            self.waiting.remove(key)

    def failed(self, now: float, peer: str, key: ChunkKey, fault: FetchFault) -> None:
        """It did not come, or had come and was found to be wrong: ask another."""
        came = key in self.wanted and key not in self.under_way and key not in self.waiting
        self.placing.discard(key)
        if self._ended(peer, key) or came:
            self.providers.blame(now, peer, key, fault)
            if key not in self.under_way and key in self.wanted:
                self.waiting.appendleft(key)

    def _ended(self, peer: str, key: ChunkKey) -> bool:
        asked = self.under_way.get(key, {})
        if asked.pop(peer, None) is None:
            return False
        if not asked:
            del self.under_way[key]
        self.providers.busy[peer] -= 1
        return True

    def leave_the_gone(self, out: list[Effect]) -> None:
        """Ask others for what was asked of who is not a member any more."""
        for key, peer in [(k, p) for k, p in self._asked if p not in self.providers.members]:
            out.append(CancelFetch(peer=peer, key=key))
            self._ended(peer, key)
            if key not in self.under_way:
                self.waiting.appendleft(key)

    @property
    def _asked(self) -> list[tuple[ChunkKey, str]]:
        return [(key, peer) for key, peers in self.under_way.items() for peer in peers]

    def forget(self, round: int, out: list[Effect]) -> None:
        """What is of ``round``."""
        for key, peer in [(k, p) for k, p in self._asked if k.round == round]:
            out.append(CancelFetch(peer=peer, key=key))
            self._ended(peer, key)
        self.waiting = deque(key for key in self.waiting if key.round != round)
        self.wanted = {key for key in self.wanted if key.round != round}
        self.placing = {key for key in self.placing if key.round != round}

    def give_up(self, out: list[Effect]) -> None:
        """All of it. What has come and is still being placed counts no more."""
        if self.under_way:
            out.append(CancelFetches())
        for key, peer in self._asked:
            self._ended(peer, key)
        self.waiting.clear()
        self.wanted.clear()
        self.placing.clear()


def _is_chunk(key: ChunkKey) -> bool:
    """Of a state or of means; records and manifests are small, and are read at once."""
    return key.kind in ("state", "mean")
