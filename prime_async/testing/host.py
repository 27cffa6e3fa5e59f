"""A simulated node: a process with its machines, and the disk that outlives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from blake3 import blake3

from prime_async.log import MachineSettings
from prime_async.machines.ballot import Ballot
from prime_async.machines.facts import Fact
from prime_async.machines.vocabulary import ActorName, Fail, LedgerAt, Machine, Settle
from prime_async.messages import ChunkInfo, ChunkKey, Commit

Deferred = tuple[Callable[..., None], tuple[object, ...]]

FIRST_STATE: tuple[int, bytes] = (0, blake3(b"the initial outer state").digest())


def digest_of(*parts: object) -> bytes:
    """A digest that stands for bytes that a real node would have."""
    return blake3(repr(parts).encode()).digest()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An outer state on disk, and the last of the commits that led to it."""

    digest: bytes
    commit: Commit | None


@dataclass(slots=True)
class DiskMeans:
    """The means of a round on disk, by chunk. ``missing``, ``wanted``: while they are fetched.

    ``damaged``: chunks whose bytes are not what they were, which is ``found`` when they are read.
    """

    infos: dict[int, ChunkInfo]
    commit: Commit | None = None
    previous: bytes | None = None
    missing: set[int] = field(default_factory=set)
    wanted: dict[int, bytes] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    found: bool = False

    @property
    def digests(self) -> list[bytes]:
        return [self.infos[c].digest for c in sorted(self.infos)]


@dataclass(slots=True)
class Disk:
    """What a crash leaves of a node. ``born``: the number of its starts, from which incarnations are made.

    ``free_at``, ``ledger_free_at``: when the writes under way are done; ``wiped``: how often all was lost.
    ``damaged``: chunks of snapshots; ``faults``: how often something of the ledger was lost without a crash. ``full``:
    it takes ballots, for which there is a reserve, and nothing else; ``was_full``: at some time.
    """

    chunk_count: int
    ballot: Ballot | None = None
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    partials: dict[int, tuple[Snapshot, set[int]]] = field(default_factory=dict)
    means: dict[int, DiskMeans] = field(default_factory=dict)
    damaged: dict[int, set[int]] = field(default_factory=dict)
    faults: int = 0
    born: int = 0
    free_at: float = 0.0
    ledger_free_at: float = 0.0
    wiped: int = 0
    full: bool = False
    was_full: bool = False

    def wipe(self) -> None:
        self.ballot, self.wiped = None, self.wiped + 1
        self.snapshots, self.partials, self.means, self.damaged = {}, {}, {}, {}

    @property
    def ledger(self) -> LedgerAt:
        """As the machine is told of it."""
        known = {r: m for r, m in sorted(self.means.items()) if not m.missing and not m.found}
        whole = [r for r, m in known.items() if m.commit is not None]
        open_rounds = [r for r, m in known.items() if m.commit is None and m.infos]
        pending = max(open_rounds, default=-1)
        digest = blake3(b"".join(self.means[pending].digests)).digest() if pending >= 0 else b""
        return LedgerAt(
            snapshots=tuple(sorted(self.snapshots)),
            means=tuple(whole),
            partials=tuple(sorted(self.partials)),
            pending=pending,
            pending_digest=digest,
        )


@dataclass(slots=True, eq=False)
class Transfer:
    """One fetch: ``client`` asked ``server`` for ``key``. ``over``: it was answered, or abandoned."""

    actor: ActorName
    client: SimNode
    server: SimNode | None
    peer: str
    key: ChunkKey
    over: bool = False


@dataclass(slots=True, eq=False)
class SimNode:
    """A process. ``state``: round and digest of its outer state, ``tip``: the last commit that led to it.

    ``applied``: what it applied, by round.

    ``steps``: inner steps since the start; those from ``base[chunk]`` on are not counted yet. ``counted``: round ->
    the chunks whose committed mean counts this node.
    """

    id: str
    settings: MachineSettings
    machines: dict[ActorName, Machine]
    disk: Disk
    state: tuple[int, bytes] = FIRST_STATE
    tip: Commit | None = None
    manifest: Snapshot | None = None  # that was read last
    settling: Settle | None = None  # the means that are applied next
    alive: bool = True
    paused: bool = False
    finished: bool = False
    failure: Fail | None = None
    backlog: list[Deferred] = field(default_factory=list)  # what came while it was paused
    facts: list[Fact] = field(default_factory=list)
    wake: dict[ActorName, float] = field(default_factory=dict)
    dialled: dict[str, int] = field(default_factory=dict)  # peer -> its incarnation, 0 if unknown

    # the store
    chunks: dict[ChunkKey, ChunkInfo] = field(default_factory=dict)
    taken: int = -1  # the newest round of which some of its contribution was used
    oldest: dict[str, int] = field(default_factory=lambda: {"contribution": 0, "mean": 0})
    held: dict[tuple[ActorName, str, ChunkKey], ChunkInfo] = field(default_factory=dict)
    waiting: dict[ChunkKey, list[Transfer]] = field(default_factory=dict)  # gets of others
    asking: dict[tuple[ActorName, str, ChunkKey], Transfer] = field(default_factory=dict)  # our gets
    up_free_at: float = 0.0
    down_free_at: float = 0.0

    # the work
    steps: int = 0
    base: dict[int, int] = field(default_factory=dict)
    encoded: tuple[int, int] | None = None  # round, and steps at the time
    not_finite: bool = False  # the local weights, until they are the outer ones again
    garbles: bool = False  # its next contribution is of bytes that no mean can be made of, in some chunks at least
    counted: dict[int, set[int]] = field(default_factory=dict)
    applied: dict[int, bytes] = field(default_factory=dict)
    run_number: int = 0  # of the RunSteps, or Evaluate, under way
    run_began: float = 0.0
    run_step_s: float = 0.0
    serves_state: bool = True
    incoming: dict[int, bytes] = field(default_factory=dict)  # chunk of a state -> digest of the whole state

    @property
    def running(self) -> bool:
        return self.alive and not self.finished and self.failure is None

    @property
    def start(self) -> int:
        """The incarnation of this process when it began; what membership makes of it is a little higher."""
        return self.settings.membership.me.incarnation


@dataclass(slots=True)
class Traffic:
    """Control messages and their bytes, and gets, of one node."""

    sent: Counter[str] = field(default_factory=Counter)
    sent_bytes: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    received_bytes: Counter[str] = field(default_factory=Counter)
    gets: int = 0
    chunk_bytes_in: int = 0
    chunk_bytes_out: int = 0
