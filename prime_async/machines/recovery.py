"""What the new owner of a chunk does before it makes its mean again: it asks who holds one that was made before.

The rules:

* ``Ask`` goes to every member of the round's view that is still here, under the number that the chunks have now, and is
  repeated until each has answered with ``Held``, or has left.
* The highest number found stands, for each chunk. It is fetched from one who holds it; who leaves, or gives something
  invalid, or nothing, is passed over. If nobody is left who holds one, the chunk is reduced anew.
* So a mean that a quorum holds is not made again: some of those who hold it are asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from prime_async.machines.attempt import Number
from prime_async.machines.vocabulary import Effect, Send
from prime_async.messages import Ask, Held


@dataclass(slots=True)
class _Asking:
    chunks: set[int]
    answered: set[str] = field(default_factory=set)
    repeat_at: float = 0.0


@dataclass(slots=True)
class Recovery:
    """The asks of a round, by the number that they are made under, and what they found: (number, who) by chunk."""

    me: str
    round: int
    repeat_s: float
    asking: dict[Number, _Asking] = field(default_factory=dict)
    found: dict[int, set[tuple[Number, str]]] = field(default_factory=dict)

    def begin(self, chunk: int, number: Number) -> None:
        self.found.pop(chunk, None)
        self.asking.setdefault(number, _Asking(chunks=set())).chunks.add(chunk)

    def drop(self, chunk: int) -> None:
        self.found.pop(chunk, None)
        for number, asking in list(self.asking.items()):
            asking.chunks.discard(chunk)
            if not asking.chunks:
                del self.asking[number]

    def say(self, now: float, here: Sequence[str], out: list[Effect]) -> None:
        """Ask who has not answered, if it is time."""
        for (epoch, attempt), asking in sorted(self.asking.items()):
            if now < asking.repeat_at:
                continue
            asking.repeat_at = now + self.repeat_s
            ask = Ask(round=self.round, epoch=epoch, attempt=attempt, chunks=tuple(sorted(asking.chunks)))
            out += [Send(peer=peer, message=ask) for peer in here if peer not in asking.answered]

    def on_held(self, peer: str, held: Held) -> None:
        number = held.epoch, held.attempt
        asking = self.asking.get(number)
        if asking is None or held.round != self.round:
            return
        asking.answered.add(peer)
        for mean in held.means:
            if mean.chunk in asking.chunks and (mean.epoch, mean.attempt) <= number:
                self.found.setdefault(mean.chunk, set()).add(((mean.epoch, mean.attempt), peer))

    def take_answered(self, here: Sequence[str]) -> list[int]:
        """Chunks of which everybody who is here has said what it holds."""
        done = [n for n, asking in sorted(self.asking.items()) if asking.answered.issuperset(here)]
        return sorted(chunk for n in done for chunk in self.asking.pop(n).chunks)

    def source(self, chunk: int, here: Sequence[str]) -> tuple[str, Number] | None:
        """The highest number found, and who holds it: this node itself, or the first of ``here``."""
        candidates = [(number, peer) for number, peer in self.found.get(chunk, ()) if peer in here]
        if not candidates:
            return None
        number, peer = max(candidates, key=lambda c: (c[0], c[1] == self.me, -here.index(c[1])))
        return peer, number

    def rule_out(self, chunk: int, peer: str, number: Number) -> None:
        self.found.get(chunk, set()).discard((number, peer))

    @property
    def next_at(self) -> float | None:
        return min((a.repeat_at for a in self.asking.values()), default=None)
