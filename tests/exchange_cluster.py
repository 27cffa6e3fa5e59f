"""Several exchange machines, and for all else as little as will do: a heap of what happens when, and nothing real.

Views are decided by a list here, and reach each node a little later. What this cannot show, the simulation of the whole
does: elections, and what the other machines make of it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from blake3 import blake3

from prime_async.machines.exchange import Exchange, ExchangeSettings
from prime_async.machines.vocabulary import (
    AdoptMean,
    CancelFetch,
    CancelFetches,
    CommitReady,
    ContributionFixed,
    Effect,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    FetchFault,
    FetchState,
    Forget,
    Heard,
    MeansCommitted,
    MeansStored,
    Reduce,
    Reduced,
    Send,
    Settle,
    StateAt,
    StoreMeans,
    Tell,
    Tick,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import (
    FIRST_CHAIN,
    ChunkInfo,
    ChunkKey,
    Commit,
    Have,
    Member,
    Message,
    View,
    bitmap,
    positions,
)
from tests.machine_harness import full_member, member, view

FAILURE_S = 10.0


@dataclass(eq=False)
class Node:
    """A process. ``store``: what it serves; ``held``: contributions that came and are not used yet."""

    id: str
    incarnation: int
    machine: Exchange
    round: int = 0
    alive: bool = True
    store: dict[ChunkKey, ChunkInfo] = field(default_factory=dict)
    held: dict[tuple[str, ChunkKey], ChunkInfo] = field(default_factory=dict)
    gets: dict[tuple[str, ChunkKey], int] = field(default_factory=dict)
    oldest_mean: int = 0
    wake: float | None = None
    fetching_state: bool = False


class Cluster:
    """Nodes n0, n1, ... and what happens to them. All that is left to chance comes from ``seed``."""

    def __init__(
        self,
        count: int,
        *,
        chunks: int = 7,
        seed: int = 0,
        loss: float = 0.0,
        step_s: float = 2.0,
        witnesses: frozenset[str] = frozenset(),
        hidden: frozenset[str] = frozenset(),
        straggler_timeout_s: float = 0.0,
    ) -> None:
        self.random = random.Random(seed)
        self.chunks, self.loss, self.step_s = chunks, loss, step_s
        self.witnesses, self.hidden, self.straggler_timeout_s = witnesses, hidden, straggler_timeout_s
        self.now, self.count = 0.0, 0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.nodes: dict[str, Node] = {}
        self.digests: dict[ChunkKey, bytes] = {}  # of every mean that was ever made
        self.made: list[tuple[str, Reduce]] = []
        self.sent: list[tuple[float, str, str, Message]] = []
        self.handed_over: dict[int, set[bytes]] = {}
        for i in range(count):
            self._start(f"n{i}", 1)
        self.views = [view(1, *(self._member(n, active=True) for n in self.nodes.values()))]
        for node in self.nodes.values():
            self._show(node)
            self._give(node, StateAt(round=0, digest=bytes(32), chain=FIRST_CHAIN))
            self._train(node)

    # --- what a test does ---------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        return self.views[-1]

    @property
    def committed(self) -> int:
        """Rounds that are committed."""
        return self.view.commit.round + 1 if self.view.commit else 0

    def run(self, until: Callable[[], bool], within_s: float) -> None:
        end = self.now + within_s
        while not until():
            assert self.heap, "nothing will happen any more"
            at, _, action = heapq.heappop(self.heap)
            assert at <= end, f"not within {within_s} s: round {self.committed} at {self.now}, {self.view}"
            self.now = max(self.now, at)
            action()

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        while self.heap and self.heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self.heap)
            action()
        self.now = end

    def rounds(self, more: int, within_s: float = 400.0) -> None:
        """Until every live member has applied so many more rounds than are committed now."""
        goal = self.committed + more
        self.run(lambda: all(n.round >= goal for n in self.nodes.values() if n.alive), within_s)

    def kill(self, id: str, *, noticed_s: float = FAILURE_S) -> None:
        node = self.nodes[id]
        node.alive = False
        self._after(noticed_s, lambda: self._remove(node))

    def restart(self, id: str) -> None:
        """As a new start, which has the state that it finds on others."""
        old = self.nodes[id]
        old.alive = False
        node = self._start(id, old.incarnation + 1)
        self._remove(old)
        self.decide(*self.view.members, self._member(node, active=False))
        self._after(3.0, lambda: self._import(node))

    def elect(self, id: str) -> None:
        """A new epoch."""
        self.decide(*self.view.members, leader=id, epoch=self.view.epoch + 1)

    def decide(self, *members: Member, **changes: object) -> None:
        """A view of these members."""
        before = self.view
        made = {"leader": before.leader, "epoch": before.epoch, "commit": before.commit, **changes}
        self.views.append(view(before.number + 1, *members, **made))  # type: ignore[arg-type]
        for node in self.nodes.values():
            self._after(self._delay(), lambda n=node: self._show(n))  # type: ignore[misc]

    def is_last(self, id: str) -> bool:
        """Whether nobody else has what ``id`` has: the means of the open, or the last, round. Nothing survives that."""
        others = [n for n in self.nodes.values() if n.alive and n.id != id]
        for round in (self.committed - 1, self.committed):
            mine = self._has(self.nodes[id], round)
            if mine and not any(self._has(n, round) for n in others):
                return True
        return False

    @staticmethod
    def _has(node: Node, round: int) -> bool:
        digest = node.machine.chunks.plan_digest or node.machine.chunks.committed_digest
        return node.round > round or (node.round == round and digest is not None)

    # --- nodes --------------------------------------------------------------------------------------------------

    def _start(self, id: str, incarnation: int) -> Node:
        settings = ExchangeSettings(
            me=id, chunk_count=self.chunks, straggler_timeout_s=self.straggler_timeout_s, fetch_timeout_s=20.0
        )
        node = self.nodes[id] = Node(id=id, incarnation=incarnation, machine=Exchange(settings))
        return node

    def _member(self, node: Node, *, active: bool) -> Member:
        if node.id in self.hidden:
            return member(node.id, active=active, incarnation=node.incarnation, voter=active)
        return full_member(node.id, active=active, incarnation=node.incarnation, witness=node.id in self.witnesses)

    def _remove(self, node: Node) -> None:
        listed = self.view.member(node.id)
        if listed is None or listed.incarnation != node.incarnation:
            return
        left = [m for m in self.view.members if m.id != node.id]
        alive = [m.id for m in left if m.voter and m.reachable and self.nodes[m.id].alive]
        if self.view.leader == node.id:
            self.decide(*left, leader=alive[0], epoch=self.view.epoch + 1)
        else:
            self.decide(*left)

    def _show(self, node: Node) -> None:
        """Its newest view; those between may be skipped."""
        if node.alive and (node.machine.view is None or node.machine.view.number < self.view.number):
            self._give(node, ViewChanged(view=self.view))

    def _import(self, node: Node) -> None:
        """The state of whoever is ahead."""
        node.fetching_state = False
        if not node.alive:
            return
        ahead = max((n.round for n in self.nodes.values() if n.alive and n is not node), default=0)
        if node.machine.round is None or ahead > node.round:
            node.round = ahead
            self._give(node, StateAt(round=node.round, digest=bytes(32), chain=self._chain(node.round)))
            self._train(node)
        listed = self.view.member(node.id)
        if listed is not None and listed.incarnation == node.incarnation and not listed.active:
            now = self._member(node, active=True)
            self.decide(*(now if m.id == node.id else m for m in self.view.members))

    def _train(self, node: Node) -> None:
        if node.id in self.witnesses:
            return
        round = node.round
        self._after(self.step_s * self.random.uniform(0.5, 1.5), lambda: self._encode(node, round))

    def _encode(self, node: Node, round: int) -> None:
        if not node.alive or node.round != round:
            return
        for chunk in range(self.chunks):
            what = ChunkKey(kind="contribution", round=round, chunk=chunk)
            node.store[what] = ChunkInfo(digest=_digest(node.id, node.incarnation, what))
        self._give(node, ContributionFixed(round=round, weight=10 + int(node.id[1:])))

    def _give(self, node: Node, event: Event) -> None:
        if not node.alive:
            return
        for effect in node.machine.handle(self.now, event):
            self._perform(node, effect)

    # --- effects ------------------------------------------------------------------------------------------------

    def _perform(self, node: Node, effect: Effect) -> None:
        match effect:
            case WakeAt(at=at):
                assert at >= self.now
                node.wake = at
                self._after(at - self.now, lambda: self._tick(node, at))
            case Send(peer=peer, message=message):
                self._send(node, peer, message)
            case Fetch():
                self._fetch(node, effect)
            case CancelFetch(peer=peer, key=key):
                node.gets.pop((peer, key), None)
                node.held.pop((peer, key), None)
            case CancelFetches():
                node.gets.clear()
                node.held.clear()
            case Reduce():
                self._reduce(node, effect)
            case AdoptMean(found=found, key=key):
                self._hold(node, key, node.store[found])
            case Settle():
                self._settle(node, effect)
            case StoreMeans(round=round, epoch=epoch, attempt=attempt):
                stored = MeansStored(round=round, epoch=epoch, attempt=attempt)
                self._after(self._delay(), lambda: self._give(node, stored))
            case Forget(means_before=means, contributions_before=contributions):
                oldest = {"mean": means, "contribution": contributions}
                node.store = {k: v for k, v in node.store.items() if k.round >= oldest[k.kind]}
                node.oldest_mean = means
            case Tell(event=CommitReady(commit=commit)):
                self._after(self._delay(), lambda: self._commit(node, commit))
            case Tell(event=MeansCommitted() as means_committed):
                self._apply(node, means_committed)
            case Tell(event=FetchState()):
                if not node.fetching_state:
                    node.fetching_state = True
                    self._after(3.0, lambda: self._import(node))
            case _:
                pass

    def _chain(self, round: int) -> bytes:
        """Of the commits before ``round``."""
        commits = [v.commit for v in self.views if v.commit is not None and v.commit.round == round - 1]
        return commits[0].chain if commits else FIRST_CHAIN

    def _tick(self, node: Node, at: float) -> None:
        if node.wake == at:
            node.wake = None
            self._give(node, Tick())

    def _send(self, node: Node, peer: str, message: Message) -> None:
        self.sent.append((self.now, node.id, peer, message))
        if isinstance(message, Have) and node.machine.chunks.attempt is not None:
            for chunk, number in node.machine.chunks.attempt.numbers.items():
                assert _mean(message.round, chunk, number) in node.store, "says that it has what it has not"
        copies = 1 + (self.random.random() < self.loss)
        for _ in range(copies):
            if self.random.random() >= self.loss:
                self._after(self._delay(), lambda: self._hear(node, peer, message))

    def _hear(self, sender: Node, peer: str, message: Message) -> None:
        to = self.nodes.get(peer)
        if to is not None and sender.alive and self.nodes[sender.id] is sender:
            self._give(to, Heard(peer=sender.id, message=message))

    def _commit(self, node: Node, commit: Commit) -> None:
        if node.id == self.view.leader and node.alive and commit.round == self.committed:
            self.decide(*self.view.members, commit=commit)

    def _reduce(self, node: Node, effect: Reduce) -> None:
        assert effect.contributors, "a mean of nobody"
        key = effect.key
        for peer in effect.contributors:
            what = ChunkKey(kind="contribution", round=key.round, chunk=key.chunk)
            assert what in node.store if peer == node.id else node.held.pop((peer, what))
        place = {m: i for i, m in enumerate(effect.members)}
        made = ChunkInfo(
            digest=_digest(key.round, key.chunk, effect.contributors, node.incarnation),
            contributors=bitmap([place[p] for p in effect.contributors]),
            total_weight=sum(effect.weights),
        )
        self.made.append((node.id, effect))
        self._after(self._delay(), lambda: self._reduced(node, key, made))

    def _reduced(self, node: Node, key: ChunkKey, made: ChunkInfo) -> None:
        if node.alive:
            self._hold(node, key, made)
            self._give(node, Reduced(key=key, info=made))

    def _hold(self, node: Node, key: ChunkKey, made: ChunkInfo) -> None:
        if (key.epoch, key.attempt) != (0, 0):
            assert self.digests.setdefault(key, made.digest) == made.digest, f"{key} was made twice"
        if key.round >= node.oldest_mean:
            node.store[key] = made

    def _settle(self, node: Node, settle: Settle) -> None:
        exceptions = {k.chunk: k for k in settle.exceptions}
        for chunk in range(self.chunks):
            usual = _mean(settle.round, chunk, (settle.epoch, settle.attempt))
            node.store[_mean(settle.round, chunk, (0, 0))] = node.store[exceptions.get(chunk, usual)]

    def _apply(self, node: Node, done: MeansCommitted) -> None:
        assert done.round == node.round
        means = [node.store[_mean(done.round, c, (0, 0))] for c in range(self.chunks)]
        self.handed_over.setdefault(done.round, set()).add(blake3(b"".join(m.digest for m in means)).digest())
        listed = next(v for v in self.views if v.commit and v.commit.round == done.round).commit
        assert listed is not None
        members = next(v for v in self.views if v.number == listed.view).members
        place = [i for i, m in enumerate(members) if (m.id, m.incarnation) == (node.id, node.incarnation)]
        for made in means:
            really = bool(place) and place[0] in positions(made.contributors)
            assert really == (done.position in positions(made.contributors)), "does not know that it was counted"
        self._after(0.2, lambda: self._applied(node, done.round + 1))

    def _applied(self, node: Node, round: int) -> None:
        if node.alive and node.round < round:
            node.round = round
            self._give(node, StateAt(round=round, digest=bytes(32), chain=self._chain(round)))
            self._train(node)

    # --- chunks between nodes -----------------------------------------------------------------------------------

    def _fetch(self, node: Node, fetch: Fetch) -> None:
        self.count += 1
        number = node.gets[fetch.peer, fetch.key] = self.count
        deadline = self.now + fetch.timeout_s
        self._after(self._delay(), lambda: self._serve(node, fetch, number, deadline))

    def _serve(self, node: Node, fetch: Fetch, number: int, deadline: float) -> None:
        """Looks again and again while the chunk is not there."""
        where = fetch.peer, fetch.key
        if node.gets.get(where) != number or not node.alive:
            return
        server = self.nodes[fetch.peer]
        listed = node.machine.view.member(fetch.peer) if node.machine.view else None
        if not server.alive or listed is None or listed.incarnation != server.incarnation:
            self._fail(node, fetch, "unreachable")
        elif fetch.key in server.store:
            made = server.store[fetch.key]
            del node.gets[where]
            if fetch.key.kind == "mean":
                self._hold(node, fetch.key, made)
            else:
                node.held[where] = made
            self._give(node, Fetched(peer=fetch.peer, key=fetch.key, info=made, size=1000))
        elif self.now >= deadline:
            self._fail(node, fetch, "late")
        else:
            self._after(0.1, lambda: self._serve(node, fetch, number, deadline))

    def _fail(self, node: Node, fetch: Fetch, fault: FetchFault) -> None:
        del node.gets[fetch.peer, fetch.key]
        self._give(node, FetchFailed(peer=fetch.peer, key=fetch.key, fault=fault))

    # --- chance and time ----------------------------------------------------------------------------------------

    def _delay(self) -> float:
        return self.random.choice((0.01, 0.02, 0.05)) if self.random.random() < 0.95 else self.random.uniform(0, 2)

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.heap, (self.now + seconds, self.count, action))


def _digest(*parts: object) -> bytes:
    return blake3(repr(parts).encode()).digest()


def _mean(round: int, chunk: int, number: tuple[int, int]) -> ChunkKey:
    return ChunkKey(kind="mean", round=round, chunk=chunk, epoch=number[0], attempt=number[1])
