"""How fast the members' links are, and what share of the chunks each should own for it.

Every member measures while it fetches contributions: those are fixed before their plan, so no get of one waits for
anything but the network. (A get of a mean waits until it is made.) What it saw travels with its ``Have``, and the
leader puts the members' views together:

* down: the sum of the rates at which the member took in from each of the others, each over the time in which it
  fetched from that one. (Over the time in which it fetched from anybody, all would look as slow as the slowest, for
  which all wait.) up: the mean of the rates that others saw from it, times the number of owners that fetched from it
  at the same time. Both are smoothed; the slower is its bandwidth.
* Who fetched nothing, since it owns nothing, is not measured downwards: that estimate drifts towards its up, so that
  one bad round does not keep it from owning anything for ever.

The shares. With n members that exchange S bytes each, one that owns a share w takes in (n - 1) w S of contributions
and (1 - w) S of means, and gives (1 - w) S of its contribution and (n - 1) w S of means: (1 + (n - 2) w) S either way.
All are done at the same time T if 1 + (n - 2) w = T b / S for each one's bandwidth b. Where that makes w negative,
the member's own contribution and the means that it must have fill its link already: it owns nothing, and the rest share
what there is (water-filling). With n = 2 the shares make no difference, and are in proportion to the bandwidths.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prime_async.messages import Have, Rate, View

RATES_SENT = 8
SMOOTHING = 0.5
DRIFT = 1 / 16
WHOLE = 1000
OFF_RELATIVE = 0.25
OFF_ABSOLUTE = 0.02


@dataclass(slots=True)
class _Span:
    """The time in which at least one get was under way, and what came in it."""

    gets: int = 0
    since: float = 0.0
    seconds: float = 0.0
    received: int = 0

    def began(self, now: float) -> None:
        if not self.gets:
            self.since = now
        self.gets += 1

    def ended(self, now: float, size: int) -> None:
        self.gets -= 1
        self.received += size
        if not self.gets:
            self.seconds += now - self.since

    def per_s(self, now: float) -> int:
        seconds = self.seconds + (now - self.since if self.gets else 0.0)
        return int(self.received / seconds) if seconds > 0 else 0


@dataclass(slots=True)
class Meter:
    """What this node took in from each peer while it fetched contributions."""

    peers: dict[str, _Span] = field(default_factory=dict)

    def began(self, now: float, peer: str) -> None:
        self.peers.setdefault(peer, _Span()).began(now)

    def ended(self, now: float, peer: str, size: int) -> None:
        self.peers[peer].ended(now, size)

    def received_per_s(self, now: float) -> int:
        """From all at once."""
        return sum(span.per_s(now) for span in self.peers.values())

    def rates(self, now: float, members: tuple[str, ...], turn: int) -> tuple[Rate, ...]:
        """From some of ``members``, others with each ``turn``: the message stays small with many members."""
        all_rates = [
            Rate(position=i, bytes_per_s=self.peers[m].per_s(now))
            for i, m in enumerate(members)
            if m in self.peers and self.peers[m].received
        ]
        start = turn % len(all_rates) if all_rates else 0
        return tuple((all_rates[start:] + all_rates[:start])[:RATES_SENT])


@dataclass(slots=True)
class Bandwidth:
    """The leader's estimates, bytes per second by member."""

    down: dict[str, float] = field(default_factory=dict)
    up: dict[str, float] = field(default_factory=dict)
    seen_up: dict[str, list[float]] = field(default_factory=dict)  # since the last ``settle``
    reported: set[tuple[str, int]] = field(default_factory=set)  # who, for which round

    def report(self, peer: str, have: Have, view: View, owners: frozenset[str]) -> None:
        """What ``peer`` saw in a round over ``view`` with these owners. Repeats do not count."""
        if (peer, have.round) in self.reported:
            return
        self.reported.add((peer, have.round))
        if have.received_per_s:
            self.down[peer] = _towards(self.down.get(peer), have.received_per_s, SMOOTHING)
        elif peer in self.down and peer in self.up:
            self.down[peer] = _towards(self.down[peer], self.up[peer], DRIFT)
        for rate in have.rates:
            if rate.position < len(view.members) and rate.bytes_per_s:
                source = view.members[rate.position].id
                self.seen_up.setdefault(source, []).append(rate.bytes_per_s * max(1, len(owners - {source})))

    def settle(self, round: int, view: View) -> None:
        """Take in what was seen up to the commit of ``round``; forget who is not in ``view``."""
        for source, seen in sorted(self.seen_up.items()):
            self.up[source] = _towards(self.up.get(source), sum(seen) / len(seen), SMOOTHING)
        self.seen_up = {}
        self.reported = {(peer, at) for peer, at in self.reported if at >= round}
        members = {m.id for m in view.members}
        self.down = {id: b for id, b in self.down.items() if id in members}
        self.up = {id: b for id, b in self.up.items() if id in members}

    def weights(self, view: View) -> dict[str, int] | None:
        """The weights that the members of ``view`` should have, if those that they have are far from it."""
        members = [m for m in view.active if m.reachable]
        known = {m.id: b for m in members if (b := self._of(m.id)) is not None}
        if not known or len(members) < 2:
            return None
        usual = sum(known.values()) / len(known)  # of who has not been measured yet
        wanted = shares({m.id: known.get(m.id, usual) for m in members}, len(view.active))
        total = sum(m.weight for m in members)
        present = {m.id: m.weight / total if total else 1 / len(members) for m in members}
        if not any(_is_off(wanted[id], present[id]) for id in present):
            return None
        return {id: round(share * WHOLE) for id, share in wanted.items()}

    def _of(self, id: str) -> float | None:
        known = [b for b in (self.down.get(id), self.up.get(id)) if b is not None]
        return min(known) if known else None


def shares(bandwidths: dict[str, float], members: int) -> dict[str, float]:
    """The shares, adding up to 1, of owners with these ``bandwidths`` (all above 0) among so many ``members``."""
    if members <= 2:
        total = sum(bandwidths.values())
        return {id: b / total for id, b in bandwidths.items()}
    taking = sorted(bandwidths, key=lambda id: (-bandwidths[id], id))
    while True:
        time = (members - 2 + len(taking)) / sum(bandwidths[id] for id in taking)
        if time * bandwidths[taking[-1]] >= 1 or len(taking) == 1:
            break
        taking.pop()
    return {id: max(0.0, (time * b - 1) / (members - 2)) if id in taking else 0.0 for id, b in bandwidths.items()}


def _towards(old: float | None, new: float, by: float) -> float:
    return float(new) if old is None else old + by * (new - old)


def _is_off(wanted: float, present: float) -> bool:
    off = abs(wanted - present)
    return off > OFF_ABSOLUTE and off > OFF_RELATIVE * present
