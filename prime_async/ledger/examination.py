"""What one file of a node's directory says of itself, and whether its bytes are those that it speaks of.

Neither the run's settings nor its model are needed, nothing is written, and nothing larger than a header is read whole.
A file that is gone when it is to be read raises :class:`FileNotFoundError`: the node may be running.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Final, Literal, TypeAlias

from blake3 import blake3
from msgspec import Struct

from prime_async.errors import ConfigError, ProtocolError, StorageError
from prime_async.ledger.ballots import MAX_BALLOT_BYTES, StoredBallot
from prime_async.ledger.files import File, Files
from prime_async.ledger.inner import FORMAT as INNER_FORMAT
from prime_async.ledger.means_format import (
    SIZE_BYTES,
    SLOTS_START,
    Tail,
    read_means_header,
    read_tail,
    slot_sizes,
)
from prime_async.ledger.snapshot_format import Layout, SnapshotFormat
from prime_async.ledger.tensors import Entry, Header, HeaderError, read_header, read_header_alone
from prime_async.messages import DIGEST_BYTES, FIRST_CHAIN, Commit, decode, encode, next_chain
from prime_async.work.chunks import Chunks
from prime_async.work.inner import Span
from prime_async.work.outer import MOMENTUM_PREFIX

PIECE_BYTES: Final = 1 << 22
Ranges: TypeAlias = Iterable[tuple[int, int]]
"""Offset and size of pieces of a file."""


class SnapshotFound(Struct, frozen=True, kw_only=True):
    """A snapshot, or with ``whole`` false a partial one.

    ``problem``: why nothing more is known ("": nothing). ``checked``: the chunks were read; then ``bad`` has those of a
    whole file that do not have their digest, and ``missing`` those of a partial one that are not there yet. ``commit``:
    the one that led to it.
    """

    round: int
    bytes: int
    whole: bool
    problem: str = ""
    run_id: str = ""
    settings: dict[str, str] = {}
    parameters: int = 0
    state_digest: str = ""
    commit: Commit | None = None
    chain: str = ""
    chunks: int = 0
    checked: bool = False
    bad: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()


class MeansFound(Struct, frozen=True, kw_only=True):
    """The means of a round.

    ``state``: ``begun``: the file does not say yet, or no longer, what is in it (``problem``: why). ``bad``: chunks
    without their digest, if they were ``checked``. The rest is of the ``commit``.
    """

    round: int
    bytes: int
    state: Literal["committed", "pending", "begun"]
    problem: str = ""
    run_id: str = ""
    chunks: int = 0
    checked: bool = False
    bad: tuple[int, ...] = ()
    commit: Commit | None = None
    previous: str = ""
    chain: str = ""
    state_digest: str = ""


class InnerFound(Struct, frozen=True, kw_only=True):
    """The inner optimiser's state: of which outer state it is."""

    bytes: int
    problem: str = ""
    run_id: str = ""
    round: int = 0
    state_digest: str = ""


class BallotFound(Struct, frozen=True, kw_only=True):
    """What the node promised. ``view``: 0 if it was never a member; ``voters``: their names in that view."""

    bytes: int
    problem: str = ""
    run_id: str = ""
    lineage: str = ""
    view: int = 0
    decided: bool = False
    members: int = 0
    voters: tuple[str, ...] = ()


def examine_snapshot(files: Files, path: Path, round: int, *, whole: bool, verify: bool) -> SnapshotFound:
    with files.open(path, create=False) as file:
        size = file.size()
        try:
            header = read_header(file) if whole else read_header_alone(file)
            layout = _layout(header, path, round)
            wrong = tuple(c for c in range(layout.chunks.count) if not _is_right(layout, file, c)) if verify else ()
        except (HeaderError, StorageError, ConfigError, OSError) as error:
            return SnapshotFound(round=round, bytes=size, whole=whole, problem=_reason(error))
    info = layout.info
    problem = ""
    if info.commit is not None and info.commit.round + 1 != round:
        problem = f"it names the commit of round {info.commit.round}"
    return SnapshotFound(
        round=round,
        bytes=size,
        whole=whole,
        problem=problem,
        run_id=header.metadata["run_id"],
        settings=_settings(header),
        parameters=layout.chunks.elements,
        state_digest=info.state_digest.hex(),
        commit=info.commit,
        chain=(info.commit.chain if info.commit is not None else FIRST_CHAIN).hex(),
        chunks=layout.chunks.count,
        checked=verify,
        bad=wrong if whole else (),
        missing=() if whole else wrong,
    )


def examine_means(files: Files, path: Path, round: int, *, verify: bool) -> MeansFound:
    with files.open(path, create=False) as file:
        size = file.size()
        try:
            header = read_means_header(file)
            if header is None:
                return MeansFound(round=round, bytes=size, state="begun", problem="it has no header that is whole")
            run_id = header.run_id.hex()
            tail = read_tail(file, header)
            if tail is None:
                reason = "it does not say what is in it"
                return MeansFound(round=round, bytes=size, state="begun", problem=reason, run_id=run_id)
            bad = tuple(_wrong_slots(file, tail)) if verify else ()
        except OSError as error:
            return MeansFound(round=round, bytes=size, state="begun", problem=_reason(error))
    settled = tail.settled
    commit = settled.commit if settled is not None else None
    return MeansFound(
        round=round,
        bytes=size,
        state="committed" if settled is not None else "pending",
        problem=_contradiction(tail, round),
        run_id=run_id,
        chunks=len(tail.contents.means) // DIGEST_BYTES,
        checked=verify,
        bad=bad,
        commit=commit,
        previous=settled.previous.hex() if settled is not None else "",
        chain=commit.chain.hex() if commit is not None else "",
        state_digest=commit.state.hex() if commit is not None else "",
    )


def examine_inner(files: Files, path: Path, *, verify: bool) -> InnerFound:
    with files.open(path, create=False) as file:
        size = file.size()
        try:
            header = read_header(file)
            metadata = header.metadata
            if metadata.get("format") != INNER_FORMAT:
                return InnerFound(bytes=size, problem="not one that this version can read")
            data = (header.data_start, size - header.data_start)
            if verify and _digest(file, [data]).hex() != metadata["data_digest"]:
                return InnerFound(bytes=size, problem="the data do not have their digest")
            return InnerFound(
                bytes=size,
                run_id=metadata["run_id"],
                round=int(metadata["round"]),
                state_digest=metadata["state_digest"],
            )
        except (HeaderError, OSError, ValueError, KeyError) as error:
            return InnerFound(bytes=size, problem=_reason(error))


def examine_ballot(files: Files, path: Path) -> BallotFound:
    with files.open(path, create=False) as file:
        size = file.size()
        try:
            stored: StoredBallot = decode(file.read_at(0, MAX_BALLOT_BYTES + 1), StoredBallot, limit=MAX_BALLOT_BYTES)
        except (ProtocolError, OSError) as error:
            return BallotFound(bytes=size, problem=_reason(error))
    if blake3(encode(stored.ballot)).digest() != stored.digest:
        return BallotFound(bytes=size, problem="it does not have its digest")
    view = stored.ballot.view
    return BallotFound(
        bytes=size,
        run_id=stored.run_id.hex(),
        lineage=view.lineage.hex() if view is not None else "",
        view=view.number if view is not None else 0,
        decided=stored.ballot.decided,
        members=len(view.members) if view is not None else 0,
        voters=tuple(member.name for member in view.voters) if view is not None else (),
    )


def _layout(header: Header, path: Path, round: int) -> Layout:
    """As the header has it. Raises as :meth:`SnapshotFormat.understand`, and :class:`HeaderError`."""
    entries, prefixes = split_vectors(header.entries)
    ends = list(accumulate((entry.nbytes // 4 for entry in entries), initial=0))
    try:
        chunks = Chunks(ends[-1], int(header.metadata["chunk_elements"]))
        run_id = bytes.fromhex(header.metadata["run_id"])
    except (KeyError, ValueError) as error:
        raise HeaderError(f"not an outer state that this version can read: {error}") from error
    if chunks.chunk_elements < 1:
        raise HeaderError(f"chunks of {chunks.chunk_elements} elements")
    spans = [
        Span(entry.name, start, stop, entry.shape) for entry, start, stop in zip(entries, ends, ends[1:], strict=False)
    ]
    return SnapshotFormat(run_id, {}, spans, chunks, prefixes).understand(header, path, round)


def split_vectors(entries: tuple[Entry, ...]) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """The tensors of the first vector, and the prefixes of all: the second may be the momentum of the first."""
    half = len(entries) // 2
    first, second = entries[:half], entries[half:]
    if first and second == tuple(Entry(MOMENTUM_PREFIX + e.name, e.dtype, e.shape) for e in first):
        return first, ("", MOMENTUM_PREFIX)
    return entries, ("",)


def _is_right(layout: Layout, file: File, chunk: int) -> bool:
    span, whole = layout.chunks.span(chunk), layout.chunks.elements
    size = 4 * (span.stop - span.start)
    ranges = [(layout.data_start + 4 * (i * whole + span.start), size) for i in range(layout.vectors)]
    return _digest(file, ranges) == layout.info.chunk_digest(chunk)


def _wrong_slots(file: File, tail: Tail) -> Iterator[int]:
    start, means = SLOTS_START, tail.contents.means
    for chunk, size in enumerate(slot_sizes(tail.contents.slots)):
        if _digest(file, _in_slot(file, start, size)) != means[chunk * DIGEST_BYTES : (chunk + 1) * DIGEST_BYTES]:
            yield chunk
        start += size


def _in_slot(file: File, start: int, size: int) -> Iterator[tuple[int, int]]:
    """Where the payload is. Of one that cannot be right the whole slot."""
    length = int.from_bytes(file.read_at(start, SIZE_BYTES), "little")
    fits = length <= size - SIZE_BYTES
    yield (start + SIZE_BYTES, length) if fits else (start, size)


def _digest(file: File, ranges: Ranges) -> bytes:
    """BLAKE3 of these pieces, joined; empty if the disk has lost them."""
    hasher = blake3()
    try:
        for start, size in ranges:
            for offset in range(start, start + size, PIECE_BYTES):
                hasher.update(file.read_at(offset, min(PIECE_BYTES, start + size - offset)))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""
    return hasher.digest()


def _contradiction(tail: Tail, round: int) -> str:
    if tail.contents.round != round:
        return f"it is of round {tail.contents.round}"
    if tail.settled is None:
        return ""
    commit, previous = tail.settled.commit, tail.settled.previous
    if commit.round != round:
        return f"its commit is of round {commit.round}"
    if commit.digest != blake3(tail.contents.means).digest():
        return "its commit is of other means"
    if commit.chain != next_chain(previous, commit.state, commit.digest):
        return "its chain is not that of its commit"
    return ""


def _settings(header: Header) -> dict[str, str]:
    try:
        found = json.loads(header.metadata["run"])
    except (KeyError, ValueError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
