"""What stands in a file of means, and where; :mod:`prime_async.ledger.means` says which files there are.

``means/ROUND.means`` (12 digits) holds, without gaps:

1. a header, 92 bytes: "prime-async means 1" and a newline, the run id, the bytes of all slots together, 8 bytes
   little-endian, and the BLAKE3 of these 60 bytes;
2. a slot for each chunk's mean, in chunk order; their sizes follow from the run's settings. A slot holds the bytes of
   the payload, 4 bytes little-endian, and the payload. It has room for the longest that there can be; what is behind a
   shorter one means nothing, and where it was never written it takes no space on most disks;
3. item A, :class:`Contents`: the sizes of the slots, the digests of the payloads that they should hold, and who is in
   these;
4. item B, :class:`Settled`, once the round is committed: the commit, and the chain before it.

An item is the length of its payload, 4 bytes little-endian and at most 2^26; the payload's BLAKE3, 32 bytes; the
payload, deterministic CBOR of a map. What follows the last item means nothing. So whoever has the file, and nothing
else, finds the items behind the slots, and the slots by the first item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from blake3 import blake3
from msgspec import Struct

from prime_async.errors import ProtocolError
from prime_async.ledger.files import File
from prime_async.messages import DIGEST_BYTES, Commit, Count, Digest, Included, decode, encode

MAGIC: Final = b"prime-async means 1\n"
SLOTS_START: Final = len(MAGIC) + DIGEST_BYTES + 8 + DIGEST_BYTES
FORMAT: Final = 1
LENGTH_BYTES: Final = 4
PREFIX_BYTES: Final = LENGTH_BYTES + DIGEST_BYTES
SIZE_BYTES: Final = 4
MAX_ITEM_BYTES: Final = 1 << 26


class Slots(Struct, frozen=True, kw_only=True):
    """The next ``chunks`` slots have ``size`` bytes each, the four that say how long the payload is among them."""

    chunks: Count
    size: Count


class Contents(Struct, frozen=True, kw_only=True, tag_field="t", tag="means"):
    """Item A. ``means``: digests, 32 bytes each, in chunk order; ``included``: who is in them, run by run."""

    format: Count
    run_id: Digest
    round: Count
    slots: tuple[Slots, ...]
    means: bytes
    included: tuple[Included, ...]


class Settled(Struct, frozen=True, kw_only=True, tag_field="t", tag="settled"):
    """Item B. ``contents``: BLAKE3 of A's payload; ``previous``: the chain before ``commit``."""

    contents: Digest
    commit: Commit
    previous: Digest


@dataclass(frozen=True, slots=True)
class MeansHeader:
    """What the header says."""

    run_id: bytes
    slots_bytes: int

    @property
    def items_start(self) -> int:
        return SLOTS_START + self.slots_bytes


@dataclass(frozen=True, slots=True)
class Tail:
    """The items of a file as they stand there; ``b`` is empty if it is absent."""

    a: bytes
    b: bytes
    contents: Contents
    settled: Settled | None


def encode_means_header(header: MeansHeader) -> bytes:
    said = MAGIC + header.run_id + header.slots_bytes.to_bytes(8, "little")
    return said + blake3(said).digest()


def read_means_header(file: File) -> MeansHeader | None:
    """``None`` if the file does not begin with one that is whole."""
    data = file.read_at(0, SLOTS_START)
    said, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if len(data) < SLOTS_START or not said.startswith(MAGIC) or blake3(said).digest() != digest:
        return None
    run_id, size = said[len(MAGIC) : -8], said[-8:]
    return MeansHeader(run_id, int.from_bytes(size, "little"))


def decode_contents(a: bytes) -> Contents | None:
    """What item A says; ``None`` if it is none of this version."""
    contents = _decode(a, Contents)
    return contents if contents is not None and contents.format == FORMAT else None


def is_consistent(contents: Contents, header: MeansHeader) -> bool:
    """Whether its digests, slots and contributors are of as many chunks, and its slots are the header's."""
    count, rest = divmod(len(contents.means), DIGEST_BYTES)
    return (
        rest == 0
        and sum(run.chunks for run in contents.slots) == sum(run.chunks for run in contents.included) == count
        and sum(run.chunks * run.size for run in contents.slots) == header.slots_bytes
        and contents.run_id == header.run_id
    )


def read_tail(
    file: File, header: MeansHeader, understand: Callable[[bytes], Contents | None] = decode_contents
) -> Tail | None:
    """The items of a file that begins with ``header``; ``None`` without an A that ``understand`` makes sense of."""
    start = header.items_start
    a = _read_item(file, start)
    contents = understand(a) if a else None
    if contents is None or not is_consistent(contents, header):
        return None
    b = _read_item(file, start + len(a))
    settled = _decode(b, Settled) if b else None
    if settled is None or settled.contents != _digest(a):
        return Tail(a, b"", contents, None)
    return Tail(a, b, contents, settled)


def read_slot(file: File, start: int, most: int) -> bytes | None:
    """The payload in the slot at ``start``, of at most so many bytes; ``None`` if that cannot be one."""
    size = int.from_bytes(file.read_at(start, SIZE_BYTES), "little")
    payload = file.read_at(start + SIZE_BYTES, size) if size <= most else b""
    return payload if len(payload) == size else None


def slots(sizes: Iterable[int]) -> tuple[Slots, ...]:
    """Slots of these ``sizes``, in bytes, run by run."""
    return tuple(Slots(chunks=len(list(run)), size=size) for size, run in groupby(sizes))


def slot_sizes(runs: Sequence[Slots]) -> list[int]:
    """The opposite of :func:`slots`."""
    return [run.size for run in runs for _ in range(run.chunks)]


def encode_item(value: Contents | Settled) -> bytes:
    payload = encode(value)
    return len(payload).to_bytes(LENGTH_BYTES, "little") + blake3(payload).digest() + payload


def encode_settled(a: bytes, commit: Commit, previous: bytes) -> bytes:
    """Item B behind item ``a``."""
    return encode_item(Settled(contents=_digest(a), commit=commit, previous=previous))


def _digest(item: bytes) -> bytes:
    return item[LENGTH_BYTES:PREFIX_BYTES]


def _read_item(file: File, start: int) -> bytes:
    """The item at ``start`` as it stands there; empty if it is not whole."""
    prefix = file.read_at(start, PREFIX_BYTES)
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if len(prefix) < PREFIX_BYTES or not 0 < length <= MAX_ITEM_BYTES:
        return b""
    payload = file.read_at(start + PREFIX_BYTES, length)
    return prefix + payload if len(payload) == length and blake3(payload).digest() == _digest(prefix) else b""


def _decode(item: bytes, kind: type[Any]) -> Any:
    try:
        return decode(item[PREFIX_BYTES:], kind, limit=MAX_ITEM_BYTES)
    except ProtocolError:
        return None
