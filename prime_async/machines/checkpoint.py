"""How a node gets the run's outer state when its own is another.

The rules:

* Membership says what the run's state is (``RunAt``). If ours is the same, training begins. Otherwise training is
  halted, the state's chunks are fetched from the provider, a few at a time, and put in their places.
* From the first chunk that is put in its place until all are, the outer state is nobody's: no other state is "ours".
* The outcome is compared with the digest that the leader named. Whatever goes wrong (the provider, which can be any
  member, moved on to the next round, left, or sent something else) ends in asking the leader anew: at once, and if
  nothing came before it went wrong again, after a pause. A provider that applies a round has no state to give. If the
  state is still the same, what came of it stays, unless its digest was another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import Struct

from prime_async.machines.facts import StateDiverged, StateFetched, StateFetchStarted
from prime_async.machines.units import to_ms
from prime_async.machines.vocabulary import (
    AskAgain,
    Begin,
    CancelFetches,
    ChunkImported,
    Effect,
    EndImport,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    FetchState,
    Halt,
    Halted,
    ImportChunk,
    Imported,
    Report,
    RunAt,
    StateAt,
    Tell,
    Tick,
    WakeAt,
)
from prime_async.messages import ChunkKey


class CheckpointSettings(Struct, frozen=True, kw_only=True):
    """What a checkpoint machine is made with."""

    chunk_count: int
    window: int = 4
    fetch_timeout_s: float = 60.0
    ask_again_s: float = 1.0


@dataclass(slots=True)
class Checkpoint:
    """See the module's rules. ``phase``: "settled", "asking", "halting", "fetching", "importing"."""

    settings: CheckpointSettings
    phase: str = "settled"
    own: tuple[int, bytes] | None = None
    target: RunAt | None = None
    waiting: list[int] = field(default_factory=list)  # chunks not asked for, the next last
    under_way: set[int] = field(default_factory=set)  # chunks asked for, or on their way to their places
    placed: set[int] = field(default_factory=set)  # chunks of ``placed_of`` that are in their places
    placed_of: tuple[int, bytes] | None = None
    halted: bool = False
    in_vain: bool = False  # since the last failure nothing came
    started_at: float = 0.0

    def handle(self, now: float, event: Event) -> list[Effect]:
        out: list[Effect] = []
        match event:
            case StateAt(round=round, digest=digest):
                self.own = (round, digest)
            case RunAt():
                self._on_run(now, event, out)
            case FetchState() if self.phase == "settled":
                self._ask_again(now, out)
            case Halted() if self.phase == "halting":
                self.halted = True
                self._begin_fetching(now, out)
            case Fetched(peer=peer, key=key) if self._wanted(key):
                self.own = None
                out.append(ImportChunk(peer=peer, key=key))
            case ChunkImported(key=key) if self._wanted(key):
                self.under_way.discard(key.chunk)
                self.placed.add(key.chunk)
                self.in_vain = False
                self._pump(out)
            case FetchFailed(key=key) if self._wanted(key):
                self._on_failed(now, out)
            case Imported(round=round, digest=digest) if self._is_target(round):
                self._on_imported(now, round, digest, out)
            case Tick() if self.phase == "asking":
                self._ask_again(now, out)
            case _:
                pass  # the outcome of something that was given up
        return out

    def _wanted(self, key: ChunkKey) -> bool:
        target = self.target
        return (
            self.phase == "fetching"
            and target is not None
            and key.kind == "state"
            and key.round == target.round
            and key.chunk in self.under_way
        )

    def _is_target(self, round: int) -> bool:
        """Not what was given up while it was being put together."""
        return self.phase == "importing" and self.target is not None and self.target.round == round

    def _on_run(self, now: float, run: RunAt, out: list[Effect]) -> None:
        busy = self.phase in ("halting", "fetching", "importing")
        if busy and self.target is not None and (run.round, run.digest) == (self.target.round, self.target.digest):
            return  # a repeated answer; a provider that fails is replaced when it does
        self.target = run
        if self.own == (run.round, run.digest):
            self._settle(out)
        elif self.halted:
            self._begin_fetching(now, out)
        else:
            self.phase = "halting"
            out.append(Tell(actor="training", event=Halt()))

    def _begin_fetching(self, now: float, out: list[Effect]) -> None:
        assert self.target is not None
        self.phase, self.started_at = "fetching", now
        state = (self.target.round, self.target.digest)
        if self.placed_of != state:
            self.placed, self.placed_of = set(), state
        self.waiting = [chunk for chunk in reversed(range(self.settings.chunk_count)) if chunk not in self.placed]
        if self.under_way:
            out.append(CancelFetches())
        self.under_way = set()
        out.append(Report(fact=StateFetchStarted(round=self.target.round, provider=self.target.provider)))
        self._pump(out)

    def _pump(self, out: list[Effect]) -> None:
        assert self.target is not None
        while self.waiting and len(self.under_way) < self.settings.window:
            chunk = self.waiting.pop()
            self.under_way.add(chunk)
            key = ChunkKey(kind="state", round=self.target.round, chunk=chunk)
            out.append(Fetch(peer=self.target.provider, key=key, timeout_s=self.settings.fetch_timeout_s))
        if not self.waiting and not self.under_way:
            self.phase = "importing"
            out.append(EndImport(round=self.target.round))

    def _on_imported(self, now: float, round: int, digest: bytes, out: list[Effect]) -> None:
        assert self.target is not None
        self.placed_of = None
        if digest != self.target.digest:
            fact = StateDiverged(
                peer=self.target.provider, round=round, ours=digest.hex(), theirs=self.target.digest.hex()
            )
            out.append(Report(fact=fact))
            self._ask_again(now, out)
            return
        self.own = (round, digest)
        out.append(Report(fact=StateFetched(round=round, seconds=to_ms(now - self.started_at))))
        at = StateAt(round=round, digest=digest)
        out += [Tell(actor="exchange", event=at), Tell(actor="membership", event=at)]
        self._settle(out)

    def _settle(self, out: list[Effect]) -> None:
        if self.under_way:  # before the first chunk came our own state turned out to be the run's
            out.append(CancelFetches())
            self.under_way = set()
        self.phase, self.halted = "settled", False
        assert self.own is not None
        out.append(Tell(actor="training", event=Begin(round=self.own[0])))

    def _on_failed(self, now: float, out: list[Effect]) -> None:
        if self.in_vain:
            self._give_up(out)
            out.append(WakeAt(at=now + self.settings.ask_again_s / 4))
        else:
            self.in_vain = True
            self._ask_again(now, out)

    def _give_up(self, out: list[Effect]) -> None:
        if self.under_way:
            out.append(CancelFetches())
        self.under_way, self.waiting = set(), []
        self.phase, self.target = "asking", None

    def _ask_again(self, now: float, out: list[Effect]) -> None:
        self._give_up(out)
        out.append(Tell(actor="membership", event=AskAgain()))
        out.append(WakeAt(at=now + self.settings.ask_again_s))
