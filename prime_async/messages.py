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
from blake3 import blake3
from msgspec import Meta, Struct

from prime_async.errors import ProtocolError

PROTOCOL_VERSION: Final = 1
MAX_CONTROL_BYTES: Final = 1 << 20
MAX_HEADER_BYTES: Final = 1 << 16
MAX_DEPTH: Final = 8
DIGEST_BYTES: Final = 32

MAX_ROUND_TIMES: Final = 3
MAX_ROSTER_ENTRIES: Final = 64
MAX_DEPARTED: Final = 16

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
Phase: TypeAlias = Annotated[str, Meta(max_length=16)]
"""What a node is doing, in a word. Open, so that a later version can be doing something else."""
Text: TypeAlias = Annotated[str, Meta(max_length=4096)]


class Member(Struct, frozen=True, kw_only=True):
    """One node as a view lists it. ``incarnation`` differs between two starts of the same node.

    ``active`` members take part in a round; the others still fetch the state. ``voter``: it has completed a round, and
    views and commits need a majority of those. ``reachable``: others can dial it, so it may own chunks, and lead.
    ``witness``: it votes and serves, and does not train. ``weight`` is the share of the chunks that the member
    reduces, relative to the other members' weights. ``rejected``: so many of its contributions could not be used, and
    were given up.
    """

    id: NodeId
    name: Name
    incarnation: Count
    control: Address
    bulk: Address
    weight: Count = 1
    active: bool = False
    voter: bool = False
    reachable: bool = False
    witness: bool = False
    rejected: Count = 0


class Commit(Struct, frozen=True, kw_only=True):
    """The means of this attempt are those of ``round``.

    ``state`` is the digest of the outer state that they are applied to; ``digest`` is over the digests of the means, in
    chunk order; ``chain`` = BLAKE3(previous chain, state, digest). ``view``: the number of the view over which the
    bitmaps in the means' headers are.
    """

    round: Count
    epoch: Count
    attempt: Count
    state: Digest
    digest: Digest
    chain: Digest
    view: Count


class View(Struct, frozen=True, kw_only=True):
    """What the members agree on: who they are, the longest-standing first, and the newest commit.

    ``number`` grows by one with each change; a majority of the voters of the view before has stored it. ``previous``
    is the BLAKE3 of the encoding of that view (zeros before the first). ``epoch`` and ``leader``: of the leader that
    made it. ``lineage`` stays the same from the run's founding until ``prime-async recover`` starts another.
    """

    lineage: Digest
    epoch: Count
    number: Count
    previous: Digest
    leader: NodeId
    members: Annotated[tuple[Member, ...], Meta(max_length=65536)]  # and MAX_CONTROL_BYTES: about 4,300 in one message
    commit: Commit | None = None

    def member(self, node: str) -> Member | None:
        return next((m for m in self.members if m.id == node), None)

    @property
    def active(self) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.active)

    @property
    def trainers(self) -> tuple[Member, ...]:
        """The active members whose contributions a round waits for."""
        return tuple(m for m in self.members if m.active and not m.witness)

    @property
    def voters(self) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.voter)


class Change(Struct, frozen=True, kw_only=True):
    """How a view differs from the one before it.

    ``gone``: positions in the list of members before. ``members`` take the place of the one with their id that is
    left, or come last.
    """

    epoch: Count
    leader: NodeId
    gone: Bitmap = b""
    members: Annotated[tuple[Member, ...], Meta(max_length=65536)] = ()
    commit: Commit | None = None


# --- membership -----------------------------------------------------------------------------------------------------


class Hello(Struct, frozen=True, kw_only=True, tag_field="t", tag="hello"):
    """A node asks to become a member, or where its leader is.

    ``settings`` is the run spec, flat, so that a refusal can say what differs. ``lineage``: what it belonged to, empty
    if nothing. ``view``: the number of the view in which it is a member, 0 if in none.
    """

    protocol: Count
    run_id: Digest
    settings: Annotated[dict[Name, Text], Meta(max_length=256)]
    member: Member
    lineage: Annotated[bytes, Meta(max_length=DIGEST_BYTES)] = b""
    view: Count = 0


class Welcome(Struct, frozen=True, kw_only=True, tag_field="t", tag="welcome"):
    """The leader of ``epoch`` answers: the node is in ``view``, which is decided.

    The leader's outer state, after ``round`` rounds, has ``state_digest``.
    """

    epoch: Count
    view: View
    round: Count
    state_digest: Digest


class Redirect(Struct, frozen=True, kw_only=True, tag_field="t", tag="redirect"):
    """A member that does not lead says who does."""

    leader: NodeId
    control: Address


RefusalReason: TypeAlias = Literal[
    "other_protocol", "other_run", "other_lineage", "key_not_allowed", "not_a_member", "diverged"
]


class Refuse(Struct, frozen=True, kw_only=True, tag_field="t", tag="refuse"):
    """Why a node is not, or no longer, a member. ``differences`` has one line for each setting that differs."""

    reason: RefusalReason
    text: Text
    differences: Annotated[tuple[Text, ...], Meta(max_length=256)] = ()


class RoundTimes(Struct, frozen=True, kw_only=True):
    """How a node spent its time from the end of the round before to the end of ``round``, in milliseconds.

    ``waiting_ms``: for others to be ready; ``exchange_ms``: for the means; both only as far as no inner step ran
    meanwhile. ``other_ms`` is the rest: encoding, the outer step, measuring the held-out loss.
    """

    round: Count
    training_ms: Count
    waiting_ms: Count
    exchange_ms: Count
    other_ms: Count
    tokens: Count


class Figures(Struct, frozen=True, kw_only=True):
    """How a node does, to be shown. Nothing is decided by it, and nothing in it is verified.

    ``tokens``, ``sent_bytes``, ``received_bytes``, ``training_ms`` and ``elapsed_ms``: since it started; the share of
    its time that it spent training is the quotient of the last two. Losses are in millionths of a nat per token (0: it
    knows none); ``heldout_micronats``: of the outer weights after ``heldout_round`` rounds. ``rounds``: the last few.
    """

    phase: Phase
    tokens: Count = 0
    tokens_per_s: Count = 0
    loss_micronats: Count = 0
    heldout_round: Count = 0
    heldout_micronats: Count = 0
    sent_bytes: Count = 0
    received_bytes: Count = 0
    training_ms: Count = 0
    elapsed_ms: Count = 0
    snapshot_round: Count = 0
    rounds: Annotated[tuple[RoundTimes, ...], Meta(max_length=MAX_ROUND_TIMES)] = ()


class Heartbeat(Struct, frozen=True, kw_only=True, tag_field="t", tag="heartbeat"):
    """A member to the leader: alive, with the outer state after ``round`` rounds.

    ``view``: the newest that it has stored, in ``epoch``: as good as an ``Accepted``. ``figures``: if the leader's
    last answer said that somebody watches.
    """

    incarnation: Count
    epoch: Count
    view: Count
    round: Count
    state_digest: Digest
    inner_steps: Count = 0
    figures: Figures | None = None


class HeartbeatAck(Struct, frozen=True, kw_only=True, tag_field="t", tag="heartbeat_ack"):
    """The leader of ``epoch`` to a heartbeat, and to all members when a view is decided: alive, ``view`` is decided.

    ``watched``: somebody wants to see how the members do, so the next heartbeats should say it.
    """

    epoch: Count
    view: Count
    watched: bool = False


class AskRoster(Struct, frozen=True, kw_only=True, tag_field="t", tag="ask_roster"):
    """A member that shows the run to people, to the leader: how do the members do, from position ``first`` on?"""

    first: Count = 0


class RosterEntry(Struct, frozen=True, kw_only=True):
    """What the leader last heard of the member at ``position`` of the view, ``silent_ms`` ago."""

    position: Count
    round: Count
    inner_steps: Count
    silent_ms: Count
    figures: Figures | None = None


class Departed(Struct, frozen=True, kw_only=True):
    """Who is not in ``view`` any more, the first that was without it; ``silent_ms`` 0: it said goodbye."""

    id: NodeId
    name: Name
    view: Count
    silent_ms: Count


class Roster(Struct, frozen=True, kw_only=True, tag_field="t", tag="roster"):
    """The answer to ``AskRoster``: of the 64 members of ``view`` from position ``first`` on, those that were heard.

    ``departed``: the last few that went, the newest last.
    """

    view: Count
    first: Count
    entries: Annotated[tuple[RosterEntry, ...], Meta(max_length=MAX_ROSTER_ENTRIES)]
    departed: Annotated[tuple[Departed, ...], Meta(max_length=MAX_DEPARTED)] = ()


class Propose(Struct, frozen=True, kw_only=True, tag_field="t", tag="propose"):
    """The leader of ``epoch`` asks the members to store view ``number``; all views before it are decided.

    It is the one before with ``change``, or, without one, what the member stored under an earlier epoch. ``digest`` is
    the BLAKE3 of its encoding: who gets another result asks for the whole (``AskView``).
    """

    epoch: Count
    number: Count
    digest: Digest
    change: Change | None = None


class Accepted(Struct, frozen=True, kw_only=True, tag_field="t", tag="accepted"):
    """A member to the leader: view ``number`` is on disk here, under ``epoch``. ``incarnations``: as in ``Promise``."""

    epoch: Count
    number: Count
    incarnations: Annotated[tuple[Count, ...], Meta(max_length=256)]


class AskView(Struct, frozen=True, kw_only=True, tag_field="t", tag="ask_view"):
    """Send me view ``number`` whole, if you have it."""

    number: Count


class ViewUpdate(Struct, frozen=True, kw_only=True, tag_field="t", tag="view"):
    """A whole view. ``epoch``: of the leader that proposes it, or under which it was decided."""

    epoch: Count
    decided: bool
    view: View


class PreVote(Struct, frozen=True, kw_only=True, tag_field="t", tag="pre_vote"):
    """A member that hears no leader asks whether a ``Prepare`` with ``epoch`` would be promised; it binds nobody."""

    epoch: Count
    view: Count


class Support(Struct, frozen=True, kw_only=True, tag_field="t", tag="support"):
    """The answer to a ``PreVote``: yes. ``incarnations``: as in ``Promise``."""

    epoch: Count
    incarnations: Annotated[tuple[Count, ...], Meta(max_length=256)]


class Prepare(Struct, frozen=True, kw_only=True, tag_field="t", tag="prepare"):
    """A candidate asks for promises. It has stored view ``number`` itself, under ``accepted_epoch``."""

    epoch: Count
    number: Count
    accepted_epoch: Count


class Promise(Struct, frozen=True, kw_only=True, tag_field="t", tag="promise"):
    """A member will take part in no epoch below ``epoch``, and this is what it has stored; the promise is on disk.

    ``decided`` is the number of the newest view that it knows to be decided. ``view``: what it has stored, number
    ``number`` under ``accepted_epoch``, if the candidate has not; then ``before`` is the one before that. Views that
    list this node with one of ``incarnations`` count it as a voter.
    """

    epoch: Count
    decided: Count
    number: Count
    accepted_epoch: Count
    member: Member
    incarnations: Annotated[tuple[Count, ...], Meta(max_length=256)]
    view: View | None = None
    before: View | None = None


class Outvoted(Struct, frozen=True, kw_only=True, tag_field="t", tag="outvoted"):
    """To one who asks for something in a lower epoch: this node has promised ``epoch``."""

    epoch: Count


class Goodbye(Struct, frozen=True, kw_only=True, tag_field="t", tag="goodbye"):
    """A node leaves on purpose. From the leader: it has left, another is to be elected at once."""

    incarnation: Count
    text: Text = ""


# --- letting newcomers in -------------------------------------------------------------------------------------------


class MemberAddress(Struct, frozen=True, kw_only=True):
    """A member that can be asked: its id, and where its control plane listens."""

    id: NodeId
    control: Address


class AskRun(Struct, frozen=True, kw_only=True, tag_field="t", tag="ask_run"):
    """Somebody with an invitation asks what the run is; and, if ``key`` is not empty, that this key may connect.

    It is all that may be said over a connection made with an invitation's key.
    """

    key: Annotated[str, Meta(max_length=64)] = ""
    name: Name = ""


class RunInfo(Struct, frozen=True, kw_only=True, tag_field="t", tag="run_info"):
    """The answer to ``AskRun``: the run spec, flat, as in ``Hello``, and members to ask, this one first.

    ``key``: as in the question; it may connect from now on.
    """

    settings: Annotated[dict[Name, Text], Meta(max_length=256)]
    members: Annotated[tuple[MemberAddress, ...], Meta(max_length=64)]
    key: Annotated[str, Meta(max_length=64)] = ""


class Vouch(Struct, frozen=True, kw_only=True, tag_field="t", tag="vouch"):
    """A member to the others: ``key`` came with an invitation of mine; let it connect to you, too."""

    key: NodeId
    name: Name = ""


# --- rounds ---------------------------------------------------------------------------------------------------------


class Ready(Struct, frozen=True, kw_only=True, tag_field="t", tag="ready"):
    """A member's contribution to ``round`` is fixed and can be fetched; ``weight`` is its tokens.

    With weight 0: the member contributes nothing, and asks for the plan of the round it is at. ``rejected``: as the
    view lists it, and as its contribution's chunks are called; one that was made before its last rejection is void.
    """

    round: Count
    weight: Tokens
    incarnation: Count
    rejected: Count = 0


class Turn(Struct, frozen=True, kw_only=True):
    """From (epoch, attempt) on, other members reduce the chunks of ``lost``, positions in the plan's view.

    The first turn of a plan is its making, without anybody lost.
    """

    epoch: Count
    attempt: Count
    lost: Bitmap = b""


class Plan(Struct, frozen=True, kw_only=True, tag_field="t", tag="plan"):
    """The leader opens a round, or changes how an open one is done, under a higher (epoch, attempt).

    ``contributors`` is a bitmap over view number ``view``; ``weights`` has one entry for each bit set, in order.
    Who owns which chunk, and under which number, is a function of that view and ``turns``, so it is not sent.
    """

    round: Count
    epoch: Count
    attempt: Count
    view: Count
    contributors: Bitmap
    weights: Annotated[tuple[Tokens, ...], Meta(max_length=65536)]
    turns: Annotated[tuple[Turn, ...], Meta(min_length=1, max_length=4096)]


class Open(Struct, frozen=True, kw_only=True, tag_field="t", tag="open"):
    """A voter to a new leader: the round it is at, and the newest plan that it knows of it."""

    epoch: Count
    round: Count
    incarnation: Count
    plan: Plan | None = None


class Ask(Struct, frozen=True, kw_only=True, tag_field="t", tag="ask"):
    """The new owner of ``chunks`` to every member, before it reduces them again: do you hold a mean of them?"""

    round: Count
    epoch: Count
    attempt: Count
    chunks: Annotated[tuple[Count, ...], Meta(max_length=65536)]


class HeldMean(Struct, frozen=True, kw_only=True):
    """A mean of ``chunk`` that was made under (epoch, attempt)."""

    chunk: Count
    epoch: Count
    attempt: Count


class Held(Struct, frozen=True, kw_only=True, tag_field="t", tag="held"):
    """The answer to ``Ask``: these, and from now on none of a lower number."""

    round: Count
    epoch: Count
    attempt: Count
    means: Annotated[tuple[HeldMean, ...], Meta(max_length=65536)] = ()


class Rate(Struct, frozen=True, kw_only=True):
    """Chunks came from the member at ``position`` of the plan's view at so many bytes per second."""

    position: Count
    bytes_per_s: Count


class Have(Struct, frozen=True, kw_only=True, tag_field="t", tag="have"):
    """A member holds every mean of this attempt, ``safe`` from its crash; or, if its disk is full, in memory alone.

    ``digest`` is over the digests of all of them, in chunk order; ``state``: of the outer state that they are for.
    ``received_per_s``: bytes, what it took in while it fetched contributions, 0 if it fetched none; ``rates``: from
    some of those that it fetched from.
    """

    round: Count
    epoch: Count
    attempt: Count
    state: Digest
    digest: Digest
    incarnation: Count
    received_per_s: Count = 0
    rates: Annotated[tuple[Rate, ...], Meta(max_length=64)] = ()
    safe: bool = True


class Unusable(Struct, frozen=True, kw_only=True, tag_field="t", tag="unusable"):
    """An owner to the leader: of a chunk of mine nobody's contribution to this plan can be used.

    ``contributors``: those, of the members of the plan's view that are still there, whose bytes are not valid, or are
    not there and will not be.
    """

    round: Count
    epoch: Count
    attempt: Count
    contributors: Bitmap
    incarnation: Count


class Behind(Struct, frozen=True, kw_only=True, tag_field="t", tag="behind"):
    """The leader to a member whose round it no longer has: the outer state is at ``round``, fetch it."""

    round: Count


# --- the ledger -----------------------------------------------------------------------------------------------------


class AskLedger(Struct, frozen=True, kw_only=True, tag_field="t", tag="ask_ledger"):
    """A node that is behind to every member: what do you have on disk?"""


MAX_STRETCHES: Final = 16


class Stretch(Struct, frozen=True, kw_only=True):
    """Rounds without a gap: from ``first`` to the one before ``end``."""

    first: Count
    end: Count


class Holdings(Struct, frozen=True, kw_only=True, tag_field="t", tag="holdings"):
    """The answer to ``AskLedger``: the outer state here is after ``round`` rounds.

    Records and settled means are here of the rounds from ``means_from`` to the one before ``round``; ``snapshots`` are
    the rounds of which the whole outer state is on disk, ascending. Of a node that is behind: ``state`` is false if
    its outer state is not known to be one of the run's; ``above`` are rounds from ``round`` on of which records and
    means are here too, ascending.
    """

    round: Count
    means_from: Count
    snapshots: Annotated[tuple[Count, ...], Meta(max_length=256)] = ()
    state: bool = True
    above: Annotated[tuple[Stretch, ...], Meta(max_length=MAX_STRETCHES)] = ()


# --- actors of users --------------------------------------------------------------------------------------------------

MAX_OWN_BYTES: Final = 1 << 16
OwnName: TypeAlias = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,31}\Z")]


class Own(Struct, frozen=True, kw_only=True, tag_field="t", tag="own"):
    """From a user's own actor to that of the same name on another node.

    ``body``: a message of its own kinds, encoded as all messages are.
    """

    actor: OwnName
    body: Annotated[bytes, Meta(max_length=MAX_OWN_BYTES)]


Message: TypeAlias = (
    Hello | Welcome | Redirect | Refuse | Heartbeat | HeartbeatAck | Propose | Accepted | AskView | ViewUpdate
    | PreVote | Support | Prepare | Promise | Outvoted | Goodbye | AskRoster | Roster
    | AskRun | RunInfo | Vouch
    | Ready | Plan | Open | Ask | Held | Have | Unusable | Behind
    | AskLedger | Holdings
    | Own
)  # fmt: skip
"""Every message of the control plane."""

RoundMessage: TypeAlias = Ready | Plan | Open | Ask | Held | Have | Unusable | Behind
"""Those that concern the exchange of a round."""

LedgerMessage: TypeAlias = AskLedger | Holdings
"""Those that concern what nodes have on disk."""


ChunkKind: TypeAlias = Literal["contribution", "mean", "state", "manifest", "record"]


class ChunkKey(Struct, frozen=True, kw_only=True, order=True):
    """Names immutable bytes: ``contribution/round/chunk``, ``mean/round/chunk/(epoch, attempt)``,
    ``state/round/chunk``, ``manifest/round/0`` or ``record/round/0``.

    A contribution's name does not hold the node, since it is asked of the node whose it is. Its ``attempt`` is how many
    of that node were rejected before it was made (``Member.rejected``). A manifest is an encoded :class:`Manifest`, a
    record an encoded :class:`Record`.
    """

    kind: ChunkKind
    round: Count
    chunk: Count
    epoch: Count = 0
    attempt: Count = 0

    def __str__(self) -> str:
        attempt = f"/({self.epoch}, {self.attempt})" if self.kind == "mean" or self.attempt else ""
        return f"{self.kind}/{self.round}/{self.chunk}{attempt}"


class ChunkInfo(Struct, frozen=True, kw_only=True):
    """What is known of a chunk beside its bytes: their BLAKE3 digest, and for a mean who is in it, with what weight."""

    digest: Digest
    contributors: Bitmap = b""
    total_weight: Count = 0


class Manifest(Struct, frozen=True, kw_only=True, tag_field="t", tag="manifest"):
    """The digests of all ``state`` chunks of an outer state, 32 bytes each, in chunk order.

    ``commit``: of the round before ``round``, ``None`` if that is the first.
    """

    round: Count
    chunks: bytes
    commit: Commit | None = None


class Included(Struct, frozen=True, kw_only=True):
    """The next ``chunks`` chunks have these ``contributors``, of this weight together, in their means."""

    chunks: Count
    contributors: Bitmap
    total_weight: Count


class Record(Struct, frozen=True, kw_only=True, tag_field="t", tag="record"):
    """A committed round in the ledger, without its means.

    ``previous`` is the chain before the commit; ``means``: the digests of the settled means, 32 bytes each, in chunk
    order; ``included``: who is in them, run by run.
    """

    commit: Commit
    previous: Digest
    means: bytes
    included: tuple[Included, ...]


class FileManifest(Struct, frozen=True, kw_only=True, tag_field="t", tag="file"):
    """What a file of ``size`` bytes is, in a group that shares files.

    Its chunks have ``chunk_bytes`` each, the last perhaps less. ``chunks``: their digests, 32 bytes each, in order. The
    BLAKE3 of this manifest's encoding names the file.
    """

    size: Count
    chunk_bytes: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    chunks: bytes


Payload: TypeAlias = Record | Manifest | FileManifest
"""What is encoded in payloads of the bulk plane. (As one of a union: a type alone would be read without its tag.)"""


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


FIRST_CHAIN: Final = bytes(DIGEST_BYTES)


def next_chain(chain: bytes, state: bytes, digest: bytes) -> bytes:
    """The chain after a commit of ``digest`` over ``state``: BLAKE3 of the three, 32 bytes each, joined."""
    return blake3(chain + state + digest).digest()


def state_digest(round: int, chunk_digests: bytes) -> bytes:
    """Of the outer state after ``round`` rounds whose chunks have these digests, 32 bytes each, in chunk order."""
    return blake3(round.to_bytes(8, "little") + chunk_digests).digest()


def file_number(digest: bytes) -> int:
    """Stands for the round in the keys of a file's manifest and chunks: from 1 to 2^63 - 1, of its digest.

    The first 8 bytes, little-endian, without the last bit; 1 for 0. It finds the manifest, which the digest proves.
    """
    return int.from_bytes(digest[:8], "little") >> 1 or 1


def bitmap(positions: list[int] | tuple[int, ...]) -> bytes:
    """The set of ``positions`` as a :data:`Bitmap`, as short as can be."""
    bits = bytearray(max(positions, default=-1) // 8 + 1)
    for i in positions:
        bits[i // 8] |= 1 << i % 8
    return bytes(bits)


def positions(bits: bytes) -> tuple[int, ...]:
    """The positions that are set in a :data:`Bitmap`, ascending."""
    return tuple(i for i in range(len(bits) * 8) if bits[i // 8] >> i % 8 & 1)
