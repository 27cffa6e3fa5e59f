"""The state of the inner optimiser, so that a node that starts again goes on where it was.

``inner.safetensors`` holds the tensors in the order in which they were given. The metadata, all strings: ``format``,
``run_id``, ``round``, ``state_digest`` (of the outer state that it belongs to), ``data_digest`` (BLAKE3 of all after
the header) and ``header_digest`` (:mod:`prime_async.ledger.tensors`); bytes in hexadecimal. A node does without it if
it is lost, of another state, or damaged. It is written beside the one before and then takes its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog
import torch
from blake3 import blake3
from torch import Tensor

from prime_async.errors import LocalError, StorageError
from prime_async.ledger.errors import translated
from prime_async.ledger.files import LOCAL_FILES, File, Files
from prime_async.ledger.tensors import Entry, Header, HeaderError, encode_header, read_header

INNER_FILE: Final = "inner.safetensors"
INNER_PARTIAL: Final = "inner.part"
FORMAT: Final = "prime-async inner state 1"
PIECE_BYTES: Final = 1 << 22
NO_DIGEST: Final = "-" * 64
"""Stands in the header until the data are written."""

DTYPES: Final = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}
TORCH_DTYPES: Final = {name: dtype for dtype, name in DTYPES.items()}


class InnerFile:
    """The inner state of one node of one run, in its directory. Used by one thread at a time."""

    def __init__(self, directory: Path, run_id: bytes, files: Files = LOCAL_FILES) -> None:
        self.path = directory / INNER_FILE
        self._partial = directory / INNER_PARTIAL
        self._run_id = run_id.hex()
        self._files = files

    def save(self, round: int, state_digest: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Replace what is there; it is on disk when this returns.

        ``tensors``: contiguous, on the host, float32, int64 or bfloat16, of any shape. They are not copied.
        Raises :class:`LocalError` if one is not like that, and :class:`StorageError` if they cannot be written: then
        what was there before is still there.
        """
        entries = [_entry(name, tensor) for name, tensor in tensors.items()]
        metadata = {
            "format": FORMAT,
            "run_id": self._run_id,
            "round": str(round),
            "state_digest": state_digest.hex(),
            "data_digest": NO_DIGEST,
        }
        header = encode_header(entries, metadata)
        with translated(self.path, "the inner state could not be written"):
            try:
                self._files.make_directory(self.path.parent)
                with self._files.open(self._partial, create=True) as file:
                    file.truncate(0)
                    data_digest = _write(file, len(header), tensors)
                    file.write_at(0, encode_header(entries, {**metadata, "data_digest": data_digest}))
                    file.sync()
                self._files.replace(self._partial, self.path)
                self._files.sync_directory(self.path.parent)
            except OSError:
                with suppress(OSError):
                    self._files.remove(self._partial)
                raise

    def load(self, round: int, state_digest: bytes) -> dict[str, Tensor] | None:
        """What was saved for this outer state; ``None`` if there is nothing, or it is of another state or run.

        ``None`` and a warning in the log if it is damaged or cannot be read: the inner optimiser starts afresh then.
        """
        wanted = {"run_id": self._run_id, "round": str(round), "state_digest": state_digest.hex()}
        try:
            with translated(self.path, "the inner state could not be read"):
                if not self._files.exists(self.path):
                    return None
                with self._files.open(self.path, create=False) as file:
                    header = read_header(file)
                    if header.metadata.get("format") != FORMAT or not wanted.items() <= header.metadata.items():
                        return None
                    return _read(file, header)
        except (StorageError, HeaderError) as error:
            structlog.get_logger().warning("inner_state_not_loaded", path=str(self.path), reason=str(error))
            return None


def _entry(name: str, tensor: Tensor) -> Entry:
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise LocalError(f"{name} is {tensor.dtype} on {tensor.device}, strides {tensor.stride()}: make it contiguous")
    return Entry(name, dtype, tuple(tensor.shape))


def _write(file: File, start: int, tensors: Mapping[str, Tensor]) -> str:
    """From ``start`` on. Returns the BLAKE3 of it all, in hexadecimal."""
    hasher = blake3()
    for tensor in tensors.values():
        for piece in _pieces(tensor):
            hasher.update(piece)
            file.write_at(start, piece)
            start += piece.nbytes
    return hasher.hexdigest()


def _read(file: File, header: Header) -> dict[str, Tensor]:
    hasher, start = blake3(), header.data_start
    tensors: dict[str, Tensor] = {}
    for entry in header.entries:
        tensor = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        for piece in _pieces(tensor):
            data = file.read_at(start, piece.nbytes)
            if len(data) != piece.nbytes:
                raise HeaderError("it is cut off")
            hasher.update(data)
            piece[:] = data
            start += len(data)
        tensors[entry.name] = tensor
    if hasher.hexdigest() != header.metadata.get("data_digest"):
        raise HeaderError("the data do not have their digest")
    return tensors


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's own memory, in order."""
    if tensor.numel() == 0:
        return
    memory = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, memory.nbytes, PIECE_BYTES):
        yield memory[start : start + PIECE_BYTES]
