"""What an audit needs: the contributions and settled means that nodes wrote down, and the comparison of them.

A node with ``node.audit`` writes each of its contributions before it says that it is ready, so before anybody can get
it, and each mean when it settles it, with what its header says and with the weights of the plan. A file holds one
record, in CBOR; its name holds a digest of that, so it is written once, and damage shows.

:func:`audit` makes every mean anew from the recorded contributions of the nodes that its header names, in the order of
the view, and compares the bytes: with those, and so with each other, of all nodes. What this checks is *whose* bytes,
which of them, with what weights, went into a mean, whoever made it, under which attempt, and from whom it was fetched:
all that a dying node can disturb. It is not a second implementation of the arithmetic, which is that of
:mod:`prime_async.work.codec` and :mod:`prime_async.work.reducers`; their tests have one.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import torch
from blake3 import blake3
from msgspec import Struct

from prime_async.config.schema import ExchangeSettings, ReducerName
from prime_async.errors import DataError, ProtocolError
from prime_async.messages import ChunkInfo, ChunkKey, decode, encode, positions
from prime_async.work.chunks import Chunks
from prime_async.work.codec import CodecName, as_tensor, make_codec
from prime_async.work.reduce import weighted_mean
from prime_async.work.reducers import make_reducer

log = structlog.get_logger(__name__)

SUFFIX = ".audit"
NAME_DIGITS = 16
MAX_COMBINATIONS = 64
"""A node that starts again in the midst of a round may contribute to it twice: so many choices of them are tried."""


class ContributionRecord(Struct, frozen=True, kw_only=True, tag_field="t", tag="contribution"):
    """What ``node`` contributed to ``chunk`` of ``round``."""

    node: str
    round: int
    chunk: int
    codec: CodecName
    elements: int
    payload: bytes


class MeanRecord(Struct, frozen=True, kw_only=True, tag_field="t", tag="mean"):
    """The mean of ``chunk`` that ``node`` settled, under the number by which it had it; (0, 0): it came as settled.

    ``contributors`` and ``total_weight``: of the header. ``members`` are those that the bitmap is over, with the
    ``weights`` of the plan; empty if the node did not know them. ``reduce`` and ``trim``: how the means of the round
    are made.
    """

    node: str
    lineage: bytes
    round: int
    chunk: int
    epoch: int
    attempt: int
    codec: CodecName
    reduce: ReducerName
    trim: int
    elements: int
    contributors: bytes
    total_weight: int
    members: tuple[str, ...]
    weights: tuple[int, ...]
    payload: bytes


# --- writing --------------------------------------------------------------------------------------------------------


class AuditFolder:
    """Where one node writes. For worker threads; each file is there whole or not at all.

    A disk that is full ends the writing, with an error in the log, and not the training: the audit then says what is
    missing.
    """

    def __init__(self, path: Path, node: str, exchange: ExchangeSettings, chunks: Chunks, sync_rounds: int = 0) -> None:
        """``exchange``: of the run. ``chunks``: how it divides the vector.

        ``sync_rounds``: its first so many rounds have plain means.
        """
        self._path = path
        self._node = node
        self._exchange = exchange
        self._chunks = chunks
        self._sync_rounds = sync_rounds
        self._broken = False

    def contribution(self, key: ChunkKey, payload: memoryview) -> None:
        """Write down what this node contributes."""
        record = ContributionRecord(
            node=self._node,
            round=key.round,
            chunk=key.chunk,
            codec=self._exchange.codec,
            elements=self._chunks.size(key.chunk),
            payload=bytes(payload),
        )
        self._write("contribution", key, record)

    def mean(
        self,
        key: ChunkKey,
        info: ChunkInfo,
        payload: memoryview,
        *,
        lineage: bytes,
        members: tuple[str, ...],
        weights: tuple[int, ...],
    ) -> None:
        """Write down a mean that this node settled."""
        record = MeanRecord(
            node=self._node,
            lineage=lineage,
            round=key.round,
            chunk=key.chunk,
            epoch=key.epoch,
            attempt=key.attempt,
            codec=self._exchange.codec_of_means,
            reduce="mean" if key.round < self._sync_rounds else self._exchange.reduce,
            trim=self._exchange.trim,
            elements=self._chunks.size(key.chunk),
            contributors=info.contributors,
            total_weight=info.total_weight,
            members=members,
            weights=weights,
            payload=bytes(payload),
        )
        self._write("mean", key, record)

    def _write(self, kind: str, key: ChunkKey, record: ContributionRecord | MeanRecord) -> None:
        if self._broken:
            return
        data = encode(record)
        path = self._path / f"round-{key.round:06}" / f"{kind}-{key.chunk:06}-{_name_of(data)}{SUFFIX}"
        partial = path.with_suffix(f".partial-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            self._broken = True
            log.error("audit_ended", path=str(self._path), error=error.strerror)


def _name_of(data: bytes) -> str:
    return blake3(data).hexdigest()[:NAME_DIGITS]


# --- comparing ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Audit:
    """What an audit found. A mean is that of one chunk of one round of one lineage.

    ``means``: how many were made anew and are what was settled; ``copies``: by how many nodes, added up. ``counted``:
    node -> round -> in how many of those its contribution is. ``differences`` and ``unchecked`` are lines for people.
    """

    nodes: set[str] = field(default_factory=set)
    rounds: set[int] = field(default_factory=set)
    means: int = 0
    copies: int = 0
    counted: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    differences: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def audit(folders: Iterable[Path]) -> Audit:
    """Compare what is in ``folders``, and in the folders in them.

    Raises :class:`DataError` if one of them cannot be read, or if there is no mean in any.
    """
    result = Audit()
    paths = _paths(folders)
    for path in sorted(paths):
        _audit_chunk(paths[path], result)
    if not (result.means or result.differences or result.unchecked):
        raise DataError("there is no settled mean in these folders: give those that node.audit named")
    return result


def _paths(folders: Iterable[Path]) -> dict[tuple[str, str], list[Path]]:
    """The files of each round and chunk."""
    found: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder: give those that node.audit named")
        for path in sorted(folder.rglob(f"*{SUFFIX}")):
            found[path.parent.name, path.name.split("-")[1]].append(path)
    return found


def _audit_chunk(paths: Sequence[Path], result: Audit) -> None:
    contributions: dict[str, list[ContributionRecord]] = defaultdict(list)
    means: dict[bytes, list[MeanRecord]] = defaultdict(list)
    for record in _read(paths, result):
        result.nodes.add(record.node)
        if isinstance(record, MeanRecord):
            result.rounds.add(record.round)
            means[record.lineage].append(record)
        else:
            contributions[record.node].append(record)
    for _, settled in sorted(means.items()):
        _audit_mean(settled, contributions, result)


def _read(paths: Sequence[Path], result: Audit) -> Iterator[ContributionRecord | MeanRecord]:
    for path in paths:
        try:
            data = path.read_bytes()
            if not path.stem.endswith(_name_of(data)):
                raise ProtocolError("its bytes are not those that were written")
            yield decode(data, ContributionRecord | MeanRecord, limit=len(data))
        except (OSError, ProtocolError) as error:
            result.differences.append(f"{path}: damaged: {error}")


def _audit_mean(
    settled: Sequence[MeanRecord], contributions: Mapping[str, Sequence[ContributionRecord]], result: Audit
) -> None:
    """One mean, as some nodes settled it; it is the same for all if all is well."""
    first = settled[0]
    what = f"round {first.round}, chunk {first.chunk}"
    odd = next((m for m in settled if _content(m) != _content(first)), None)
    if odd is not None:
        result.differences.append(f"{what}: {first.node[:8]} and {odd.node[:8]} settled different means")
        return
    plan = next((m for m in settled if m.members), None)
    if plan is None:
        result.unchecked.append(f"{what}: no node here knew its plan")
        return
    who = [plan.members[i] for i in positions(plan.contributors)]
    weights = [plan.weights[i] for i in positions(plan.contributors)]
    if not who or not all(weights) or sum(weights) != plan.total_weight:
        result.differences.append(f"{what}: the weights {weights} are not {plan.total_weight}, as the header says")
        return
    missing = [node for node in who if node not in contributions]
    if missing:
        names = ", ".join(node[:8] for node in missing)
        result.unchecked.append(f"{what}: there is no contribution of {names}, which the header names")
        return
    choices = itertools.islice(itertools.product(*(contributions[node] for node in who)), MAX_COMBINATIONS)
    if not any(_mean_of(choice, weights, plan) == plan.payload for choice in choices):
        names = ", ".join(node[:8] for node in who)
        result.differences.append(f"{what}: the mean of the contributions of {names} is another than the settled one")
        return
    result.means += 1
    result.copies += len({m.node for m in settled})
    for node in who:
        result.counted[node][first.round] += 1


def _content(mean: MeanRecord) -> tuple[object, ...]:
    """What must be equal on all nodes."""
    return mean.codec, mean.reduce, mean.trim, mean.elements, mean.contributors, mean.total_weight, mean.payload


def _mean_of(contributions: Sequence[ContributionRecord], weights: Sequence[int], plan: MeanRecord) -> bytes | None:
    """The encoded mean, in this order and made as ``plan`` says; ``None`` if one of them is not valid."""
    codec, elements = make_codec(contributions[0].codec), contributions[0].elements
    if any((c.codec, c.elements) != (codec.name, elements) for c in contributions):
        return None
    payloads = [as_tensor(memoryview(c.payload)) for c in contributions]
    means, reducer = make_codec(plan.codec), make_reducer(plan.reduce, plan.trim)
    out = torch.empty(means.payload_bytes(elements), dtype=torch.uint8)
    scratch = torch.empty(elements), torch.empty(elements)
    made = weighted_mean(codec, payloads, weights, out, scratch, means, reducer)
    return None if made.left_out else out[: made.size].numpy().tobytes()
