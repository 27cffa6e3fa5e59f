"""Which chunks of the weights a round exchanges: all of them, or those of one fragment after the other.

Fragments are those of Streaming DiLoCo (arXiv 2501.18512, "Streaming partial updates"): the weights in as many parts,
each with rounds of its own, staggered, so that as few bytes are under way at once. Here a fragment is a span of the
flat vector, of whole chunks, and fragments are of equal size but for a chunk; the parameters lie in the order of their
names, so that a fragment has neighbouring layers. One round is open at a time, of whatever fragment: commits have one
order, and the ledger one chain.
"""

from __future__ import annotations

from msgspec import Struct


class Fragments(Struct, frozen=True):
    """``chunk_count`` chunks in ``count`` fragments, from 1 to ``chunk_count``."""

    chunk_count: int
    count: int = 1

    def of(self, round: int) -> int:
        """The fragment that ``round`` exchanges."""
        return round % self.count

    def chunks(self, round: int) -> range:
        """The chunks that ``round`` exchanges, ascending and without a gap."""
        fragment = self.of(round)
        return range(self._start(fragment), self._start(fragment + 1))

    def holding(self, chunk: int) -> int:
        """The fragment that has ``chunk`` in it."""
        return next(f for f in range(self.count) if chunk in self.chunks(f))

    def _start(self, fragment: int) -> int:
        return fragment * self.chunk_count // self.count
