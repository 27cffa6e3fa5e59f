"""An owner's part of a round: the means that this node makes.

The rules:

* A few chunks at a time, in chunk order, are opened: their contributions are fetched from every contributor, and when
  all are here the chunk is reduced. The first owner of a chunk does so at once; a later one asks first (``Recovery``),
  and adopts a mean that was found under its own number instead.
* A contributor that leaves the view, says that its bytes are gone, does not serve them in time, or serves invalid
  ones, is left out of the chunks that are still open. One that cannot be reached for a moment is asked again.
* A mean of nobody's contribution is never made: a chunk of which all are left out is opened again a little later. But
  bytes that were gone or invalid once stay so, and are not asked for again: a chunk for which nothing else is left is
  hopeless, and the leader is told.
* A chunk that goes to another owner is given up. If it is being reduced, the outcome is known under its old number, for
  the new owner to ask for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from prime_async.machines.attempt import Attempt, Means, Number, mean_key, number_of
from prime_async.machines.facts import ContributorLeftOut
from prime_async.machines.fetches import Fetches
from prime_async.machines.recovery import Recovery
from prime_async.machines.vocabulary import AdoptMean, Effect, FetchFault, Reduce, Reduced, Report
from prime_async.messages import ChunkInfo, ChunkKey, Held


@dataclass(slots=True)
class Reducing:
    """See the module's rules. ``own_here``: this node's own contribution is here, and is the one that was planned."""

    me: str
    window: int
    attempt: Attempt
    means: Means
    fetches: Fetches
    recovery: Recovery
    own_here: bool = False
    to_open: deque[int] = field(default_factory=deque)
    awaited: dict[int, set[str]] = field(default_factory=dict)  # open chunk -> contributors still fetched
    left_out: dict[int, set[str]] = field(default_factory=dict)  # open chunk -> contributors
    useless: dict[int, set[str]] = field(default_factory=dict)  # chunk -> contributors whose bytes are gone or invalid
    hopeless: set[int] = field(default_factory=set)  # chunks that only such are left for
    adopting: dict[int, tuple[str, Number]] = field(default_factory=dict)  # chunk -> from whom, made under what
    making: dict[ChunkKey, tuple[str, ...]] = field(default_factory=dict)  # mean being reduced -> contributors
    starved: list[tuple[float, int]] = field(default_factory=list)  # when to open again what had no contribution

    # --- which chunks -------------------------------------------------------------------------------------------

    def own(self, chunk: int) -> None:
        if self.attempt.is_first(chunk):
            self.to_open.append(chunk)
        else:
            self.recovery.begin(chunk, self.attempt.numbers[chunk])

    def disown(self, now: float, chunk: int, out: list[Effect]) -> None:
        if chunk in self.to_open:
            self.to_open.remove(chunk)
        self.starved = [item for item in self.starved if item[1] != chunk]
        self.hopeless.discard(chunk)
        self.recovery.drop(chunk)
        if chunk in self.awaited:
            left_out = self.left_out.pop(chunk)
            del self.awaited[chunk]
            for peer in self.attempt.weights:
                if peer != self.me and peer not in left_out:
                    self.fetches.cancel(now, peer, self.attempt.contribution(peer, chunk), out)
        if chunk in self.adopting:
            peer, number = self.adopting.pop(chunk)
            self.fetches.cancel(now, peer, mean_key(self.attempt.round, chunk, number), out)

    def stop(self, now: float, out: list[Effect]) -> None:
        """Give up whatever is not made yet."""
        asked_for = [c for asking in self.recovery.asking.values() for c in asking.chunks]
        starved = [chunk for _, chunk in self.starved]
        for chunk in sorted({*self.to_open, *self.awaited, *self.adopting, *asked_for, *starved, *self.hopeless}):
            self.disown(now, chunk, out)

    def pump(self, now: float, here: Sequence[str], offering: Sequence[str], out: list[Effect]) -> None:
        """Begin as much as the window allows. ``here``, ``offering``: of the members, and of the contributors."""
        self.recovery.say(now, here, out)
        self.to_open.extend(self.recovery.take_answered(here))
        self.to_open.extend(chunk for at, chunk in self.starved if at <= now)
        self.starved = [item for item in self.starved if item[0] > now]
        while self.to_open and len(self.awaited) + len(self.adopting) + len(self.making) < self.window:
            self._open(now, self.to_open.popleft(), here, offering, out)

    def _open(self, now: float, chunk: int, here: Sequence[str], offering: Sequence[str], out: list[Effect]) -> None:
        source = self.recovery.source(chunk, here)
        if source is None:
            self._open_anew(now, chunk, offering, out)
        elif source[0] == self.me:
            self._adopt(chunk, source[1], out)
        else:
            self.adopting[chunk] = source
            self.fetches.begin(now, source[0], mean_key(self.attempt.round, chunk, source[1]), out)

    def _open_anew(self, now: float, chunk: int, offering: Sequence[str], out: list[Effect]) -> None:
        present = {p for p in offering if p != self.me or self.own_here}
        useless = self.useless.get(chunk, set()) & present
        if useless and useless == present:
            self.hopeless.add(chunk)
            return
        self.left_out[chunk] = set(useless)
        self.awaited[chunk] = {p for p in self.attempt.weights if p != self.me and p not in useless}
        for peer in self.attempt.weights:
            if peer not in present:
                self._leave_out(chunk, peer, "left the run", out)
            elif peer != self.me and peer not in useless:
                self.fetches.begin(now, peer, self.attempt.contribution(peer, chunk), out)
        self._reduce_if_all_here(now, chunk, out)

    @property
    def unusable(self) -> set[str]:
        """Whose contributions leave a chunk without any."""
        return {peer for chunk in self.hopeless for peer in self.useless[chunk]}

    # --- what comes ---------------------------------------------------------------------------------------------

    def on_held(self, peer: str, held: Held) -> None:
        self.recovery.on_held(peer, held)

    def waits_for(self, peer: str, key: ChunkKey) -> bool:
        """Whether this key is fetched from ``peer`` to make a mean, or as one."""
        if key.kind == "contribution":
            return peer in self.awaited.get(key.chunk, ())
        return self.adopting.get(key.chunk) == (peer, number_of(key))

    def on_fetched(self, now: float, peer: str, key: ChunkKey, info: ChunkInfo, out: list[Effect]) -> None:
        if key.kind == "contribution":
            self.awaited[key.chunk].discard(peer)
            self._reduce_if_all_here(now, key.chunk, out)
        else:
            del self.adopting[key.chunk]
            self.means.add(key.chunk, number_of(key), info)
            self._adopt(key.chunk, number_of(key), out)

    def on_failed(self, now: float, peer: str, key: ChunkKey, fault: FetchFault, out: list[Effect]) -> None:
        if fault == "unreachable":
            self.fetches.later(now, peer, key)
        elif key.kind == "contribution":
            if fault != "late":
                self.useless.setdefault(key.chunk, set()).add(peer)
            self._leave_out(key.chunk, peer, fault, out)
            self._reduce_if_all_here(now, key.chunk, out)
        else:
            self._pass_over(key.chunk)

    def on_reduced(self, now: float, event: Reduced, out: list[Effect]) -> None:
        key = event.key
        contributors = self.making.pop(key, None)
        if contributors is None:
            return
        self.useless.setdefault(key.chunk, set()).update(event.left_out)
        for peer in event.left_out:
            fact = ContributorLeftOut(round=key.round, chunk=key.chunk, peer=peer, reason="its bytes are not valid")
            out.append(Report(fact=fact))
        if not set(contributors) <= set(event.left_out):
            self.means.add(key.chunk, number_of(key), event.info)
        elif key == self.attempt.key(key.chunk):
            self.starved.append((now + self.fetches.retry_s, key.chunk))

    def leave_out_the_gone(self, now: float, here: Sequence[str], offering: Sequence[str], out: list[Effect]) -> None:
        gone = set(self.attempt.weights) - set(offering)
        for chunk in sorted(self.awaited):
            for peer in [p for p in self.attempt.weights if p in self.awaited[chunk] and p in gone]:
                self.fetches.cancel(now, peer, self.attempt.contribution(peer, chunk), out)
                self._leave_out(chunk, peer, "left the run", out)
            self._reduce_if_all_here(now, chunk, out)
        for chunk, (peer, number) in sorted(self.adopting.items()):
            if peer not in here:
                self.fetches.cancel(now, peer, mean_key(self.attempt.round, chunk, number), out)
                self._pass_over(chunk)

    # --- steps --------------------------------------------------------------------------------------------------

    def _pass_over(self, chunk: int) -> None:
        peer, number = self.adopting.pop(chunk)
        self.recovery.rule_out(chunk, peer, number)
        self.to_open.appendleft(chunk)

    def _adopt(self, chunk: int, number: Number, out: list[Effect]) -> None:
        info = self.means.held[chunk][number]
        if number != self.attempt.numbers[chunk]:
            found = mean_key(self.attempt.round, chunk, number)
            out.append(AdoptMean(found=found, key=self.attempt.key(chunk)))
        self.means.add(chunk, self.attempt.numbers[chunk], info)

    def _leave_out(self, chunk: int, peer: str, reason: str, out: list[Effect]) -> None:
        self.awaited[chunk].discard(peer)
        self.left_out[chunk].add(peer)
        fact = ContributorLeftOut(round=self.attempt.round, chunk=chunk, peer=peer, reason=reason)
        out.append(Report(fact=fact))

    def _reduce_if_all_here(self, now: float, chunk: int, out: list[Effect]) -> None:
        if self.awaited[chunk]:
            return
        del self.awaited[chunk]
        left_out = self.left_out.pop(chunk)
        in_it = {p: w for p, w in self.attempt.weights.items() if p not in left_out}
        if not in_it:
            self.starved.append((now + self.fetches.retry_s, chunk))
            return
        key = self.attempt.key(chunk)
        self.making[key] = tuple(in_it)
        rejected = tuple(self.attempt.rejected[p] for p in in_it)
        reduce = Reduce(
            key=key,
            contributors=tuple(in_it),
            weights=tuple(in_it.values()),
            members=self.attempt.members,
            rejected=rejected if any(rejected) else (),
        )
        out.append(reduce)

    @property
    def next_at(self) -> float | None:
        times = [at for at, _ in self.starved]
        if self.recovery.next_at is not None:
            times.append(self.recovery.next_at)
        return min(times, default=None)
