"""How a node comes to the run's outer state, keeps it on disk, and tells others what it has.

The outer state is event-sourced: a snapshot, and the means of every round since (:mod:`~prime_async.machines.keeping`).

The rules:

* The run's state is what the newest commit leads to; the commits' chain, and no show of hands, says what that is. For
  the state after the newest commit there is no commit yet: until there is, the leader's word (``RunAt``) counts.
* A node that is behind halts its training, gets onto its disk what it lacks (:mod:`~prime_async.machines.catchup`), and
  takes the outer steps one after the other. It fetches the means that it missed, as long as members have them; or a
  snapshot with the means since, if that is fewer bytes, or its own state is of another history. Rounds that pass in the
  meantime are means to fetch like all others.
* A run may begin with a state that comes from elsewhere, whose digest (``initial``) all nodes know: above it nobody's
  word counts. Who has it not gets it from a member, and does not begin with the means of the first rounds alone.
* A node whose state is at the run's round, and another, fetches the digests of all chunks, and then the chunks that
  differ. What it takes steps with meanwhile goes wrong in the same chunks alone.
* Means that are on disk, and prove to be those of the newest commit, are not fetched.
* What is read from disk and is damaged is fetched again. A disk that is full is told of; training goes on.
* A member that asks what is here is told what is on disk, once this node's state is the run's; and before, what is
  known to be of the run's history: nodes that are all behind may have together what none of them has alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from prime_async.machines.catchup import CatchUp, manifest_key, record_key, state_key
from prime_async.machines.facts import (
    CatchingUp,
    CatchUpStarted,
    CaughtUp,
    LedgerTrouble,
    SnapshotWritten,
    StateDiverged,
    StateMended,
    StateNowhere,
)
from prime_async.machines.fragments import Fragments
from prime_async.machines.keeping import Keeping, leads_to, means_from
from prime_async.machines.providers import Download, Providers
from prime_async.machines.records import Records
from prime_async.machines.units import to_ms
from prime_async.machines.vocabulary import (
    AdoptRound,
    Advance,
    AskAgain,
    Begin,
    ChunkImported,
    ChunkStored,
    Effect,
    EndImport,
    Event,
    Fetched,
    FetchFailed,
    FetchState,
    Halt,
    Halted,
    Heard,
    ImportChunk,
    Imported,
    LedgerAt,
    LedgerFailed,
    LoadSnapshot,
    ManifestRead,
    ReadManifest,
    ReadRecord,
    RecordRead,
    Report,
    RoundOpened,
    RoundStored,
    RunAt,
    Send,
    SnapshotOpened,
    SnapshotStored,
    StateAt,
    StoreChunk,
    Tell,
    Tick,
    ViewChanged,
    WakeAt,
    WriteSnapshot,
)
from prime_async.messages import FIRST_CHAIN, AskLedger, ChunkKey, Commit, Holdings, Message, View, next_chain

FORGIVEN_AFTER = 5
"""After so many times of asking in vain those are asked too who sent what does not fit: theirs may be mended."""
NOWHERE_AFTER = 10
"""After so many times of asking in vain it is said that nobody has what is missing."""


TELL_EVERY_S = 10.0
"""How often a node that catches up says how far it is."""
WRITE_AGAIN_S = 30.0
"""So long after a snapshot could not be written it is tried again: no round may end before there is one."""


class CheckpointSettings(Struct, frozen=True, kw_only=True):
    """What a checkpoint machine is made with. ``mean_bytes``: of the chunks of a round together.

    ``state_bytes``: of all chunks. ``fragments``: a round exchanges one of so many.

    ``window``: gets under way from each member. ``keep_snapshots`` is at least 1. ``initial``: the digest of the state
    that the run begins with, if that comes from elsewhere; empty: every node begins with it.
    """

    me: str
    chunk_count: int
    fragments: int = 1
    mean_bytes: int = 1
    state_bytes: int = 8
    window: int = 2
    fetch_timeout_s: float = 60.0
    ask_again_s: float = 1.0
    snapshot_every: int = 10
    keep_snapshots: int = 2
    keep_rounds: int = 20
    initial: bytes = b""


@dataclass(slots=True)
class Repair:
    """Chunks of the outer state after ``round`` rounds that are fetched anew. ``missing`` ``None``: which, is open."""

    round: int
    missing: set[int] | None = None
    total: int = 0
    before: bytes = b""


@dataclass(slots=True)
class Checkpoint:
    """See the module's rules. ``phase``: "starting" (it is not known where the run is), "settled", "working".

    ``busy``: the outer state is being changed for us: "loading", "advancing", "importing".
    """

    settings: CheckpointSettings
    phase: str = "starting"
    busy: str = ""
    own: StateAt | None = None
    told: StateAt | None = None  # the state of this node that the other machines know
    view: View | None = None
    run: RunAt | None = None
    disk: LedgerAt = field(default_factory=LedgerAt)
    halting: bool = False
    halted: bool = False
    torn: bool = False  # the outer state is nobody's: some chunks are imported and others not
    wrong: bool = False  # it is known not to be the run's
    stranger: bool = False  # it is of another history than the run's
    base: tuple[str, int] | None = None  # what the catching up begins with: "own" or "snapshot", and its round
    repair: Repair | None = None
    adopting: int = -1  # the round whose pending means are taken for committed
    writing: int = -1  # the round of the snapshot that is being written
    write_again_at: float | None = None  # since one could not be
    coming: int = -1  # the round whose means, applied by training, may be on their way to the disk
    seen: int = -1  # the newest round whose means, which led to our state, have been on disk, or could not be put there
    floor: int = 0  # what is on disk of earlier rounds does not lead to our state
    started_at: float = 0.0
    said_at: float = 0.0  # how far the catching up is
    asked_at: float | None = None
    asked_in_vain: int = 0
    paused_until: float = 0.0
    wake_at: float | None = None
    providers: Providers = field(init=False)
    download: Download = field(init=False)
    catch_up: CatchUp = field(init=False)
    keeping: Keeping = field(init=False)

    def __post_init__(self) -> None:
        s = self.settings
        self.providers = Providers(me=s.me, window=s.window, pause_s=5 * s.ask_again_s)
        self.download = Download(providers=self.providers, timeout_s=s.fetch_timeout_s)
        self.catch_up = CatchUp(download=self.download, records=Records(Fragments(s.chunk_count, s.fragments)))
        given = s.initial != b""
        self.keeping = Keeping(every=s.snapshot_every, snapshots=s.keep_snapshots, rounds=s.keep_rounds, given=given)

    # --- the one way in -----------------------------------------------------------------------------------------

    def handle(self, now: float, event: Event) -> list[Effect]:
        out: list[Effect] = []
        match event:
            case StateAt():
                self._on_own(event, out)
            case LedgerAt():
                self.disk, self.catch_up.on_disk = event, frozenset(event.means)
                self._see()
                given = self.keeping.given
                if self.own is not None and not leads_to(self.own.round, self.floor, self.disk, self.seen, given):
                    self._write_if_due(out)
                self._tidy(out)
            case ViewChanged(view=view):
                self.view = view
                self.providers.see(view)
                self.download.leave_the_gone(out)
            case RunAt():
                self.run = replace(event, digest=self.settings.initial or event.digest) if event.round == 0 else event
                if self.phase == "starting" or not (self._is_right or self._is_next):
                    self._begin(now)
            case FetchState():
                self._begin(now)
            case Halted():
                self.halted, self.halting = self.halting, False
            case Heard(peer=peer, message=message):
                self._on_message(peer, message, out)
            case Tick():
                self.wake_at = None
            case SnapshotStored(round=round) if round == self.writing:
                self._on_written(round, out)
            case LedgerFailed():
                self._on_ledger_failed(now, event, out)
            case _:
                self._on_outcome(now, event, out)
        self._go_on(now, out)
        self._write_again(now, out)
        return out

    def _on_own(self, at: StateAt, out: list[Effect]) -> None:
        """Training has a new outer state, or begins with the one that was on disk."""
        self.coming = at.round - 1 if self.own is not None and self.seen < at.round - 1 else -1
        self.own = self.told = at
        self.wrong = False
        self._see()
        self._write_if_due(out)

    def _see(self) -> None:
        """Which means have come to the disk: they are not on their way there any more."""
        if self.own is not None:
            self.seen = max([self.seen, *(r for r in self.disk.means if r < self.own.round)])

    def _on_message(self, peer: str, message: Message, out: list[Effect]) -> None:
        if peer not in self.providers.members:
            return
        if isinstance(message, Holdings):
            self.providers.heard(peer, message)
        elif isinstance(message, AskLedger) and (holdings := self._holdings) is not None:
            out.append(Send(peer=peer, message=holdings))

    @property
    def _holdings(self) -> Holdings | None:
        """What is here for others: if we are behind, what is known to be of the run's history; ``None`` if nothing."""
        own, settled = self.own, self.phase == "settled"
        if own is None or self.phase == "starting":
            return None
        proven = settled or self._is_proven
        right = settled or (proven and not self.wrong)
        first = means_from(own.round, self.floor, self.disk, self.coming) if proven else own.round
        snapshots = tuple(s for s in self.disk.snapshots if self.floor <= s <= own.round and right)
        above = () if settled else self.catch_up.verified(own.round, self._goal)
        if not settled and first == own.round and not snapshots and not above:
            return None
        return Holdings(round=own.round, means_from=first, snapshots=snapshots, state=right, above=above)

    @property
    def _is_proven(self) -> bool:
        """Whether the commits that led to our state are known to be the run's."""
        own = self.own
        if own is None or self.torn or self.stranger:
            return False
        return self._is_next or own.chain == self.catch_up.records.chain_before(own.round)

    # --- where the run is ---------------------------------------------------------------------------------------

    @property
    def _commit(self) -> Commit | None:
        return self.view.commit if self.view else None

    @property
    def _goal(self) -> int:
        """The round of the run's state."""
        return self._commit.round + 1 if self._commit else 0

    @property
    def _goal_chain(self) -> bytes:
        return self._commit.chain if self._commit else FIRST_CHAIN

    def _expected(self, round: int) -> bytes | None:
        """The digest of the run's state after ``round`` rounds, as far as it is known."""
        record, commit = self.catch_up.records.linked(round), self._commit
        if round == 0 and self.settings.initial:
            return self.settings.initial
        if record is not None:
            return record.commit.state
        if commit is not None and commit.round == round:
            return commit.state
        return self.run.digest if self.run is not None and self.run.round == round else None

    @property
    def _is_right(self) -> bool:
        """Whether our state is the run's, as far as can be told."""
        own = self.own
        if own is None or self.view is None or self.torn or self.wrong or self.stranger:
            return False
        if self._expected(own.round) not in (own.digest, None):
            return False
        return own.round == self._goal and own.chain == self._goal_chain

    @property
    def _is_next(self) -> bool:
        """Whether our state is that which the newest commit is about: exchange and training will see to it."""
        own, commit = self.own, self._commit
        if own is None or commit is None or self.torn or (own.round, own.digest) != (commit.round, commit.state):
            return False
        return next_chain(own.chain, commit.state, commit.digest) == commit.chain

    # --- beginning and ending -----------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        if self.phase == "working":
            return
        self.phase, self.started_at, self.said_at = "working", now, now
        self.asked_at, self.asked_in_vain, self.base, self.stranger = None, 0, None, False
        self.download.bytes_come = 0

    def _go_on(self, now: float, out: list[Effect]) -> None:
        """Do whatever can be done now, as long as our state is not the run's."""
        if self.phase != "working" or self.own is None or self.view is None:
            return
        if self._is_right and not self.busy:
            self._settle(now, out)
            return
        if not self.halted and not self.halting:
            self.halting = True
            out.append(Tell(actor="training", event=Halt()))
        if now >= self.paused_until:
            self._ask(now, out)
            self._work(now, out)
            self._say_how_far(now, out)
        self._wake(max(self.paused_until, (self.asked_at or now) + self.settings.ask_again_s), out)

    def _wake(self, at: float, out: list[Effect]) -> None:
        if self.wake_at is None or self.wake_at > at:
            self.wake_at = at
            out.append(WakeAt(at=at))

    def _settle(self, now: float, out: list[Effect]) -> None:
        assert self.own is not None
        self.phase, self.repair, self.base = "settled", None, None
        self.catch_up.give_up(out)
        self.catch_up.choose_snapshot(None, out)
        self.catch_up.begin()
        self.halting = self.halted = False
        if self.own != self.told:
            self.told = self.own
            fetched, seconds = self.download.bytes_come, to_ms(now - self.started_at)
            out.append(Report(fact=CaughtUp(round=self.own.round, fetched_bytes=fetched, seconds=seconds)))
            out += [Tell(actor="exchange", event=self.own), Tell(actor="membership", event=self.own)]
        out.append(Tell(actor="training", event=Begin(round=self.own.round)))
        self._write_if_due(out)
        self._tidy(out)

    def _ask(self, now: float, out: list[Effect]) -> None:
        """What the others have, and where the run is: again and again, since both change."""
        if self.asked_at is not None and now < self.asked_at + self.settings.ask_again_s:
            return
        self.asked_at = now
        self.asked_in_vain = 0 if self.base is not None or self.repair is not None else self.asked_in_vain + 1
        out += [Send(peer=peer, message=AskLedger()) for peer in self.providers.members]
        if self.own is not None and (self.own.round == self._goal or self.base is None):
            out.append(Tell(actor="membership", event=AskAgain()))
        if self.asked_in_vain == FORGIVEN_AFTER:
            self.providers.liars.clear()
        if self.asked_in_vain == NOWHERE_AFTER:
            advice = (
                "no member that is here has what the last commit leads to: start a node that has it, or carry on from "
                "an older state with `prime-async recover --force`"
            )
            ours = self.own.round if self.own else 0
            out.append(Report(fact=StateNowhere(round=self._goal, ours=ours, advice=advice)))

    # --- catching up --------------------------------------------------------------------------------------------

    def _work(self, now: float, out: list[Effect]) -> None:
        assert self.own is not None
        if self._commit is not None:
            self.catch_up.records.aim(self._commit)
            self.catch_up.look_on_disk(self.base[1] if self.base is not None else self.own.round, out)
        self._compare_histories()
        if self.repair is not None and self.repair.round != self._goal:
            self._leave_repair(out)
        if self.busy:
            pass
        elif self.own.round == self._goal and not self.stranger and self.base is None:
            self._mend(out)
        elif not self._adopts(out):
            self._choose_base(out)
        if self.base is not None:
            self._compare_histories()
            snapshot = self.catch_up.snapshot
            known = snapshot is not None and self._is_known(snapshot)
            self.catch_up.go_on(now, self.base[1], self._goal, known, out)
            self._step(out)
        else:
            self.download.pump(now, out)

    def _compare_histories(self) -> None:
        """Whether our state is one that the run went through."""
        assert self.own is not None
        if self.torn or self.busy:
            return
        chain = self.catch_up.records.chain_before(self.own.round) if self._commit else FIRST_CHAIN
        if self.own.round > self._goal or chain not in (self.own.chain, None):
            self.stranger = self.own.round > 0
        expected = self._expected(self.own.round)
        if expected is not None and expected != self.own.digest:
            self.wrong = True

    def _adopts(self, out: list[Effect]) -> bool:
        """Whether the means of the newest commit are on our disk since before we knew that they are."""
        own, commit, disk = self.own, self._commit, self.disk
        assert own is not None
        if commit is None or self.stranger or self.torn or own.round != commit.round:
            return False
        if commit.round in self.catch_up.stored:
            return False
        # Committed ones can be there without being applied: the exchange had them while training was not begun.
        pending = (disk.pending, disk.pending_digest) == (commit.round, commit.digest)
        fits = own.digest == commit.state and (pending or commit.round in disk.means)
        if not fits or next_chain(own.chain, commit.state, commit.digest) != commit.chain:
            return False
        if self.adopting != commit.round:
            self.adopting = commit.round
            out.append(AdoptRound(commit=commit, previous=own.chain))
        return True

    def _choose_base(self, out: list[Effect]) -> None:
        """Our own state, or a snapshot: whichever costs fewer bytes."""
        assert self.own is not None
        if self.base is not None and self._is_possible(self.base):
            return
        own = [("own", self.own.round)] if not (self.stranger or self.torn) else []
        bases = [b for b in [*own, *(("snapshot", s) for s in self._snapshots)] if self._is_possible(b)]
        base = min(bases, key=self._cost, default=None)
        if base == self.base:
            return
        self.base = base
        self.catch_up.choose_snapshot(base[1] if base is not None and base[0] == "snapshot" else None, out)
        if base is not None:
            fact = CatchUpStarted(
                round=self.own.round,
                run_round=self._goal,
                snapshot=base[1] if base[0] == "snapshot" else -1,
                providers=len(self.providers.holdings),
            )
            out.append(Report(fact=fact))

    def _say_how_far(self, now: float, out: list[Effect]) -> None:
        if self.base is None or now < self.said_at + TELL_EVERY_S:
            return
        self.said_at = now
        means, snapshot = self.catch_up.missing(self.base[1], self._goal)
        fact = CatchingUp(
            run_round=self._goal,
            fetched_bytes=self.download.bytes_come,
            missing_bytes=round(means * self.settings.mean_bytes + snapshot * self.settings.state_bytes),
            seconds=to_ms(now - self.started_at),
        )
        out.append(Report(fact=fact))

    @property
    def _snapshots(self) -> list[int]:
        """Of the rounds of the run's history; of the last only if it is known what it must be.

        Not of the one that is being written here: it may be of another history, and would take that one's place.
        """
        goal, first = self._goal, 0 if self.settings.initial else 1
        known = [s for s in self.providers.snapshots if first <= s < goal or (s == goal > 0 and self._is_known(s))]
        return [s for s in known if s != self.writing]

    @property
    def _lacks_the_initial(self) -> bool:
        """Whether our state is none that the run went through, since it never began with the right one."""
        own, initial = self.own, self.settings.initial
        return own is not None and own.round == 0 and initial not in (b"", own.digest)

    def _is_known(self, round: int) -> bool:
        """Whether it is known what the outer state after ``round`` rounds must be."""
        return self._expected(round) is not None and self.catch_up.records.chain_before(round) is not None

    def _is_possible(self, base: tuple[str, int]) -> bool:
        kind, round = base
        if kind == "own" and (self.stranger or self._lacks_the_initial):
            return False
        here = self.catch_up.snapshot_stored and self.catch_up.snapshot == round
        if kind == "snapshot" and not here and not self.providers.somebody_has(manifest_key(round)):
            return False
        first = self.catch_up.first_lacking(round)
        return first >= self._goal or self.catch_up.is_here(first) or self.providers.somebody_has(record_key(first))

    def _cost(self, base: tuple[str, int]) -> tuple[float, int]:
        """Bytes to fetch; of equals, the newest."""
        kind, round = base
        state = 0.0
        if kind == "snapshot" and round not in self.disk.snapshots:
            state = self.settings.state_bytes * (0.5 if round in self.disk.partials else 1.0)
        return state + (self._goal - round) * self.settings.mean_bytes, -round

    def _step(self, out: list[Effect]) -> None:
        """Change the outer state, if all that it takes is on disk, and nobody else does."""
        if self.busy or not self.halted or self.base is None:
            return
        assert self.own is not None
        kind, round = self.base
        if kind == "snapshot":
            if self.catch_up.snapshot_stored:
                self.busy, self.torn = "loading", True
                out.append(LoadSnapshot(round=round))
        elif self.own.round in self.catch_up.stored and self.own.round < self._goal:
            self.busy = "advancing"
            out.append(Advance(round=self.own.round))

    # --- mending ------------------------------------------------------------------------------------------------

    def _mend(self, out: list[Effect]) -> None:
        """We are where the run is, and hold something else."""
        assert self.own is not None
        if not self.halted or self.run is None or self.run.round != self.own.round:
            return
        if self.run.digest == self.own.digest:
            self.wrong = self.torn
            return
        if self.repair is None:
            self.repair = Repair(round=self.own.round, before=self.own.digest)
            self.download.want([manifest_key(self.own.round)])
            fact = StateDiverged(
                peer="", round=self.own.round, ours=self.own.digest.hex(), theirs=self.run.digest.hex()
            )
            out.append(Report(fact=fact))

    def _leave_repair(self, out: list[Effect]) -> None:
        """The run went on: what was put in its place stays, and the rest is mended where the run is now."""
        assert self.repair is not None
        self.download.give_up(out)
        if self.torn and not self.busy:
            self.busy = "importing"
            out.append(EndImport(round=self.repair.round))
        self.repair = None

    def _on_differing(self, read: ManifestRead, out: list[Effect]) -> None:
        repair = self.repair
        if repair is None or repair.round != read.round or repair.missing is not None:
            return
        repair.missing, repair.total = set(read.differing), len(read.differing)
        self.download.want([state_key(read.round, c) for c in read.differing])
        self._end_repair(out)

    def _end_repair(self, out: list[Effect]) -> None:
        if self.repair is not None and self.repair.missing is not None and not self.repair.missing and not self.busy:
            self.busy = "importing"
            out.append(EndImport(round=self.repair.round))

    # --- outcomes -----------------------------------------------------------------------------------------------

    def _on_outcome(self, now: float, event: Event, out: list[Effect]) -> None:
        match event:
            case Fetched(peer=peer, key=key, size=size):
                if self.download.came(now, peer, key, size, out):
                    self._take(peer, key, out)
            case FetchFailed(peer=peer, key=key, fault=fault):
                self.download.failed(now, peer, key, fault)
            case RecordRead(peer=peer, record=record):
                self.download.drop(record_key(record.commit.round))
                self.providers.liars.update(filter(None, self.catch_up.records.take(peer, record)))
            case ManifestRead():
                self._on_manifest(now, event, out)
            case SnapshotOpened(round=round, missing=missing):
                self.catch_up.on_snapshot_opened(round, missing)
            case RoundOpened(round=round, missing=missing):
                self.catch_up.on_round_opened(round, missing, out)
            case ChunkStored(key=key):
                self.download.done(key)
                self.catch_up.on_chunk_stored(event, out)
            case SnapshotStored(round=round):
                self.catch_up.on_snapshot_stored(round)
            case RoundStored(round=round):
                self.catch_up.on_round_stored(round)
                if round == self.adopting and self.own is not None and self.base is None:
                    self.base, self.adopting = ("own", round), -1
            case ChunkImported(key=key):
                self.download.done(key)
                if self.repair is not None and self.repair.missing is not None and self.repair.round == key.round:
                    self.repair.missing.discard(key.chunk)
                    self._end_repair(out)
            case Imported():
                self._on_imported(event, out)
            case _:
                raise TypeError(f"checkpoint has no use for {type(event).__name__}")

    def _take(self, peer: str, key: ChunkKey, out: list[Effect]) -> None:
        """What came goes where it belongs."""
        if key.kind == "record":
            out.append(ReadRecord(peer=peer, key=key))
        elif key.kind == "manifest":
            out.append(ReadManifest(peer=peer, key=key))
        elif self.repair is not None and key.kind == "state":
            self.torn = True
            out.append(ImportChunk(peer=peer, key=key))
        else:
            out.append(StoreChunk(peer=peer, key=key))

    def _on_manifest(self, now: float, read: ManifestRead, out: list[Effect]) -> None:
        expected = self._expected(read.round)
        key = manifest_key(read.round)
        self.download.done(key)
        if read.round not in (self.catch_up.snapshot, self.repair.round if self.repair else None):
            return  # it was given up
        chain = read.commit.chain if read.commit is not None else FIRST_CHAIN
        if read.digest != expected or chain != self.catch_up.records.chain_before(read.round):
            # Only the chain proves a lie: the leader's word may be the one that is wrong.
            proved = self.catch_up.records.linked(read.round) is not None
            self.providers.blame(now, read.peer, key, "invalid" if proved else "gone")
            self.download.want([key])
        elif self.repair is not None:
            self._on_differing(read, out)
        else:
            self.catch_up.on_manifest(read, out)

    def _on_imported(self, imported: Imported, out: list[Effect]) -> None:
        what, self.busy = self.busy, ""
        round, digest = imported.round, imported.digest
        assert self.own is not None
        chain = self.own.chain if what == "importing" else self.catch_up.records.chain_before(round)
        self.own = StateAt(round=round, digest=digest, chain=chain or self._goal_chain)
        self.torn = self.stranger = False
        self.wrong = self._expected(round) not in (digest, None) or (self.wrong and what == "advancing")
        if what == "loading":
            self.base, self.floor, self.seen = ("own", round), round, -1
            self.catch_up.choose_snapshot(None, out)
        elif what == "importing" and self.repair is not None:
            fact = StateMended(round=round, chunks=self.repair.total, before=self.repair.before.hex(), now=digest.hex())
            out.append(Report(fact=fact))
            self.repair = None
        if self.own.round == self._goal:
            self.base = None

    # --- the disk -----------------------------------------------------------------------------------------------

    def _on_ledger_failed(self, now: float, failed: LedgerFailed, out: list[Effect]) -> None:
        """Only what failed is begun anew: of the same round other things may be under way, and go well."""
        out.append(Report(fact=LedgerTrouble(round=failed.round, damaged=failed.damaged, text=failed.text)))
        match failed.of:
            case "store_means" | "save_inner" | "keep":
                return  # nothing here waits for it
            case "settle":
                self._on_means_lost(failed.round)
                return
            case "write_snapshot":
                self._on_not_written(now, failed.round)
                return
            case "adopt_round":
                self._on_not_adopted(failed.round)
                return
            case "open_snapshot" | "finish_snapshot" | "load_snapshot":
                self.catch_up.on_snapshot_damaged(failed.round)
            case "open_round" | "store_record" | "advance":
                self.catch_up.on_round_damaged(failed.round)
            case "store_chunk":
                pass  # it is among all that is given up
        if failed.of in ("load_snapshot", "advance"):
            self.busy = ""
        if not failed.damaged or failed.of == "store_chunk":
            self._pause(now, out)

    def _on_means_lost(self, round: int) -> None:
        """They are not on their way to the disk any more: what is there does not lead to the state that they make."""
        self.seen = max(self.seen, round)
        self.coming = self.coming if self.coming > self.seen else -1

    def _on_not_written(self, now: float, round: int) -> None:
        if round == self.writing:
            self.writing, self.write_again_at = -1, now + WRITE_AGAIN_S

    def _write_again(self, now: float, out: list[Effect]) -> None:
        if self.write_again_at is None:
            return
        if now < self.write_again_at:
            self._wake(self.write_again_at, out)
        else:
            self.write_again_at = None
            self._write_if_due(out)

    def _on_not_adopted(self, round: int) -> None:
        if round == self.adopting:
            means = tuple(r for r in self.disk.means if r != round)
            self.adopting, self.disk = -1, replace(self.disk, pending=-1, means=means)

    def _pause(self, now: float, out: list[Effect]) -> None:
        """Try again later to get what is missing onto the disk. Chunks that are put right in memory go on coming."""
        if self.repair is None:
            self.catch_up.give_up(out)
        self.base = None if not self.torn else self.base
        self.paused_until = now + 5 * self.settings.ask_again_s

    def _write_if_due(self, out: list[Effect]) -> None:
        if self.own is None or self.writing >= 0 or self.phase != "settled":
            return
        if self.keeping.is_due(self.own.round, self.floor, self.disk, self.seen):
            self.writing = self.own.round
            out.append(WriteSnapshot(round=self.own.round))

    def _on_written(self, round: int, out: list[Effect]) -> None:
        self.writing = -1
        out.append(Report(fact=SnapshotWritten(round=round)))

    def _tidy(self, out: list[Effect]) -> None:
        """Delete what is not kept any more. Not while something is being fetched, or its record looked for."""
        if self.phase == "settled" and self.own is not None and self.writing < 0:
            keep = self.keeping.what_goes(self.own.round, self.floor, self.disk)
            if keep is not None:
                out.append(keep)
