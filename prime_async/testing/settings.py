"""What a simulated run is made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prime_async.machines.fragments import Fragments


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """The run, the network and the disks. Times are uniform between the two numbers of a pair.

    ``fragments``: a round exchanges one of so many. ``seconds`` above 0: a round's training lasts so long, instead of
    ``inner_steps``. ``step_s``: of an inner step, ``step_s_of`` for single nodes. ``overlaps``, ``eager``,
    ``sync_rounds``: as of a training machine. ``loss`` and ``doubled`` are chances per control message; ``latency_s``
    is that of a message or of a chunk, beside its transfer. ``bytes_per_s_of``: bandwidth of single nodes, each way;
    without it a transfer takes no time. ``snapshot_every``, ``keep_snapshots``, ``keep_rounds``: as in ``[node]``.
    ``measured``: messages are encoded, for their bytes to be counted.
    """

    chunk_count: int = 3
    fragments: int = 1
    inner_steps: int = 4
    seconds: float = 0.0
    rounds: int = 0
    min_members: int = 1
    straggler_timeout_s: float = 0.0
    overlaps: bool = False
    eager: bool = False
    sync_rounds: int = 0
    heartbeat_s: float = 1.0
    failure_timeout_s: float = 10.0
    fetch_timeout_s: float = 60.0
    step_s: float = 0.5
    step_s_of: Mapping[str, float] = field(default_factory=dict, hash=False)
    latency_s: tuple[float, float] = (0.01, 0.1)
    loss: float = 0.0
    doubled: float = 0.0
    chunk_bytes: int = 1 << 20
    bytes_per_s_of: Mapping[str, float] = field(default_factory=dict, hash=False)
    disk_s: tuple[float, float] = (0.001, 0.02)
    snapshot_every: int = 4
    keep_snapshots: int = 2
    keep_rounds: int = 6
    nat: frozenset[str] = frozenset()
    witnesses: frozenset[str] = frozenset()
    measured: bool = False

    def chunks(self, round: int) -> range:
        """Those that ``round`` exchanges."""
        return Fragments(self.chunk_count, self.fragments).chunks(round)
