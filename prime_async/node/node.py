"""A node: the transport, four actors in one nursery, and what a failure means."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from prime_async.actors.auditor import Auditor
from prime_async.actors.checkpoint import CheckpointActor
from prime_async.actors.copier import Copier
from prime_async.actors.exchange import ExchangeActor
from prime_async.actors.ledger import LedgerKeeper
from prime_async.actors.store import ChunkStore
from prime_async.actors.tensors import Tensors
from prime_async.actors.training import Stepping, TrainingActor
from prime_async.config.schema import Config
from prime_async.config.spec import run_id
from prime_async.ledger import RemoteCopy, Restored
from prime_async.log import LogWriter, MachineSettings
from prime_async.machines.ballot import Ballot
from prime_async.machines.facts import Fact, LedgerRestored
from prime_async.machines.own import OwnActor
from prime_async.machines.units import to_ms
from prime_async.machines.vocabulary import ActorName, ContributionTaken, Leave, Measured, StateAt
from prime_async.messages import Figures
from prime_async.node.allow import AllowList
from prime_async.node.build import (
    allow_list,
    audit_folder,
    check_beginning,
    data_stream,
    largest_payload,
    machine_settings,
    node_ledger,
    open_transport,
)
from prime_async.node.figures import Gauge
from prime_async.node.meter import Meter
from prime_async.node.participant import Participant
from prime_async.node.switchboard import Performer, log_fact
from prime_async.transport.base import Transport
from prime_async.transport.keys import read_key_file
from prime_async.work.workload import Workload

if TYPE_CHECKING:
    from prime_async.watch.station import Station


class Node(Participant):
    """One node of a run. Made by :func:`open_node`."""

    def __init__(
        self,
        config: Config,
        transport: Transport,
        workload: Workload,
        allow: AllowList,
        stepping: Stepping | None = None,
        actors: Sequence[OwnActor] = (),
    ) -> None:
        super().__init__(config, transport, allow, actors)
        self._gauge = Gauge(config.node.witness)
        self.stopping = False
        self._workload = workload
        self._stepping = stepping
        self._store = ChunkStore()
        self._station: Station | None = None
        self._ledger = node_ledger(config, workload)
        self._keeper = LedgerKeeper(self._ledger, Tensors(workload), None)
        self._copier = self._open_copier()
        self._restored = Restored(workload.round, workload.state_digest(), 0, None)

    @property
    def meter(self) -> Meter:
        """How the node is doing, in numbers."""
        return self._gauge.meter

    @property
    def round(self) -> int:
        """Outer steps in this node's outer state."""
        return self._workload.round

    @property
    def workload(self) -> Workload:
        """What this node trains. Its tensors are the node's own while the node runs: read them after ``wait``."""
        return self._workload

    def stop(self, *, at_once: bool = False) -> None:
        """Ask the node to leave: after the round, or after the inner step that is under way. Returns immediately."""
        self.stopping = True
        self._switchboard.post("training", Leave(at_once=at_once))

    # --- wiring -------------------------------------------------------------------------------------------------

    def _report(self, fact: Fact) -> None:
        log_fact(self._log, fact)
        self._gauge.add(fact, trio.current_time())
        if self._station is not None:
            self._station.add(fact)
        self.events.put(fact)

    def _open_copier(self) -> Copier | None:
        node = self.config.node
        if self._ledger is None or not node.remote:
            return None
        return Copier(RemoteCopy(node.remote, node.directory, run_id(self.config.run)), self._ledger, self._report)

    def _build(self, nursery: trio.Nursery, settings: MachineSettings, recorder: LogWriter | None) -> None:
        self._switchboard.connect(settings.build(), self._report, recorder)
        keeper, runners = self._keeper, self._switchboard.runners
        folder = audit_folder(self.config, self.id, self._workload)
        auditor = Auditor(folder, keeper.tensors) if folder is not None else None
        membership = self._membership_actor(nursery, self._finished.set)
        exchange = ExchangeActor(
            self._transport,
            keeper,
            self._store,
            nursery,
            runners["exchange"].post,
            runners["exchange"].retract,
            auditor,
        )
        checkpoint = CheckpointActor(
            self._transport, keeper, nursery, runners["checkpoint"].post, runners["checkpoint"].retract
        )
        keeper.post = runners["checkpoint"].post
        if self._copier is not None:
            keeper.on_snapshot = self._copier.wake
            nursery.start_soon(self._copier.run, name=f"copier of {self.id[:8]}")
        self._store.read_ledger, self._store.has_committed = keeper.provide, keeper.has_committed
        self._store.may_read = lambda peer: not self._allow.may_only_ask(peer)
        self._store.on_taken = lambda round: self._switchboard.post("training", ContributionTaken(round=round))
        training = TrainingActor(
            keeper,
            self._store,
            nursery,
            runners["training"].post,
            report=self._report,
            fail=self._fail,
            inner_every=self.config.node.snapshot_every,
            auditor=auditor,
            stepping=self._stepping,
        )
        performers: dict[ActorName, Performer] = {
            "membership": membership,
            "exchange": exchange,
            "checkpoint": checkpoint,
            "training": training,
        }
        self._switchboard.start(nursery, performers)

    # --- from open to closed ------------------------------------------------------------------------------------

    def _start(self, nursery: trio.Nursery, settings: MachineSettings, recorder: LogWriter | None) -> None:
        self._build(nursery, settings, recorder)
        nursery.start_soon(self._end_events)
        nursery.start_soon(self._measure)
        if self._station is not None:
            nursery.start_soon(self._station.run)
        self._transport.serve(self._store)
        restored = self._restored
        self._keeper.announce()
        self._switchboard.post("training", StateAt(round=restored.round, digest=restored.digest, chain=restored.chain))

    async def _measure(self) -> None:
        """Tell membership how this node does, for those who watch."""
        last: Figures | None = None
        while True:
            figures = self._gauge.figures(self.traffic.sent, self.traffic.received)
            if figures != last:
                self._switchboard.post("membership", Measured(figures=figures))
                last = figures
            await trio.sleep(self.config.run.heartbeat_s)

    async def _end_events(self) -> None:
        await self._finished.wait()
        self.events.close()

    async def _load(self) -> Ballot | None:
        """What is on disk of the outer state becomes the workload's."""
        began = trio.current_time()
        if self._ledger is not None:
            restored = self._restored = await trio.to_thread.run_sync(self._ledger.restore)
            inner = await trio.to_thread.run_sync(self._ledger.restore_inner, restored)
            if restored.round:
                seconds = to_ms(trio.current_time() - began)
                fact = LedgerRestored(round=restored.round, snapshot=restored.snapshot, inner=inner, seconds=seconds)
                self._report(fact)
        self._keeper.tip, self._keeper.served_round = self._restored.tip, self._restored.round
        ballot = await trio.to_thread.run_sync(self._ballots.load)
        check_beginning(self.config, self._restored.round, self._restored.digest, ballot)
        return ballot

    async def _save_last(self) -> None:
        with trio.CancelScope(shield=True):
            await self._keeper.save()
            if self._copier is not None:
                await self._copier.push()


def _default_workload(config: Config) -> Workload:
    """The model and data of the configuration. torch is imported here, and only here."""
    from prime_async.work.diloco import build_workload

    return build_workload(config.run, config.node, data_stream(read_key_file(config.node.key).id))


def _open_station(config: Config, node_id: str) -> AbstractContextManager[Station]:
    """Imported only where somebody wants to see the run."""
    from prime_async.watch.station import open_station

    return open_station(config, node_id)


@asynccontextmanager
async def open_node(
    config: Config,
    *,
    transport: Transport | None = None,
    workload: Workload | None = None,
    actors: Sequence[OwnActor] = (),
) -> AsyncIterator[Node]:
    """Run a node for as long as the block lasts.

    It joins its run, or founds it, and trains in the background; iterate over ``node.events`` to watch it, and
    ``await node.wait()`` until it has left. ``transport`` and ``workload`` replace the real network, and the model
    and data of the configuration; by default both are made from ``config``. If ``node.directory`` holds an outer
    state of this run, the node begins with it, and fetches only what it missed. ``actors`` run beside ours: see
    :mod:`prime_async.machines.own`.

    Leaving the block stops the node after the inner step that is under way, says goodbye, and saves the outer state.
    Cancelling it does the same without the goodbye. If the node cannot go on, the block is cancelled and one of these
    is raised: :class:`ConfigError`, :class:`AddressInUseError`, :class:`RefusedError`,
    :class:`NonFiniteError`, :class:`StorageError`. In every case the outer state is on disk afterwards, if any round
    was done.
    """
    if workload is None:
        workload = await trio.to_thread.run_sync(_default_workload, config)
    async with open_with(config, workload, transport=transport, actors=actors) as node:
        yield node


@asynccontextmanager
async def open_with(
    config: Config,
    workload: Workload,
    *,
    transport: Transport | None = None,
    stepping: Stepping | None = None,
    actors: Sequence[OwnActor] = (),
) -> AsyncIterator[Node]:
    """As :func:`open_node`; ``stepping`` does the inner steps, if not the workload."""
    async with AsyncExitStack() as stack:
        allow = allow_list(config.node)
        if transport is None:
            transport = await stack.enter_async_context(open_transport(config.node, largest_payload(workload), allow))
        node = Node(config, transport, workload, allow, stepping, actors)
        if config.node.dashboard or config.node.sinks:
            node._station = stack.enter_context(_open_station(config, transport.id))
        ballot = await node._load()
        settings = machine_settings(config, transport, workload, ballot, node._restored.tip)
        recorder = node._open_recorder(stack, settings)
        try:
            async with node._running(partial(node.stop, at_once=True)) as nursery:
                node._start(nursery, settings, recorder)
                yield node
        finally:
            await node._save_last()
            node.events.close()
        node._raise_failure()
