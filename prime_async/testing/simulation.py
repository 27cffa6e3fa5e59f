"""Whole runs without a network, a clock or tensors: the real machines, driven from a heap of events.

Everything else of a node is a small model of the real thing: a contribution, a mean and an outer state are digests,
a get takes the latency of two messages and waits at its server, inner steps take as long as they are told to, and a
disk takes a moment until what it was given is safe. Virtual time costs nothing, and a seed decides all that chance
decides: a run that fails is run again by its seed, with ``trace_to``, for every event and effect of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from prime_async.errors import LocalError
from prime_async.log import MachineSettings
from prime_async.machines.ballot import Ballot
from prime_async.machines.checkpoint import CheckpointSettings
from prime_async.machines.exchange import ExchangeSettings
from prime_async.machines.membership import ContactPoint, MembershipSettings
from prime_async.machines.training import TrainingSettings
from prime_async.machines.vocabulary import (
    ActorName,
    AdoptMean,
    Apply,
    BallotStored,
    CancelFetch,
    CancelFetches,
    ConnectMembers,
    Dial,
    Effect,
    Encode,
    EndImport,
    Evaluate,
    Fail,
    Fetch,
    Finish,
    Forget,
    GiveUp,
    ImportChunk,
    Leave,
    Merge,
    Reduce,
    Report,
    Restore,
    RunSteps,
    Save,
    Send,
    Settle,
    StateAt,
    StopEvaluation,
    StopSteps,
    StoreBallot,
    TakeBack,
    Tell,
    WakeAt,
)
from prime_async.messages import FIRST_CHAIN, Member
from prime_async.testing.host import Disk, SimNode, digest_of
from prime_async.testing.kernel import Kernel, Observer
from prime_async.testing.ledger import SimLedger, restore
from prime_async.testing.network import Network
from prime_async.testing.recording import SimRecorders
from prime_async.testing.settings import SimulationSettings
from prime_async.testing.store import Store
from prime_async.testing.trace import lines_of, text_of
from prime_async.testing.work import Work

RUN_ID = bytes(32)
STARTS_APART = 1000
"""Between the incarnations of two starts: a process that was removed becomes the next of its own."""
TRACE_RECORDS = 200_000


class Simulation:
    """A run of ``nodes`` nodes, n0 (which founds it), n1, and so on; more can be started.

    ``nodes`` has the last process of each name, ``processes`` all of them. ``observers`` see each event with its
    effects before these are performed, ``disk_observers`` each ballot when it is safe on its disk.
    """

    def __init__(self, nodes: int, seed: int, settings: SimulationSettings | None = None) -> None:
        self._settings = settings or SimulationSettings()
        self.nodes: dict[str, SimNode] = {}
        self.disks: dict[str, Disk] = {}
        self.processes: list[SimNode] = []
        self.kernel = Kernel(seed)
        self.kernel.perform = self._perform
        self.network = Network(self.kernel, self.nodes, self._settings)
        self.store = Store(self.kernel, self.network)
        self.work = Work(self.kernel, self.store, self._settings)
        self.ledger = SimLedger(self.kernel, self.store, self._settings)
        self.disk_observers: list[Callable[[SimNode, Ballot], None]] = []
        self.hint = ""  # how to run this again
        self._recorders: SimRecorders | None = None
        for i in range(nodes):
            self.start(f"n{i}")

    @property
    def seed(self) -> int:
        return self.kernel.seed

    @property
    def now(self) -> float:
        return self.kernel.now

    @property
    def observers(self) -> list[Observer]:
        return self.kernel.observers

    @property
    def settings(self) -> SimulationSettings:
        return self._settings

    @settings.setter
    def settings(self, settings: SimulationSettings) -> None:
        self._settings = self.network.settings = self.work.settings = self.ledger.settings = settings

    @property
    def running(self) -> list[SimNode]:
        return [n for n in self.nodes.values() if n.running]

    # --- what a test does: nodes --------------------------------------------------------------------------------

    def start(self, name: str, *, wiped: bool = False, contacts: Iterable[str] | None = None) -> SimNode:
        """Start a node, for the first time or again: as a new incarnation, with what is on its disk, or ``wiped``."""
        disk = self.disks.setdefault(name, Disk(chunk_count=self._settings.chunk_count))
        if name in self.nodes:
            self.crash(name)
        if wiped:
            disk.wipe()
        if contacts is None:
            first = disk.born == 0 and name == "n0"
            contacts = [] if first else [n for n in ("n0", *self.nodes) if n != name]
        disk.born += 1
        node = self._new_process(name, disk, list(dict.fromkeys(contacts)))
        if self._recorders is not None:
            self._recorders.record(node)
        self.nodes[name] = node
        self.processes.append(node)
        chain = node.tip.chain if node.tip is not None else FIRST_CHAIN
        self.ledger.announce(node)
        self.kernel.post(node, "training", StateAt(round=node.state[0], digest=node.state[1], chain=chain))
        return node

    def _new_process(self, name: str, disk: Disk, contacts: list[str]) -> SimNode:
        state, _, tip = restore(disk)
        s = self._settings
        witness = name in s.witnesses
        me = Member(
            id=name,
            name=name,
            incarnation=disk.born * STARTS_APART,
            control=f"sim://{name}",
            bulk=f"sim://{name}",
            witness=witness,
        )
        settings = MachineSettings(
            membership=MembershipSettings(
                me=me,
                run_id=RUN_ID,
                settings={},
                contacts=tuple(ContactPoint(id=c, control=f"sim://{c}") for c in contacts[:8]),
                min_members=s.min_members,
                heartbeat_s=s.heartbeat_s,
                failure_timeout_s=s.failure_timeout_s,
                ballot=disk.ballot,
                tip=tip,
            ),
            exchange=ExchangeSettings(
                me=name,
                chunk_count=s.chunk_count,
                fragments=s.fragments,
                min_members=s.min_members,
                straggler_timeout_s=s.straggler_timeout_s,
                fetch_timeout_s=s.fetch_timeout_s,
            ),
            checkpoint=CheckpointSettings(
                me=name,
                chunk_count=s.chunk_count,
                fragments=s.fragments,
                fetch_timeout_s=s.fetch_timeout_s,
                snapshot_every=s.snapshot_every,
                keep_snapshots=s.keep_snapshots,
                keep_rounds=s.keep_rounds,
            ),
            training=TrainingSettings(
                me=name,
                inner_steps=0 if s.seconds else s.inner_steps,
                seconds=s.seconds,
                rounds=s.rounds,
                min_members=s.min_members,
                witness=witness,
                overlaps=s.overlaps and not witness,
                eager=s.eager and not witness,
                fragments=s.fragments,
                sync_rounds=s.sync_rounds,
            ),
        )
        node = SimNode(id=name, settings=settings, machines=settings.build(), disk=disk)
        node.state, node.tip = state, tip
        return node

    def crash(self, name: str) -> None:
        """The process ends; what is under way to it, and to its disk, is lost."""
        node = self.nodes[name]
        if node.alive:
            node.alive = False
            node.disk.free_at = node.disk.ledger_free_at = 0.0
            self.store.lose_server(node)

    def pause(self, name: str) -> None:
        """The node is not run; what comes for it waits."""
        self.nodes[name].paused = True

    def resume(self, name: str) -> None:
        if self.nodes[name].paused:
            self.kernel.go_on(self.nodes[name])

    def corrupt(self, name: str) -> None:
        """Its outer state is not what it computed any more, and it does not know."""
        node = self.nodes[name]
        node.state = (node.state[0], digest_of("corrupt", node.state[1], self.now))

    def spoil(self, name: str) -> None:
        """Its inner steps end in NaN."""
        self.nodes[name].not_finite = True

    def garble(self, name: str, *, share: float = 1.0) -> None:
        """Its next contribution is of bytes that no mean can be made of, in about so many of the chunks."""
        self.nodes[name].garbles, self.work.garbled_share = True, share

    def fill(self, name: str, *, full: bool = True) -> None:
        """Its disk has no room for anything more; or has again."""
        disk = self.disks[name]
        disk.full, disk.was_full = full, disk.was_full or full

    def damage(self, name: str) -> str:
        """Bytes of something in its ledger are not what they were: of a mean or of a snapshot. Says what."""
        disk, chunk = self.disks[name], self.kernel.random.randrange(max(1, self._settings.chunk_count))
        there = [("means", r) for r, m in disk.means.items() if chunk in m.infos]
        there += [("snapshot", r) for r in disk.snapshots]
        if not there:
            return "nothing"
        kind, round = self.kernel.random.choice(sorted(there))
        (disk.means[round].damaged if kind == "means" else disk.damaged.setdefault(round, set())).add(chunk)
        disk.faults += 1
        return f"{kind} {round}, chunk {chunk}"

    def leave(self, name: str, *, at_once: bool = False) -> None:
        self.kernel.post(self.nodes[name], "training", Leave(at_once=at_once))

    # --- what a test does: the network --------------------------------------------------------------------------

    def split(self, *groups: Iterable[str]) -> None:
        """Nodes of different groups do not hear each other; who is in none is in the first. Without groups: all do."""
        self.network.islands = {name: k for k, group in enumerate(groups) for name in group}

    def cut(self, sender: str, receiver: str, *, both_ways: bool = False) -> None:
        self.network.cuts.add((sender, receiver))
        if both_ways:
            self.network.cuts.add((receiver, sender))

    def flap(self, a: str, b: str, *, period_s: float = 10.0, down_s: float = 2.0) -> None:
        """The link is down for the first ``down_s`` of each period."""
        self.network.flaps[a, b] = self.network.flaps[b, a] = (period_s, down_s)

    def heal(self) -> None:
        """All links carry everything, and nothing is lost or doubled on purpose; nodes that are paused stay so."""
        self.network.heal()
        self.settings = replace(self._settings, loss=0.0, doubled=0.0)

    # --- what a test does: time ---------------------------------------------------------------------------------

    def run_until(self, condition: Callable[[], bool], limit_s: float) -> None:
        """Go on until ``condition`` holds. Raises ``AssertionError``, with the seed, if it does not in ``limit_s``."""
        end = self.now + limit_s
        step = self.kernel.step
        while not condition():
            if not step(end):
                raise AssertionError(f"not within {limit_s:g} s; {self.where()}: {self.summary()}")

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        step = self.kernel.step
        while step(end):
            pass
        self.kernel.now = end

    def step(self) -> bool:
        """One event. ``False``: nothing will happen any more."""
        return self.kernel.step(math.inf)

    # --- what went wrong ----------------------------------------------------------------------------------------

    def where(self) -> str:
        return f"seed {self.seed}, at {self.now:.3f} s{self.hint}"

    def summary(self) -> str:
        """One line for each node."""
        lines = []
        for node in self.nodes.values():
            what = "crashed" if not node.alive else "finished" if node.finished else "paused" if node.paused else ""
            failure = f" {node.failure.kind}: {node.failure.text}" if node.failure else ""
            lines.append(f"\n  {node.id}: round {node.state[0]} {what}{failure} {self._view_of(node)}")
        return "".join(lines)

    def _view_of(self, node: SimNode) -> str:
        ballot = node.disk.ballot
        return text_of(ballot) if ballot else "without a ballot"

    def record_to(self, directory: Path) -> None:
        """Write the message log of every node to ``directory``, as a real node does: ``n1.log``.

        A node that is started again writes ``n1-2.log``, and so on. Call it before anything happens; a simulation that
        records cannot be pickled. Raises :class:`LocalError` if something has happened, :class:`StorageError` if the
        directory cannot be written to.
        """
        if self.kernel.events:
            raise LocalError(f"record_to at {self.now:.3f} s: a log begins with its node, so call it before run_until")
        self._recorders = SimRecorders(directory)
        for node in self.nodes.values():
            self._recorders.record(node)

    def record(self) -> None:
        """From now on, keep all events and effects (the last 200,000 of them)."""
        self.kernel.trace = deque(maxlen=TRACE_RECORDS)

    @property
    def trace(self) -> list[str]:
        """Since ``record``: one line for each event, and one for each of its effects."""
        return lines_of(self.kernel.trace or ())

    def trace_to(self, path: Path) -> None:
        path.write_text("\n".join([*self.trace, self.where() + self.summary(), ""]))

    # --- effects ------------------------------------------------------------------------------------------------

    def _perform(self, node: SimNode, actor: ActorName, effect: Effect) -> None:
        match effect:
            case Send(peer=peer, message=message):
                self.network.send(node, peer, message)
            case WakeAt(at=at):
                self.kernel.wake_at(node, actor, at)
            case Report(fact=fact):
                node.facts.append(fact)
            case Tell(actor=other, event=event):
                self.kernel.post(node, other, event)
            case Fetch():
                self.store.fetch(node, actor, effect)
            case StoreBallot():
                self._write(node, effect)
            case Dial(peer=peer):
                self.network.dial(node, peer)
            case ConnectMembers():
                self.network.connect(node, effect)
            case Fail():
                node.failure = effect
            case Finish():
                node.finished = True
            case _:
                self._perform_rarer(node, actor, effect)

    def _perform_rarer(self, node: SimNode, actor: ActorName, effect: Effect) -> None:
        match effect:
            case CancelFetches():
                self.store.cancel_all(node, actor)
            case CancelFetch():
                self.store.cancel(node, actor, effect)
            case AdoptMean():
                self.store.adopt(node, effect)
            case Settle():
                self.store.settle(node, effect, self._settings.chunks(effect.round))
                node.settling = effect
                self.ledger.settle(node, effect)
            case Reduce():
                self.store.reduce(node, effect)
            case Forget():
                self.store.forget(node, effect)
            case (
                RunSteps() | StopSteps() | Encode() | Apply() | Merge() | GiveUp() | TakeBack() | Evaluate()
                | StopEvaluation() | Restore() | Save() | ImportChunk() | EndImport()
            ):  # fmt: skip
                self.work.perform(node, effect)
            case _:
                self.ledger.perform(node, effect)

    # --- the disk -----------------------------------------------------------------------------------------------

    def _write(self, node: SimNode, effect: StoreBallot) -> None:
        """Writes are done one after the other. A crash may come between the disk's being safe and our hearing so."""
        low, high = self._settings.disk_s
        node.disk.free_at = max(self.now, node.disk.free_at) + low + (high - low) * self.kernel.random.random()
        self.kernel.later(node.disk.free_at - self.now, self._safe, node, effect)

    def _safe(self, node: SimNode, effect: StoreBallot) -> None:
        if not node.alive:
            return
        node.disk.ballot = effect.ballot
        for observer in self.disk_observers:
            observer(node, effect.ballot)
        self.kernel.post(node, "membership", BallotStored(seq=effect.seq), self._settings.disk_s[0])
