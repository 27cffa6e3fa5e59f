"""From a configuration to what a node is made of."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from blake3 import blake3

from prime_async.audit import AuditFolder
from prime_async.config.schema import Config, NodeSettings
from prime_async.config.spec import flatten, run_id
from prime_async.errors import ConfigError
from prime_async.ledger import Ledger
from prime_async.log import MachineSettings
from prime_async.machines.ballot import Ballot
from prime_async.machines.checkpoint import CheckpointSettings
from prime_async.machines.exchange import ExchangeSettings
from prime_async.machines.membership import ContactPoint, MembershipSettings
from prime_async.machines.training import TrainingSettings
from prime_async.messages import Commit, Member
from prime_async.node.address import advertised_host, contacts_of
from prime_async.node.allow import AllowList
from prime_async.transport.base import Transport
from prime_async.transport.keys import read_key_file
from prime_async.transport.zeromq import ZmqSettings, open_zmq
from prime_async.work.chunks import Chunks
from prime_async.work.workload import Workload

FETCH_TIMEOUTS = 6
"""A chunk may take so many failure timeouts: who is dead is found by heartbeats, this is for who is alive and mute."""
GETS_PER_PEER = 16
CHUNKS_UNDER_WAY = 4
"""Of a round, from each member, at least: of contributions, and as many of means."""
UNDER_WAY_BYTES = 8 << 20
"""So much of it from each member, where more streams would have more under way."""
CATCH_UP_BYTES = 16 << 20
"""On their way from one member, while this node is behind."""
RECORD_BYTES = 1 << 14
RECORD_BYTES_PER_CHUNK = 32 + (1 << 13) + 64
"""A record or manifest is at most so large: a digest and, if each mean has other contributors, a bitmap."""


def allow_list(node: NodeSettings) -> AllowList:
    """Who may connect before there is a view: the configured keys, and those we ask."""
    return AllowList([*node.allow, *(c.id for c in contacts_of(node))], node.allow_file, node.directory)


def data_stream(node_id: str) -> int:
    """The node's data stream, from its key: no two nodes of a run have the same."""
    return int.from_bytes(blake3(b"data stream " + node_id.encode()).digest(length=8), "little")


def node_ledger(config: Config, workload: Workload) -> Ledger | None:
    """What the node keeps on disk; ``None`` if its workload has nothing to keep."""
    if not workload.spans:
        return None
    run = config.run
    return Ledger(config.node.directory, run_id(run), flatten(run), workload, run.exchange.chunk_elements)


def audit_folder(config: Config, node_id: str, workload: Workload) -> AuditFolder | None:
    """Where the node writes its contributions and means, if it is to."""
    if config.node.audit is None:
        return None
    run, exchange = config.run, config.run.exchange
    chunks = Chunks(workload.elements, exchange.chunk_elements)
    return AuditFolder(config.node.audit, node_id, exchange, chunks, run.warmup_sync_steps)


def record_path(config: Config, node_id: str) -> Path | None:  # noqa: ARG001
    """Where the node writes its message log, if it is to. The pytest plugin puts another in its place, by node."""
    return config.node.record


def check_beginning(config: Config, round: int, digest: bytes, ballot: Ballot | None) -> None:
    """That there is something to begin with: a state of ``digest`` after ``round`` rounds, or members that have one.

    Raises :class:`ConfigError` if there is not.
    """
    run, node = config.run, config.node
    if round > 0 or run.initial_digest in ("", digest.hex()) or node.join:
        return
    if ballot is None or ballot.view is None or len(ballot.view.members) == 1:
        raise ConfigError(
            [
                f"run.initial_digest: the run begins with weights that are not in {node.directory}: write them there "
                "with `prime-async import`, or name members that have them as node.join"
            ]
        )


def catch_up_window(workload: Workload) -> int:
    """Gets under way from each member while this node is behind: two chunks of a state of the usual size, or more."""
    largest = max((workload.state_bytes(c) for c in range(workload.chunk_count)), default=1)
    return max(2, min(GETS_PER_PEER, CATCH_UP_BYTES // max(largest, 1)))


def chunks_under_way(streams: int, workload: Workload) -> int:
    """Contributions, or means, of a round that are fetched from each member at once: one over each stream.

    A chunk crosses on one stream, so that with fewer of them streams would be idle; which costs most where a lost
    packet slows one down.
    """
    chunks = range(workload.chunk_count)
    largest = max((max(workload.payload_bytes(c), workload.usual_mean_bytes(c)) for c in chunks), default=1)
    return max(CHUNKS_UNDER_WAY, min(streams, UNDER_WAY_BYTES // max(largest, 1)))


def largest_payload(workload: Workload) -> int:
    """Bytes of the largest payload that nodes with this workload send each other."""
    chunks = range(workload.chunk_count)
    largest = max(
        (max(workload.payload_bytes(c), workload.mean_bytes(c), workload.state_bytes(c)) for c in chunks), default=0
    )
    return max(largest, RECORD_BYTES + RECORD_BYTES_PER_CHUNK * len(chunks))


def open_transport(
    node: NodeSettings, max_payload_bytes: int, allow: AllowList
) -> AbstractAsyncContextManager[Transport]:
    """The real network. Raises :class:`ConfigError` without a usable key."""
    settings = ZmqSettings(
        key=read_key_file(node.key),
        advertise=advertised_host(node),
        allow=allow,
        host=node.host,
        control_port=node.port,
        bulk_port=node.bulk_port,
        encrypt=node.encrypt,
        streams=node.streams,
        window=max(GETS_PER_PEER, 2 * node.streams),  # for contributions and means of a round at once
        max_payload_bytes=max_payload_bytes,
    )
    return open_zmq(settings)


def membership_settings(
    config: Config,
    transport: Transport,
    ballot: Ballot | None = None,
    tip: Commit | None = None,
    *,
    rounds: bool = True,
) -> MembershipSettings:
    """What the membership machine is made with. ``rounds``: whether there are any.

    The incarnation is the time of the start in milliseconds, by our own clock. A clock that went back does not give an
    incarnation that an earlier start has had: the ballot knows those.
    """
    run, node = config.run, config.node
    me = Member(
        id=transport.id,
        name=node.name or transport.id[:8],
        incarnation=max(time.time_ns() // 1_000_000, 1 + max(ballot.incarnations, default=0) if ballot else 0),
        control=transport.control_address,
        bulk=transport.bulk_address,
        witness=node.witness,
    )
    return MembershipSettings(
        me=me,
        run_id=run_id(run),
        settings=flatten(run),
        contacts=tuple(
            ContactPoint(id=c.id, control=transport.locate(c.id, c.host, c.port)) for c in contacts_of(node)
        ),
        min_members=run.min_members,
        heartbeat_s=run.heartbeat_s,
        failure_timeout_s=run.failure_timeout_s,
        watches=bool(node.dashboard or node.sinks),
        rounds=rounds,
        ballot=ballot,
        tip=tip,
    )


def machine_settings(
    config: Config,
    transport: Transport,
    workload: Workload,
    ballot: Ballot | None = None,
    tip: Commit | None = None,
) -> MachineSettings:
    """What the machines are made with."""
    membership = membership_settings(config, transport, ballot, tip)
    me = membership.me.id
    return MachineSettings(
        membership=membership,
        exchange=_exchange_settings(config, me, workload),
        checkpoint=_checkpoint_settings(config, me, workload),
        training=_training_settings(config, me, workload),
    )


def _exchange_settings(config: Config, me: str, workload: Workload) -> ExchangeSettings:
    run, window = config.run, chunks_under_way(config.node.streams, workload)
    return ExchangeSettings(
        me=me,
        chunk_count=workload.chunk_count,
        fragments=workload.fragments.count,
        min_members=run.min_members,
        straggler_timeout_s=run.straggler_timeout_s,
        chunk_window=window,
        mean_window=window,
        fetch_timeout_s=FETCH_TIMEOUTS * run.failure_timeout_s,
        repeat_s=run.heartbeat_s,
    )


def _checkpoint_settings(config: Config, me: str, workload: Workload) -> CheckpointSettings:
    run, node = config.run, config.node
    return CheckpointSettings(
        me=me,
        chunk_count=workload.chunk_count,
        fragments=workload.fragments.count,
        mean_bytes=sum(map(workload.usual_mean_bytes, range(workload.chunk_count))) // workload.fragments.count,
        state_bytes=sum(map(workload.state_bytes, range(workload.chunk_count))),
        window=catch_up_window(workload),
        fetch_timeout_s=FETCH_TIMEOUTS * run.failure_timeout_s,
        ask_again_s=run.heartbeat_s,
        snapshot_every=node.snapshot_every if workload.spans else 0,
        keep_snapshots=node.keep_snapshots,
        keep_rounds=node.keep_rounds,
        initial=bytes.fromhex(run.initial_digest) if workload.spans else b"",
    )


def _training_settings(config: Config, me: str, workload: Workload) -> TrainingSettings:
    run, node = config.run, config.node
    return TrainingSettings(
        me=me,
        inner_steps=run.steps_per_round,
        seconds=run.seconds_per_round,
        witness=node.witness,
        rounds=run.rounds,
        evaluate_every=node.evaluate_every,
        min_members=run.min_members,
        overlaps=run.overlaps and not node.witness,
        eager=run.mode == "eager" and not node.witness,
        fragments=workload.fragments.count,
        sync_rounds=run.warmup_sync_steps,
    )
