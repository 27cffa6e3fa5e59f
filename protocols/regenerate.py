"""Writes the golden vectors and the rejected bytes of protocol 1 from the values below.

Run it from the repository root, ``python protocols/regenerate.py``, after *adding* a case here: for a new message, a
new field, a rule that was broken once. It writes what is not there yet, and refuses to change what is: a vector that
changes is another protocol, and other implementations, older logs and running nodes know only the old one. If a
vector was wrong from the start, ``--force`` replaces it; read the diff by hand then, and say in the commit why.

The tests never run this. They hold the code to the files, so that a change of the code cannot change both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cbor2
import msgspec
import numpy as np
import torch
from blake3 import blake3

from prime_async.config.schema import OuterSettings, ReducerName
from prime_async.errors import NonFiniteError
from prime_async.ledger import StoredBallot
from prime_async.ledger.means_format import (
    FORMAT,
    SIZE_BYTES,
    Contents,
    MeansHeader,
    Settled,
    encode_item,
    encode_means_header,
    slots,
)
from prime_async.log import LOG_VERSION, LogHeader, LogRecord, MachineSettings, effects_digest
from prime_async.machines.ballot import Ballot, apply_change, is_quorum, view_digest
from prime_async.machines.checkpoint import CheckpointSettings
from prime_async.machines.exchange import ExchangeSettings
from prime_async.machines.leadership import ContactPoint, MembershipSettings
from prime_async.machines.owners import assign
from prime_async.machines.training import TrainingSettings
from prime_async.machines.vocabulary import (
    ActorName,
    Applied,
    AskAgain,
    BallotStored,
    Begin,
    Captured,
    ChunkImported,
    ChunkStored,
    CommitReady,
    ContributionFixed,
    ContributionTaken,
    DoorClosed,
    Encoded,
    Evaluated,
    EvaluationStopped,
    Event,
    Fetched,
    FetchFailed,
    FetchFile,
    FetchState,
    FoundUnusable,
    Halt,
    Halted,
    Heard,
    Imported,
    Leave,
    LeaveFile,
    LedgerAt,
    LedgerFailed,
    LetIn,
    ManifestRead,
    MeansCommitted,
    MeansStored,
    Measured,
    Merged,
    Offended,
    Progress,
    Reached,
    RecordRead,
    Reduced,
    Rejected,
    Restored,
    RoundOpened,
    RoundStored,
    RunAt,
    Saved,
    SnapshotOpened,
    SnapshotStored,
    StateAt,
    StepsDone,
    Tick,
    Told,
    ViewChanged,
    WakeAt,
    Weighed,
)
from prime_async.messages import (
    FIRST_CHAIN,
    Accepted,
    Ask,
    AskLedger,
    AskRoster,
    AskRun,
    AskView,
    Behind,
    Change,
    ChunkInfo,
    ChunkKey,
    Commit,
    Departed,
    Figures,
    FileManifest,
    Found,
    Get,
    Goodbye,
    Have,
    Heartbeat,
    HeartbeatAck,
    Held,
    HeldMean,
    Hello,
    Holdings,
    Included,
    LedgerMessage,
    Manifest,
    Member,
    MemberAddress,
    Message,
    Missing,
    Open,
    Outvoted,
    Own,
    Plan,
    Prepare,
    PreVote,
    Promise,
    Propose,
    Rate,
    Ready,
    Record,
    Redirect,
    Refuse,
    Roster,
    RosterEntry,
    RoundMessage,
    RoundTimes,
    RunInfo,
    Stretch,
    Support,
    Turn,
    Unusable,
    View,
    ViewUpdate,
    Vouch,
    Welcome,
    Withdraw,
    bitmap,
    encode,
    file_number,
    next_chain,
    positions,
)
from prime_async.work.codec import CodecName, as_bytes, as_tensor, make_codec
from prime_async.work.outer import OuterState
from prime_async.work.reduce import weighted_mean
from prime_async.work.reducers import make_reducer

V1 = Path(__file__).parent / "v1"
MOST = 2**63 - 1
MOST_TOKENS = 2**47 - 1  # of which 65536 members together have fewer than 2^63
FP32_MAX = float(np.finfo(np.float32).max)

# --- values that several cases share --------------------------------------------------------------------------------

A, B, C = "0a" * 32, "1b" * 32, "2c" * 32
D0, D1, D2 = bytes(32), bytes(range(32)), b"\xff" * 32
ANNA = Member(id=A, name="anna", incarnation=1700000000000, control="tcp://192.0.2.1:7700", bulk="tcp://192.0.2.1:7701")
BERT = Member(
    id=B,
    name="bert's café",
    incarnation=1700000000123,
    control="tcp://[2001:db8::2]:7700",
    bulk="tcp://[2001:db8::2]:7701",
    weight=3,
    active=True,
    voter=True,
    reachable=True,
)
CARL = Member(
    id=C,
    name="carl",
    incarnation=1700000000456,
    control="tcp://c.example:7700",
    bulk="tcp://c.example:7701",
    active=True,
    voter=True,
    witness=True,
)
BARE = Member(id="n", name="", incarnation=0, control="", bulk="", weight=0)
FULL = Member(
    id="f" * 64,
    name="ä" * 64,
    incarnation=MOST,
    control="c" * 256,
    bulk="b" * 256,
    weight=MOST,
    active=True,
    voter=True,
    reachable=True,
    witness=True,
    rejected=MOST,
)
LINEAGE = blake3(b"the founding").digest()
MEANS = b"".join(blake3(bytes([chunk])).digest() for chunk in range(3))
"""The digests of the three means of a round."""
S11, M11 = blake3(b"a state").digest(), blake3(MEANS).digest()
COMMIT = Commit(round=11, epoch=1, attempt=0, state=S11, digest=M11, chain=next_chain(FIRST_CHAIN, S11, M11), view=1)
RECORD = Record(
    commit=COMMIT,
    previous=FIRST_CHAIN,
    means=MEANS,
    included=(
        Included(chunks=2, contributors=bitmap([0, 1]), total_weight=98304),
        Included(chunks=1, contributors=bitmap([1]), total_weight=32768),
    ),
)
FIGURES = Figures(
    phase="training",
    tokens=1_263_616,
    tokens_per_s=8412,
    loss_micronats=1_779_213,
    heldout_round=12,
    heldout_micronats=1_765_004,
    sent_bytes=10_905_190,
    received_bytes=11_010_048,
    training_ms=145_200,
    elapsed_ms=150_000,
    snapshot_round=10,
    rounds=(RoundTimes(round=11, training_ms=12_100, waiting_ms=180, exchange_ms=210, other_ms=10, tokens=102_400),),
)
MOST_FIGURES = Figures(
    phase="\U0001f680" * 16,
    tokens=MOST,
    tokens_per_s=MOST,
    loss_micronats=MOST,
    heldout_round=MOST,
    heldout_micronats=MOST,
    sent_bytes=MOST,
    received_bytes=MOST,
    training_ms=MOST,
    elapsed_ms=MOST,
    snapshot_round=MOST,
    rounds=(RoundTimes(round=MOST, training_ms=MOST, waiting_ms=MOST, exchange_ms=MOST, other_ms=MOST, tokens=MOST),)
    * 3,
)
FULL_COMMIT = Commit(round=MOST, epoch=MOST, attempt=MOST, state=D2, digest=D2, chain=D2, view=MOST)
FOUNDED = View(lineage=LINEAGE, epoch=1, number=1, previous=bytes(32), leader=B, members=(BERT,))
JOINING = Change(epoch=1, leader=B, members=(ANNA,), commit=COMMIT)
VIEW = apply_change(FOUNDED, JOINING)
EMPTY_VIEW = View(lineage=D0, epoch=0, number=0, previous=D0, leader="n", members=())
FULL_VIEW = View(
    lineage=D2,
    epoch=MOST,
    number=MOST,
    previous=D2,
    leader=A,
    members=(FULL, BARE, ANNA, CARL),
    commit=FULL_COMMIT,
)
FIRST = (Turn(epoch=1, attempt=0),)
HOLDINGS_MOST = Holdings(
    round=MOST, means_from=MOST, snapshots=(MOST,) * 256, above=(Stretch(first=MOST, end=MOST),) * 16
)
PLAN = Plan(round=12, epoch=1, attempt=0, view=2, contributors=bitmap([0, 1]), weights=(65536, 32768), turns=FIRST)
BALLOT = Ballot(
    incarnations=(1699999999999, 1700000000000),
    promised=2,
    promised_to=B,
    accepted=1,
    view=VIEW,
    before=FOUNDED,
)
SETTINGS = {"run.rounds": "0", "run.model.name": '"tiny"', "run.inner.learning_rate": "0.001", "run.a_longer_key": "[]"}
LOSS_NAN = float("nan")


def control_cases() -> list[tuple[str, Any]]:
    """Name and value of every golden control message."""
    return [
        ("hello", Hello(protocol=1, run_id=D1, settings=SETTINGS, member=ANNA)),
        ("hello_least", Hello(protocol=0, run_id=D0, settings={}, member=BARE)),
        (
            "hello_most",
            Hello(
                protocol=MOST,
                run_id=D2,
                settings={"k" * 64: "v" * 300, "": ""},
                member=FULL,
                lineage=D2,
                view=MOST,
            ),
        ),
        ("hello_again", Hello(protocol=1, run_id=D1, settings=SETTINGS, member=ANNA, lineage=LINEAGE, view=2)),
        ("welcome", Welcome(epoch=1, view=VIEW, round=12, state_digest=D1)),
        ("welcome_least", Welcome(epoch=0, view=EMPTY_VIEW, round=0, state_digest=D0)),
        ("redirect", Redirect(leader=B, control=BERT.control)),
        ("redirect_least", Redirect(leader="n", control="")),
        ("refuse_other_protocol", Refuse(reason="other_protocol", text="this run speaks protocol 1")),
        (
            "refuse_other_run",
            Refuse(
                reason="other_run",
                text="the node that asks has another run spec",
                differences=("run.rounds: 0 in the run, 5 at the node that asks", ""),
            ),
        ),
        ("refuse_other_lineage", Refuse(reason="other_lineage", text="one side was carried on without the other")),
        ("refuse_key_not_allowed", Refuse(reason="key_not_allowed", text="")),
        ("refuse_not_a_member", Refuse(reason="not_a_member", text="say hello")),
        ("refuse_diverged", Refuse(reason="diverged", text="fetch it")),
        (
            "heartbeat",
            Heartbeat(incarnation=1700000000000, epoch=1, view=2, round=12, state_digest=D1, inner_steps=1234),
        ),
        ("heartbeat_least", Heartbeat(incarnation=0, epoch=0, view=0, round=0, state_digest=D0)),
        (
            "heartbeat_most",
            Heartbeat(incarnation=MOST, epoch=MOST, view=MOST, round=MOST, state_digest=D2, inner_steps=MOST),
        ),
        (
            "heartbeat_watched",
            Heartbeat(incarnation=1, epoch=1, view=2, round=12, state_digest=D1, inner_steps=1234, figures=FIGURES),
        ),
        (
            "heartbeat_watched_least",
            Heartbeat(incarnation=1, epoch=1, view=2, round=0, state_digest=D0, figures=Figures(phase="")),
        ),
        (
            "heartbeat_watched_most",
            Heartbeat(incarnation=1, epoch=1, view=2, round=MOST, state_digest=D2, figures=MOST_FIGURES),
        ),
        ("heartbeat_ack_watched", HeartbeatAck(epoch=1, view=2, watched=True)),
        ("ask_roster", AskRoster()),
        ("ask_roster_most", AskRoster(first=MOST)),
        (
            "roster",
            Roster(
                view=2,
                first=0,
                entries=(
                    RosterEntry(position=0, round=12, inner_steps=1234, silent_ms=250, figures=FIGURES),
                    RosterEntry(position=3, round=11, inner_steps=0, silent_ms=0),
                ),
                departed=(Departed(id=C, name="carla", view=2, silent_ms=10012),),
            ),
        ),
        ("roster_of_nobody", Roster(view=2, first=64, entries=())),
        (
            "roster_most",
            Roster(
                view=MOST,
                first=MOST,
                entries=(
                    RosterEntry(position=MOST, round=MOST, inner_steps=MOST, silent_ms=MOST, figures=MOST_FIGURES),
                )
                * 64,
                departed=(Departed(id="f" * 64, name="x" * 64, view=MOST, silent_ms=MOST),) * 16,
            ),
        ),
        ("heartbeat_ack", HeartbeatAck(epoch=1, view=2)),
        ("heartbeat_ack_sizes_of_integers", HeartbeatAck(epoch=23, view=24)),
        ("heartbeat_ack_more_sizes", HeartbeatAck(epoch=255, view=256)),
        ("heartbeat_ack_still_more_sizes", HeartbeatAck(epoch=65535, view=65536)),
        ("heartbeat_ack_largest_sizes", HeartbeatAck(epoch=2**32 - 1, view=2**32)),
        ("propose", Propose(epoch=1, number=2, digest=view_digest(VIEW), change=JOINING)),
        ("propose_again", Propose(epoch=2, number=2, digest=view_digest(VIEW))),
        (
            "propose_most",
            Propose(
                epoch=MOST,
                number=MOST,
                digest=D2,
                change=Change(epoch=MOST, leader="f" * 64, gone=b"\xff" * 64, members=(FULL, BARE), commit=FULL_COMMIT),
            ),
        ),
        ("propose_nothing_but_an_epoch", Propose(epoch=3, number=3, digest=D1, change=Change(epoch=3, leader=C))),
        ("accepted", Accepted(epoch=1, number=2, incarnations=(1699999999999, 1700000000000))),
        ("accepted_most", Accepted(epoch=MOST, number=MOST, incarnations=(MOST,) * 3)),
        ("ask_view", AskView(number=2)),
        ("ask_view_most", AskView(number=MOST)),
        ("view", ViewUpdate(epoch=1, decided=True, view=VIEW)),
        ("view_of_one", ViewUpdate(epoch=1, decided=True, view=FOUNDED)),
        ("view_proposed", ViewUpdate(epoch=2, decided=False, view=VIEW)),
        ("view_of_four", ViewUpdate(epoch=MOST, decided=True, view=FULL_VIEW)),
        ("pre_vote", PreVote(epoch=2, view=2)),
        ("pre_vote_most", PreVote(epoch=MOST, view=MOST)),
        ("support", Support(epoch=2, incarnations=(1700000000123,))),
        ("support_least", Support(epoch=0, incarnations=())),
        ("prepare", Prepare(epoch=2, number=2, accepted_epoch=1)),
        ("prepare_most", Prepare(epoch=MOST, number=MOST, accepted_epoch=MOST)),
        (
            "promise",
            Promise(
                epoch=2,
                decided=1,
                number=2,
                accepted_epoch=1,
                member=ANNA,
                incarnations=(1699999999999, 1700000000000),
                view=VIEW,
                before=FOUNDED,
            ),
        ),
        (
            "promise_of_a_decided_view",
            Promise(
                epoch=2, decided=2, number=2, accepted_epoch=1, member=BERT, incarnations=(1700000000123,), view=VIEW
            ),
        ),
        (
            "promise_of_nothing_newer",
            Promise(epoch=2, decided=2, number=2, accepted_epoch=1, member=BERT, incarnations=(1700000000123,)),
        ),
        (
            "promise_most",
            Promise(
                epoch=MOST,
                decided=MOST,
                number=MOST,
                accepted_epoch=MOST,
                member=FULL,
                incarnations=(MOST, 0),
                view=FULL_VIEW,
                before=EMPTY_VIEW,
            ),
        ),
        ("outvoted", Outvoted(epoch=3)),
        ("outvoted_most", Outvoted(epoch=MOST)),
        ("goodbye", Goodbye(incarnation=1700000000000)),
        ("goodbye_of_the_leader", Goodbye(incarnation=7, text="the leader has left")),
        ("ready", Ready(round=12, weight=65536, incarnation=1700000000000)),
        ("ready_again", Ready(round=12, weight=65536, incarnation=1700000000000, rejected=2)),
        ("ready_asking", Ready(round=0, weight=0, incarnation=0)),
        ("ready_most", Ready(round=MOST, weight=MOST_TOKENS, incarnation=MOST, rejected=MOST)),
        ("plan", PLAN),
        (
            "plan_of_many",
            Plan(
                round=12,
                epoch=1,
                attempt=3,
                view=9,
                contributors=bitmap([0, 7, 8, 17]),
                weights=(1, 24, 256, MOST_TOKENS),
                turns=(*FIRST, Turn(epoch=1, attempt=1, lost=bitmap([3])), Turn(epoch=1, attempt=3, lost=bitmap([9]))),
            ),
        ),
        (
            "plan_taken_over",
            Plan(
                round=12,
                epoch=2,
                attempt=4,
                view=2,
                contributors=bitmap([0, 1]),
                weights=(65536, 32768),
                turns=(*FIRST, Turn(epoch=2, attempt=0, lost=bitmap([0]))),
            ),
        ),
        (
            "plan_of_none",
            Plan(
                round=0,
                epoch=0,
                attempt=0,
                view=0,
                contributors=b"",
                weights=(),
                turns=(Turn(epoch=MOST, attempt=MOST, lost=b"\xff" * 64),),
            ),
        ),
        ("open", Open(epoch=2, round=12, incarnation=1700000000000, plan=PLAN)),
        ("open_without_a_plan", Open(epoch=2, round=0, incarnation=0)),
        ("open_most", Open(epoch=MOST, round=MOST, incarnation=MOST)),
        ("ask", Ask(round=12, epoch=2, attempt=0, chunks=(0, 3, 1000))),
        ("ask_for_nothing", Ask(round=MOST, epoch=MOST, attempt=MOST, chunks=())),
        (
            "held",
            Held(
                round=12,
                epoch=2,
                attempt=0,
                means=(HeldMean(chunk=0, epoch=1, attempt=0), HeldMean(chunk=1000, epoch=1, attempt=3)),
            ),
        ),
        ("held_nothing", Held(round=12, epoch=2, attempt=0)),
        (
            "held_most",
            Held(
                round=MOST,
                epoch=MOST,
                attempt=MOST,
                means=(HeldMean(chunk=MOST, epoch=MOST, attempt=MOST),),
            ),
        ),
        (
            "have",
            Have(
                round=12,
                epoch=1,
                attempt=0,
                state=D0,
                digest=D1,
                incarnation=1700000000000,
                received_per_s=12_500_000,
                rates=(Rate(position=0, bytes_per_s=9_000_000), Rate(position=17, bytes_per_s=0)),
            ),
        ),
        (
            "have_without_measurements",
            Have(round=12, epoch=1, attempt=0, state=D0, digest=D1, incarnation=1700000000000),
        ),
        (
            "have_most",
            Have(
                round=MOST,
                epoch=MOST,
                attempt=MOST,
                state=D2,
                digest=D2,
                incarnation=MOST,
                received_per_s=MOST,
                rates=(Rate(position=MOST, bytes_per_s=MOST),),
            ),
        ),
        (
            "have_in_memory_alone",
            Have(round=12, epoch=1, attempt=0, state=D0, digest=D1, incarnation=1700000000000, safe=False),
        ),
        (
            "unusable",
            Unusable(round=12, epoch=1, attempt=2, contributors=bitmap([0, 9]), incarnation=1700000000000),
        ),
        (
            "unusable_most",
            Unusable(round=MOST, epoch=MOST, attempt=MOST, contributors=b"\xff" * 8192, incarnation=MOST),
        ),
        ("behind", Behind(round=13)),
        ("behind_most", Behind(round=MOST)),
        ("ask_ledger", AskLedger()),
        ("ask_run", AskRun(key=B, name="bert")),
        ("ask_run_least", AskRun()),
        (
            "run_info",
            RunInfo(
                settings={"run.name": '"tiny"', "run.rounds": "0"},
                members=(
                    MemberAddress(id=A, control=ANNA.control),
                    MemberAddress(id=C, control="tcp://c.example:7700"),
                ),
                key=B,
            ),
        ),
        ("run_info_least", RunInfo(settings={}, members=())),
        ("vouch", Vouch(key=B, name="bert")),
        ("holdings", Holdings(round=12, means_from=3, snapshots=(0, 10))),
        ("holdings_without_a_snapshot", Holdings(round=12, means_from=12)),
        (
            "holdings_of_a_node_that_is_behind",
            Holdings(
                round=12,
                means_from=3,
                state=False,
                above=(Stretch(first=13, end=15), Stretch(first=16, end=17)),
            ),
        ),
        ("own", Own(actor="tally", body=b"\xa1\x64type\x64ping")),
        ("own_most", Own(actor="t" + "9_" * 15 + "y", body=bytes(65536))),
        ("holdings_most", HOLDINGS_MOST),
    ]


def bulk_cases() -> list[tuple[str, Any]]:
    """Name and value of every golden bulk header."""
    mean = ChunkKey(kind="mean", round=12, chunk=3, epoch=1, attempt=2)
    return [
        ("get_contribution", Get(id=1, key=ChunkKey(kind="contribution", round=12, chunk=3), wait_ms=60000)),
        (
            "get_contribution_after_a_rejection",
            Get(id=1, key=ChunkKey(kind="contribution", round=12, chunk=3, attempt=1), wait_ms=60000),
        ),
        ("get_mean", Get(id=2, key=mean, wait_ms=3_600_000)),
        ("get_settled_mean", Get(id=3, key=ChunkKey(kind="mean", round=12, chunk=3), wait_ms=7500)),
        ("get_state", Get(id=MOST, key=ChunkKey(kind="state", round=0, chunk=0), wait_ms=0)),
        ("get_manifest", Get(id=4, key=ChunkKey(kind="manifest", round=12, chunk=0), wait_ms=60000)),
        ("get_record", Get(id=5, key=ChunkKey(kind="record", round=11, chunk=0), wait_ms=60000)),
        ("found_contribution", Found(id=1, info=ChunkInfo(digest=D1), size=1040)),
        (
            "found_mean",
            Found(id=2, info=ChunkInfo(digest=D2, contributors=bitmap([0, 1]), total_weight=98304), size=1040),
        ),
        ("found_empty", Found(id=3, info=ChunkInfo(digest=blake3(b"").digest()), size=0)),
        (
            "found_most",
            Found(id=MOST, info=ChunkInfo(digest=D2, contributors=b"\xff" * 64, total_weight=MOST), size=MOST),
        ),
        ("missing_gone", Missing(id=1, gone=True, text="mean/12/3/(1, 2) is of a round that is over")),
        ("missing_yet", Missing(id=2, gone=False)),
        ("withdraw", Withdraw(id=1)),
        ("withdraw_most", Withdraw(id=MOST)),
    ]


def ledger_payload_cases() -> list[tuple[str, Any]]:
    """Name and value of every golden payload that is CBOR."""
    chunks = b"".join(blake3(bytes([chunk, chunk])).digest() for chunk in range(3))
    return [
        ("manifest", Manifest(round=12, chunks=chunks, commit=COMMIT)),
        ("manifest_of_the_first_state", Manifest(round=0, chunks=chunks)),
        ("manifest_most", Manifest(round=MOST, chunks=D2 * 64, commit=FULL_COMMIT)),
        ("file", FileManifest(size=2500, chunk_bytes=1024, chunks=chunks)),
        ("file_of_nothing", FileManifest(size=0, chunk_bytes=1024, chunks=b"")),
        ("file_most", FileManifest(size=MOST, chunk_bytes=MOST, chunks=D2)),
        ("record", RECORD),
        ("record_of_no_chunks", Record(commit=COMMIT, previous=D0, means=b"", included=())),
        (
            "record_most",
            Record(
                commit=FULL_COMMIT,
                previous=D2,
                means=D2 * 64,
                included=(Included(chunks=MOST, contributors=b"\xff" * 8192, total_weight=MOST),),
            ),
        ),
    ]


def tolerated_cases() -> list[tuple[str, str, Any, dict[str, Any], Any]]:
    """(name, plane, message, what is changed in its map, the value that a reader gets): None removes a field."""
    beat = Heartbeat(incarnation=1, epoch=1, view=2, round=3, state_digest=D1)
    member = msgspec.to_builtins(ANNA, builtin_types=(bytes,))
    alone = View(lineage=LINEAGE, epoch=1, number=1, previous=bytes(32), leader=A, members=(ANNA,))
    view = msgspec.to_builtins(alone, builtin_types=(bytes,)) | {"members": [{**member, "region": "eu"}], "since": 5}
    view_of_old = {k: v for k, v in view.items() if k != "commit"}
    return [
        (
            "heartbeat_with_unknown_fields",
            "control",
            beat,
            {"z": None, "gpus": 8, "later": {"deep": [b"\x00", -1, True, 1.5]}},
            beat,
        ),
        ("heartbeat_without_figures", "control", beat, {"figures": "LEFT OUT"}, beat),
        ("heartbeat_without_an_optional_field", "control", beat, {"inner_steps": "LEFT OUT"}, beat),
        (
            "view_with_unknown_fields_inside",
            "control",
            ViewUpdate(epoch=1, decided=True, view=alone),
            {"view": view},
            ViewUpdate(epoch=1, decided=True, view=alone),
        ),
        (
            "view_without_a_commit",
            "control",
            ViewUpdate(epoch=1, decided=True, view=alone),
            {"view": view_of_old},
            ViewUpdate(epoch=1, decided=True, view=alone),
        ),
        (
            "propose_without_a_change",
            "control",
            Propose(epoch=2, number=2, digest=D1),
            {"change": "LEFT OUT"},
            Propose(epoch=2, number=2, digest=D1),
        ),
        (
            "get_without_optional_fields",
            "bulk",
            Get(id=1, key=ChunkKey(kind="state", round=2, chunk=3), wait_ms=5),
            {"key": {"kind": "state", "round": 2, "chunk": 3}},
            Get(id=1, key=ChunkKey(kind="state", round=2, chunk=3), wait_ms=5),
        ),
        ("withdraw_with_an_unknown_field", "bulk", Withdraw(id=9), {"why": "late"}, Withdraw(id=9)),
        (
            "holdings_without_an_optional_field",
            "control",
            Holdings(round=3, means_from=1),
            {"snapshots": "LEFT OUT", "state": "LEFT OUT", "above": "LEFT OUT"},
            Holdings(round=3, means_from=1),
        ),
        ("ask_ledger_with_an_unknown_field", "control", AskLedger(), {"rounds": [3, 9]}, AskLedger()),
        (
            "manifest_without_a_commit",
            "records",
            Manifest(round=0, chunks=D1),
            {"commit": "LEFT OUT"},
            Manifest(round=0, chunks=D1),
        ),
        ("record_with_an_unknown_field", "records", RECORD, {"loss": 2.5}, RECORD),
    ]


# --- rejected -------------------------------------------------------------------------------------------------------

T = b"\x61t"
READY_END = b"\x68rejected\x00" + b"\x6bincarnation\x03"
READY = b"\xa5" + T + b"\x65ready" + b"\x65round\x01" + b"\x66weight\x02" + READY_END


def ready(round: bytes = b"\x01", weight: bytes = b"\x02") -> bytes:
    return b"\xa5" + T + b"\x65ready" + b"\x65round" + round + b"\x66weight" + weight + READY_END


def ready_and(extra: bytes) -> bytes:
    """A ready with an unknown field, z, of these bytes."""
    return b"\xa6" + T + b"\x65ready" + b"\x61z" + extra + READY.split(b"ready", 1)[1]


def changed(message: Any, **fields: Any) -> bytes:
    """The deterministic encoding of ``message`` with other values in its map; "LEFT OUT" removes one."""
    tree = msgspec.to_builtins(message, builtin_types=(bytes,)) | fields
    return cbor2.dumps({k: v for k, v in tree.items() if v != "LEFT OUT"}, canonical=True)


def commit_without(view: View, field: str) -> dict[str, Any]:
    """The map of a view, without a field of its commit."""
    tree: dict[str, Any] = msgspec.to_builtins(view, builtin_types=(bytes,))
    return tree | {"commit": {k: v for k, v in tree["commit"].items() if k != field}}


def control_rejects() -> list[tuple[str, str, bytes, bool]]:
    """(name, reason, bytes, whether CDDL has no way to say so)."""
    beat = Heartbeat(incarnation=1, epoch=1, view=2, round=3, state_digest=D1)
    hello = Hello(protocol=1, run_id=D1, settings={}, member=ANNA)
    plan = Plan(round=1, epoch=1, attempt=0, view=1, contributors=b"\x01", weights=(5,), turns=FIRST)
    member = msgspec.to_builtins(ANNA, builtin_types=(bytes,))
    entry = {"position": 0, "round": 1, "inner_steps": 0, "silent_ms": 0}
    refuse = Refuse(reason="diverged", text="")
    update = ViewUpdate(epoch=1, decided=True, view=VIEW)
    propose = Propose(epoch=1, number=2, digest=D1)
    opened = Open(epoch=2, round=12, incarnation=1, plan=PLAN)
    support = Support(epoch=2, incarnations=(1,))
    have = Have(round=1, epoch=1, attempt=0, state=D0, digest=D1, incarnation=1)
    holdings = Holdings(round=12, means_from=3)
    return [
        ("own_without_a_name", "an actor's name has a letter first", encode(Own(actor="9", body=b"")), False),
        ("own_with_too_much", "a body of 65537 bytes", encode(Own(actor="tally", body=bytes(65537))), False),
        # What is not one item, or cut off.
        ("trailing_byte", "a byte after the message", READY + b"\x00", True),
        ("two_messages", "a second message after the first", READY + READY, True),
        ("cut_off", "the last byte is missing", READY[:-1], False),
        ("length_beyond_the_end", "a text of 2^62 bytes is announced", b"\xa1" + T + b"\x7b\x40" + bytes(7), False),
        ("many_items_announced", "an array of 2^32 items is announced", b"\x9b\0\0\0\1\0\0\0\0", False),
        ("break_alone", "a break code outside of an item", b"\xff", False),
        ("reserved_additional_information", "28 is reserved", b"\x1c", False),
        # What is not the deterministic encoding.
        ("integer_one_byte_too_long", "1 in two bytes", ready(b"\x18\x01"), True),
        ("integer_in_eight_bytes", "1 in nine bytes", ready(b"\x1b" + bytes(7) + b"\x01"), True),
        ("length_too_long", "the length of a key in two bytes", READY.replace(b"\x65round", b"\x78\x05round"), True),
        (
            "keys_not_sorted",
            "weight comes before round",
            b"\xa4" + T + b"\x65ready" + b"\x66weight\x02" + b"\x65round\x01" + b"\x6bincarnation\x03",
            True,
        ),
        (
            "tag_not_first",
            "t is the shortest key and must come first",
            b"\xa4\x65round\x01" + T + b"\x65ready" + b"\x66weight\x02" + b"\x6bincarnation\x03",
            True,
        ),
        (
            "duplicate_key",
            "round comes twice",
            READY.replace(b"\xa5", b"\xa6").replace(b"\x65round\x01", b"\x65round\x01" * 2),
            True,
        ),
        ("map_of_indefinite_length", "indefinite lengths are not allowed", b"\xbf" + READY[1:] + b"\xff", True),
        (
            "text_of_indefinite_length",
            "indefinite lengths are not allowed",
            READY.replace(b"\x65ready", b"\x7f\x65ready\xff"),
            True,
        ),
        (
            "array_of_indefinite_length",
            "indefinite lengths are not allowed",
            encode(plan).replace(b"\x81\x05", b"\x9f\x05\xff"),
            True,
        ),
        (
            "bytes_of_indefinite_length",
            "indefinite lengths are not allowed",
            encode(plan).replace(b"\x41\x01", b"\x5f\x41\x01\xff"),
            True,
        ),
        (
            "float_longer_than_needed",
            "1.0 in four bytes, in a field that nobody knows",
            ready_and(b"\xfa\x3f\x80\0\0"),
            True,
        ),
        ("not_a_number_with_payload", "NaN is f97e00", ready_and(b"\xf9\x7e\x01"), True),
        ("text_not_utf8", "ff is no UTF-8", READY.replace(b"\x65ready", b"\x61\xff"), False),
        ("surrogate_in_text", "a surrogate is no character", ready_and(b"\x63\xed\xa0\x80"), False),
        # Tags. No message has one, and what they would make a decoder do (dates, regular expressions, arithmetic on
        # numbers of a million digits) is not for a peer to decide.
        ("self_described", "tag 55799 before the message", b"\xd9\xd9\xf7" + READY, False),
        ("bignum", "2^64 as a big number", ready(b"\xc2\x49\x01" + bytes(8)), False),
        ("tag_on_text", "tag 999 in a field that nobody knows", ready_and(b"\xd9\x03\xe7\x01"), True),
        ("date", "tag 0 in a field that nobody knows", ready_and(b"\xc0\x742020-01-01T00:00:00Z"), True),
        ("big_number_unknown", "tag 2 in a field that nobody knows", ready_and(b"\xc2\x49\x01" + bytes(8)), True),
        ("decimal_fraction", "tag 4 in a field that nobody knows", ready_and(b"\xc4\x82\x01\x0f"), True),
        ("rational", "tag 30 in a field that nobody knows", ready_and(b"\xd8\x1e\x82\x01\x02"), True),
        ("regular_expression", "tag 35 in a field that nobody knows", ready_and(b"\xd8\x23\x62a+"), True),
        ("shared_reference_to_itself", "tags 28 and 29 make a cycle", ready_and(b"\xd8\x1c\x81\xd8\x1d\x00"), True),
        # Sizes.
        ("too_deep", "nine containers inside each other", ready_and(b"\x81" * 8 + b"\x01"), True),
        ("far_too_deep", "a hundred containers inside each other", ready_and(b"\x81" * 99 + b"\x01"), True),
        # Which message is it?
        ("empty_map", "no tag", b"\xa0", False),
        ("no_tag", "no tag", b"\xa3\x65round\x01\x66weight\x02\x6bincarnation\x03", False),
        ("unknown_tag", "no such message", changed(Behind(round=1), t="behold"), False),
        ("tag_of_a_bulk_header", "get is not of this plane", encode(Withdraw(id=1)), False),
        ("tag_is_a_number", "a tag is text", changed(Behind(round=1), t=1), False),
        ("tag_is_bytes", "a tag is text", changed(Behind(round=1), t=b"behind"), False),
        ("number", "a message is a map", b"\x01", False),
        ("array", "a message is a map", b"\x82\x65ready\x01", False),
        ("null", "a message is a map", b"\xf6", False),
        ("key_is_a_number", "keys are text", b"\xa3\x01\x01" + encode(Behind(round=1))[1:], False),
        ("key_is_bytes", "keys are text", b"\xa3\x41z\x01" + encode(Behind(round=1))[1:], False),
        # Types.
        (
            "missing_field",
            "weight is missing",
            changed(Ready(round=1, weight=2, incarnation=3), weight="LEFT OUT"),
            False,
        ),
        (
            "missing_field_inside",
            "the member has no id",
            changed(hello, member={k: v for k, v in member.items() if k != "id"}),
            False,
        ),
        ("text_for_integer", "round is a number", ready(b"\x61\x31"), False),
        ("bool_for_integer", "true is not 1", ready(b"\xf5"), False),
        ("float_for_integer", "1.0 is not 1", ready(b"\xf9\x3c\x00"), False),
        ("nan_for_integer", "NaN is not a number of rounds", ready(b"\xf9\x7e\x00"), False),
        ("null_for_integer", "null is not 0", ready(b"\xf6"), False),
        ("array_for_integer", "round is a number", ready(b"\x81\x01"), False),
        ("integer_for_bool", "1 is not true", changed(hello, member=member | {"active": 1}), False),
        ("bytes_for_text", "an id is text", changed(hello, member=member | {"id": A.encode()}), False),
        ("text_for_bytes", "a digest is bytes", changed(beat, state_digest="0" * 32), False),
        ("array_for_bytes", "a digest is bytes", changed(beat, state_digest=list(range(32))), False),
        ("array_for_map", "a member is a map", changed(hello, member=[A, "anna", 1, "", "", 1, False]), False),
        ("text_for_bool", "decided is true or false", changed(update, decided="yes"), False),
        ("null_for_bool", "null is not false", changed(update, decided=None), False),
        (
            "float_for_a_loss",
            "losses are whole numbers of millionths",
            changed(beat, figures={"phase": "training", "loss_micronats": 1.5}),
            False,
        ),
        ("figures_without_a_phase", "phase is missing", changed(beat, figures={}), False),
        ("phase_too_long", "65 bytes", changed(beat, figures={"phase": "x" * 65}), False),
        (
            "four_round_times",
            "at most three",
            changed(beat, figures={"phase": "", "rounds": [msgspec.to_builtins(FIGURES.rounds[0])] * 4}),
            False,
        ),
        (
            "roster_of_65",
            "at most 64",
            changed(Roster(view=1, first=0, entries=()), entries=[entry] * 65),
            False,
        ),
        ("null_for_map", "there is no view that is not one", changed(update, view=None), False),
        ("map_of_another_kind", "a plan is no change", changed(propose, change=msgspec.to_builtins(PLAN)), False),
        (
            "plan_with_another_tag",
            "the plan in an open is one",
            changed(opened, plan=msgspec.to_builtins(PLAN, builtin_types=(bytes,)) | {"t": "plane"}),
            False,
        ),
        ("commit_is_no_message", "it stands in a view", changed(COMMIT, t="commit"), False),
        ("map_for_array", "weights are an array", changed(plan, weights={}), False),
        ("setting_is_a_number", "settings are text", changed(hello, settings={"run.rounds": 0}), False),
        ("unknown_reason", "reasons are a closed list", changed(refuse, reason="dislike"), False),
        # Bounds.
        ("negative", "counts are not negative", ready(b"\x20"), False),
        ("no_turn", "a plan has one turn at least", changed(plan, turns=[]), False),
        ("too_many_turns", "4097 turns", changed(plan, turns=[{"epoch": 1, "attempt": 0}] * 4097), False),
        ("too_many_incarnations", "257 incarnations", changed(support, incarnations=[0] * 257), False),
        (
            "too_many_rates",
            "65 rates",
            changed(have, rates=[{"position": 0, "bytes_per_s": 0}] * 65),
            False,
        ),
        ("have_without_a_state", "means of which state?", changed(have, state="LEFT OUT"), False),
        (
            "commit_without_a_state",
            "a commit names the state that it is about",
            changed(update, view=commit_without(VIEW, "state")),
            False,
        ),
        ("too_many_snapshots", "257 snapshots", changed(holdings, snapshots=[0] * 257), False),
        (
            "too_many_stretches",
            "17 stretches",
            changed(holdings, above=[{"first": 0, "end": 1}] * 17),
            False,
        ),
        ("holdings_without_means", "no first round", changed(holdings, means_from="LEFT OUT"), False),
        ("payload_as_a_message", "a record's place is the other plane", encode(RECORD), False),
        ("long_lineage", "a lineage of 33 bytes", changed(hello, lineage=bytes(33)), False),
        ("negative_in_array", "weights are not negative", changed(plan, weights=[-1]), False),
        ("two_to_the_63", "counts are below 2^63", ready(b"\x1b\x80" + bytes(7)), False),
        ("short_digest", "a digest of 31 bytes", changed(beat, state_digest=D1[:-1]), False),
        ("long_digest", "a digest of 33 bytes", changed(beat, state_digest=D1 + b"\0"), False),
        ("empty_id", "an id has a character at least", changed(hello, member=member | {"id": ""}), False),
        ("long_id", "an id of 65 characters", changed(hello, member=member | {"id": "0" * 65}), True),
        ("very_long_id", "an id of 257 characters", changed(hello, member=member | {"id": "0" * 257}), False),
        ("long_name", "a name of 65 characters", changed(hello, member=member | {"name": "n" * 65}), True),
        ("long_address", "an address of 257 characters", changed(hello, member=member | {"bulk": "b" * 257}), True),
        ("long_key_of_a_setting", "a key of 65 characters", changed(hello, settings={"k" * 65: ""}), True),
        ("too_many_settings", "257 settings", changed(hello, settings={f"{i:03}": "" for i in range(257)}), False),
        ("too_many_differences", "257 differences", changed(refuse, differences=[""] * 257), False),
    ]


def bulk_rejects() -> list[tuple[str, str, bytes, bool]]:
    get = Get(id=1, key=ChunkKey(kind="state", round=2, chunk=3), wait_ms=5)
    found = Found(id=1, info=ChunkInfo(digest=D1), size=4)
    missing = Missing(id=1, gone=True)
    key = msgspec.to_builtins(get.key)
    return [
        ("control_message", "a heartbeat's place is the other plane", encode(HeartbeatAck(epoch=1, view=1)), False),
        ("payload_in_the_header", "bytes after the header", encode(found) + b"\0\0\0\0", True),
        ("wait_too_long", "an hour and a millisecond", changed(get, wait_ms=3_600_001), False),
        ("wait_negative", "a wait below 0", changed(get, wait_ms=-1), False),
        ("unknown_kind_of_chunk", "no such kind", changed(get, key=key | {"kind": "gradient"}), False),
        ("key_as_text", "a key is a map", changed(get, key="state/2/3"), False),
        ("key_without_chunk", "no chunk", changed(get, key={"kind": "state", "round": 2}), False),
        ("negative_chunk", "chunks count from 0", changed(get, key=key | {"chunk": -1}), False),
        ("negative_id", "a get of a negative number", changed(get, id=-1), False),
        ("found_without_info", "no digest to verify", changed(found, info="LEFT OUT"), False),
        ("found_without_digest", "no digest to verify", changed(found, info={}), False),
        ("negative_size", "a size below 0", changed(found, size=-1), False),
        ("gone_is_a_number", "1 is not true", changed(missing, gone=1), False),
        ("withdraw_without_id", "withdraw what?", changed(Withdraw(id=1), id="LEFT OUT"), False),
        ("unsorted", "keys out of order", b"\xa2\x62id\x01" + T + b"\x68withdraw", True),
    ]


def ledger_payload_rejects() -> list[tuple[str, str, bytes, bool]]:
    manifest = Manifest(round=12, chunks=D0, commit=COMMIT)
    file = FileManifest(size=1, chunk_bytes=1, chunks=D0)
    included = msgspec.to_builtins(RECORD.included[0], builtin_types=(bytes,))
    return [
        ("message", "a heartbeat's place is the other plane", encode(HeartbeatAck(epoch=1, view=1)), False),
        ("bytes_after_a_record", "a second record after the first", encode(RECORD) * 2, True),
        ("record_without_a_commit", "it is of a committed round", changed(RECORD, commit=None), False),
        ("short_previous", "a chain of 31 bytes", changed(RECORD, previous=bytes(31)), False),
        ("means_in_an_array", "digests are joined", changed(RECORD, means=[D0, D1]), False),
        ("included_is_a_map", "runs are an array", changed(RECORD, included=included), False),
        (
            "negative_chunks",
            "a run of fewer than no chunks",
            changed(RECORD, included=[included | {"chunks": -1}]),
            False,
        ),
        (
            "bitmap_too_long",
            "a bitmap of 8193 bytes",
            changed(RECORD, included=[included | {"contributors": bytes(8193)}]),
            False,
        ),
        ("file_of_endless_chunks", "chunks of no bytes", changed(file, chunk_bytes=0), False),
        ("file_without_a_size", "how long is it?", changed(file, size="LEFT OUT"), False),
        ("manifest_without_chunks", "nothing to verify with", changed(manifest, chunks="LEFT OUT"), False),
        ("chunks_are_text", "digests are bytes", changed(manifest, chunks="00" * 32), False),
        ("keys_not_sorted", "keys out of order", b"\xa3" + T + b"\x68manifest\x66chunks\x40\x65round\x00", True),
    ]


def long_rejects() -> list[dict[str, Any]]:
    """Those that are too long to write out: ``parts`` are [hexadecimal, how many times]."""
    plan = Plan(round=1, epoch=1, attempt=0, view=1, contributors=b"", weights=(), turns=FIRST)
    before, after = encode(plan).split(b"\x6ccontributors\x40")
    refuse = Refuse(reason="diverged", text="")
    before_text, after_text = encode(refuse).split(b"\x64text\x60")
    big = 2**20 - len(ready_and(b"\x5a" + bytes(4))) + 1
    bulk = b"\xa3" + T + b"\x68withdraw" + b"\x61z\x5a"
    big_bulk = 2**16 - len(bulk) - 4 - len(b"\x62id\x01") + 1
    head, tail = ready_and(b"\x5a" + big.to_bytes(4, "big") + b"SPLIT").split(b"SPLIT")
    # Keys of two letters sort before those of one only if they are shorter: t, z, id.
    return [
        {
            "name": "bitmap_too_long",
            "plane": "control",
            "reason": "a bitmap of 8193 bytes",
            "parts": [[(before + b"\x6ccontributors\x59\x20\x01").hex(), 1], ["00", 8193], [after.hex(), 1]],
            "beyond_cddl": False,
        },
        {
            "name": "text_too_long",
            "plane": "control",
            "reason": "a text of 4097 characters",
            "parts": [[(before_text + b"\x64text\x79\x10\x01").hex(), 1], ["61", 4097], [after_text.hex(), 1]],
            "beyond_cddl": True,
        },
        {
            "name": "too_large",
            "plane": "control",
            "reason": "2^20 + 1 bytes, all of them in order",
            "parts": [[head.hex(), 1], ["00", big], [tail.hex(), 1]],
            "beyond_cddl": True,
        },
        {
            "name": "header_too_large",
            "plane": "bulk",
            "reason": "2^16 + 1 bytes, all of them in order",
            "parts": [[(bulk + big_bulk.to_bytes(4, "big")).hex(), 1], ["00", big_bulk], [b"\x62id\x01".hex(), 1]],
            "beyond_cddl": True,
        },
    ]


# --- a log ----------------------------------------------------------------------------------------------------------


def machine_settings() -> MachineSettings:
    return MachineSettings(
        membership=MembershipSettings(
            me=ANNA,
            run_id=D1,
            settings=SETTINGS,
            contacts=(ContactPoint(id=B, control=BERT.control),),
            min_members=2,
            heartbeat_s=0.5,
            failure_timeout_s=10.0,
            ballot=BALLOT,
            tip=COMMIT,
        ),
        exchange=ExchangeSettings(me=A, chunk_count=3, fragments=2, straggler_timeout_s=30.0, fetch_timeout_s=60.0),
        checkpoint=CheckpointSettings(
            me=A,
            chunk_count=3,
            fragments=2,
            mean_bytes=3072,
            state_bytes=24576,
            snapshot_every=10,
            keep_snapshots=2,
            keep_rounds=20,
        ),
        training=TrainingSettings(me=A, inner_steps=500, rounds=10, overlaps=True, fragments=2),
    )


def actor_of(message: Message) -> ActorName:
    if isinstance(message, Own):
        return f"own/{message.actor}"
    if isinstance(message, LedgerMessage):
        return "checkpoint"
    return "exchange" if isinstance(message, RoundMessage) else "membership"


def log_events() -> list[tuple[ActorName, Event]]:
    """At least one event of every kind. They do not make a story: the log shows the form, and does not replay."""
    contribution = ChunkKey(kind="contribution", round=12, chunk=0)
    mean = ChunkKey(kind="mean", round=12, chunk=1, epoch=1, attempt=2)
    state = ChunkKey(kind="state", round=12, chunk=2)
    info = ChunkInfo(digest=D1)
    of_mean = ChunkInfo(digest=D2, contributors=bitmap([0, 1]), total_weight=98304)
    heard: list[tuple[ActorName, Event]] = [
        (
            actor_of(message),
            Heard(peer=B, message=message),
        )
        for name, message in control_cases()
        if name in {m.__struct_config__.tag for _, m in control_cases()} | {"refuse_diverged"}
    ]
    return [
        ("training", StateAt(round=12, digest=D1, chain=COMMIT.chain)),
        ("membership", Tick()),
        *heard,
        ("membership", DoorClosed(peer=C, address="tcp://192.0.2.3:7700")),
        ("membership", Offended(peer=C, plane="bulk", reason="a message without frames", times=3, shut_out=True)),
        ("checkpoint", RunAt(round=13, digest=D2)),
        ("exchange", ViewChanged(view=VIEW)),
        ("membership", Reached(peer=C, reachable=True)),
        ("membership", Reached(peer=C, reachable=False)),
        ("membership", BallotStored(seq=1)),
        ("membership", CommitReady(commit=COMMIT, view=7)),
        ("membership", Weighed(weights={B: 3, A: 1})),
        ("membership", Progress(inner_steps=500)),
        ("membership", Measured(figures=FIGURES)),
        ("membership", AskAgain()),
        ("own/tally", ViewChanged(view=VIEW)),
        ("own/tally", Told(body=b"\xa1\x64type\x65count")),
        ("checkpoint", FetchState()),
        ("training", Halt()),
        ("checkpoint", Halted()),
        ("checkpoint", Fetched(peer=B, key=state, info=info, size=1040)),
        ("checkpoint", ChunkImported(key=state)),
        ("checkpoint", FetchFailed(peer=B, key=state, fault="gone")),
        ("checkpoint", Imported(round=13, digest=D2)),
        ("checkpoint", LedgerAt()),
        (
            "checkpoint",
            LedgerAt(snapshots=(0, 10), means=(9, 10, 11), partials=(5,), pending=12, pending_digest=D2),
        ),
        ("checkpoint", RecordRead(peer=B, record=RECORD)),
        ("checkpoint", ManifestRead(peer=B, round=12, digest=D1, commit=COMMIT, differing=(0, 2))),
        ("checkpoint", ManifestRead(peer=B, round=0, digest=D1, commit=None, differing=())),
        ("checkpoint", RoundOpened(round=11, missing=(1, 2))),
        ("checkpoint", SnapshotOpened(round=10, missing=())),
        ("checkpoint", ChunkStored(key=state)),
        ("checkpoint", RoundStored(round=11)),
        ("checkpoint", SnapshotStored(round=10)),
        ("checkpoint", LedgerFailed(of="advance", round=11, damaged=True, text="chunk 2 is not what it was")),
        ("checkpoint", LedgerFailed(of="write_snapshot", round=12, damaged=False, text="no space left on device")),
        ("training", Begin(round=13)),
        ("training", StepsDone(steps=500, tokens=65536, seconds=12.75)),
        ("training", Captured(round=12)),
        ("training", Encoded(round=12, finite=True)),
        ("exchange", ContributionFixed(round=12, weight=65536)),
        ("exchange", ContributionFixed(round=12, weight=65536, rejected=1)),
        ("membership", FoundUnusable(peer=B, incarnation=1700000000123, round=12, times=1)),
        ("training", Rejected(times=1)),
        ("training", ContributionTaken(round=12)),
        ("exchange", Fetched(peer=B, key=contribution, info=info)),
        ("exchange", FetchFailed(peer=B, key=contribution, fault="late")),
        ("exchange", FetchFailed(peer=B, key=mean, fault="unreachable")),
        ("exchange", FetchFailed(peer=B, key=mean, fault="invalid")),
        ("exchange", Reduced(key=mean, info=of_mean)),
        ("exchange", Reduced(key=mean, info=of_mean, left_out=(C,))),
        ("exchange", MeansStored(round=12, epoch=1, attempt=2)),
        ("exchange", MeansStored(round=12, epoch=1, attempt=2, safe=False)),
        ("training", MeansCommitted(round=12, position=1, chain=D1)),
        ("training", MeansCommitted(round=12, position=-1, chain=D1)),
        ("training", Applied(round=13, digest=D2)),
        ("training", Merged(round=12)),
        ("training", Evaluated(loss=1.999)),
        ("training", Evaluated(loss=LOSS_NAN)),
        ("training", Restored()),
        ("training", Leave()),
        ("training", Leave(at_once=True)),
        ("training", Saved(path="/srv/prime/outer-state.safetensors")),
        ("membership", LetIn(peer=C, key=B, name="bert", invited=True)),
        ("membership", LetIn(peer=C, key=B, name="bert", invited=True, refusal="the invitation has expired")),
        ("checkpoint", FetchFile(digest=D1)),
        ("checkpoint", LeaveFile(digest=D1)),
        ("training", EvaluationStopped()),
    ]


def log_items() -> list[LogHeader | LogRecord]:
    counts: dict[str, int] = {}
    items: list[LogHeader | LogRecord] = [LogHeader(version=LOG_VERSION, node=A, machines=machine_settings())]
    for i, (actor, event) in enumerate(log_events()):
        seq = counts[actor] = counts.get(actor, -1) + 1
        now = 100.0 + i * 0.125 if i else 100.1
        items.append(LogRecord(actor=actor, seq=seq, now=now, event=event, effects=effects_digest([WakeAt(at=now)])))
    return items


def log_rejects() -> list[dict[str, Any]]:
    """Logs that are refused whole. ``after_header``: the header of every-event.cborseq stands before the bytes."""
    header, *records = log_items()
    first = records[0]
    step = msgspec.to_builtins(first, builtin_types=(bytes,))
    start = encode(header)
    cases = [
        ("not_cbor_at_all", "text", b"node 1 started\n"),
        ("empty", "no header", b""),
        ("no_header", "the first item is a step", encode(first)),
        ("version_2", "a later version", changed(header, version=2)),
        ("header_without_machines", "nothing to replay with", changed(header, machines="LEFT OUT")),
        ("two_headers", "a header in the middle", start + start),
        ("unknown_actor", "no such machine", start + changed(first, actor="weather")),
        ("unknown_event", "no such event", start + changed(first, event={"type": "rain"})),
        ("event_without_its_fields", "no round", start + changed(first, event={"type": "begin"})),
        (
            "unknown_message",
            "no such message",
            start + changed(first, event={"type": "heard", "peer": B, "message": {"t": "hi"}}),
        ),
        (
            "unknown_fault",
            "no such fault",
            start + changed(first, event=step["event"] | {"type": "fetch_failed", "fault": "rude"}),
        ),
        ("short_effects", "a digest of 15 bytes", start + changed(first, effects=bytes(15))),
        ("long_effects", "a digest of 32 bytes", start + changed(first, effects=bytes(32))),
        ("negative_seq", "calls count from 0", start + changed(first, seq=-1)),
        ("now_is_text", "seconds are a number", start + changed(first, now="noon")),
        ("no_event", "no event", start + changed(first, event="LEFT OUT")),
        ("garbage_in_the_middle", "a break code between two steps", start + b"\xff" + encode(first)),
    ]
    return [
        {"name": n, "reason": r, "after_header": b[: len(start)] == start, "cborseq_hex": b.removeprefix(start).hex()}
        for n, r, b in cases
    ]


# --- numbers --------------------------------------------------------------------------------------------------------


def f32(values: list[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(values, dtype="<f4")


def codec_inputs() -> list[tuple[str, CodecName, list[float]]]:
    ramp = [float(i - 128) / 8 for i in range(257)]
    return [
        ("empty", "int8", []),
        ("one", "int8", [0.5]),
        ("signs", "int8", [1.0, -1.0, 0.0, -0.0, 0.25]),
        ("ties_go_to_even", "int8", [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]),
        ("zeros", "int8", [0.0] * 5),
        ("two_blocks", "int8", [*ramp[:256], 3.0]),
        ("each_block_has_its_scale", "int8", [1000.0] * 256 + [0.001, -0.002]),
        ("scale_would_be_denormal", "int8", [1.4e-36, -1e-40, 0.0]),
        ("smallest_scale", "int8", [127 * 2.0**-126, 2.0**-126]),
        ("largest", "int8", [FP32_MAX, -FP32_MAX, 1.0]),
        *four_bit_inputs(ramp),
        ("empty", "fp16", []),
        ("range", "fp16", [1.0, -0.0, 0.1, 65504.0, 65519.0, -1e30, 6e-8, 2.9e-8, 1e-40]),
        ("empty", "fp32", []),
        ("as_they_are", "fp32", [1.0, -0.0, 0.1, 1e-40, FP32_MAX, -FP32_MAX]),
        *few_element_inputs(),
    ]


def four_bit_inputs(ramp: list[float]) -> list[tuple[str, CodecName, list[float]]]:
    signs, largest = [1.0, -1.0, 0.0, -0.0, 0.25], [FP32_MAX, -FP32_MAX, 1.0]
    return [
        ("empty", "int4", []),
        ("one", "int4", [0.5]),
        ("signs", "int4", signs),
        ("ties_go_to_even", "int4", [7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5]),
        ("zeros", "int4", [0.0] * 5),
        ("two_blocks", "int4", [*ramp[:256], 3.0]),
        ("smallest_scale", "int4", [7 * 2.0**-126, 2.0**-126, 2.0**-127]),
        ("scale_would_be_denormal", "int4", [8e-38, -1e-40]),
        ("largest", "int4", largest),
        ("empty", "e3m0", []),
        ("one", "e3m0", [0.5]),
        ("signs", "e3m0", signs),
        ("each_level", "e3m0", [sign * 2.0**-e for e in range(9) for sign in (1, -1)]),
        ("ties_go_away_from_zero", "e3m0", [1.0, 0.75, -0.375, 3 / 16, 1 / 128, -1 / 128, 0.0078]),
        ("two_blocks", "e3m0", [*ramp[:256], 3.0]),
        ("smallest_scale", "e3m0", [2.0**-120, 2.0**-126, -(2.0**-128)]),
        ("scale_too_small", "e3m0", [7e-37, -1e-40]),
        ("largest", "e3m0", largest),
    ]


def few_element_inputs() -> list[tuple[str, CodecName, list[float]]]:
    rising = [(-1.0) ** i * i for i in range(200)]
    few = [0.0] * 4096
    few[5], few[4095] = 1.0, -0.01
    return [
        ("empty", "topk", []),
        ("one", "topk", [-0.5]),
        ("two_levels", "topk", rising),
        ("largest", "topk", [FP32_MAX, -FP32_MAX, 1.0] * 64),
        ("first_of_equal_ones", "topk", [1.0] * 65 + [-1.0] * 64),
        ("one_of_two_is_zero", "topk", [0.0] * 64 + [3.0]),
        ("zeros", "topk", [0.0, -0.0] * 40),
        ("denormal", "topk", [1e-40] * 64 + [-(2.0**-126)]),
        ("two_blocks", "topk", [float((i * 2654435761) % 4099) - 2000 for i in range(4100)]),
        ("empty", "sparse", []),
        ("bitmap", "sparse", [0.0, 127.0, -3.0, 0.4]),
        ("positions_and_bitmap", "sparse", [*few, 2.0, 0.0, 0.001]),
        ("zeros", "sparse", [0.0, -0.0] * 4),
        ("scale_would_be_denormal", "sparse", [1.4e-36, 0.0]),
        ("largest", "sparse", [FP32_MAX, 0.0, -FP32_MAX]),
    ]


def codec_vectors() -> list[dict[str, Any]]:
    out = []
    for name, codec_name, values in codec_inputs():
        data = f32(values)
        payload, decoded = encoded(codec_name, data), np.zeros_like(data)
        make_codec(codec_name).decode(as_tensor(memoryview(payload)), torch.from_numpy(decoded))
        out.append(
            {
                "name": f"{codec_name}_{name}",
                "codec": codec_name,
                "elements": len(values),
                "input_f32le_hex": data.tobytes().hex(),
                "payload_hex": payload.hex(),
                "decoded_f32le_hex": decoded.tobytes().hex(),
            }
        )
    return out


def encoded(name: CodecName, data: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    codec = make_codec(name)
    out = torch.zeros(codec.payload_bytes(len(data)), dtype=torch.uint8)
    size = codec.encode(torch.from_numpy(data), out, torch.zeros(len(data)))
    return bytes(as_bytes(out[:size]))


def mean_vectors() -> list[dict[str, Any]]:
    a, b, c = [1.0, -2.0, 3.0, 0.0], [0.5, 0.25, -8.0, 1e-3], [0.1, 0.2, 0.3, 0.4]
    cases: list[tuple[str, CodecName, list[list[float] | bytes], list[int]]] = [
        ("two", "int8", [a, b], [65536, 32768]),
        ("three_uneven", "int8", [a, b, c], [3, 1, 7]),
        ("one_alone", "int8", [b], [5]),
        ("no_weight_at_all", "int8", [a, b], [0, 0]),
        ("one_not_valid", "int8", [a, b"\xff" * 8, c], [3, 1, 7]),
        ("none", "int8", [], []),
        ("weights_that_fp32_cannot_hold", "int8", [a, b], [2**60 + 1, 2**53 + 1]),
        ("two", "int4", [a, b], [65536, 32768]),
        ("one_not_valid", "int4", [a, b"\xff" * 5, c], [3, 1, 7]),
        ("three_uneven", "e3m0", [a, b, c], [3, 1, 7]),
        ("three_uneven", "fp16", [a, b, c], [3, 1, 7]),
        ("two", "fp32", [a, b], [2, 1]),
        ("in_one_order", "fp32", [[1e8] * 4, [1.0] * 4, [-1e8] * 4], [1, 1, 1]),
        ("in_another_order", "fp32", [[1e8] * 4, [-1e8] * 4, [1.0] * 4], [1, 1, 1]),
        ("beyond_the_largest", "fp32", [[FP32_MAX] * 4, [FP32_MAX] * 4, [FP32_MAX] * 4], [1, 1, 1]),
    ]
    return [mean_vector(*case) for case in cases] + [
        mean_vector(f"{reduce}_{name}", codec_name, inputs, weights, reduce, trim)
        for name, codec_name, inputs, weights, reduce, trim in [*other_mean_cases(a, b, c), *topk_mean_cases()]
    ]


def topk_mean_cases() -> list[tuple[str, CodecName, list[list[float] | bytes], list[int], ReducerName, int]]:
    spread = [[float((i * step) % 257) - 128 for i in range(200)] for step in (3, 5, 11)]
    return [
        ("union", "topk", [*spread], [3, 1, 7], "mean", 1),
        ("union", "topk", [*spread], [3, 1, 7], "rda", 1),
        ("one_not_valid", "topk", [spread[0], b"\xff" * 15, spread[2]], [3, 1, 7], "mean", 1),
        ("none", "topk", [], [], "mean", 1),
    ]


def other_mean_cases(
    a: list[float], b: list[float], c: list[float]
) -> list[tuple[str, CodecName, list[list[float] | bytes], list[int], ReducerName, int]]:
    minus_three_a, zero, huge = [-3 * x for x in a], [0.0] * 4, [FP32_MAX] * 4
    half_turned = [FP32_MAX, -FP32_MAX, -FP32_MAX, -FP32_MAX]
    tiny = [2.0**-149, 0.0, 0.0, 2.0**-149]
    return [
        ("three_uneven", "fp32", [a, b, c], [3, 1, 7], "rda", 1),
        ("three_uneven", "int8", [a, b, c], [3, 1, 7], "rda", 1),
        ("one_not_valid", "int8", [a, b"\xff" * 8, c], [3, 1, 7], "rda", 1),
        ("of_five_elements", "fp32", [[0.1, 0.2, 0.3, 0.4, 0.5], [9.0, 1e-3, 7.0, 5.0, -1.0]], [1, 1], "rda", 1),
        ("with_zeros", "fp32", [a, zero], [1, 1], "rda", 1),
        ("zeros_alone", "fp32", [zero, zero], [1, 1], "rda", 1),
        ("opposite_ways", "fp32", [b, [-x for x in b]], [1, 1], "rda", 1),
        ("opposite_but_for_rounding", "fp32", [a, minus_three_a], [1, 1], "rda", 1),
        ("large_and_tiny", "fp32", [huge, tiny], [1, 1], "rda", 1),
        ("beyond_the_largest", "fp32", [huge, half_turned], [1, 1], "rda", 1),
        ("no_weight_at_all", "fp32", [a, b], [0, 0], "rda", 1),
        ("four", "fp32", [a, b, c, huge], [1, 2, 3, 4], "trimmed_mean", 1),
        ("five", "fp32", [a, b, c, huge, half_turned], [1, 2, 3, 4, 5], "trimmed_mean", 1),
        ("more_than_there_are", "fp32", [a, b, c, huge, half_turned], [1, 2, 3, 4, 5], "trimmed_mean", 7),
        ("two", "int8", [a, b], [3, 1], "trimmed_mean", 1),
        ("three", "fp32", [a, b, c], [1, 1, 1], "median", 1),
        ("four", "fp32", [a, b, c, huge], [1, 2, 3, 4], "median", 1),
        ("one_without_weight", "fp32", [a, b, c, huge], [1, 2, 3, 0], "median", 1),
        ("zeros_of_both_signs", "fp32", [[0.0, -0.0, -1.0, 1.0], [-0.0, -0.0, -0.0, -0.0]], [1, 1], "median", 1),
    ]


def mean_vector(
    name: str,
    codec_name: CodecName,
    inputs: list[list[float] | bytes],
    weights: list[int],
    reduce: ReducerName = "mean",
    trim: int = 1,
) -> dict[str, Any]:
    """``reduce`` and ``trim`` stand in it where they say something."""
    payloads = [x if isinstance(x, bytes) else encoded(codec_name, f32(x)) for x in inputs]
    codec, n = make_codec(codec_name), next((len(x) for x in inputs if isinstance(x, list)), 4)
    means = make_codec("sparse" if codec_name == "topk" else codec_name)
    mean = torch.zeros(means.payload_bytes(n), dtype=torch.uint8)
    scratch = torch.zeros(n), torch.zeros(n)
    tensors = [as_tensor(memoryview(p)) for p in payloads]
    made = weighted_mean(codec, tensors, weights, mean, scratch, means, make_reducer(reduce, trim))
    return {
        "name": f"{codec_name}_{name}",
        "codec": codec_name,
        **({} if means.name == codec_name else {"mean_codec": means.name}),
        **({} if reduce == "mean" else {"reduce": reduce, "trim": trim}),
        "elements": n,
        "payloads_hex": [p.hex() for p in payloads],
        "weights": weights,
        "left_out": made.left_out,
        "mean_hex": bytes(as_bytes(mean[: made.size])).hex(),
    }


def payload_rejects() -> list[dict[str, Any]]:
    def scales(*values: float) -> bytes:
        return f32(list(values)).tobytes()

    nan, inf = float("nan"), float("inf")
    cases: list[tuple[str, CodecName, int, bytes, str]] = [
        ("too_short", "int8", 2, scales(1.0) + b"\x01", "5 bytes instead of 6"),
        ("too_long", "int8", 2, scales(1.0) + b"\x01\x02\x03", "7 bytes instead of 6"),
        ("value_minus_128", "int8", 2, scales(1.0) + b"\x80\x00", "values go from -127 to 127"),
        ("scale_nan", "int8", 1, scales(nan) + b"\x01", "a scale is not a number"),
        ("scale_infinite", "int8", 1, scales(inf) + b"\x00", "a scale is infinite"),
        ("scale_negative", "int8", 1, scales(-1.0) + b"\x01", "a scale is negative"),
        ("scale_denormal", "int8", 1, scales(2.0**-127) + b"\x01", "processors differ on denormals"),
        ("scale_too_large", "int8", 1, scales(2.68e36) + b"\x01", "127 times it is infinite"),
        ("second_scale_nan", "int8", 257, scales(1.0, nan) + bytes(257), "a scale is not a number"),
        ("too_long", "int4", 2, scales(1.0) + b"\x11\x01", "6 bytes instead of 5"),
        ("code_8_low", "int4", 2, scales(1.0) + b"\x18", "a code is 8"),
        ("code_8_high", "int4", 2, scales(1.0) + b"\x81", "a code is 8"),
        ("second_code_of_an_odd_end", "int4", 1, scales(1.0) + b"\x11", "the number of elements is odd"),
        ("scale_too_large", "int4", 1, scales(5e37) + b"\x01", "seven times it is infinite"),
        ("code_8", "e3m0", 2, scales(1.0) + b"\x18", "a code is 8"),
        ("scale_too_small", "e3m0", 1, scales(2.0**-121) + b"\x01", "a 64th of it is denormal"),
        ("infinite", "fp16", 1, b"\x00\x7c", "an element is infinite"),
        ("nan", "fp16", 1, b"\x01\x7e", "an element is not a number"),
        ("too_short", "fp32", 2, scales(1.0), "4 bytes instead of 8"),
        ("nan", "fp32", 2, scales(1.0, nan), "an element is not a number"),
        ("infinite", "fp32", 2, scales(-inf, 1.0), "an element is infinite"),
        *few_element_rejects(),
    ]
    return [
        {"name": f"{c}_{n}", "codec": c, "elements": e, "payload_hex": p.hex(), "reason": r} for n, c, e, p, r in cases
    ]


def few_element_rejects() -> list[tuple[str, CodecName, int, bytes, str]]:
    def two(low: float, high: float) -> bytes:
        return f32([low, high]).tobytes()

    one = f32([1.0]).tobytes()
    return [
        ("too_short", "topk", 1, two(0, 1) + b"\0\0", "10 bytes instead of 11"),
        ("nan", "topk", 1, two(0, float("nan")) + b"\0\0\1", "a magnitude is not a number"),
        ("denormal", "topk", 1, two(0, 1e-40) + b"\0\0\1", "a magnitude is denormal"),
        ("low_above_high", "topk", 65, two(2, 1) + b"\0\x10\0\4", "low is not below high"),
        ("low_is_not_used", "topk", 65, two(1, 2) + b"\0\x10\0\5", "low must be 0"),
        ("not_ascending", "topk", 65, two(1, 2) + b"\1\0\0\4", "positions do not ascend"),
        ("position_twice", "topk", 65, two(1, 2) + b"\1\x10\0\4", "positions do not ascend"),
        ("beyond_the_block", "topk", 65, two(1, 2) + b"\0\x10\4\4", "position 65 of 65"),
        ("half_byte", "topk", 1, two(0, 1) + b"\0\x10\1", "something is behind the last position"),
        ("code_too_many", "topk", 1, two(0, 1) + b"\0\0\5", "something is behind the last code"),
        ("zero_with_a_sign", "topk", 65, two(0, 2) + b"\0\x10\0\6", "the zero has a sign"),
        ("zero_elsewhere", "topk", 65, two(0, 2) + b"\1\x20\0\4", "element 0 is the zero to keep"),
        ("too_short", "sparse", 1, one, "no counts"),
        ("too_long", "sparse", 1, one + b"\1\0\1\x7f\0", "9 bytes instead of 8"),
        ("count_too_large", "sparse", 1, one + b"\2\0\1\x7f\x7f", "2 elements of 1"),
        ("scale_without_elements", "sparse", 1, one + b"\0\0", "the scale must be 0"),
        ("elements_without_scale", "sparse", 1, bytes(4) + b"\1\0\1\x7f", "the scale must not be 0"),
        ("bitmap_beyond_the_end", "sparse", 1, one + b"\1\0\2\x7f", "element 1 of 1"),
        ("bitmap_of_another_count", "sparse", 2, one + b"\1\0\3\x7f", "2 elements instead of 1"),
        ("value_zero", "sparse", 2, one + b"\2\0\3\x7f\0", "what is zero is left out"),
        ("value_minus_128", "sparse", 1, one + b"\1\0\1\x80", "values go from -127 to 127"),
        ("largest_is_not_127", "sparse", 1, one + b"\1\0\1\x7e", "the scale is larger than needed"),
        ("not_ascending", "sparse", 64, one + b"\2\0\1\0\0\x7f\x7f", "positions do not ascend"),
    ]


def value_rejects() -> list[dict[str, Any]]:
    """Vectors that cannot be encoded."""
    out = []
    cases: list[tuple[CodecName, float]] = [
        ("int8", float("nan")),
        ("int8", float("-inf")),
        ("int4", float("nan")),
        ("e3m0", float("inf")),
        ("fp16", float("nan")),
        ("fp32", float("inf")),
        ("topk", float("nan")),
        ("sparse", float("-inf")),
    ]
    for codec_name, bad in cases:
        data = f32([1.0, bad])
        try:
            encoded(codec_name, data)
        except NonFiniteError:
            out.append({"codec": codec_name, "input_f32le_hex": data.tobytes().hex()})
    return out


def digest_vectors() -> dict[str, Any]:
    chain, chains = FIRST_CHAIN, []
    for state, digest in ((D0, D1), (D1, D2), (D1, D0)):
        following = next_chain(chain, state, digest)
        chains.append(
            {
                "previous_hex": chain.hex(),
                "state_hex": state.hex(),
                "digest_hex": digest.hex(),
                "chain_hex": following.hex(),
            }
        )
        chain = following
    payloads = [b"", b"\x00", bytes(range(251)) * 5]
    means = [blake3(p).digest() for p in payloads]
    return {
        "chunk_digest": [{"payload_hex": p.hex(), "digest_hex": blake3(p).hexdigest()} for p in payloads],
        "means_digest": [
            {"chunk_digests_hex": [d.hex() for d in some], "digest_hex": blake3(b"".join(some)).hexdigest()}
            for some in (means[:1], means, means[::-1])
        ],
        "commit_chain": chains,
        "outer_state": [state_vector(0, 2), state_vector(3, 2), state_vector(2**40, 5)],
        "run_id": [
            {"settings": s, "cbor_hex": encode(s).hex(), "run_id_hex": blake3(encode(s)).hexdigest()}
            for s in ({}, SETTINGS)
        ],
        "effects_digest": [
            {"effects_cbor_hex": encode(e).hex(), "digest_hex": effects_digest(e).hex()} for e in ([], [WakeAt(at=1.5)])
        ],
        "chunk_owners": owner_vectors(),
        "view_digest": [
            {"view_cbor_hex": encode(v).hex(), "digest_hex": blake3(encode(v)).hexdigest()} for v in (FOUNDED, VIEW)
        ],
        "view_after": change_vectors(),
        "quorum": quorum_vectors(),
        "file": file_vectors(),
    }


def file_vectors() -> list[dict[str, Any]]:
    """Bytes, their manifest, the digest that names them, and the number that finds the manifest."""
    vectors = []
    for data in (b"", b"x", bytes(range(250)) * 10):
        chunks = b"".join(blake3(data[at : at + 1024]).digest() for at in range(0, len(data), 1024))
        manifest = encode(FileManifest(size=len(data), chunk_bytes=1024, chunks=chunks))
        digest = blake3(manifest).digest()
        vectors.append(
            {
                "payload_hex": data.hex(),
                "chunk_bytes": 1024,
                "manifest_cbor_hex": manifest.hex(),
                "digest_hex": digest.hex(),
                "number": file_number(digest),
            }
        )
    return vectors


def state_vector(round: int, chunk_elements: int) -> dict[str, Any]:
    theta, momentum = f32([1.0, -2.0, 0.5, 1e-3, 8.0]), f32([0.0, 0.25, -0.125, 1e-9, -1.0])
    state = OuterState(torch.zeros(5), chunk_elements, OuterSettings())
    spans = [state.chunks.span(c) for c in range(state.chunks.count)]
    exports = [theta[s].tobytes() + momentum[s].tobytes() for s in spans]
    for chunk, data in enumerate(exports):
        state.import_chunk(chunk, memoryview(data))
    digest = state.end_import(round)
    return {
        "round": round,
        "chunk_elements": chunk_elements,
        "theta_f32le_hex": theta.tobytes().hex(),
        "momentum_f32le_hex": momentum.tobytes().hex(),
        "chunks_hex": [e.hex() for e in exports],
        "chunk_digests_hex": [blake3(e).hexdigest() for e in exports],
        "state_digest_hex": digest.hex(),
    }


def owner_vectors() -> list[dict[str, Any]]:
    yes = {"active": True, "reachable": True}
    inactive, behind_nat = yes | {"active": False}, yes | {"reachable": False}
    first: list[tuple[int, int, list[int]]] = [(1, 0, [])]
    cases: list[tuple[list[tuple[str, int, dict[str, bool]]], list[tuple[int, int, list[int]]]]] = [
        ([("a", 1, yes), ("b", 1, yes), ("c", 1, yes)], first),
        ([("a", 3, yes), ("b", 1, yes)], first),
        ([("a", 5, yes), ("b", 1, yes), ("c", 1, yes)], first),
        ([("a", 1, inactive), ("b", 2, yes), ("c", 1, yes)], first),
        ([("a", 0, yes), ("b", 0, yes)], first),
        ([("a", 0, yes), ("b", 2, yes)], first),
        ([("a", 4, behind_nat), ("b", 1, yes), ("c", 1, yes)], first),
        ([("a", 1, behind_nat), ("b", 1, inactive)], first),
        ([(A, 1, yes), (B, 1, yes), (C, 2, yes)], [*first, (1, 1, [2])]),
        ([(A, 1, yes), (B, 1, yes), (C, 2, yes)], [*first, (1, 1, [2]), (2, 0, [0])]),
        ([(A, 1, yes), (B, 1, yes), (C, 2, yes)], [*first, (2, 3, [0, 2])]),
        ([(A, 1, yes), (B, 0, yes), (C, 1, behind_nat)], [*first, (1, 1, [0])]),
        ([(A, 1, yes), (B, 1, yes)], [*first, (1, 1, [0, 1])]),
    ]
    out = []
    for members, turns in cases:
        view = View(
            lineage=D0,
            epoch=1,
            number=1,
            previous=D0,
            leader="a",
            members=tuple(
                Member(id=i, name=i, incarnation=1, control="", bulk="", weight=w, **can) for i, w, can in members
            ),
        )
        taken = tuple(Turn(epoch=e, attempt=a, lost=bitmap(lost)) for e, a, lost in turns)
        out.append(
            {
                "members": [{"id": i, "weight": w, **can} for i, w, can in members],
                "chunk_count": 9,
                "turns": [{"epoch": t.epoch, "attempt": t.attempt, "lost": list(positions(t.lost))} for t in taken],
                "owners": [
                    {"owner": at.owner, "epoch": at.epoch, "attempt": at.attempt} for at in assign(view, 9, taken)
                ],
            }
        )
    return out


def change_vectors() -> list[dict[str, Any]]:
    """A view, a change, and the view that it makes; ``None`` for a change that does not fit."""
    three = apply_change(VIEW, Change(epoch=1, leader=B, members=(CARL,)))
    older = msgspec.structs.replace(ANNA, active=True, voter=True, reachable=True)
    cases = [
        (FOUNDED, JOINING),
        (VIEW, Change(epoch=2, leader=A)),
        (three, Change(epoch=2, leader=C, gone=bitmap([0]), commit=msgspec.structs.replace(COMMIT, round=12))),
        (three, Change(epoch=1, leader=B, members=(older,))),
        (three, Change(epoch=1, leader=B, gone=bitmap([1]), members=(older,))),
        (three, Change(epoch=1, leader=B, gone=bitmap([0, 2]), members=(BARE, older, FULL))),
        (FOUNDED, Change(epoch=1, leader=B, gone=bitmap([1]))),
    ]
    return [{"before": value_of(v), "change": value_of(c), "after": value_of(after(v, c))} for v, c in cases]


def after(view: View, change: Change) -> View | None:
    try:
        return apply_change(view, change)
    except ValueError:
        return None


def quorum_vectors() -> list[dict[str, Any]]:
    cases: list[tuple[list[str], str, list[str]]] = [
        (["a"], "a", ["a"]),
        (["a"], "a", []),
        (["a", "b"], "a", ["a"]),
        (["a", "b"], "a", ["b"]),
        (["a", "b", "c"], "a", ["b", "c"]),
        (["a", "b", "c"], "a", ["a"]),
        (["a", "b", "c", "d"], "a", ["a", "d"]),
        (["a", "b", "c", "d"], "a", ["b", "c"]),
        (["b", "c"], "a", ["a", "b"]),
        (["b", "c"], "a", ["b", "c"]),
        ([], "a", ["a"]),
    ]
    out = []
    for voters, leader, agreed in cases:
        members = tuple(
            Member(id=i, name=i, incarnation=1, control="", bulk="", voter=i in voters) for i in ("a", "b", "c", "d")
        )
        view = View(lineage=D0, epoch=1, number=1, previous=D0, leader=leader, members=members)
        out.append({"voters": voters, "leader": leader, "agreed": agreed, "quorum": is_quorum(view, agreed)})
    return out


def ballot_vectors() -> list[dict[str, Any]]:
    """Ballot files."""
    least = Ballot(incarnations=())
    decided = Ballot(incarnations=(MOST,), promised=MOST, promised_to=A, accepted=MOST, view=FULL_VIEW, decided=True)
    out = []
    for name, ballot in (("two_views", BALLOT), ("least", least), ("decided", decided)):
        stored = StoredBallot(run_id=D1, ballot=ballot, digest=blake3(encode(ballot)).digest())
        out.append({"name": name, "cbor_hex": encode(stored).hex(), "value": value_of(stored)})
    return out


def ledger_vectors() -> list[dict[str, Any]]:
    """Files of means: whole, what is in the slots, and the items behind them."""
    three = [bytes([chunk]) for chunk in range(3)]  # of which RECORD is
    uneven = [b"\x01\x02\x03\x04", b"\x05\x06\x07\x08", b"\x09"]
    of_all = (Included(chunks=3, contributors=bitmap([0, 8]), total_weight=MOST),)
    of_nobody = (Included(chunks=1, contributors=b"", total_weight=0),)
    cases: list[tuple[str, int, list[bytes], list[int], tuple[Included, ...], Commit | None]] = [
        ("settled", COMMIT.round, three, [1] * 3, RECORD.included, COMMIT),
        ("not_settled", COMMIT.round, three, [1] * 3, RECORD.included, None),
        ("slots_of_two_sizes", 0, uneven, [4, 4, 1], of_all, None),
        ("shorter_than_their_slots", 0, [b"", *uneven[1:]], [6, 6, 2], of_all, None),
        ("one_chunk", MOST, [bytes(range(9))], [9], of_nobody, None),
    ]
    out = []
    for name, round, payloads, most, included, commit in cases:
        sizes = [SIZE_BYTES + size for size in most]
        filled = [len(p).to_bytes(SIZE_BYTES, "little") + p for p in payloads]
        contents = Contents(
            format=FORMAT,
            run_id=D1,
            round=round,
            slots=slots(sizes),
            means=b"".join(blake3(p).digest() for p in payloads),
            included=included,
        )
        values: list[Contents | Settled] = [contents]
        if commit is not None:
            values.append(Settled(contents=blake3(encode(contents)).digest(), commit=commit, previous=FIRST_CHAIN))
        header = encode_means_header(MeansHeader(D1, sum(sizes)))
        room = [slot.ljust(size, b"\0") for slot, size in zip(filled, sizes, strict=True)]
        out.append(
            {
                "name": name,
                "file_hex": b"".join([header, *room, *map(encode_item, values)]).hex(),
                "payloads_hex": [p.hex() for p in payloads],
                "items": [{"cbor_hex": encode(v).hex(), "value": value_of(v)} for v in values],
            }
        )
    return out


# --- files ----------------------------------------------------------------------------------------------------------


def diagnostic(value: Any) -> Any:
    """A value as JSON: bytes are {"hex": "00ff"}, numbers that JSON has not are {"float": "nan"}."""
    match value:
        case bytes():
            return {"hex": value.hex()}
        case float() if value != value or value in (float("inf"), float("-inf")):
            return {"float": repr(value)}
        case dict():
            return {k: diagnostic(v) for k, v in value.items()}
        case list() | tuple():
            return [diagnostic(v) for v in value]
        case _:
            return value


def value_of(message: Any) -> Any:
    return diagnostic(msgspec.to_builtins(message, builtin_types=(bytes,)))


def message_vectors(plane: str, cases: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    out = [
        {"name": n, "kind": m.__struct_config__.tag, "cbor_hex": encode(m).hex(), "value": value_of(m)}
        for n, m in cases
    ]
    for name, of, message, fields, read in tolerated_cases():
        if of == plane:
            out.append(
                {
                    "name": name,
                    "kind": message.__struct_config__.tag,
                    "cbor_hex": changed(message, **fields).hex(),
                    "value": value_of(read),
                    "decode_only": True,
                }
            )
    return out


def reject_vectors(plane: str, cases: list[tuple[str, str, bytes, bool]]) -> list[dict[str, Any]]:
    short = [
        {"name": n, "plane": plane, "reason": r, "cbor_hex": b.hex(), "beyond_cddl": beyond}
        for n, r, b, beyond in cases
    ]
    return short + [case for case in long_rejects() if case["plane"] == plane]


def files() -> dict[str, bytes]:
    items = log_items()
    documents = {
        "vectors/control.json": message_vectors("control", control_cases()),
        "vectors/bulk.json": message_vectors("bulk", bulk_cases()),
        "vectors/records.json": message_vectors("records", ledger_payload_cases()),
        "vectors/every-event.json": [{"cbor_hex": encode(i).hex(), "value": value_of(i)} for i in items],
        "vectors/ballot.json": ballot_vectors(),
        "vectors/ledger.json": ledger_vectors(),
        "vectors/codec.json": codec_vectors(),
        "vectors/mean.json": mean_vectors(),
        "vectors/digests.json": digest_vectors(),
        "rejected/control.json": reject_vectors("control", control_rejects()),
        "rejected/bulk.json": reject_vectors("bulk", bulk_rejects()),
        "rejected/records.json": reject_vectors("records", ledger_payload_rejects()),
        "rejected/log.json": log_rejects(),
        "rejected/payloads.json": payload_rejects(),
        "rejected/values.json": value_rejects(),
    }
    texts = {n: (json.dumps(d, indent=1, ensure_ascii=False) + "\n").encode() for n, d in documents.items()}
    return texts | {"vectors/every-event.cborseq": b"".join(encode(i) for i in items)}


def additions_only(old: bytes, new: bytes) -> bool:
    """Whether every vector of a JSON file ``old`` is, unchanged, in ``new``."""
    try:
        before, after = json.loads(old), json.loads(new)
    except ValueError:
        return False
    if isinstance(before, dict):
        return all(all(v in after.get(k, []) for v in values) for k, values in before.items())
    return all(v in after for v in before)


def main(force: bool) -> int:
    wrong = []
    for name, data in files().items():
        path = V1 / name
        old = path.read_bytes() if path.exists() else None
        if old == data:
            continue
        if old is not None and not force and not additions_only(old, data):
            wrong.append(name)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        print(f"{name}: written")
    for name in wrong:
        print(f"{name}: existing vectors would change; left as it is. Mend the code, or read --help")
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--force"]):
        print(__doc__)
        sys.exit(2)
    sys.exit(main(force="--force" in sys.argv))
