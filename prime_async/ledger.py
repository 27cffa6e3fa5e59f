"""What a node keeps on disk: its outer state and its ballot, each one file, replaced whole or not at all.

The safetensors file holds the outer weights under the model's own parameter names, the outer momentum beside them under
``momentum.`` and the name, and in its metadata the run id, the round, and the digest of the outer state. The ballot is
what the node has promised and accepted (:mod:`prime_async.machines.ballot`), in CBOR, with a digest.
"""

from __future__ import annotations

import os
from pathlib import Path

from blake3 import blake3
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prime_async.errors import ConfigError, ProtocolError, StorageError
from prime_async.machines.ballot import Ballot
from prime_async.messages import decode, encode
from prime_async.work.workload import Workload

BALLOT_FILE = "ballot.cbor"
MAX_BALLOT_BYTES = 1 << 22
STATE_FILE = "outer-state.safetensors"
FORMAT = "prime-async outer state 1"


class StateFile:
    """The newest outer state of one run, in a directory of its own."""

    def __init__(self, directory: Path, run_id: bytes) -> None:
        self.path = directory / STATE_FILE
        self._run_id = run_id.hex()
        self._saved: tuple[int, bytes] | None = None

    def save(self, workload: Workload) -> Path | None:
        """Write the outer state; nothing if no round was done, or it is there already, or there is nothing to keep.

        Returns the path if the file holds this state now. Raises :class:`StorageError`, and then the file that was
        there before is still there.
        """
        state = (workload.round, workload.state_digest())
        tensors = workload.named_state()
        if workload.round == 0 or not tensors:
            return None
        if state == self._saved:
            return self.path
        metadata = {
            "format": FORMAT,
            "run_id": self._run_id,
            "round": str(workload.round),
            "state_digest": state[1].hex(),
        }
        partial = self.path.with_suffix(f".partial-{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), partial, metadata)
            _sync(partial)
            partial.replace(self.path)
            _sync(self.path.parent)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise StorageError(f"{self.path}: the outer state could not be written: {error}") from error
        self._saved = state
        return self.path

    def saved_round(self) -> int:
        """How many rounds led to the saved outer state; 0 if there is none. Raises as ``load`` does."""
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
            self._check_owner(metadata)
            return int(metadata["round"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StorageError(f"{self.path}: the saved outer state is damaged ({error}): move it away") from error

    def load(self, workload: Workload) -> bool:
        """Put the saved outer state, if there is one, into ``workload``.

        Raises :class:`ConfigError` if the file is of another run, and :class:`StorageError` if it is damaged.
        """
        if not self.path.exists():
            return False
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                self._check_owner(metadata)
                tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
            round, expected = int(metadata["round"]), metadata["state_digest"]
            digest = workload.load_named_state(tensors, round)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StorageError(f"{self.path}: the saved outer state is damaged ({error}): move it away") from error
        if digest.hex() != expected:
            raise StorageError(f"{self.path}: the saved outer state is damaged: its digest is another. Move it away")
        self._saved = (workload.round, digest)
        return True

    def _check_owner(self, metadata: dict[str, str]) -> None:
        if metadata.get("format") != FORMAT:
            raise StorageError(f"{self.path}: not an outer state that this version can read. Move it away")
        if metadata.get("run_id") != self._run_id:
            raise ConfigError(
                [
                    f"{self.path}: node.directory holds the state of another run (or of this one before its [run] "
                    "table was changed): choose another directory, or move the file away"
                ]
            )


class StoredBallot(Struct, frozen=True, kw_only=True, tag_field="t", tag="ballot"):
    """What the ballot file holds. ``digest``: BLAKE3 of the encoded ballot."""

    run_id: bytes
    ballot: Ballot
    digest: bytes


class BallotFile:
    """The ballot of one node of one run, in its directory."""

    def __init__(self, directory: Path, run_id: bytes) -> None:
        self.path = directory / BALLOT_FILE
        self._run_id = run_id

    def save(self, ballot: Ballot) -> None:
        """Put ``ballot`` on disk in the place of the one before; it is there, whole, when this returns.

        Raises :class:`StorageError`: then the node must not answer for it.
        """
        data = encode(StoredBallot(run_id=self._run_id, ballot=ballot, digest=blake3(encode(ballot)).digest()))
        partial = self.path.with_suffix(f".partial-{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            _sync(partial)
            partial.replace(self.path)
            _sync(self.path.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StorageError(f"{self.path}: the ballot could not be written: {error}") from error

    def load(self) -> Ballot | None:
        """The ballot on disk; ``None`` if there is none.

        Raises :class:`ConfigError` if it is of another run, and :class:`StorageError` if it is damaged.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read: {error}") from error
        try:
            stored: StoredBallot = decode(data, StoredBallot, limit=MAX_BALLOT_BYTES)
        except ProtocolError as error:
            raise StorageError(f"{self.path}: the ballot is damaged ({error}): {_WITHOUT_BALLOT}") from error
        if blake3(encode(stored.ballot)).digest() != stored.digest:
            raise StorageError(f"{self.path}: the ballot is damaged: {_WITHOUT_BALLOT}")
        if stored.run_id != self._run_id:
            raise ConfigError(
                [
                    f"{self.path}: node.directory holds the ballot of another run (or of this one before its [run] "
                    "table was changed): choose another directory, or move the file away"
                ]
            )
        return stored.ballot


_WITHOUT_BALLOT = "move it away, and the node joins as a new one"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
