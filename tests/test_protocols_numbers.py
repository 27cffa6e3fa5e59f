"""The numbers of ``protocols/v1/vectors``: payloads, means, digests, views, ballots, and who owns a chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cbor2
import msgspec
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings

from prime_async.config.schema import OuterSettings, RunSpec
from prime_async.config.spec import flatten, run_id
from prime_async.errors import ConfigError, NonFiniteError, StorageError
from prime_async.ledger import BallotFile, StoredBallot
from prime_async.ledger.contents import BytesContent, manifest_digest, read_manifest
from prime_async.log import effects_digest
from prime_async.machines.ballot import Ballot, apply_change, is_quorum, view_digest
from prime_async.machines.owners import assign
from prime_async.machines.vocabulary import ActorName, Effect, Event, Send, Tell, ViewChanged, WakeAt
from prime_async.messages import (
    FIRST_CHAIN,
    Change,
    Commit,
    Have,
    Member,
    Record,
    Turn,
    View,
    bitmap,
    decode,
    encode,
    file_number,
    next_chain,
    state_digest,
)
from prime_async.testing import SimNode, Simulation
from prime_async.work.codec import as_bytes, as_tensor, make_codec
from prime_async.work.outer import OuterState
from prime_async.work.reduce import weighted_mean
from prime_async.work.reducers import make_reducer
from tests.protocols_harness import bytes_of, from_diagnostic, load, validate, values

CODEC: list[dict[str, Any]] = load("vectors/codec.json")
MEANS: list[dict[str, Any]] = load("vectors/mean.json")
DIGESTS: dict[str, list[dict[str, Any]]] = load("vectors/digests.json")
BALLOTS: list[dict[str, Any]] = load("vectors/ballot.json")
BAD_PAYLOADS: list[dict[str, Any]] = load("rejected/payloads.json")
BAD_VALUES: list[dict[str, Any]] = load("rejected/values.json")


def raw(digits: str) -> torch.Tensor:
    """uint8."""
    return as_tensor(memoryview(bytes.fromhex(digits))).clone()


def floats(digits: str) -> torch.Tensor:
    """fp32, of little-endian bytes."""
    data = raw(digits)
    return data.view(torch.float32) if data.numel() else torch.empty(0)


def hexadecimal(tensor: torch.Tensor) -> str:
    return bytes(as_bytes(tensor)).hex()


def by_name(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[c["name"] for c in cases])


@by_name(CODEC)
def test_elements_encode_to_the_golden_payload(case: dict[str, Any]) -> None:
    codec, values = make_codec(case["codec"]), floats(case["input_f32le_hex"])
    out = torch.full((codec.payload_bytes(case["elements"]),), 0xAA, dtype=torch.uint8)

    size = codec.encode(values, out, torch.empty_like(values))

    assert hexadecimal(out[:size]) == case["payload_hex"]


@by_name(CODEC)
def test_a_golden_payload_decodes_to_its_elements(case: dict[str, Any]) -> None:
    codec, out = make_codec(case["codec"]), torch.full((case["elements"],), torch.nan)

    assert codec.check(raw(case["payload_hex"]), case["elements"]) is None
    codec.decode(raw(case["payload_hex"]), out)

    assert hexadecimal(out) == case["decoded_f32le_hex"]


@by_name(MEANS)
def test_contributions_reduce_to_the_golden_mean(case: dict[str, Any]) -> None:
    codec, means, n = make_codec(case["codec"]), make_codec(case.get("mean_codec", case["codec"])), case["elements"]
    out = torch.full((means.payload_bytes(n),), 0xAA, dtype=torch.uint8)
    scratch = (torch.full((n,), torch.nan), torch.full((n,), torch.nan))

    reducer = make_reducer(case.get("reduce", "mean"), case.get("trim", 1))
    payloads = [raw(p) for p in case["payloads_hex"]]
    made = weighted_mean(codec, payloads, case["weights"], out, scratch, means, reducer)

    assert (hexadecimal(out[: made.size]), made.left_out) == (case["mean_hex"], case["left_out"])


@by_name(BAD_PAYLOADS)
def test_a_rejected_payload_does_not_pass_the_check(case: dict[str, Any]) -> None:
    assert make_codec(case["codec"]).check(raw(case["payload_hex"]), case["elements"]) is not None


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_that_are_not_finite_cannot_be_encoded(case: dict[str, Any]) -> None:
    codec, values = make_codec(case["codec"]), floats(case["input_f32le_hex"])
    out = torch.empty(codec.payload_bytes(values.numel()), dtype=torch.uint8)

    with pytest.raises(NonFiniteError):
        codec.encode(values, out, torch.empty_like(values))


@pytest.mark.parametrize("case", DIGESTS["outer_state"], ids=lambda c: f"round {c['round']}")
def test_the_outer_state_has_the_golden_chunks_and_digests(case: dict[str, Any]) -> None:
    theta, momentum = floats(case["theta_f32le_hex"]), floats(case["momentum_f32le_hex"])
    state = OuterState(torch.zeros_like(theta), case["chunk_elements"], OuterSettings())

    for chunk, data in enumerate(case["chunks_hex"]):
        span = state.chunks.span(chunk)
        assert data == hexadecimal(theta[span]) + hexadecimal(momentum[span])
        state.import_chunk(chunk, memoryview(bytes.fromhex(data)))

    assert state.end_import(case["round"]).hex() == case["state_digest_hex"]
    assert state.chunk_digests.hex() == "".join(case["chunk_digests_hex"])
    assert [state.export_chunk(c).hex() for c in range(state.chunks.count)] == case["chunks_hex"]
    whole = case["round"].to_bytes(8, "little") + state.chunk_digests
    assert blake3(whole).hexdigest() == case["state_digest_hex"]
    assert state_digest(case["round"], state.chunk_digests).hex() == case["state_digest_hex"]


def test_the_chain_of_commits_is_the_golden_one() -> None:
    chain = FIRST_CHAIN
    for case in DIGESTS["commit_chain"]:
        assert chain.hex() == case["previous_hex"]
        state, digest = bytes.fromhex(case["state_hex"]), bytes.fromhex(case["digest_hex"])
        assert blake3(chain + state + digest).hexdigest() == case["chain_hex"]
        chain = next_chain(chain, state, digest)
        assert chain.hex() == case["chain_hex"]


def test_a_golden_record_proves_itself_with_the_chain() -> None:
    (record,) = [decode(bytes_of(v), Record) for v in load("vectors/records.json") if v["name"] == "record"]

    assert blake3(record.means).digest() == record.commit.digest
    assert next_chain(record.previous, record.commit.state, record.commit.digest) == record.commit.chain
    assert sum(run.chunks for run in record.included) == len(record.means) // 32


def test_digests_of_chunks_and_of_all_means_are_the_golden_ones() -> None:
    for case in DIGESTS["chunk_digest"]:
        assert blake3(bytes.fromhex(case["payload_hex"])).hexdigest() == case["digest_hex"]
    for case in DIGESTS["means_digest"]:
        assert blake3(bytes.fromhex("".join(case["chunk_digests_hex"]))).hexdigest() == case["digest_hex"]


def test_members_report_and_commit_the_digest_of_all_means_in_chunk_order() -> None:
    simulation = Simulation(3, seed=5)
    means: dict[tuple[int, int, int, int], str] = {}
    said: list[Have] = []
    commits: dict[int, Commit] = {}

    def look(node: SimNode, _actor: ActorName, _: Event, effects: list[Effect]) -> None:
        for key, info in node.chunks.items():
            if key.kind == "mean":
                means.setdefault((key.round, key.epoch, key.attempt, key.chunk), info.digest.hex())
        for effect in effects:
            match effect:
                case Send(message=Have() as have):
                    said.append(have)
                case Tell(event=ViewChanged(view=View(commit=Commit() as commit))):
                    assert commits.setdefault(commit.round, commit) == commit

    simulation.observers.append(look)
    simulation.run_for(20.0)

    assert len({s.round for s in said}) > 2
    assert len(commits) > 2
    messages: list[Have | Commit] = [*said, *commits.values()]
    for message in messages:
        number = message.round, message.epoch, message.attempt
        joined = "".join(means[*number, c] for c in range(simulation.settings.chunk_count))
        assert blake3(bytes.fromhex(joined)).digest() == message.digest
    chain = FIRST_CHAIN
    for _, commit in sorted(commits.items()):
        chain = next_chain(chain, commit.state, commit.digest)
        assert commit.chain == chain


@pytest.mark.parametrize("case", DIGESTS["run_id"], ids=lambda c: f"{len(c['settings'])} settings")
def test_a_run_id_is_the_digest_of_the_settings(case: dict[str, Any]) -> None:
    assert encode(case["settings"]).hex() == case["cbor_hex"]
    assert blake3(bytes.fromhex(case["cbor_hex"])).hexdigest() == case["run_id_hex"]


def test_the_run_id_of_a_run_is_made_in_this_way() -> None:
    spec = RunSpec(name="a-run")

    assert run_id(spec) == blake3(encode(flatten(spec))).digest()


def test_the_digest_of_effects_is_the_golden_one() -> None:
    effects: list[list[Effect]] = [[], [WakeAt(at=1.5)]]
    for listed, case in zip(effects, DIGESTS["effects_digest"], strict=True):
        assert encode(listed).hex() == case["effects_cbor_hex"]
        assert effects_digest(listed).hex() == case["digest_hex"]


@pytest.mark.parametrize("case", DIGESTS["chunk_owners"], ids=range(len(DIGESTS["chunk_owners"])))
def test_chunks_have_the_golden_owners(case: dict[str, Any]) -> None:
    members = tuple(Member(name="", incarnation=1, control="", bulk="", **m) for m in case["members"])
    turns = [Turn(epoch=t["epoch"], attempt=t["attempt"], lost=bitmap(t["lost"])) for t in case["turns"]]

    owners = assign(view_of(members, members[0].id), case["chunk_count"], turns)

    assert [at._asdict() for at in owners] == case["owners"]


def view_of(members: tuple[Member, ...], leader: str) -> View:
    return View(lineage=bytes(32), epoch=1, number=1, previous=bytes(32), leader=leader, members=members)


def test_the_digest_of_a_view_is_the_golden_one_and_names_it_in_the_next() -> None:
    previous = bytes(32)
    for case in DIGESTS["view_digest"]:
        data = bytes.fromhex(case["view_cbor_hex"])
        view: View = decode(data, View)

        assert blake3(data).digest() == view_digest(view) == bytes.fromhex(case["digest_hex"])
        assert view.previous == previous
        previous = view_digest(view)


@pytest.mark.parametrize("case", DIGESTS["file"], ids=lambda c: f"{len(c['payload_hex']) // 2} bytes")
def test_the_name_and_number_of_a_file_are_the_golden_ones(case: dict[str, Any]) -> None:
    content = BytesContent(bytes.fromhex(case["payload_hex"]), case["chunk_bytes"])
    data, digest = bytes.fromhex(case["manifest_cbor_hex"]), bytes.fromhex(case["digest_hex"])

    assert encode(content.manifest) == data
    assert manifest_digest(content.manifest) == digest
    assert read_manifest(data, digest, case["chunk_bytes"]) == content.manifest
    assert file_number(digest) == case["number"]


@pytest.mark.parametrize("case", DIGESTS["view_after"], ids=range(len(DIGESTS["view_after"])))
def test_a_change_makes_the_golden_view(case: dict[str, Any]) -> None:
    before = msgspec.convert(from_diagnostic(case["before"]), View, builtin_types=(bytes,))
    change = msgspec.convert(from_diagnostic(case["change"]), Change, builtin_types=(bytes,))
    after = msgspec.convert(from_diagnostic(case["after"]), View | None, builtin_types=(bytes,))

    if after is None:
        with pytest.raises(ValueError, match="not in the view"):
            apply_change(before, change)
    else:
        assert apply_change(before, change) == after


@pytest.mark.parametrize("case", DIGESTS["quorum"], ids=range(len(DIGESTS["quorum"])))
def test_those_who_agree_are_a_quorum_exactly_if_they_are_golden(case: dict[str, Any]) -> None:
    ids = dict.fromkeys([*case["voters"], case["leader"], *case["agreed"]])
    members = tuple(Member(id=i, name="", incarnation=1, control="", bulk="", voter=i in case["voters"]) for i in ids)

    assert is_quorum(view_of(members, case["leader"]), case["agreed"]) == case["quorum"]


@by_name(BALLOTS)
def test_a_golden_ballot_file_is_what_the_code_writes_and_the_schema_describes(
    case: dict[str, Any], tmp_path: Path
) -> None:
    data = bytes.fromhex(case["cbor_hex"])
    stored = msgspec.convert(from_diagnostic(case["value"]), StoredBallot, builtin_types=(bytes,))
    file = BallotFile(tmp_path, stored.run_id)

    file.save(stored.ballot)

    assert file.path.read_bytes() == data == encode(stored)
    assert file.load() == stored.ballot
    assert blake3(encode(stored.ballot)).digest() == stored.digest
    assert validate("ballot", data, closed=True) is None


@settings(deadline=None, derandomize=True, max_examples=40)
@given(values(Ballot))
def test_any_ballot_file_is_what_the_schema_describes(ballot: Ballot) -> None:
    stored = StoredBallot(run_id=bytes(32), ballot=ballot, digest=bytes(32))

    assert validate("ballot", encode(stored), closed=True) is None


@pytest.mark.parametrize("wrong", [{"t": "ballast"}, {"run_id": 0}, {"run_id": b"\0"}, {"ballot": {}}, {"digest": ""}])
def test_a_wrong_field_in_a_ballot_file_fits_neither_the_schema_nor_the_code(
    wrong: dict[str, Any], tmp_path: Path
) -> None:
    tree = cbor2.loads(bytes.fromhex(BALLOTS[0]["cbor_hex"])) | wrong
    file = BallotFile(tmp_path, bytes(range(32)))
    file.path.write_bytes(cbor2.dumps(tree, canonical=True))

    with pytest.raises((StorageError, ConfigError)):
        file.load()
    assert validate("ballot", file.path.read_bytes()) is not None
