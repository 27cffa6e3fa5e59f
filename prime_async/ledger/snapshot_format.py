"""What stands in the file of a snapshot, and where; :mod:`prime_async.ledger.snapshots` says which files there are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blake3 import blake3
from msgspec import Struct

from prime_async.errors import ConfigError, LocalError, ProtocolError, StorageError
from prime_async.ledger.errors import DamagedError
from prime_async.ledger.files import File
from prime_async.ledger.tensors import Entry, Header, encode_header
from prime_async.messages import DIGEST_BYTES, Commit, decode, encode, state_digest
from prime_async.work.chunks import Chunks
from prime_async.work.inner import Span

FORMAT: Final = "prime-async outer state 2"
MAX_ROUND: Final = 2**63 - 1


class SnapshotInfo(Struct, frozen=True, kw_only=True):
    """What a snapshot is of: the outer state after ``round`` rounds.

    ``chunk_digests``: BLAKE3 of each chunk's weights and then momentum, fp32 little-endian; 32 bytes each, in order.
    ``commit``: the one that led to this state.
    """

    round: int
    state_digest: bytes
    chunk_digests: bytes
    commit: Commit | None = None

    def chunk_digest(self, chunk: int) -> bytes:
        return self.chunk_digests[chunk * DIGEST_BYTES : (chunk + 1) * DIGEST_BYTES]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the chunks lie in a file of ``info`` whose data begin at ``data_start`` bytes."""

    info: SnapshotInfo
    chunks: Chunks
    data_start: int
    vectors: int  # one after the other, such as weights and momentum

    @property
    def file_bytes(self) -> int:
        return self.data_start + 4 * self.vectors * self.chunks.elements

    def chunk_bytes(self, chunk: int) -> int:
        return 4 * self.vectors * self.chunks.size(chunk)

    def read(self, file: File, chunk: int) -> tuple[bytes, ...]:
        """The chunk's part of each vector, whatever it is; joining them would be a copy that not everybody needs."""
        size = 4 * self.chunks.size(chunk)
        return tuple(file.read_at(start, size) for start in self._starts(chunk))

    def write(self, file: File, chunk: int, data: memoryview) -> None:
        size = 4 * self.chunks.size(chunk)
        for i, start in enumerate(self._starts(chunk)):
            file.write_at(start, data[i * size : (i + 1) * size])

    def is_right(self, chunk: int, *parts: bytes | memoryview) -> bool:
        """Whether these, joined, are the bytes of ``chunk``."""
        hasher = blake3()
        for part in parts:
            hasher.update(part)
        return hasher.digest() == self.info.chunk_digest(chunk)

    def _starts(self, chunk: int) -> list[int]:
        start, whole = self.chunks.span(chunk).start, self.chunks.elements
        return [self.data_start + 4 * (i * whole + start) for i in range(self.vectors)]


class SnapshotFormat:
    """The headers of one run's snapshots."""

    def __init__(
        self, run_id: bytes, settings: Mapping[str, str], spans: Sequence[Span], chunks: Chunks, prefixes: Sequence[str]
    ) -> None:
        self.chunks = chunks
        self._vectors = len(prefixes)
        self._run_id = run_id.hex()
        self._settings = json.dumps(dict(settings), sort_keys=True)
        self._entries = tuple(Entry(prefix + s.name, "F32", s.shape) for prefix in prefixes for s in spans)

    def layout(self, info: SnapshotInfo, data_start: int) -> Layout:
        return Layout(info, self.chunks, data_start, self._vectors)

    def encode(self, info: SnapshotInfo) -> bytes:
        """The header of a file of ``info``.

        Raises :class:`LocalError` if ``info`` does not fit the model, or its digests do not fit each other.
        """
        self._check(info)
        metadata = {
            "format": FORMAT,
            "run_id": self._run_id,
            "run": self._settings,
            "round": str(info.round),
            "chunk_elements": str(self.chunks.chunk_elements),
            "state_digest": info.state_digest.hex(),
            "chunk_digests": info.chunk_digests.hex(),
            "commit": encode(info.commit).hex() if info.commit else "",
        }
        return encode_header(self._entries, metadata)

    def understand(self, header: Header, path: Path, round: int) -> Layout:
        """What the header of the file at ``path`` says, which should be of ``round``.

        Raises :class:`ConfigError` if it is of another run, :class:`DamagedError` if it contradicts itself, and
        :class:`StorageError` if it is of a model or version that this is not.
        """
        metadata = header.metadata
        if metadata.get("format") != FORMAT:
            raise StorageError(f"{path}: not an outer state that this version can read. Move it away")
        if metadata.get("run_id") != self._run_id:
            raise ConfigError(
                [
                    f"{path}: node.directory holds the state of another run (or of this one before its [run] "
                    "table was changed): choose another directory, or move the file away"
                ]
            )
        if header.entries != self._entries or metadata.get("chunk_elements") != str(self.chunks.chunk_elements):
            raise StorageError(f"{path}: the outer state of another model, or in other chunks. Move it away")
        try:
            info = _info(metadata)
            self._check(info)
        except (KeyError, ValueError, ProtocolError, LocalError) as error:
            raise DamagedError(path, None, str(error)) from error
        if info.round != round:
            raise DamagedError(path, None, f"it is of round {info.round}")
        return self.layout(info, header.data_start)

    def _check(self, info: SnapshotInfo) -> None:
        if not 0 <= info.round <= MAX_ROUND:
            raise LocalError(f"there is no round {info.round}")
        if len(info.chunk_digests) != self.chunks.count * DIGEST_BYTES:
            raise LocalError(f"{len(info.chunk_digests)} bytes of digests for {self.chunks.count} chunks")
        if state_digest(info.round, info.chunk_digests) != info.state_digest:
            raise LocalError(f"the chunks' digests do not make the digest of the state after round {info.round}")


def _info(metadata: Mapping[str, str]) -> SnapshotInfo:
    commit = bytes.fromhex(metadata["commit"])
    return SnapshotInfo(
        round=int(metadata["round"]),
        state_digest=bytes.fromhex(metadata["state_digest"]),
        chunk_digests=bytes.fromhex(metadata["chunk_digests"]),
        commit=decode(commit, Commit) if commit else None,
    )
