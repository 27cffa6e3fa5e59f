"""Everything that crosses the wire or enters a log, as frozen values, and their one encoding.

The encoding is deterministic CBOR (RFC 8949, section 4.2) of a map per message, with the message's name under
``"t"``. ``protocols/v1/*.cddl`` describes the same messages for other implementations, and the tests hold both
to each other. Fields are only ever added, with a default; a reader ignores fields it does not know.

What a peer sent is checked here before anything else sees it: size, nesting, duplicate keys, trailing bytes,
indefinite lengths, non-canonical forms, then the type and bounds of every field.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, NoReturn, TypeAlias, TypeVar

import cbor2
import msgspec
from msgspec import Meta, Struct

from prime_async.errors import ProtocolError

PROTOCOL_VERSION: Final = 1
MAX_CONTROL_BYTES: Final = 1 << 20
MAX_HEADER_BYTES: Final = 1 << 16
MAX_DEPTH: Final = 8
DIGEST_BYTES: Final = 32

MAX_TOKENS: Final = 2**47 - 1
"""Of one contribution: those of 65,536 members add up to less than 2^63."""

NodeId: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64)]
"""A node's CURVE public key as 64 lower-case hexadecimal digits (any short string on the in-memory transport)."""

Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Tokens: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
Digest: TypeAlias = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
"""A BLAKE3 digest, 32 bytes."""
Bitmap: TypeAlias = Annotated[bytes, Meta(max_length=8192)]
"""A set of positions in a view's list of members: bit ``i % 8`` of byte ``i // 8`` stands for member ``i``."""
Address: TypeAlias = Annotated[str, Meta(max_length=256)]
Name: TypeAlias = Annotated[str, Meta(max_length=64)]
Text: TypeAlias = Annotated[str, Meta(max_length=4096)]


class Member(Struct, frozen=True, kw_only=True):
    """One node as a view lists it. ``incarnation`` differs between two starts of the same node.

    ``active`` members take part in a round and are waited for; the others still fetch the state.
    ``weight`` is the share of the chunks that the member reduces, relative to the other members' weights.
    """

    id: NodeId
    name: Name
    incarnation: Count
    control: Address
    bulk: Address
    weight: Count = 1
    active: bool = False


class View(Struct, frozen=True, kw_only=True):
    """A numbered list of members, the longest-standing first. A higher (epoch, number) replaces a lower one."""

    epoch: Count
    number: Count
    leader: NodeId
    members: Annotated[tuple[Member, ...], Meta(max_length=65536)]  # and MAX_CONTROL_BYTES: about 5,000 in one message

    def member(self, node: str) -> Member | None:
        return next((m for m in self.members if m.id == node), None)

    @property
    def active(self) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.active)


class Hello(Struct, frozen=True, kw_only=True, tag_field="t", tag="hello"):
    """A node asks to become a member. ``settings`` is the run spec, flat, so that a refusal can say what differs."""

    protocol: Count
    run_id: Digest
    settings: Annotated[dict[Name, Text], Meta(max_length=256)]
    member: Member


class Welcome(Struct, frozen=True, kw_only=True, tag_field="t", tag="welcome"):
    """The leader's answer: the node is in ``view``; the outer state after ``round`` rounds has ``state_digest``."""

    view: View
    round: Count
    state_digest: Digest


class Redirect(Struct, frozen=True, kw_only=True, tag_field="t", tag="redirect"):
    """A member that does not lead says who does."""

    leader: NodeId
    control: Address


RefusalReason: TypeAlias = Literal[
    "other_protocol", "other_run", "key_not_allowed", "not_a_member", "diverged", "leader_left"
]


class Refuse(Struct, frozen=True, kw_only=True, tag_field="t", tag="refuse"):
    """Why a node is not, or no longer, a member. ``differences`` has one line for each setting that differs."""

    reason: RefusalReason
    text: Text
    differences: Annotated[tuple[Text, ...], Meta(max_length=256)] = ()


class Heartbeat(Struct, frozen=True, kw_only=True, tag_field="t", tag="heartbeat"):
    """A member to the leader: alive, at this view, with the outer state after ``round`` rounds."""

    incarnation: Count
    epoch: Count
    view: Count
    round: Count
    state_digest: Digest
    inner_steps: Count = 0


class HeartbeatAck(Struct, frozen=True, kw_only=True, tag_field="t", tag="heartbeat_ack"):
    """The leader's answer to a heartbeat: alive, and the number of the newest view."""

    epoch: Count
    view: Count


class ViewUpdate(Struct, frozen=True, kw_only=True, tag_field="t", tag="view"):
    """The leader announces a view, or repeats it to a member whose heartbeat shows an older one."""

    view: View


class Goodbye(Struct, frozen=True, kw_only=True, tag_field="t", tag="goodbye"):
    """A node leaves on purpose. From the leader it means that the run ends here."""

    incarnation: Count
    text: Text = ""


class Ready(Struct, frozen=True, kw_only=True, tag_field="t", tag="ready"):
    """A member's contribution to ``round`` is fixed and can be fetched; ``weight`` is its tokens.

    With weight 0: the member contributes nothing, and asks for the plan or the commit of the round it is at.
    """

    round: Count
    weight: Tokens


class Plan(Struct, frozen=True, kw_only=True, tag_field="t", tag="plan"):
    """The leader opens a round, or opens it again under a higher (epoch, attempt).

    ``contributors`` is a bitmap over view number ``view``; ``weights`` has one entry for each bit set, in order.
    Who owns which chunk is a function of that view, so it is not sent.
    """

    round: Count
    epoch: Count
    attempt: Count
    view: Count
    contributors: Bitmap
    weights: Annotated[tuple[Tokens, ...], Meta(max_length=65536)]


class Have(Struct, frozen=True, kw_only=True, tag_field="t", tag="have"):
    """A member holds every mean of this attempt; ``digest`` is over the digests of all of them, in chunk order."""

    round: Count
    epoch: Count
    attempt: Count
    digest: Digest


class Commit(Struct, frozen=True, kw_only=True, tag_field="t", tag="commit"):
    """The means of this attempt are the round's. ``chain`` = BLAKE3(previous chain, digest)."""

    round: Count
    epoch: Count
    attempt: Count
    digest: Digest
    chain: Digest


class Behind(Struct, frozen=True, kw_only=True, tag_field="t", tag="behind"):
    """The leader to a member whose round it no longer has: the outer state is at ``round``, fetch it."""

    round: Count


Message: TypeAlias = (
    Hello | Welcome | Redirect | Refuse | Heartbeat | HeartbeatAck | ViewUpdate | Goodbye
    | Ready | Plan | Have | Commit | Behind
)  # fmt: skip
"""Every message of the control plane."""


ChunkKind: TypeAlias = Literal["contribution", "mean", "state"]


class ChunkKey(Struct, frozen=True, kw_only=True, order=True):
    """Names immutable bytes: ``contribution/round/chunk``, ``mean/round/chunk/(epoch, attempt)`` or
    ``state/round/chunk``.

    A contribution's name does not hold the node, since it is asked of the node whose it is.
    """

    kind: ChunkKind
    round: Count
    chunk: Count
    epoch: Count = 0
    attempt: Count = 0

    def __str__(self) -> str:
        attempt = f"/({self.epoch}, {self.attempt})" if self.kind == "mean" else ""
        return f"{self.kind}/{self.round}/{self.chunk}{attempt}"


class ChunkInfo(Struct, frozen=True, kw_only=True):
    """What is known of a chunk beside its bytes: their BLAKE3 digest, and for a mean who is in it, with what weight."""

    digest: Digest
    contributors: Bitmap = b""
    total_weight: Count = 0


class Get(Struct, frozen=True, kw_only=True, tag_field="t", tag="get"):
    """Asks for a chunk. The server answers when it has it, or with ``Missing`` after ``wait_ms`` milliseconds."""

    id: Count
    key: ChunkKey
    wait_ms: Annotated[int, Meta(ge=0, le=3_600_000)]


class Found(Struct, frozen=True, kw_only=True, tag_field="t", tag="found"):
    """The header of a chunk; the payload, ``size`` raw bytes, is the frame after it."""

    id: Count
    info: ChunkInfo
    size: Count


class Missing(Struct, frozen=True, kw_only=True, tag_field="t", tag="missing"):
    """The chunk is not here. ``gone``: and will not be. Otherwise the wait ran out."""

    id: Count
    gone: bool
    text: Text = ""


class Withdraw(Struct, frozen=True, kw_only=True, tag_field="t", tag="withdraw"):
    """The get of this number is not waited for any more: whoever asked does not want the answer."""

    id: Count


BulkHeader: TypeAlias = Get | Found | Missing | Withdraw
"""Every header of the bulk plane."""

T = TypeVar("T")


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("tags are not allowed")


class _NoTags(dict[int, Any]):
    """Stands in for cbor2's table of tag decoders, which run on what a peer sent: one took 20 s for half a megabyte."""

    def __missing__(self, tag: int) -> Any:
        return _refuse_tag


def encode(value: Any) -> bytes:
    """Deterministic CBOR of a message, header, event or effect."""
    return cbor2.dumps(msgspec.to_builtins(value, builtin_types=(bytes,)), canonical=True)


def decode(data: bytes, kind: Any, *, limit: int = MAX_CONTROL_BYTES) -> Any:
    """The value of type ``kind`` (``Message``, ``BulkHeader``, ...) that ``data`` encodes.

    Raises :class:`ProtocolError` for anything that is not exactly the encoding of one such value (with, perhaps,
    fields that this version does not know).
    """
    if len(data) > limit:
        raise ProtocolError(f"{len(data)} bytes where at most {limit} are allowed")
    try:
        tree = cbor2.loads(
            data,
            max_depth=MAX_DEPTH,
            allow_duplicate_keys=False,
            allow_indefinite=False,
            strict_hashable_types=True,
            semantic_decoders=_NoTags(),
            tag_hook=_refuse_tag,
        )
        # loads() ignores trailing bytes and accepts longer forms of the same value: the way back shows both.
        if cbor2.dumps(tree, canonical=True) != data:
            raise ProtocolError("the bytes are not the deterministic encoding of what they hold, or bytes follow it")
        return msgspec.convert(tree, kind, builtin_types=(bytes,))
    except (cbor2.CBORError, msgspec.ValidationError, ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"not a valid {getattr(kind, '__name__', 'message')}: {error}") from error


def bitmap(positions: list[int] | tuple[int, ...]) -> bytes:
    """The set of ``positions`` as a :data:`Bitmap`, as short as can be."""
    bits = bytearray(max(positions, default=-1) // 8 + 1)
    for i in positions:
        bits[i // 8] |= 1 << i % 8
    return bytes(bits)


def positions(bits: bytes) -> tuple[int, ...]:
    """The positions that are set in a :data:`Bitmap`, ascending."""
    return tuple(i for i in range(len(bits) * 8) if bits[i // 8] >> i % 8 & 1)
