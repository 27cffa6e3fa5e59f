"""Message logs: every event that a node's machines were given, and a digest of what they answered.

A log is a CBOR sequence (RFC 8742): one header, then one record for each call of a machine. ``protocols/v1/log.cddl``
describes both. The machines are pure, so :func:`replay` needs no network, clock or tensors to drive them again, and
must find the same effects, event by event.
"""

from __future__ import annotations

import io
import itertools
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cbor2
import msgspec
import structlog
from blake3 import blake3
from msgspec import Meta, Struct

from prime_async.errors import LogFormatError, ReplayMismatchError, StorageError
from prime_async.machines.checkpoint import Checkpoint, CheckpointSettings
from prime_async.machines.exchange import Exchange, ExchangeSettings
from prime_async.machines.membership import Membership, MembershipSettings
from prime_async.machines.own import Hosted, OwnActor
from prime_async.machines.sharing import Sharing, SharingSettings
from prime_async.machines.training import Training, TrainingSettings
from prime_async.machines.vocabulary import MACHINES, OWN, ActorName, Effect, Event, Machine
from prime_async.messages import OwnName, encode
from prime_async.words import Words

log = structlog.get_logger(__name__)

LOG_VERSION = 1
EFFECTS_DIGEST_BYTES = 16
MAX_LOG_DEPTH = 16
MOST_REORDERED = 5
"""Effects whose orders are tried, to say what was expected."""


class MachineSettings(Struct, frozen=True, kw_only=True):
    """What the machines of a node are made with: with the events, all that a replay needs.

    A node of a run has the first four; one of a group without rounds has membership, and, if it shares files,
    ``sharing`` as the machine of its checkpoint actor.
    """

    membership: MembershipSettings
    exchange: ExchangeSettings | None = None
    checkpoint: CheckpointSettings | None = None
    training: TrainingSettings | None = None
    sharing: SharingSettings | None = None

    def build(self) -> dict[ActorName, Machine]:
        """Fresh machines."""
        machines: dict[ActorName, Machine] = {"membership": Membership(self.membership)}
        if self.exchange is not None:
            machines["exchange"] = Exchange(self.exchange)
        if self.checkpoint is not None:
            machines["checkpoint"] = Checkpoint(self.checkpoint)
        if self.training is not None:
            machines["training"] = Training(self.training)
        if self.sharing is not None:
            machines["checkpoint"] = Sharing(self.sharing)
        return machines


class LogHeader(Struct, frozen=True, kw_only=True, tag_field="t", tag="log"):
    """The first item of a log."""

    version: int
    node: str
    machines: MachineSettings
    actors: tuple[OwnName, ...] = ()
    """The names of the user's own."""


class LogRecord(Struct, frozen=True, kw_only=True, tag_field="t", tag="step"):
    """One call: the ``seq``-th of ``actor``'s machine, at ``now`` on the node's monotonic clock, in seconds.

    ``effects`` is the start of the BLAKE3 digest of the encoded list of effects.
    """

    actor: Annotated[ActorName, Meta(pattern=rf"^({'|'.join(MACHINES)}|{OWN}[a-z][a-z0-9_]{{0,31}})\Z")]
    seq: Annotated[int, Meta(ge=0)]
    now: float
    event: Event
    effects: Annotated[bytes, Meta(min_length=EFFECTS_DIGEST_BYTES, max_length=EFFECTS_DIGEST_BYTES)]


def effects_digest(effects: Sequence[Effect]) -> bytes:
    """The first 16 bytes of the BLAKE3 digest of the effects' encoding."""
    return blake3(encode(list(effects))).digest(length=EFFECTS_DIGEST_BYTES)


class LogWriter:
    """Appends to a log, a whole record at a time, so that a crash tears at most the last one.

    Records go to the operating system at once, and to the disk when it pleases: a log explains a crash of the
    process, not one of the machine.
    """

    def __init__(self, path: Path, node: str, machines: MachineSettings, actors: Sequence[OwnName] = ()) -> None:
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(f"{path}: cannot write the message log: {error.strerror}") from error
        self._end = weakref.finalize(self, os.close, self._fd)
        self._path = path
        self._broken = False
        self._append(LogHeader(version=LOG_VERSION, node=node, machines=machines, actors=tuple(actors)))

    def record(self, actor: ActorName, seq: int, now: float, event: Event, effects: Sequence[Effect]) -> None:
        """Append one call of a machine. A disk that is full ends the log, with an error in it, and not the training."""
        if not self._broken:
            self._append(LogRecord(actor=actor, seq=seq, now=now, event=event, effects=effects_digest(effects)))

    def _append(self, item: LogHeader | LogRecord) -> None:
        data = memoryview(encode(item))
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            self._broken = True
            log.error("message_log_ended", path=str(self._path), error=error.strerror)

    def close(self) -> None:
        """Nothing is recorded any more. It is closed at the latest when nobody has it any more."""
        self._end()


@dataclass(frozen=True, slots=True)
class MessageLog:
    """A log that was read. ``torn_bytes``: what follows the last whole record."""

    header: LogHeader
    records: tuple[LogRecord, ...]
    torn_bytes: int


def read_log(path: Path) -> MessageLog:
    """Read a log whole. A torn tail is left out; anything else that is wrong raises :class:`LogFormatError`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LogFormatError(f"{path}: cannot read the message log: {error.strerror}") from error
    items = _items(data)
    try:
        tree, end = next(items, (None, 0))
        header = msgspec.convert(tree, LogHeader, builtin_types=(bytes,))
    except (msgspec.ValidationError, cbor2.CBORDecodeError) as error:
        raise LogFormatError(f"{path}: not a message log of prime-async: {error}") from error
    if header.version != LOG_VERSION:
        raise LogFormatError(f"{path}: a log of version {header.version}; this program reads version {LOG_VERSION}")
    records: list[LogRecord] = []
    try:
        for tree, stop in items:
            records.append(msgspec.convert(tree, LogRecord, builtin_types=(bytes,)))
            end = stop
    except (msgspec.ValidationError, cbor2.CBORDecodeError) as error:
        raise LogFormatError(f"{path}: record {len(records)} is not one of a message log: {error}") from error
    return MessageLog(header, tuple(records), len(data) - end)


def _items(data: bytes) -> Iterator[tuple[object, int]]:
    """The items of a CBOR sequence, each with the position where it ends; what is cut off at the end is not one."""
    stream = io.BytesIO(data)
    decoder = cbor2.CBORDecoder(stream, read_size=1, max_depth=MAX_LOG_DEPTH)
    while True:
        try:
            item = decoder.decode()
        except cbor2.CBORDecodeEOF:
            return
        yield item, stream.tell()


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """One call, driven again. ``index``: of the record in the log, from 0."""

    index: int
    record: LogRecord
    effects: tuple[Effect, ...]


def replay(log: MessageLog, actors: Sequence[OwnActor] = ()) -> Iterator[ReplayedStep]:
    """Drive fresh machines with the recorded events, and yield what each call gives.

    ``actors``: the user's own that the log has. What they would have done is not done.

    Raises :class:`ReplayMismatchError` at the first call whose effects are not the recorded ones, and
    :class:`LogFormatError` if one of the log's actors is not among ``actors``.
    """
    machines: dict[ActorName, Machine] = log.header.machines.build()
    own = {actor.name: actor for actor in actors}
    for name in log.header.actors:
        if name not in own:
            raise LogFormatError(
                f"the log has events of the actor {name}, which is not one of ours: name the function that makes it, "
                "with `prime-async replay --own module:function`, or give it to replay()"
            )
        machines[OWN + name] = Hosted(own[name], log.header.node)
    counts: dict[ActorName, int] = dict.fromkeys(machines, 0)
    for index, record in enumerate(log.records):
        where = f"event {index}, number {record.seq} of {record.actor}, {type(record.event).__name__}"
        if counts.get(record.actor) != record.seq:
            raise ReplayMismatchError(f"{where}: number {counts.get(record.actor, 0)} is missing from the log", index)
        counts[record.actor] = record.seq + 1
        try:
            effects = machines[record.actor].handle(record.now, record.event)
        except Exception as error:
            text = f"{where}: the machine raised {type(error).__name__}: {error}"
            raise ReplayMismatchError(text, index) from error
        if effects_digest(effects) != record.effects:
            raise ReplayMismatchError(f"{where}: {_mismatch(log, index, effects)}", index)
        yield ReplayedStep(index, record, tuple(effects))


def words_of(log: MessageLog) -> Words:
    """Words that know the names of all nodes of which the log tells."""
    words = Words([log.header.machines.membership.me])
    for record in log.records:
        words.learn(record.event)
    return words


def _mismatch(log: MessageLog, index: int, effects: Sequence[Effect]) -> str:
    """What was expected, as far as a digest says it, and what came."""
    record, words = log.records[index], words_of(log)
    unknown = f"effects with digest {record.effects.hex()}, which is all that a log holds of them"
    expected = _guess(record.effects, effects, words, record.now) or unknown
    return (
        "the machine answers with other effects than the recorded ones.\n"
        f"  given:    {words.of(record.event)}\n"
        f"  expected: {expected}\n"
        f"  actual:   {words.of_all(effects, record.now)}"
    )


def _guess(digest: bytes, effects: Sequence[Effect], words: Words, now: float) -> str:
    """The recorded effects, where they are the actual ones without one, or in another order, or none."""
    if digest == effects_digest(()):
        return "nothing"
    shorter = (("", [*effects[:i], *effects[i + 1 :]]) for i in range(len(effects)))
    orders = (("in this order: ", order) for order in itertools.permutations(effects[:MOST_REORDERED]))
    for how, candidate in itertools.chain(shorter, orders if len(effects) <= MOST_REORDERED else ()):
        if effects_digest(candidate) == digest:
            return how + words.of_all(candidate, now)
    return ""
