"""What happened, as a person or a program that watches a node would put it.

A machine that has something to tell emits ``Report(fact=...)``. The same value becomes a line of the log (its tag is
the event's name, its fields are the keys) and an item of ``node.events``.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from prime_async.messages import Figures


class InnerStepDone(Struct, frozen=True, kw_only=True, tag="inner_step_done"):
    """One inner step. ``loss`` in nats per token; ``step`` counts this node's steps since it started."""

    round: int
    step: int
    loss: float
    tokens: int
    seconds: float


class EvaluationStarted(Struct, frozen=True, kw_only=True, tag="evaluation_started"):
    """This node measures the held-out loss after ``round`` rounds, for which it does no inner steps."""

    round: int


class HeldOutLoss(Struct, frozen=True, kw_only=True, tag="held_out_loss"):
    """The outer weights after ``round`` rounds on text that no node trains on, nats per token."""

    round: int
    loss: float


class Founded(Struct, frozen=True, kw_only=True, tag="founded"):
    """This node began the run."""


class Joined(Struct, frozen=True, kw_only=True, tag="joined"):
    """The leader took this node into the run."""

    leader: str
    view: int
    round: int


class StillAsking(Struct, frozen=True, kw_only=True, tag="still_asking"):
    """No member has answered for so many seconds."""

    contacts: tuple[str, ...]
    seconds: float


class KeyDenied(Struct, frozen=True, kw_only=True, tag="key_denied"):
    """The node at ``address`` does not allow our key."""

    peer: str
    address: str


class MemberJoined(Struct, frozen=True, kw_only=True, tag="member_joined"):
    """The leader took a node in. This, and that one is lost or leaves, is told at the leader, and where one watches."""

    peer: str
    name: str
    view: int


class MemberLost(Struct, frozen=True, kw_only=True, tag="member_lost"):
    """The leader removed a member that was silent for ``silent_s`` seconds."""

    peer: str
    name: str
    silent_s: float
    view: int


class MemberLeft(Struct, frozen=True, kw_only=True, tag="member_left"):
    """A member said goodbye."""

    peer: str
    name: str
    view: int


class KeyLetIn(Struct, frozen=True, kw_only=True, tag="key_let_in"):
    """``key`` may connect from now on.

    It came with the invitation ``by``, or, not ``invited``, the member ``by`` vouches for it.
    """

    key: str
    name: str
    by: str
    invited: bool


class HelloRefused(Struct, frozen=True, kw_only=True, tag="hello_refused"):
    """The leader refused a node."""

    peer: str
    reason: str
    text: str
    differences: tuple[str, ...] = ()


class ViewAdopted(Struct, frozen=True, kw_only=True, tag="view_adopted"):
    """This node goes by a new view. ``members`` are names, in order; ``active`` counts those that are waited for."""

    epoch: int
    view: int
    leader: str
    members: tuple[str, ...]
    active: int


class MemberSeen(Struct, frozen=True, kw_only=True):
    """A member as the leader sees it. ``silent_s``: since it was heard last; ``round``: of its outer state.

    ``figures`` are its own, ``None`` while nothing was heard of it.
    """

    id: str
    name: str
    incarnation: int
    leads: bool
    active: bool
    witness: bool
    round: int
    inner_steps: int
    silent_s: float
    figures: Figures | None


class MembersSeen(Struct, frozen=True, kw_only=True, tag="members_seen"):
    """How some members of ``view`` do: of ``total``, those from position ``first`` on. Only where somebody watches."""

    epoch: int
    view: int
    first: int
    total: int
    members: tuple[MemberSeen, ...]


class LeaderSilent(Struct, frozen=True, kw_only=True, tag="leader_silent"):
    """This member has heard nothing from its leader for ``silent_s``, and asks again to join."""

    leader: str
    silent_s: float


class LeaderElected(Struct, frozen=True, kw_only=True, tag="leader_elected"):
    """This node leads from now on. ``silent``: names of members that did not answer, and are left out."""

    epoch: int
    seconds: float
    silent: tuple[str, ...]


class SteppedDown(Struct, frozen=True, kw_only=True, tag="stepped_down"):
    """This node does not lead any more."""

    epoch: int
    reason: str


class CutOff(Struct, frozen=True, kw_only=True, tag="cut_off"):
    """Too few voters have been heard, for so many seconds, to go on. This node keeps its work and waits."""

    seconds: float
    heard: int
    voters: int
    advice: str


class StateNowhere(Struct, frozen=True, kw_only=True, tag="state_nowhere"):
    """No member holds the outer state that the last commit leads to."""

    round: int
    ours: int
    advice: str


class SlowWake(Struct, frozen=True, kw_only=True, tag="slow_wake"):
    """This node was not run for ``seconds``; it gives its peers that much more time before it judges their silence."""

    seconds: float


class StateDiverged(Struct, frozen=True, kw_only=True, tag="state_diverged"):
    """Two outer states, or sets of means, that must be equal are not."""

    peer: str
    round: int
    ours: str
    theirs: str


class WaitingForMembers(Struct, frozen=True, kw_only=True, tag="waiting_for_members"):
    """No round is planned: fewer members are active than ``min_members``."""

    round: int
    active: int
    min_members: int


class RoundPlanned(Struct, frozen=True, kw_only=True, tag="round_planned"):
    """The exchange of a round begins, or begins again under a higher attempt."""

    round: int
    epoch: int
    attempt: int
    contributors: int
    chunks_owned: int


class OwnersLost(Struct, frozen=True, kw_only=True, tag="owners_lost"):
    """The leader gives the chunks of these members to others."""

    round: int
    epoch: int
    attempt: int
    peers: tuple[str, ...]


class ChunksReassigned(Struct, frozen=True, kw_only=True, tag="chunks_reassigned"):
    """So many chunks of an open round go from the members of ``lost`` to those of ``owners``; both are names."""

    round: int
    epoch: int
    attempt: int
    chunks: int
    lost: tuple[str, ...]
    owners: tuple[str, ...]


class ChunksRedone(Struct, frozen=True, kw_only=True, tag="chunks_redone"):
    """The means of all chunks that were reassigned in this round are here, ``seconds`` after the first of them were."""

    round: int
    chunks: int
    lost: tuple[str, ...]
    owners: tuple[str, ...]
    seconds: float


class RoundTakenOver(Struct, frozen=True, kw_only=True, tag="round_taken_over"):
    """A new leader knows what is open: it carries on the plan of this (epoch, attempt)."""

    round: int
    epoch: int
    attempt: int


class ContributorLeftOut(Struct, frozen=True, kw_only=True, tag="contributor_left_out"):
    """This node, owner of ``chunk``, reduces it without ``peer``."""

    round: int
    chunk: int
    peer: str
    reason: str


class ContributionRejected(Struct, frozen=True, kw_only=True, tag="contribution_rejected"):
    """Owners could use no contribution to a chunk of ``round``, and that of ``peer`` is one of them: it is given up.

    Told at the leader, and at ``peer``, which begins again from the outer weights. ``times``: since its start.
    """

    round: int
    peer: str
    times: int


class ContributionReady(Struct, frozen=True, kw_only=True, tag="contribution_ready"):
    """This node's part of the round is encoded; from here on it waits for the plan, that is, for others."""

    round: int
    tokens: int


class RoundCommitted(Struct, frozen=True, kw_only=True, tag="round_committed"):
    """A quorum holds the same means; they are the round's."""

    round: int
    attempt: int


class RoundFinished(Struct, frozen=True, kw_only=True, tag="round_finished"):
    """The outer step of ``round`` is taken. ``state_digest``: of the outer state after it, hexadecimal."""

    round: int
    state_digest: str
    tokens: int
    training_s: float
    exchange_s: float


class RoundIgnored(Struct, frozen=True, kw_only=True, tag="round_message_ignored"):
    """A message about a round made no sense here."""

    peer: str
    round: int
    reason: str


class NonFiniteProgress(Struct, frozen=True, kw_only=True, tag="non_finite_progress"):
    """The inner steps of a round ended in NaN or infinity; the node starts again from the outer weights."""

    round: int
    times: int


class LedgerRestored(Struct, frozen=True, kw_only=True, tag="ledger_restored"):
    """This node begins with what it had on disk: a snapshot after ``snapshot`` rounds, 0: the initial weights.

    With the means since it has the outer state after ``round`` rounds. ``inner``: the inner optimiser's state is of the
    same round, and used.
    """

    round: int
    snapshot: int
    inner: bool
    seconds: float


class CatchUpStarted(Struct, frozen=True, kw_only=True, tag="catch_up_started"):
    """This node has the outer state after ``round`` rounds, and the run is at ``run_round``.

    It fetches the means of the rounds between from ``providers`` members; and a snapshot after ``snapshot`` rounds
    first, which is cheaper or all that there is, if that is not -1.
    """

    round: int
    run_round: int
    snapshot: int
    providers: int


class CatchingUp(Struct, frozen=True, kw_only=True, tag="catching_up"):
    """How far that is, told now and then. ``missing_bytes`` grows with every round that passes meanwhile."""

    run_round: int
    fetched_bytes: int
    missing_bytes: int
    seconds: float


class CaughtUp(Struct, frozen=True, kw_only=True, tag="caught_up"):
    """The outer state is the run's. ``fetched_bytes``: what was missing on disk and came from members."""

    round: int
    fetched_bytes: int
    seconds: float


class StateMended(Struct, frozen=True, kw_only=True, tag="state_mended"):
    """Our outer state was not the run's: so many of its chunks were fetched anew. Digests are hexadecimal."""

    round: int
    chunks: int
    before: str
    now: str


class SnapshotWritten(Struct, frozen=True, kw_only=True, tag="snapshot_written"):
    """The outer state after ``round`` rounds is on disk, whole."""

    round: int


class LedgerTrouble(Struct, frozen=True, kw_only=True, tag="ledger_trouble"):
    """Something of ``round`` could not be written to disk, or what was read there was damaged. Training goes on."""

    round: int
    damaged: bool
    text: str


class RemoteCopied(Struct, frozen=True, kw_only=True, tag="remote_copied"):
    """The remote copy leads at least to the outer state after ``round`` rounds; so many bytes were sent for it."""

    round: int
    sent_bytes: int
    seconds: float


class RemoteCopyFailed(Struct, frozen=True, kw_only=True, tag="remote_copy_failed"):
    """The remote copy is as it was. Training goes on, and after the next snapshot it is tried again."""

    round: int
    text: str


class StateSaved(Struct, frozen=True, kw_only=True, tag="state_saved"):
    """The outer state is on disk."""

    round: int
    path: str


class FileFetched(Struct, frozen=True, kw_only=True, tag="file_fetched"):
    """The file of this ``digest``, hexadecimal, is here, whole.

    So many bytes of it came, from ``providers`` members; the rest was here.
    """

    digest: str
    fetched_bytes: int
    providers: int
    seconds: float


class FileNowhere(Struct, frozen=True, kw_only=True, tag="file_nowhere"):
    """No member that is here has the file of this ``digest``, hexadecimal. It is waited for."""

    digest: str
    members: int
    seconds: float


class PeerDropped(Struct, frozen=True, kw_only=True, tag="peer_dropped"):
    """A peer broke the protocol."""

    peer: str
    plane: str
    reason: str
    times: int
    shut_out: bool


Fact: TypeAlias = (
    InnerStepDone | EvaluationStarted | HeldOutLoss | Founded | Joined | StillAsking | KeyDenied
    | MemberJoined | MemberLost | MemberLeft
    | KeyLetIn | HelloRefused | ViewAdopted | MembersSeen | LeaderSilent | LeaderElected | SteppedDown | CutOff
    | StateNowhere | SlowWake | StateDiverged | WaitingForMembers
    | ContributionReady | RoundPlanned | OwnersLost | ChunksReassigned | ChunksRedone | RoundTakenOver
    | ContributorLeftOut | ContributionRejected | RoundCommitted
    | RoundFinished | RoundIgnored | NonFiniteProgress
    | LedgerRestored | CatchUpStarted | CatchingUp | CaughtUp | StateMended | SnapshotWritten | LedgerTrouble
    | RemoteCopied | RemoteCopyFailed | StateSaved | FileFetched | FileNowhere | PeerDropped
)  # fmt: skip
"""Everything that ``node.events`` can give."""
