"""Whole runs without a network, a clock or tensors: the real machines, driven from a heap of events.

Everything else of a node is a small model of the real thing: a contribution, a mean and an outer state are digests,
a fetch takes the latency of two messages and waits at its server, inner steps take as long as they are told to.
Virtual time costs nothing, and a seed decides all that chance decides: a run that fails is run again by its seed.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from blake3 import blake3

from prime_async.log import MachineSettings
from prime_async.machines.checkpoint import CheckpointSettings
from prime_async.machines.exchange import ExchangeSettings
from prime_async.machines.facts import Fact
from prime_async.machines.membership import ContactPoint, MembershipSettings
from prime_async.machines.training import TrainingSettings
from prime_async.machines.vocabulary import (
    ActorName,
    Applied,
    Apply,
    CancelFetches,
    ChunkImported,
    ConnectMembers,
    Dial,
    Effect,
    Encode,
    Encoded,
    EndImport,
    Evaluate,
    Evaluated,
    Event,
    Fail,
    Fetch,
    Fetched,
    FetchFailed,
    FetchFault,
    Finish,
    Forget,
    Heard,
    ImportChunk,
    Imported,
    Leave,
    Machine,
    Reduce,
    Reduced,
    Report,
    Restore,
    Restored,
    RunSteps,
    Save,
    Saved,
    Send,
    StateAt,
    StepsDone,
    StopSteps,
    Tell,
    Tick,
    WakeAt,
)
from prime_async.messages import (
    Behind,
    ChunkInfo,
    ChunkKey,
    Commit,
    Have,
    Member,
    Message,
    Plan,
    Ready,
    ViewUpdate,
    bitmap,
    decode,
    encode,
    positions,
)

ROUND_MESSAGES = (Ready, Plan, Have, Commit, Behind)
RUN_ID = bytes(32)
RESEND_S = 0.5
"""Chunks come over TCP: what a split holds up arrives after it."""


def digest_of(*parts: object) -> bytes:
    """A digest that stands for bytes that a real node would have."""
    return blake3(repr(parts).encode()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """``latency_s``: of a message, uniform between the two. Chances are per control message."""

    chunk_count: int = 3
    inner_steps: int = 4
    rounds: int = 0
    min_members: int = 1
    step_s: float = 0.5
    latency_s: tuple[float, float] = (0.01, 0.1)
    loss: float = 0.0
    doubled: float = 0.0
    heartbeat_s: float = 1.0
    failure_timeout_s: float = 10.0


@dataclass(slots=True)
class SimNode:
    """A simulated node. ``state``: round and digest of its outer state. ``applied``: what it applied, by round."""

    id: str
    settings: MachineSettings
    machines: dict[ActorName, Machine]
    alive: bool = True
    paused: bool = False
    backlog: list[Callable[[], None]] = field(default_factory=list)  # what came while it was paused
    state: tuple[int, bytes] = (0, digest_of("initial"))
    applied: dict[int, bytes] = field(default_factory=dict)
    counted: dict[int, set[int]] = field(default_factory=dict)  # round -> chunks whose mean counts this node
    chunks: dict[ChunkKey, ChunkInfo] = field(default_factory=dict)
    oldest: dict[str, int] = field(default_factory=lambda: {"contribution": 0, "mean": 0})
    held: dict[tuple[str, str, ChunkKey], ChunkInfo] = field(default_factory=dict)
    waiting: list[tuple[ChunkKey, Callable[[ChunkInfo | None], None]]] = field(default_factory=list)
    fetch_generation: Counter[str] = field(default_factory=Counter)
    wake: dict[str, int] = field(default_factory=dict)  # actor -> number of its last wish
    steps_generation: int = 0
    steps_began: float = 0.0
    incoming: list[bytes] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    failure: Fail | None = None
    finished: bool = False
    steps: int = 0

    @property
    def running(self) -> bool:
        return self.alive and not self.finished and self.failure is None


class Simulation:
    """Nodes ``n0``, ``n1``, ...; the first founds the run. Drive it with ``run_until``; look at ``nodes``.

    ``observers`` see every call of a machine before its effects are performed. ``drops`` picks messages to lose, by
    sender, receiver and content, beside those that chance takes.
    """

    def __init__(self, nodes: int, seed: int, settings: SimulationSettings | None = None) -> None:
        self.settings = settings or SimulationSettings()
        self.seed = seed
        self.now = 0.0
        self.random = random.Random(seed)
        self.nodes: dict[str, SimNode] = {}
        self.island: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.observers: list[Callable[[SimNode, Event, list[Effect]], None]] = []
        self.drops: Callable[[str, str, Message], bool] = lambda _sender, _receiver, _message: False
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._tie = 0
        for i in range(nodes):
            self.start(f"n{i}")

    # --- what a test does ---------------------------------------------------------------------------------------

    def start(self, name: str, state: tuple[int, bytes] | None = None) -> SimNode:
        """Start a node, for the first time or again: as a new incarnation, with the initial state or ``state``."""
        s = self.settings
        old = self.nodes.get(name)
        incarnation = old.settings.membership.me.incarnation + 1000 if old else 1
        me = Member(id=name, name=name, incarnation=incarnation, control=f"sim://{name}", bulk=f"sim://{name}")
        contacts = () if name == "n0" else (ContactPoint(id="n0", control="sim://n0"),)
        settings = MachineSettings(
            membership=MembershipSettings(
                me=me,
                run_id=RUN_ID,
                settings={},
                contacts=contacts,
                min_members=s.min_members,
                heartbeat_s=s.heartbeat_s,
                failure_timeout_s=s.failure_timeout_s,
            ),
            exchange=ExchangeSettings(me=name, chunk_count=s.chunk_count, min_members=s.min_members),
            checkpoint=CheckpointSettings(chunk_count=s.chunk_count),
            training=TrainingSettings(me=name, inner_steps=s.inner_steps, rounds=s.rounds, min_members=s.min_members),
        )
        node = SimNode(id=name, settings=settings, machines=settings.build())
        node.state = state or node.state
        self.nodes[name] = node
        at = StateAt(round=node.state[0], digest=node.state[1])
        self._later(0.0, lambda: self._give(node, "training", at))
        return node

    def crash(self, name: str) -> None:
        """The node stops for good; what is under way to it is lost."""
        self.nodes[name].alive = False

    def pause(self, name: str) -> None:
        """The node is not run; what comes for it waits."""
        self.nodes[name].paused = True

    def resume(self, name: str) -> None:
        node = self.nodes[name]
        node.paused = False
        backlog, node.backlog = node.backlog, []
        for action in backlog:
            self._later(0.0, action)

    def leave(self, name: str, *, at_once: bool = False) -> None:
        node = self.nodes[name]
        self._later(0.0, lambda: self._give(node, "training", Leave(at_once=at_once)))

    def split(self, *groups: tuple[str, ...]) -> None:
        """Nodes of different groups do not hear each other. Without groups: all do again."""
        self.island = Counter({name: k for k, group in enumerate(groups) for name in group})

    def run_until(self, condition: Callable[[], bool], limit_s: float) -> None:
        """Go on until ``condition`` holds. Raises ``AssertionError``, with the seed, if it does not in ``limit_s``."""
        end = self.now + limit_s
        while not condition():
            if not self._heap or self._heap[0][0] > end:
                states = {n.id: (n.state[0], n.finished, n.failure) for n in self.nodes.values()}
                raise AssertionError(f"not within {limit_s} s; seed {self.seed}, at {self.now:.3f}: {states}")
            self.now, _, action = heapq.heappop(self._heap)
            action()

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = end

    @property
    def running(self) -> list[SimNode]:
        return [n for n in self.nodes.values() if n.running]

    # --- time and messages --------------------------------------------------------------------------------------

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        self._tie += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._tie, action))

    def _latency(self) -> float:
        return self.random.uniform(*self.settings.latency_s)

    def _reaches(self, a: str, b: str) -> bool:
        return self.island[a] == self.island[b] and self.nodes[a].running and self.nodes[b].alive

    def _on(self, node: SimNode, action: Callable[[], None]) -> None:
        """Run ``action`` at ``node`` now, or when it is run again."""
        if not node.alive:
            return
        if node.paused:
            node.backlog.append(action)
        else:
            action()

    def _give(self, node: SimNode, actor: ActorName, event: Event) -> None:
        if not node.running:
            return
        if node.paused:
            node.backlog.append(lambda: self._give(node, actor, event))
            return
        effects = node.machines[actor].handle(self.now, event)
        for observer in self.observers:
            observer(node, event, effects)
        for effect in effects:
            self._perform(node, actor, effect)

    def _post(self, node: SimNode, actor: ActorName, event: Event, delay_s: float = 0.0) -> None:
        self._later(delay_s, lambda: self._give(node, actor, event))

    def _send(self, node: SimNode, peer: str, message: Message) -> None:
        self.messages[type(message).__name__] += 1
        copies = 1 if self.random.random() >= self.settings.doubled else 2
        data = encode(message)
        for _ in range(copies):
            if self.random.random() >= self.settings.loss and not self.drops(node.id, peer, message):
                self._later(self._latency(), lambda: self._arrive(node.id, peer, data))

    def _arrive(self, sender: str, peer: str, data: bytes) -> None:
        if peer not in self.nodes or not self.nodes[peer].alive or self.island[sender] != self.island[peer]:
            return
        message = decode(data, Message)
        actor: ActorName = "exchange" if isinstance(message, ROUND_MESSAGES) else "membership"
        if isinstance(message, ViewUpdate):
            self._give(self.nodes[peer], "exchange", Heard(peer=sender, message=message))
        self._give(self.nodes[peer], actor, Heard(peer=sender, message=message))

    # --- effects ------------------------------------------------------------------------------------------------

    def _perform(self, node: SimNode, actor: ActorName, effect: Effect) -> None:
        match effect:
            case WakeAt(at=at):
                self._wake(node, actor, at)
            case Report(fact=fact):
                node.facts.append(fact)
            case Tell(actor=other, event=event):
                self._post(node, other, event)
            case Send(peer=peer, message=message):
                self._send(node, peer, message)
            case Dial() | ConnectMembers():
                pass  # everybody who is up can be reached
            case Fail():
                node.failure = effect
            case Finish():
                node.finished = True
            case Fetch():
                self._fetch(node, actor, effect)
            case CancelFetches():
                node.fetch_generation[actor] += 1
                node.held = {k: v for k, v in node.held.items() if k[0] != actor}
            case Reduce():
                self._reduce(node, effect)
            case Forget():
                self._forget(node, effect)
            case _:
                self._train(node, effect)

    def _wake(self, node: SimNode, actor: ActorName, at: float) -> None:
        node.wake[actor] = number = node.wake.get(actor, 0) + 1

        def tick() -> None:
            if node.wake[actor] == number:
                self._give(node, actor, Tick())

        self._later(max(0.0, at - self.now), tick)

    def _train(self, node: SimNode, effect: Effect) -> None:
        step_s = self.settings.step_s * self.random.uniform(0.8, 1.2)
        match effect:
            case RunSteps(steps=steps):
                node.steps_generation += 1
                node.steps_began = self.now
                generation = node.steps_generation
                self._later(steps * step_s, lambda: self._end_steps(node, generation, steps))
            case StopSteps():
                done = int((self.now - node.steps_began) / step_s)
                generation = node.steps_generation
                self._later(step_s, lambda: self._end_steps(node, generation, done))
            case Encode(round=round):
                for chunk in range(self.settings.chunk_count):
                    key = ChunkKey(kind="contribution", round=round, chunk=chunk)
                    body = (node.id, node.settings.membership.me.incarnation, round, chunk, node.steps)
                    self._store(node, key, ChunkInfo(digest=digest_of(*body)))
                self._post(node, "training", Encoded(round=round, finite=True), 0.05)
            case Apply():
                self._apply(node, effect)
            case Evaluate():
                self._post(node, "training", Evaluated(loss=1.0), 0.05)
            case Restore():
                self._post(node, "training", Restored(), 0.05)
            case Save():
                self._post(node, "training", Saved(path=""), 0.05)
            case ImportChunk(peer=peer, key=key):
                node.held.pop(("checkpoint", peer, key))
                self._post(node, "checkpoint", ChunkImported(key=key), 0.01)
            case EndImport(round=round):
                node.state = (round, node.incoming[-1])
                self._post(node, "checkpoint", Imported(round=round, digest=node.incoming[-1]), 0.01)
            case _:
                raise TypeError(f"nothing performs {effect!r}")

    def _end_steps(self, node: SimNode, generation: int, steps: int) -> None:
        if generation != node.steps_generation:
            return
        node.steps_generation += 1
        node.steps += steps
        self._give(node, "training", StepsDone(steps=steps, tokens=steps * 10, seconds=0.0))

    def _apply(self, node: SimNode, effect: Apply) -> None:
        means = []
        for chunk in range(self.settings.chunk_count):
            key = ChunkKey(kind="mean", round=effect.round, chunk=chunk, epoch=effect.epoch, attempt=effect.attempt)
            means.append(node.chunks[key].digest)
            if effect.position in positions(node.chunks[key].contributors):
                node.counted.setdefault(effect.round, set()).add(chunk)
        node.applied[effect.round] = digest_of(*means)
        node.state = (effect.round + 1, digest_of(node.state[1], *means))
        self._post(node, "training", Applied(round=node.state[0], digest=node.state[1]), 0.05)

    # --- chunks -------------------------------------------------------------------------------------------------

    def _store(self, node: SimNode, key: ChunkKey, info: ChunkInfo) -> None:
        if key.round < node.oldest[key.kind]:
            return
        node.chunks[key] = info
        answered = [w for w in node.waiting if w[0] == key]
        node.waiting = [w for w in node.waiting if w[0] != key]
        for _, answer in answered:
            answer(info)

    def _forget(self, node: SimNode, effect: Forget) -> None:
        node.oldest = {"contribution": effect.contributions_before, "mean": effect.means_before}
        node.chunks = {k: v for k, v in node.chunks.items() if k.round >= node.oldest[k.kind]}
        over = [w for w in node.waiting if w[0].round < node.oldest[w[0].kind]]
        node.waiting = [w for w in node.waiting if w[0].round >= node.oldest[w[0].kind]]
        for _, answer in over:
            answer(None)

    def _serve(self, server: SimNode, key: ChunkKey, answer: Callable[[ChunkInfo | None], None]) -> None:
        if key.kind == "state":
            round, digest = server.state
            answer(ChunkInfo(digest=digest) if round == key.round else None)
        elif key in server.chunks:
            answer(server.chunks[key])
        elif key.round < server.oldest[key.kind]:
            answer(None)
        else:
            server.waiting.append((key, answer))

    def _fetch(self, node: SimNode, actor: ActorName, fetch: Fetch) -> None:
        generation = node.fetch_generation[actor]
        settled = False

        def settle(info: ChunkInfo | None, fault: FetchFault) -> None:
            nonlocal settled
            if settled or generation != node.fetch_generation[actor] or not node.alive:
                return
            settled = True
            if info is None:
                self._give(node, actor, FetchFailed(peer=fetch.peer, key=fetch.key, fault=fault))
                return
            if fetch.key.kind == "mean":
                self._store(node, fetch.key, info)
            elif fetch.key.kind == "state":
                node.incoming = [*node.incoming[-8:], info.digest]
            node.held[actor, fetch.peer, fetch.key] = info
            self._give(node, actor, Fetched(peer=fetch.peer, key=fetch.key, info=info))

        server = self.nodes.get(fetch.peer)
        if server is None or not self._reaches(node.id, fetch.peer):
            self._later(0.01, lambda: self._on(node, lambda: settle(None, "unreachable")))
            return

        def answer(info: ChunkInfo | None) -> None:
            if self._reaches(server.id, node.id):
                self._later(self._latency(), lambda: self._on(node, lambda: settle(info, "gone")))
            elif server.running and not settled:
                self._later(RESEND_S, lambda: answer(info))

        self._later(self._latency(), lambda: self._on(server, lambda: self._serve(server, fetch.key, answer)))
        self._later(fetch.timeout_s, lambda: self._on(node, lambda: settle(None, "late")))

    def _reduce(self, node: SimNode, effect: Reduce) -> None:
        key = ChunkKey(kind="contribution", round=effect.key.round, chunk=effect.key.chunk)
        inputs = [
            node.chunks[key] if peer == node.id else node.held.pop(("exchange", peer, key))
            for peer in effect.contributors
        ]
        place = {member: i for i, member in enumerate(effect.members)}
        info = ChunkInfo(
            digest=digest_of(effect.key.chunk, *((i.digest, w) for i, w in zip(inputs, effect.weights, strict=True))),
            contributors=bitmap([place[p] for p in effect.contributors]),
            total_weight=sum(effect.weights),
        )

        def done() -> None:
            if node.running:
                self._store(node, effect.key, info)
                self._give(node, "exchange", Reduced(key=effect.key, info=info))

        self._later(0.02, lambda: self._on(node, done))
