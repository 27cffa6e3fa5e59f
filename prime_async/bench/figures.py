"""What a process of the benchmark is told, and what it reports; JSON on both ways."""

from __future__ import annotations

from msgspec import Struct

from prime_async.bench.peers import PeerName


class VectorSpec(Struct, frozen=True, kw_only=True):
    """What a process is told of its node."""

    rank: int
    nodes: int
    elements: int
    chunk_elements: int
    iterations: int
    encrypt: bool
    directory: str  # shared by all
    ids: tuple[str, ...]  # the nodes' public keys, by rank


class WorkerSpec(VectorSpec, frozen=True, kw_only=True):
    """One process of a group: a node of ours, a rank of gloo, and a member of each peer at once."""

    keep: bool  # the means on disk
    peers: tuple[PeerName, ...] = ()  # measured beside ours and gloo


class Timing(Struct, frozen=True, kw_only=True):
    """One process's part of one operation; times on the monotonic clock that all processes of a machine share."""

    began_s: float  # when it left the barrier before
    ended_s: float  # when it held the result
    cpu_s: float  # of all threads of the process, and what it forked, until everybody had the result
    wire_bytes: int  # through the loopback interface meanwhile, all processes together


class Phases(Struct, frozen=True, kw_only=True):
    """Where the seconds of one exchange went on one node: one after the other, they add up to the whole.

    ``plan``: from the last encoded chunk until the first fetch; ``contributions``: until the last one was here;
    ``reduce``: until the last own chunk was reduced; ``means``: until the last mean was here; ``commit``: until the
    first chunk was applied. Means are fetched, and chunks reduced, while contributions still come.
    """

    encode: float
    plan: float
    contributions: float
    reduce: float
    means: float
    commit: float
    apply: float


class Busy(Struct, frozen=True, kw_only=True):
    """Seconds that worker threads of one node spent in each kind of call, waiting for a core included."""

    encode: float
    reduce: float
    apply: float


class Exchanged(Struct, frozen=True, kw_only=True):
    """One exchange, as one node saw it."""

    timing: Timing
    digest: str  # of the result
    sent_bytes: int  # by the node's own counters, both planes
    phases: Phases
    busy: Busy


class Averaged(Struct, frozen=True, kw_only=True):
    """One average by a peer, as one process saw it."""

    timing: Timing
    digest: str  # of the result
    relative_error: float  # of some of its chunks


class PeerReport(Struct, frozen=True, kw_only=True):
    """A peer in one of its settings, in one process. ``reason``: why it was left out here; empty if it was not."""

    name: str
    runs: list[Averaged]
    reason: str


class WorkerReport(Struct, frozen=True, kw_only=True):
    """What a process found. ``relative_error``: see :func:`prime_async.bench.data.relative_error`; rank 0 alone."""

    exchanges: list[Exchanged]
    peers: list[PeerReport]  # gloo first
    peak_memory_bytes: int  # above what the process had before its first exchange
    relative_error: float | None = None
