"""The means that others make: which are fetched from whom.

The rules:

* Before the commit, a mean is fetched from its owner, who answers when it has made it, a few at a time from each owner.
  An owner that cannot be reached for a moment is asked again: a member that does not have the mean either would let us
  wait for it. A mean that its owner does not give is asked of the others in turn.
* Once it is committed, a mean that its owner does not give, or that has no number that we know, is fetched as the
  settled one, ``mean/round/chunk/(0, 0)``: from the leader first, then from the others in turn. They answer when they
  have settled it; so that a member that waits for it itself does not hold us up, the first tries are short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from prime_async.machines.attempt import SETTLED, mean_key, number_of
from prime_async.machines.fetches import Fetches
from prime_async.machines.vocabulary import Effect, FetchFault
from prime_async.messages import ChunkKey, View

SHORTENED = 3
"""The first try of a settled mean waits for 1/2^3 of the whole time, the next for twice as long, and so on."""


@dataclass(slots=True)
class Gathering:
    """See the module's rules. ``source`` has what is wanted: from whom."""

    me: str
    window: int
    fetches: Fetches
    source: dict[ChunkKey, str] = field(default_factory=dict)
    queue: dict[str, deque[ChunkKey]] = field(default_factory=dict)  # what is not asked for yet, by source
    under_way: dict[str, int] = field(default_factory=dict)  # source -> gets
    tries: dict[ChunkKey, int] = field(default_factory=dict)

    def want(self, peer: str, key: ChunkKey) -> None:
        self.source[key] = peer
        self.queue.setdefault(peer, deque()).append(key)

    def unwant(self, now: float, key: ChunkKey, out: list[Effect]) -> None:
        peer = self.source.pop(key, None)
        if peer is None:
            return
        queue = self.queue.get(peer)
        if queue is not None and key in queue:
            queue.remove(key)
            return
        if (peer, key) in self.fetches.under_way:
            self.under_way[peer] -= 1
        self.fetches.cancel(now, peer, key, out)

    def pump(self, now: float, out: list[Effect]) -> None:
        """Begin as much as the windows allow."""
        for peer, queue in list(self.queue.items()):
            while queue and self.under_way.get(peer, 0) < self.window:
                self.begin(now, peer, queue.popleft(), out)
            if not queue:
                del self.queue[peer]  # of a thousand sources, few have anything left to ask for

    def begin(self, now: float, peer: str, key: ChunkKey, out: list[Effect]) -> None:
        if peer == self.me:  # there is nobody to ask
            self.fetches.later(now, peer, key)
            return
        self.under_way[peer] = self.under_way.get(peer, 0) + 1
        tries = self.tries[key] = self.tries.get(key, 0) + 1
        whole = self.fetches.timeout_s
        timeout_s = whole / 2 ** max(0, SHORTENED + 1 - tries) if number_of(key) == SETTLED else whole
        self.fetches.begin(now, peer, key, out, timeout_s)

    def begin_again(self, now: float, peer: str, key: ChunkKey, view: View, out: list[Effect]) -> None:
        if peer == self.me or view.member(peer) is None:
            peer = self.source[key] = self.first_source(view)
        self.begin(now, peer, key, out)

    def replace_the_gone(self, now: float, view: View, here: Collection[str], out: list[Effect]) -> list[int]:
        """Once it is committed: the chunks that were to come from who is gone, and come as settled from another.

        ``here``: those that have not started anew since the plan; the others have not what they had.
        """
        gone = [k for k, peer in self.source.items() if peer != self.me and not self._can_give(k, peer, view, here)]
        for key in gone:
            self.unwant(now, key, out)
            self.want(self.first_source(view), mean_key(key.round, key.chunk, SETTLED))
        return [key.chunk for key in gone]

    @staticmethod
    def _can_give(key: ChunkKey, peer: str, view: View, here: Collection[str]) -> bool:
        return view.member(peer) is not None if number_of(key) == SETTLED else peer in here

    def waits_for(self, peer: str, key: ChunkKey) -> bool:
        return self.source.get(key) == peer

    def on_fetched(self, peer: str, key: ChunkKey) -> None:
        self.under_way[peer] -= 1
        del self.source[key]

    def on_failed(
        self, now: float, peer: str, key: ChunkKey, fault: FetchFault, view: View, *, committed: bool
    ) -> None:
        """Try again, a little later, as the rules say."""
        self.under_way[peer] -= 1
        settled = number_of(key) == SETTLED
        if committed and not settled:
            del self.source[key]
            key = mean_key(key.round, key.chunk, SETTLED)
            source = self.first_source(view)
        elif fault == "unreachable" and not settled and view.member(peer) is not None:
            source = peer
        else:
            source = self.next_source(view, peer)
        self.source[key] = source
        self.fetches.later(now, source, key)

    def is_stuck(self, view: View) -> bool:
        """Whether everybody was asked in vain for a settled mean, twice."""
        enough = 2 * len(self._turn(view))
        return any(number_of(key) == SETTLED and self.tries.get(key, 0) > enough for key in self.source)

    def first_source(self, view: View) -> str:
        return self._turn(view)[0]

    def next_source(self, view: View, tried: str) -> str:
        turn = self._turn(view)
        return turn[(turn.index(tried) + 1) % len(turn)] if tried in turn else turn[0]

    def _turn(self, view: View) -> list[str]:
        """The leader, then those that take part, then the other members; this node itself if there is nobody else."""
        ranked = (*view.active, *(m for m in view.members if not m.active))
        others = [m.id for m in ranked if m.id not in (self.me, view.leader)]
        return [view.leader, *others] if view.leader != self.me else others or [self.me]
