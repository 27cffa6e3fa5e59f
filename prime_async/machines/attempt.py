"""What a member knows of one try at a round."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from prime_async.messages import ChunkKey, View


@dataclass(slots=True)
class Attempt:
    """One try at a round. ``weights``: contributor -> tokens, in the order of the plan's view."""

    round: int
    epoch: int
    attempt: int
    members: tuple[str, ...]
    incarnations: dict[str, int]
    owners: tuple[str, ...]
    weights: dict[str, int]
    to_open: deque[int] = field(default_factory=deque)  # owned chunks, not begun
    awaited: dict[int, set[str]] = field(default_factory=dict)  # owned chunk -> contributors still fetched
    left_out: dict[int, set[str]] = field(default_factory=dict)
    reducing: set[int] = field(default_factory=set)
    means_wanted: dict[str, deque[int]] = field(default_factory=dict)  # source -> chunks
    under_way: dict[str, int] = field(default_factory=dict)  # source -> means being fetched
    digests: dict[int, bytes] = field(default_factory=dict)  # chunk -> digest of its mean, here
    digest: bytes | None = None  # of all of them
    following: bool = False  # committed already: all means come from the leader

    @property
    def number(self) -> tuple[int, int]:
        return self.epoch, self.attempt

    def key(self, chunk: int) -> ChunkKey:
        return ChunkKey(kind="mean", round=self.round, chunk=chunk, epoch=self.epoch, attempt=self.attempt)

    def still_here(self, view: View | None) -> set[str]:
        """Members of the plan's view that have not left, nor started anew, since."""
        members = view.members if view else ()
        return {m.id for m in members if self.incarnations.get(m.id) == m.incarnation}
