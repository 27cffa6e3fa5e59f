"""The ledger of a simulated node: what is on its disk beside its ballot, and the effects that read and write it.

A snapshot is the digest of an outer state, the means of a round are the headers of its chunks. Writes take a moment,
and a crash loses those that are under way. What is damaged is found when it is read, and not before.
"""

from __future__ import annotations

from collections.abc import Callable

from blake3 import blake3

from prime_async.machines.attempt import SETTLED, mean_key
from prime_async.machines.vocabulary import (
    AdoptRound,
    Advance,
    ChunkStored,
    DiskWork,
    Effect,
    Event,
    FetchFailed,
    FindRecord,
    FinishSnapshot,
    Imported,
    Keep,
    LedgerFailed,
    LoadSnapshot,
    ManifestRead,
    MeansStored,
    OpenRound,
    OpenSnapshot,
    ReadManifest,
    ReadRecord,
    RecordRead,
    RoundOpened,
    RoundStored,
    Settle,
    SnapshotOpened,
    SnapshotStored,
    StoreChunk,
    StoreMeans,
    StoreRecord,
    WriteSnapshot,
)
from prime_async.messages import FIRST_CHAIN, ChunkInfo, ChunkKey, Commit, Included, Record
from prime_async.testing.host import FIRST_STATE, Disk, DiskMeans, SimNode, Snapshot, digest_of
from prime_async.testing.kernel import Kernel
from prime_async.testing.settings import SimulationSettings
from prime_async.testing.store import BrokenModelError, Store

APPLY_S = 0.02


def restore(disk: Disk) -> tuple[tuple[int, bytes], bytes, Commit | None]:
    """The outer state that a disk gives, the chain of the commits that led to it, and the last of them."""
    state, chain, tip = FIRST_STATE, FIRST_CHAIN, None
    for round in sorted(disk.damaged):
        demote(disk, round)
    if disk.snapshots:
        round = max(disk.snapshots)
        snapshot = disk.snapshots[round]
        state, tip = (round, snapshot.digest), snapshot.commit
        chain = tip.chain if tip is not None else FIRST_CHAIN
    while (means := disk.means.get(state[0])) is not None and means.commit is not None:
        if means.previous != chain or means.commit.state != state[1] or means.missing:
            break
        if means.damaged:
            means.found = True
            break
        state, chain, tip = applied(state, means), means.commit.chain, means.commit
    return state, chain, tip


def demote(disk: Disk, round: int) -> None:
    """A snapshot of which chunks are damaged is what the others of its chunks are."""
    whole = set(range(disk.chunk_count))
    disk.partials[round] = disk.snapshots.pop(round), whole - disk.damaged.pop(round)


def applied(state: tuple[int, bytes], means: DiskMeans) -> tuple[int, bytes]:
    """The outer state that the means make of ``state``."""
    return state[0] + 1, digest_of(state[1], *means.digests)


class SimLedger:
    """Performs the effects that concern the disk, for all nodes."""

    def __init__(self, kernel: Kernel, store: Store, settings: SimulationSettings) -> None:
        self.kernel = kernel
        self.store = store
        self.settings = settings
        store.read_disk = self.read
        self.contents: dict[bytes, Record | tuple[bytes, Commit | None]] = {}  # by digest

    # --- what peers get -----------------------------------------------------------------------------------------

    def read(self, server: SimNode, key: ChunkKey) -> ChunkInfo | None:
        """What ``server`` gives from its disk, or of its outer state; ``None``: it is gone."""
        self._find_damage(server, key)
        if key.kind == "state":
            found = self._state(server, key.round)
            return ChunkInfo(digest=found[0]) if found else None
        if key.kind == "manifest":
            found = self._state(server, key.round)
            return self._content(found) if found else None
        means = server.disk.means.get(key.round)
        if (
            means is None
            or means.commit is None
            or means.missing
            or (key.kind == "mean" and key.chunk in means.damaged)
        ):
            return None
        return means.infos[key.chunk] if key.kind == "mean" else self._content(self.record_of(means))

    def _find_damage(self, server: SimNode, key: ChunkKey) -> None:
        """It is read: what is damaged does not count as there any more."""
        means, disk = server.disk.means.get(key.round), server.disk
        in_memory = server.serves_state and server.state[0] == key.round
        if key.kind == "state" and not in_memory and key.chunk in disk.damaged.get(key.round, ()):
            demote(disk, key.round)
            self.announce(server)
        elif key.kind == "mean" and means is not None and key.chunk in means.damaged and not means.found:
            means.found = True
            self.announce(server)

    @staticmethod
    def _state(server: SimNode, round: int) -> tuple[bytes, Commit | None] | None:
        if server.serves_state and server.state[0] == round:
            return server.state[1], server.tip
        snapshot = server.disk.snapshots.get(round)
        return (snapshot.digest, snapshot.commit) if snapshot is not None else None

    def _content(self, content: Record | tuple[bytes, Commit | None]) -> ChunkInfo:
        info = ChunkInfo(digest=digest_of("content", content))
        self.contents[info.digest] = content
        return info

    @staticmethod
    def record_of(means: DiskMeans) -> Record:
        assert means.commit is not None
        assert means.previous is not None
        infos = [means.infos[c] for c in sorted(means.infos)]
        runs = [Included(chunks=1, contributors=i.contributors, total_weight=i.total_weight) for i in infos]
        return Record(commit=means.commit, previous=means.previous, means=b"".join(means.digests), included=tuple(runs))

    # --- effects ------------------------------------------------------------------------------------------------

    def perform(self, node: SimNode, effect: Effect) -> None:
        match effect:
            case StoreMeans():
                self._write(node, "store_means", self._store_means, effect)
            case WriteSnapshot(round=round):
                self._write_snapshot(node, round)
            case ReadRecord(peer=peer, key=key):
                record = self.contents[node.held.pop(("checkpoint", peer, key)).digest]
                assert isinstance(record, Record)
                self.kernel.post(node, "checkpoint", RecordRead(peer=peer, record=record))
            case FindRecord(round=round):
                self._find_record(node, round)
            case ReadManifest(peer=peer, key=key):
                self._read_manifest(node, peer, key)
            case OpenRound(record=record):
                self._write(node, "open_round", self._open_round, record)
            case OpenSnapshot(round=round):
                self._write(node, "open_snapshot", self._open_snapshot, round, node.manifest)
            case StoreChunk(peer=peer, key=key):
                info = node.held.pop(("checkpoint", peer, key))
                self._write(node, "store_chunk", self._store_chunk, peer, key, info)
            case StoreRecord(record=record):
                self._write(node, "store_record", self._close_round, record.commit, record.previous)
            case AdoptRound(commit=commit, previous=previous):
                self._write(node, "adopt_round", self._adopt_round, commit, previous)
            case FinishSnapshot(round=round):
                self._write(node, "finish_snapshot", self._finish_snapshot, round)
            case LoadSnapshot(round=round):
                node.serves_state = False
                self.kernel.later(APPLY_S, self.kernel.on, node, self._load, node, round)
            case Advance(round=round):
                node.serves_state = False
                self.kernel.later(APPLY_S, self.kernel.on, node, self._advance, node, round)
            case Keep():
                self._write(node, "keep", self._keep, effect)
            case _:
                raise TypeError(f"nothing performs {effect!r}")

    def settle(self, node: SimNode, effect: Settle) -> None:
        """The committed means are those that are held as settled now."""
        infos = {c: node.chunks[mean_key(effect.round, c, SETTLED)] for c in self.settings.chunks(effect.round)}
        self._write(node, "settle", self._commit, effect, infos)

    def _write(self, node: SimNode, of: DiskWork, function: Callable[..., None], *args: object) -> None:
        """Writes are done one after the other. A chunk takes its share of what all chunks of a round take."""
        disk, took_s = node.disk, self.kernel.random.uniform(*self.settings.disk_s)
        if of == "store_chunk":
            took_s /= self.settings.chunk_count
        disk.ledger_free_at = max(self.kernel.now, disk.ledger_free_at) + took_s
        self.kernel.later(disk.ledger_free_at - self.kernel.now, self._safe, node, of, function, args)

    def _safe(self, node: SimNode, of: DiskWork, function: Callable[..., None], args: tuple[object, ...]) -> None:
        """It is on disk, whether the node is run or not; if it is, it hears of it. Or there is no room for it."""
        if node.alive and node.disk.full and of != "keep":
            self._fail_full(node, of, args)
        elif node.alive:
            function(node, *args)

    def _fail_full(self, node: SimNode, of: DiskWork, args: tuple[object, ...]) -> None:
        rounds = (_round_of(arg) for arg in args)
        round = next(r for r in rounds if r is not None)
        self._post(node, "checkpoint", LedgerFailed(of=of, round=round, damaged=False, text="no space left"))
        for effect in args:
            if isinstance(effect, StoreMeans):
                number = {"epoch": effect.epoch, "attempt": effect.attempt}
                self._post(node, "exchange", MeansStored(round=round, **number, safe=False))

    def _post(self, node: SimNode, actor: str, event: Event) -> None:
        self.kernel.post(node, "exchange" if actor == "exchange" else "checkpoint", event, self.settings.disk_s[0])

    def announce(self, node: SimNode) -> None:
        """Tell the machine what is on disk."""
        self.kernel.post(node, "checkpoint", node.disk.ledger)

    def _find_record(self, node: SimNode, round: int) -> None:
        means = node.disk.means.get(round)
        if means is not None and means.commit is not None and not means.missing:
            self.kernel.post(node, "checkpoint", RecordRead(peer="", record=self.record_of(means)))

    # --- rounds -------------------------------------------------------------------------------------------------

    def _store_means(self, node: SimNode, effect: StoreMeans) -> None:
        others = {key.chunk: key for key in effect.exceptions}
        number = effect.epoch, effect.attempt
        keys = {c: others.get(c, mean_key(effect.round, c, number)) for c in self.settings.chunks(effect.round)}
        known = node.disk.means.get(effect.round)
        if known is not None and known.wanted:
            return  # its committed means are being fetched: these are late
        if all(key in node.chunks for key in keys.values()) and (known is None or known.commit is None):
            node.disk.means[effect.round] = DiskMeans(infos={c: node.chunks[k] for c, k in keys.items()})
        stored = MeansStored(round=effect.round, epoch=effect.epoch, attempt=effect.attempt)
        self._post(node, "exchange", stored)
        self.announce(node)

    def _commit(self, node: SimNode, effect: Settle, infos: dict[int, ChunkInfo]) -> None:
        node.disk.means[effect.round] = DiskMeans(infos=infos, commit=effect.commit, previous=effect.previous)
        self._answer_waiting(node, effect.round)
        self.announce(node)

    def _answer_waiting(self, node: SimNode, round: int) -> None:
        for key in [k for k in node.waiting if k.kind == "record" and k.round == round]:
            self.store.answer_waiting(node, key)

    def _open_round(self, node: SimNode, record: Record) -> None:
        round = record.commit.round
        means = node.disk.means.setdefault(round, DiskMeans(infos={}))
        chunks = self.settings.chunks(round)
        digests = {c: record.means[32 * i : 32 * (i + 1)] for i, c in enumerate(chunks)}
        means.infos = {c: i for c, i in means.infos.items() if i.digest == digests[c] and c not in means.damaged}
        means.damaged.clear()
        means.found = False
        means.wanted = digests
        missing = tuple(c for c in chunks if c not in means.infos)
        means.missing = set(missing)
        self._post(node, "checkpoint", RoundOpened(round=round, missing=missing))

    def _adopt_round(self, node: SimNode, commit: Commit, previous: bytes) -> None:
        self._close_round(node, commit, previous, of="adopt_round")

    def _close_round(self, node: SimNode, commit: Commit, previous: bytes, of: DiskWork = "store_record") -> None:
        means = node.disk.means[commit.round]
        if means.damaged:
            means.found = True
            self._fail(node, of, commit.round)
            return
        if means.missing or blake3(b"".join(means.digests)).digest() != commit.digest:
            raise BrokenModelError(f"{node.id} closes round {commit.round} without its means")
        means.commit, means.previous = commit, previous
        self._post(node, "checkpoint", RoundStored(round=commit.round))
        self.announce(node)

    @staticmethod
    def is_right(info: ChunkInfo, expected: bytes) -> bool:
        """Whether a chunk that came is the one that was asked for: everybody looks."""
        return info.digest == expected

    def _fail(self, node: SimNode, of: DiskWork, round: int) -> None:
        self._post(node, "checkpoint", LedgerFailed(of=of, round=round, damaged=True, text="it is not what it was"))

    def _store_chunk(self, node: SimNode, peer: str, key: ChunkKey, info: ChunkInfo) -> None:
        if key.kind == "mean":
            means = node.disk.means.get(key.round)
            if means is None:  # deleted meanwhile
                return
            if means.wanted and not self.is_right(info, means.wanted[key.chunk]):
                self._post(node, "checkpoint", FetchFailed(peer=peer, key=key, fault="invalid"))
                return
            means.infos[key.chunk] = info
            means.missing.discard(key.chunk)
        else:
            partial = node.disk.partials[key.round]
            if not self.is_right(info, partial[0].digest):
                self._post(node, "checkpoint", FetchFailed(peer=peer, key=key, fault="invalid"))
                return
            partial[1].add(key.chunk)
        self._post(node, "checkpoint", ChunkStored(key=key))

    # --- snapshots ----------------------------------------------------------------------------------------------

    def _write_snapshot(self, node: SimNode, round: int) -> None:
        """Of the outer state as it is now, if that is the one that was meant."""
        if node.state[0] == round and node.serves_state:
            self._write(node, "write_snapshot", self._snapshot, round, Snapshot(node.state[1], node.tip))
        else:
            failed = LedgerFailed(of="write_snapshot", round=round, damaged=False, text="the outer state had gone on")
            self.kernel.post(node, "checkpoint", failed)

    def _snapshot(self, node: SimNode, round: int, snapshot: Snapshot) -> None:
        node.disk.snapshots[round] = snapshot
        node.disk.damaged.pop(round, None)
        self._post(node, "checkpoint", SnapshotStored(round=round))
        self.announce(node)

    def _read_manifest(self, node: SimNode, peer: str, key: ChunkKey) -> None:
        content = self.contents[node.held.pop(("checkpoint", peer, key)).digest]
        assert isinstance(content, tuple)
        digest, commit = content
        node.manifest = Snapshot(digest, commit)
        differing = () if node.state == (key.round, digest) else tuple(range(self.settings.chunk_count))
        read = ManifestRead(peer=peer, round=key.round, digest=digest, commit=commit, differing=differing)
        self.kernel.post(node, "checkpoint", read)

    def _open_snapshot(self, node: SimNode, round: int, manifest: Snapshot) -> None:
        partial = node.disk.partials.get(round)
        if partial is None or partial[0] != manifest:
            partial = node.disk.partials[round] = (manifest, set())
        if node.disk.snapshots.get(round) == manifest:
            partial[1].update(set(range(self.settings.chunk_count)) - node.disk.damaged.get(round, set()))
        missing = tuple(c for c in range(self.settings.chunk_count) if c not in partial[1])
        self._post(node, "checkpoint", SnapshotOpened(round=round, missing=missing))

    def _finish_snapshot(self, node: SimNode, round: int) -> None:
        snapshot, chunks = node.disk.partials.pop(round)
        if len(chunks) != self.settings.chunk_count:
            raise BrokenModelError(f"{node.id} finishes the snapshot of round {round} without all its chunks")
        self._snapshot(node, round, snapshot)

    # --- the outer state ----------------------------------------------------------------------------------------

    def _load(self, node: SimNode, round: int) -> None:
        if node.disk.damaged.get(round):
            node.serves_state = True
            demote(node.disk, round)
            self._fail(node, "load_snapshot", round)
            self.announce(node)
            return
        snapshot = node.disk.snapshots[round]
        node.state, node.tip, node.serves_state = (round, snapshot.digest), snapshot.commit, True
        self.kernel.give(node, "checkpoint", Imported(round=round, digest=snapshot.digest))

    def _advance(self, node: SimNode, round: int) -> None:
        means = node.disk.means[round]
        if node.state[0] != round or means.commit is None or means.missing:
            raise BrokenModelError(f"{node.id}, at {node.state[0]}, advances from round {round}")
        if means.damaged:
            means.found = node.serves_state = True
            self._fail(node, "advance", round)
            return
        node.state, node.tip, node.serves_state = applied(node.state, means), means.commit, True
        node.applied[round] = digest_of(*means.digests)
        self.kernel.give(node, "checkpoint", Imported(round=node.state[0], digest=node.state[1]))

    def _keep(self, node: SimNode, keep: Keep) -> None:
        disk = node.disk
        disk.snapshots = {r: s for r, s in disk.snapshots.items() if r in keep.snapshots}
        disk.damaged = {r: chunks for r, chunks in disk.damaged.items() if r in disk.snapshots}
        disk.means = {r: m for r, m in disk.means.items() if r >= keep.means_from}
        newest = max(disk.snapshots, default=0)
        disk.partials = {r: p for r, p in disk.partials.items() if r > newest}
        self.announce(node)


def _round_of(argument: object) -> int | None:
    """The round that a write of this is about, if that can be told."""
    match argument:
        case int():
            return argument
        case Record(commit=commit):
            return commit.round
        case StoreMeans(round=round) | Settle(round=round) | ChunkKey(round=round) | Commit(round=round):
            return round
        case _:
            return None
