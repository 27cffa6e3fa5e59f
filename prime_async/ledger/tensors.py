"""The header of a safetensors file (https://huggingface.co/docs/safetensors), written and read without its tensors.

The library's own writer wants all tensors in memory, and sorts them by name. Here the order is the caller's, so that a
flat vector divided into tensors lies in the file as it lies in memory, and the data can be written piece by piece.

A file is: the length of the header, 8 bytes little-endian; the header, a JSON object padded with spaces to a multiple
of 8 bytes; the tensors, little-endian, without gaps, in the header's order. ``header_digest`` in the metadata is the
BLAKE3, in hexadecimal, of the header with 64 times "0" in its place: what is written here cannot be misread unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Final, Literal

import msgspec
from blake3 import blake3

from prime_async.errors import LocalError
from prime_async.ledger.files import File

LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 100_000_000
"""The library reads no longer ones."""

ITEM_BYTES: Final = {"F32": 4, "I64": 8, "BF16": 2}
METADATA: Final = "__metadata__"
DIGEST: Final = "header_digest"
NO_DIGEST: Final = "0" * 64


class HeaderError(ValueError):
    """The bytes are not a header that was written here. Says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: ``dtype`` as safetensors names it (F32, I64, BF16)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says: the tensors in the order of the file, the first of which begins at ``data_start`` bytes."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def file_bytes(self) -> int:
        return self.data_start + sum(entry.nbytes for entry in self.entries)


def encode_header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """The length and the header. The same entries and lengths of metadata make as many bytes.

    Raises :class:`LocalError` if two tensors have one name, or the header would be too long for the library.
    """
    tree: dict[str, Any] = {METADATA: {**metadata, DIGEST: NO_DIGEST}}
    offset = 0
    for entry in entries:
        if entry.name in tree:
            raise LocalError(f"two tensors of a file have the name {entry.name!r}: rename one")
        end = offset + entry.nbytes
        tree[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise LocalError(f"a header of {len(text)} bytes is too long for safetensors: choose larger chunks")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text.replace(
        _sealed_with(NO_DIGEST), _sealed_with(blake3(text).hexdigest())
    )


def read_header(file: File) -> Header:
    """The header of ``file``, which is as long as the header says.

    Raises :class:`HeaderError` if it is not one that :func:`encode_header` made, or the file has another length, and
    :class:`OSError` if it cannot be read.
    """
    header = read_header_alone(file)
    if file.size() != header.file_bytes:
        raise HeaderError(f"it has {file.size()} bytes instead of {header.file_bytes}")
    return header


def read_header_alone(file: File) -> Header:
    """As :func:`read_header`, of a file that may have any length."""
    length = int.from_bytes(file.read_at(0, LENGTH_BYTES), "little")
    if not 0 < length <= min(MAX_HEADER_BYTES, file.size() - LENGTH_BYTES):
        raise HeaderError("it is cut off in the header, or not a safetensors file")
    text = file.read_at(LENGTH_BYTES, length)
    try:
        fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(fields.pop(METADATA), type=dict[str, str])
        places = [(name, msgspec.json.decode(place, type=_Place)) for name, place in fields.items()]
        entries = tuple(Entry(name, place.dtype, place.shape) for name, place in places)
        ends = [place.data_offsets for _, place in places]
    except (msgspec.MsgspecError, KeyError, RecursionError, ValueError) as error:
        raise HeaderError(f"the header cannot be read: {error}") from error
    _check_seal(text, metadata)
    _check_offsets(entries, ends)
    return Header(entries, metadata, LENGTH_BYTES + length)


class _Place(msgspec.Struct, forbid_unknown_fields=True):
    dtype: Literal["F32", "I64", "BF16"]
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[int, int]


def _sealed_with(digest: str) -> bytes:
    """What stands once in a header: within a string its quotes would be escaped."""
    return f'"{DIGEST}":"{digest}"'.encode()


def _check_seal(text: bytes, metadata: Mapping[str, str]) -> None:
    digest = metadata.get(DIGEST, "")
    if blake3(text.replace(_sealed_with(digest), _sealed_with(NO_DIGEST))).hexdigest() != digest:
        raise HeaderError("the header does not have its digest")


def _check_offsets(entries: Sequence[Entry], offsets: Sequence[tuple[int, int]]) -> None:
    start = 0
    for entry, (begin, end) in zip(entries, offsets, strict=True):
        if begin != start or end - begin != entry.nbytes:
            raise HeaderError(f"{entry.name} does not lie where it should")
        start = end
