"""The events that machines are given and the effects they answer with.

All are frozen values with a tag, so that a log can hold them and a replay can compare them. An event says what
happened; an effect says what is to be done, and its docstring names the event that reports the outcome.
"""

from __future__ import annotations

from typing import Final, Literal, Protocol, TypeAlias

from msgspec import Struct

from prime_async.machines.ballot import Ballot
from prime_async.machines.facts import Fact
from prime_async.messages import ChunkInfo, ChunkKey, Commit, Figures, Message, Record, View

ActorName: TypeAlias = str
"""One of ``MACHINES``, or that of a user's own actor, with ``OWN`` before it."""
MACHINES: Final = ("membership", "exchange", "checkpoint", "training")
OWN: Final = "own/"

# --- events -----------------------------------------------------------------------------------------------------


class Tick(Struct, frozen=True, kw_only=True, tag="tick"):
    """The time of the machine's last ``WakeAt`` has come."""


class Heard(Struct, frozen=True, kw_only=True, tag="heard"):
    """A control message came from ``peer``."""

    peer: str
    message: Message


class DoorClosed(Struct, frozen=True, kw_only=True, tag="door_closed"):
    """The node at ``address`` does not allow our key."""

    peer: str
    address: str


class Offended(Struct, frozen=True, kw_only=True, tag="offended"):
    """A peer broke the protocol; ``shut_out``: once too often."""

    peer: str
    plane: str
    reason: str
    times: int
    shut_out: bool


class StateAt(Struct, frozen=True, kw_only=True, tag="state_at"):
    """This node's outer state is that after ``round`` rounds, and has this digest.

    ``chain``: of the commits of those rounds.
    """

    round: int
    digest: bytes
    chain: bytes


class RunAt(Struct, frozen=True, kw_only=True, tag="run_at"):
    """To checkpoint: the run's outer state after ``round`` rounds has this digest, says the leader."""

    round: int
    digest: bytes


class ViewChanged(Struct, frozen=True, kw_only=True, tag="view_changed"):
    """The members, and the newest commit, are now these: the view is decided."""

    view: View


class Reached(Struct, frozen=True, kw_only=True, tag="reached"):
    """Whether the connections that we dialled to ``peer`` were made, both planes: others can dial it too."""

    peer: str
    reachable: bool


class BallotStored(Struct, frozen=True, kw_only=True, tag="ballot_stored"):
    """The ballot of ``StoreBallot`` number ``seq``, and so all before it, is on disk."""

    seq: int


class CommitReady(Struct, frozen=True, kw_only=True, tag="commit_ready"):
    """To membership of the leader: a quorum of the voters of view ``view`` holds these means; commit them next."""

    commit: Commit
    view: int


class Weighed(Struct, frozen=True, kw_only=True, tag="weighed"):
    """To membership of the leader: the shares of the chunks that members should own, by id."""

    weights: dict[str, int]


class FoundUnusable(Struct, frozen=True, kw_only=True, tag="found_unusable"):
    """To membership of the leader: owners cannot use what this start of ``peer`` contributed to ``round``.

    ``times``: so many of its contributions are rejected with this one.
    """

    peer: str
    incarnation: int
    round: int
    times: int


class Progress(Struct, frozen=True, kw_only=True, tag="progress"):
    """Inner steps done by this node since it started."""

    inner_steps: int


class Measured(Struct, frozen=True, kw_only=True, tag="measured"):
    """To membership: how this node does, to be shown to whoever watches."""

    figures: Figures


class AskAgain(Struct, frozen=True, kw_only=True, tag="ask_again"):
    """To membership: the state that the leader named is gone, ask what it is now."""


class FetchState(Struct, frozen=True, kw_only=True, tag="fetch_state"):
    """To checkpoint: this node's outer state is not the run's any more, or never was what was committed."""


class Begin(Struct, frozen=True, kw_only=True, tag="begin"):
    """To training: the outer state, after ``round`` rounds, is the run's; train whenever this node is active."""

    round: int


class Halt(Struct, frozen=True, kw_only=True, tag="halt"):
    """To training: stop, and leave the tensors alone until the next ``Begin``."""


class Halted(Struct, frozen=True, kw_only=True, tag="halted"):
    """To checkpoint: the tensors are at rest."""


class ContributionFixed(Struct, frozen=True, kw_only=True, tag="contribution_fixed"):
    """To exchange: this node's contribution is encoded and can be served. ``rejected``: how many were before it."""

    round: int
    weight: int
    rejected: int = 0


class Rejected(Struct, frozen=True, kw_only=True, tag="rejected"):
    """To training: this node's contribution was given up, for owners could not use it; ``times``: so many were."""

    times: int


class ContributionTaken(Struct, frozen=True, kw_only=True, tag="contribution_taken"):
    """To training: some of this node's contribution to ``round`` was given to a peer, or reduced here.

    Until then it can be in no mean.
    """

    round: int


class MeansCommitted(Struct, frozen=True, kw_only=True, tag="means_committed"):
    """To training: the means of the round are committed, and all of them are here.

    ``position``: of this node in the bitmaps of the means' headers; -1 if it was not in their plan. ``chain``: of the
    commits, with this one.
    """

    round: int
    position: int
    chain: bytes


class LetIn(Struct, frozen=True, kw_only=True, tag="let_in"):
    """To membership: ``KeyToLetIn`` is done. ``refusal``: why the key may not connect; empty: it may."""

    peer: str
    key: str
    name: str
    invited: bool
    refusal: str = ""


class Leave(Struct, frozen=True, kw_only=True, tag="leave"):
    """To membership: say goodbye. To training: finish the round (or, ``at_once``, the step), save, then leave."""

    at_once: bool = False


class Fetched(Struct, frozen=True, kw_only=True, tag="fetched"):
    """A chunk of ``size`` bytes came from ``peer`` and is held under its key."""

    peer: str
    key: ChunkKey
    info: ChunkInfo
    size: int = 0


FetchFault: TypeAlias = Literal["gone", "late", "unreachable", "invalid"]


class FetchFailed(Struct, frozen=True, kw_only=True, tag="fetch_failed"):
    """A chunk did not come."""

    peer: str
    key: ChunkKey
    fault: FetchFault


class Reduced(Struct, frozen=True, kw_only=True, tag="reduced"):
    """A mean was made and can be served. ``left_out``: contributors whose bytes were not valid."""

    key: ChunkKey
    info: ChunkInfo
    left_out: tuple[str, ...] = ()


class MeansStored(Struct, frozen=True, kw_only=True, tag="means_stored"):
    """To exchange: the means of ``StoreMeans`` are ``safe`` from a crash, or cannot be put on disk, which was told."""

    round: int
    epoch: int
    attempt: int
    safe: bool = True


class StepsDone(Struct, frozen=True, kw_only=True, tag="steps_done"):
    """The inner steps asked for are done, or were stopped early after ``steps``."""

    steps: int
    tokens: int
    seconds: float


class Captured(Struct, frozen=True, kw_only=True, tag="captured"):
    """The local weights are noted, and may move: the contribution is encoded from the note."""

    round: int


class Encoded(Struct, frozen=True, kw_only=True, tag="encoded"):
    """The contribution is encoded; ``finite`` says whether it can be used."""

    round: int
    finite: bool


class Applied(Struct, frozen=True, kw_only=True, tag="applied"):
    """The outer step is taken."""

    round: int
    digest: bytes


class Merged(Struct, frozen=True, kw_only=True, tag="merged"):
    """The local weights have moved with the outer ones."""

    round: int


class Evaluated(Struct, frozen=True, kw_only=True, tag="evaluated"):
    """Held-out loss of the outer weights, nats per token."""

    loss: float


class EvaluationStopped(Struct, frozen=True, kw_only=True, tag="evaluation_stopped"):
    """It was told to end early: there is no loss."""


class Restored(Struct, frozen=True, kw_only=True, tag="restored"):
    """The local weights are the outer weights again, or without what was given up."""


class Saved(Struct, frozen=True, kw_only=True, tag="saved"):
    """The outer state is on disk at ``path`` ("": there is nowhere to save it)."""

    path: str


class ChunkImported(Struct, frozen=True, kw_only=True, tag="chunk_imported"):
    """A fetched chunk of the state is in its place."""

    key: ChunkKey


class Imported(Struct, frozen=True, kw_only=True, tag="imported"):
    """The outer state is now that after ``round`` rounds, and has this digest."""

    round: int
    digest: bytes


class LedgerAt(Struct, frozen=True, kw_only=True, tag="ledger_at"):
    """What is on disk: snapshots of these rounds, and of these rounds the committed means; both ascending.

    ``partials``: rounds of snapshots of which some chunks are there. ``pending``: the newest round of which means are
    on disk that are not known to be committed, and their common digest; -1 if none.
    """

    snapshots: tuple[int, ...] = ()
    means: tuple[int, ...] = ()
    partials: tuple[int, ...] = ()
    pending: int = -1
    pending_digest: bytes = b""


class RecordRead(Struct, frozen=True, kw_only=True, tag="record_read"):
    """The record that came from ``peer``, or (empty) from our own disk. Nothing is verified but that it is one."""

    peer: str
    record: Record


class ManifestRead(Struct, frozen=True, kw_only=True, tag="manifest_read"):
    """The manifest that came from ``peer`` belongs to an outer state of this digest.

    ``commit``: of the round before, as it says. ``differing``: the chunks that are not so in our outer state.
    """

    peer: str
    round: int
    digest: bytes
    commit: Commit | None
    differing: tuple[int, ...]


class RoundOpened(Struct, frozen=True, kw_only=True, tag="round_opened"):
    """The means of the round that are not on disk yet: the numbers of their chunks."""

    round: int
    missing: tuple[int, ...]


class SnapshotOpened(Struct, frozen=True, kw_only=True, tag="snapshot_opened"):
    """The chunks of the snapshot that are not on disk yet."""

    round: int
    missing: tuple[int, ...]


class ChunkStored(Struct, frozen=True, kw_only=True, tag="chunk_stored"):
    """A fetched mean, or chunk of a snapshot, is on disk."""

    key: ChunkKey


class RoundStored(Struct, frozen=True, kw_only=True, tag="round_stored"):
    """The means of a committed round are on disk, with its record."""

    round: int


class SnapshotStored(Struct, frozen=True, kw_only=True, tag="snapshot_stored"):
    """The snapshot is on disk, whole."""

    round: int


DiskWork: TypeAlias = Literal[
    "store_means", "settle", "save_inner", "write_snapshot", "keep",
    "open_round", "store_chunk", "store_record", "adopt_round", "open_snapshot", "finish_snapshot",
    "load_snapshot", "advance",
]  # fmt: skip
"""What is done on disk, mostly by the name of the effect that asks for it: several of one round may be under way."""


class LedgerFailed(Struct, frozen=True, kw_only=True, tag="ledger_failed"):
    """What was to be done on disk for this round was not. ``damaged``: bytes there are not what they were.

    Else it is the disk that is full, or does not work.
    """

    of: DiskWork
    round: int
    damaged: bool
    text: str


class FetchFile(Struct, frozen=True, kw_only=True, tag="fetch_file"):
    """Get the file whose manifest has this digest, and its chunks."""

    digest: bytes


class LeaveFile(Struct, frozen=True, kw_only=True, tag="leave_file"):
    """The file of this digest is not wanted any more."""

    digest: bytes


class Told(Struct, frozen=True, kw_only=True, tag="told"):
    """To a user's own actor, from this node's program. ``body``: an event of its own kinds, encoded."""

    body: bytes


Event: TypeAlias = (
    Tick | Heard | DoorClosed | Offended | Reached | BallotStored | StateAt | RunAt | ViewChanged | CommitReady
    | Weighed | FoundUnusable | Progress | Measured | AskAgain | FetchState | Begin | Halt | Halted | ContributionFixed
    | Rejected | ContributionTaken | MeansCommitted | Leave | Fetched | FetchFailed | Reduced | StepsDone | Captured
    | Encoded | Applied | Merged | Evaluated | EvaluationStopped | Restored | Saved | ChunkImported | Imported
    | MeansStored | LedgerAt | RecordRead | ManifestRead | RoundOpened | SnapshotOpened | ChunkStored | RoundStored
    | SnapshotStored | LedgerFailed | FetchFile | LeaveFile | LetIn | Told
)  # fmt: skip
"""Everything that can happen to a machine."""

# --- effects ----------------------------------------------------------------------------------------------------


class WakeAt(Struct, frozen=True, kw_only=True, tag="wake_at"):
    """Give this machine a ``Tick`` at ``at`` (its own clock, seconds). Replaces the wish before it."""

    at: float


class Report(Struct, frozen=True, kw_only=True, tag="report"):
    """Tell whoever watches."""

    fact: Fact


class Tell(Struct, frozen=True, kw_only=True, tag="tell"):
    """Give ``event`` to another machine of this node."""

    actor: ActorName
    event: Event


class Send(Struct, frozen=True, kw_only=True, tag="send"):
    """Send a control message. It may be lost."""

    peer: str
    message: Message


class Dial(Struct, frozen=True, kw_only=True, tag="dial"):
    """Connect to the control plane of a node that is no member yet, or not known to be one."""

    peer: str
    control: str


class ConnectMembers(Struct, frozen=True, kw_only=True, tag="connect_members"):
    """Allow and dial exactly the members of ``view``, and the ``contacts``; hang up on all others."""

    view: View
    contacts: tuple[str, ...] = ()


class KeyToLetIn(Struct, frozen=True, kw_only=True, tag="key_to_let_in"):
    """Put ``key`` on the list of those that may connect, safe from a crash: ``LetIn``.

    ``invited``: ``peer`` is an invitation, and is to be looked at first; else it is a member that vouches for the key.
    """

    peer: str
    key: str
    name: str
    invited: bool


class StoreBallot(Struct, frozen=True, kw_only=True, tag="store_ballot"):
    """Put ``ballot`` on disk, safe from a crash, in the place of the one before: ``BallotStored``."""

    seq: int
    ballot: Ballot


FailureKind: TypeAlias = Literal["refused", "non_finite"]


class Fail(Struct, frozen=True, kw_only=True, tag="fail"):
    """This node cannot go on."""

    kind: FailureKind
    text: str
    reason: str = ""
    differences: tuple[str, ...] = ()


class Finish(Struct, frozen=True, kw_only=True, tag="finish"):
    """This node has left the run; it can stop."""


class Fetch(Struct, frozen=True, kw_only=True, tag="fetch"):
    """Get a chunk from a peer: ``Fetched`` or ``FetchFailed``."""

    peer: str
    key: ChunkKey
    timeout_s: float


class CancelFetches(Struct, frozen=True, kw_only=True, tag="cancel_fetches"):
    """Abandon this machine's fetches, without an event, and drop the contributions that they brought."""


class CancelFetch(Struct, frozen=True, kw_only=True, tag="cancel_fetch"):
    """Abandon one fetch, without an event, and drop what it brought unless that is a mean."""

    peer: str
    key: ChunkKey


class AdoptMean(Struct, frozen=True, kw_only=True, tag="adopt_mean"):
    """Hold the mean that is here as ``found`` under ``key`` too, and answer those who wait for it."""

    found: ChunkKey
    key: ChunkKey


class Settle(Struct, frozen=True, kw_only=True, tag="settle"):
    """Hold the means of these keys, one for each chunk, as the round's: also under (epoch, attempt) (0, 0).

    ``exceptions``: keys of chunks that were made under another number than ``epoch`` and ``attempt``. For the ledger:
    the ``commit``, and the chain before it, ``previous``. For an audit: the
    ``lineage``, and the ``members`` over which the means' bitmaps are, with the ``weights`` that the plan gave them (0:
    it counts none of theirs); both empty if this node has not gone by that plan.
    """

    round: int
    epoch: int
    attempt: int
    commit: Commit
    previous: bytes
    exceptions: tuple[ChunkKey, ...] = ()
    lineage: bytes = b""
    members: tuple[str, ...] = ()
    weights: tuple[int, ...] = ()


class Reduce(Struct, frozen=True, kw_only=True, tag="reduce"):
    """Make the mean ``key`` of the contributions of ``contributors``, in this order: ``Reduced``.

    ``members`` is the plan's view as ids, over which the bitmap of the mean's header is made. ``rejected``: of each
    contributor, as its chunk is called; empty: none of any.
    """

    key: ChunkKey
    contributors: tuple[str, ...]
    weights: tuple[int, ...]
    members: tuple[str, ...]
    rejected: tuple[int, ...] = ()

    @property
    def inputs(self) -> dict[str, ChunkKey]:
        """Contributor -> what it gives, in order."""
        rejected = self.rejected or (0,) * len(self.contributors)
        return {
            peer: ChunkKey(kind="contribution", round=self.key.round, chunk=self.key.chunk, attempt=times)
            for peer, times in zip(self.contributors, rejected, strict=True)
        }


class Forget(Struct, frozen=True, kw_only=True, tag="forget"):
    """Drop means of rounds before ``means_before``, and contributions of rounds before ``contributions_before``."""

    means_before: int
    contributions_before: int


class RunSteps(Struct, frozen=True, kw_only=True, tag="run_steps"):
    """Do inner steps: ``StepsDone``."""

    round: int
    steps: int


class StopSteps(Struct, frozen=True, kw_only=True, tag="stop_steps"):
    """End ``RunSteps`` after the step that is under way: its ``StepsDone`` comes early."""


class Encode(Struct, frozen=True, kw_only=True, tag="encode"):
    """Encode this node's contribution, chunk by chunk: ``Encoded``.

    ``beside`` the next inner steps: the local weights are noted first, ``Captured``. ``eager``: they are encoded, and
    then moved by an estimate of the outer step, before that. ``rejected``: how many were, as its chunks are called.
    """

    round: int
    beside: bool = False
    eager: bool = False
    rejected: int = 0


class Apply(Struct, frozen=True, kw_only=True, tag="apply"):
    """Take the outer step with the settled means of the round: ``Applied``.

    Chunks whose mean does not count ``position`` keep this node's local progress for the next contribution. ``beside``
    the inner steps: the local weights stay as they are until ``Merge``. ``weight``: of this
    node's contribution, if it was eager; ``rejected``: as its chunks are called.
    """

    round: int
    position: int
    beside: bool = False
    weight: int = 0
    rejected: int = 0


class Merge(Struct, frozen=True, kw_only=True, tag="merge"):
    """Move the local weights as the means of ``round`` moved the outer ones: ``Merged``. No inner step is under way."""

    round: int


class TakeBack(Struct, frozen=True, kw_only=True, tag="take_back"):
    """The eager contribution to ``round`` is in no mean: make it local progress again, ``Restored``."""

    round: int


class GiveUp(Struct, frozen=True, kw_only=True, tag="give_up"):
    """Give up the local progress that is in the contribution to ``round``, and keep what came after: ``Restored``."""

    round: int


class Evaluate(Struct, frozen=True, kw_only=True, tag="evaluate"):
    """Measure the held-out loss of the outer weights: ``Evaluated``."""

    round: int


class StopEvaluation(Struct, frozen=True, kw_only=True, tag="stop_evaluation"):
    """End ``Evaluate`` between two batches: ``EvaluationStopped``, or ``Evaluated`` if it was done by then."""


class Restore(Struct, frozen=True, kw_only=True, tag="restore"):
    """Give up the local progress: ``Restored``."""


class Save(Struct, frozen=True, kw_only=True, tag="save"):
    """Write the outer state to disk: ``Saved``."""


class ImportChunk(Struct, frozen=True, kw_only=True, tag="import_chunk"):
    """Put a fetched chunk of the state in its place: ``ChunkImported``."""

    peer: str
    key: ChunkKey


class EndImport(Struct, frozen=True, kw_only=True, tag="end_import"):
    """The chunks that were imported make the outer state that after ``round`` rounds: ``Imported``."""

    round: int


class StoreMeans(Struct, frozen=True, kw_only=True, tag="store_means"):
    """Put the means of the plan (epoch, attempt), all of which are here, on disk, safe from a crash: ``MeansStored``.

    ``exceptions``: the keys of those whose number is another.
    """

    round: int
    epoch: int
    attempt: int
    exceptions: tuple[ChunkKey, ...] = ()


class ReadRecord(Struct, frozen=True, kw_only=True, tag="read_record"):
    """Decode a fetched record: ``RecordRead``, or ``FetchFailed``."""

    peer: str
    key: ChunkKey


class FindRecord(Struct, frozen=True, kw_only=True, tag="find_record"):
    """See whether the record of this round is on our own disk: ``RecordRead`` of nobody, or nothing."""

    round: int


class ReadManifest(Struct, frozen=True, kw_only=True, tag="read_manifest"):
    """Decode a fetched manifest, and keep it: ``ManifestRead``, or ``FetchFailed``."""

    peer: str
    key: ChunkKey


class OpenRound(Struct, frozen=True, kw_only=True, tag="open_round"):
    """See which means of a committed round are on disk: ``RoundOpened``."""

    record: Record


class OpenSnapshot(Struct, frozen=True, kw_only=True, tag="open_snapshot"):
    """Make room on disk for the snapshot of the manifest that was read last: ``SnapshotOpened``."""

    round: int


class StoreChunk(Struct, frozen=True, kw_only=True, tag="store_chunk"):
    """Put a fetched mean, or chunk of a snapshot, on disk: ``ChunkStored``, or ``FetchFailed`` if it is another."""

    peer: str
    key: ChunkKey


class StoreRecord(Struct, frozen=True, kw_only=True, tag="store_record"):
    """The means of this round are on disk, all of them: ``RoundStored``."""

    record: Record


class AdoptRound(Struct, frozen=True, kw_only=True, tag="adopt_round"):
    """The pending means on disk are those of ``commit``: ``RoundStored``."""

    commit: Commit
    previous: bytes


class FinishSnapshot(Struct, frozen=True, kw_only=True, tag="finish_snapshot"):
    """All chunks of the snapshot are on disk: ``SnapshotStored``."""

    round: int


class LoadSnapshot(Struct, frozen=True, kw_only=True, tag="load_snapshot"):
    """Make the snapshot on disk the outer state: ``Imported``."""

    round: int


class Advance(Struct, frozen=True, kw_only=True, tag="advance"):
    """Take the outer step with the committed means on disk, keeping the local progress: ``Imported``."""

    round: int


class WriteSnapshot(Struct, frozen=True, kw_only=True, tag="write_snapshot"):
    """Write the outer state as it is now to disk, while it may go on to change: ``SnapshotStored``."""

    round: int


class Keep(Struct, frozen=True, kw_only=True, tag="keep"):
    """Delete all other snapshots, partial ones up to the newest, and means before ``means_from``: ``LedgerAt``."""

    snapshots: tuple[int, ...]
    means_from: int


class Perform(Struct, frozen=True, kw_only=True, tag="perform"):
    """Of a user's own actor: do what only its program knows. ``body``: an effect of its own kinds, encoded."""

    body: bytes


Effect: TypeAlias = (
    WakeAt | Report | Tell | Send | Dial | ConnectMembers | KeyToLetIn | StoreBallot | Fail | Finish | Fetch
    | CancelFetches | CancelFetch | AdoptMean | Settle | Reduce | Forget
    | RunSteps | StopSteps | Encode | Apply | Merge | GiveUp | TakeBack | Evaluate | StopEvaluation
    | Restore | Save
    | ImportChunk | EndImport | StoreMeans | ReadRecord | FindRecord | ReadManifest | OpenRound | OpenSnapshot
    | StoreChunk | StoreRecord | AdoptRound | FinishSnapshot | LoadSnapshot | Advance | WriteSnapshot | Keep
    | Perform
)  # fmt: skip
"""Everything that a machine can ask for."""


class Machine(Protocol):
    """A pure state machine. It is given one event at a time, with a clock that never goes back."""

    def handle(self, now: float, event: Event) -> list[Effect]:
        """The effects of ``event`` at ``now`` (seconds of a monotonic clock), in the order to perform them."""
        ...
