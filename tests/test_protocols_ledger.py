"""Files of means and ``protocols/v1/ledger.cddl``: golden ones, and what neither the schema nor the code takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cbor2
import msgspec
import pytest
from blake3 import blake3
from hypothesis import given, settings
from msgspec.structs import replace

from prime_async.ledger import MeansFiles
from prime_async.ledger.means_format import FORMAT, MAX_ITEM_BYTES, Contents, Settled, slot_sizes
from prime_async.messages import ChunkInfo, decode, encode, next_chain
from tests.protocols_harness import KINDS, choices, from_diagnostic, load, rule_of, structs, tag, validate, values

CASES: list[dict[str, Any]] = load("vectors/ledger.json")
WHOLE = CASES[0]
HEADER_BYTES = 92
PREFIX_BYTES = 36

derandomized = settings(deadline=None, derandomize=True, max_examples=40)
each_case = pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])


def contents_of(case: dict[str, Any]) -> Contents:
    contents: Contents = msgspec.convert(from_diagnostic(case["items"][0]["value"]), Contents, builtin_types=(bytes,))
    return contents


def infos_of(contents: Contents) -> list[ChunkInfo]:
    digests = [contents.means[i : i + 32] for i in range(0, len(contents.means), 32)]
    who = [run for run in contents.included for _ in range(run.chunks)]
    return [
        ChunkInfo(digest=d, contributors=run.contributors, total_weight=run.total_weight)
        for d, run in zip(digests, who, strict=True)
    ]


def means_of(case: dict[str, Any], directory: Path) -> MeansFiles:
    contents = contents_of(case)
    return MeansFiles(directory, contents.run_id, [size - 4 for size in slot_sizes(contents.slots)])


def payloads_of(case: dict[str, Any]) -> list[bytes]:
    return [bytes.fromhex(digits) for digits in case["payloads_hex"]]


def test_every_item_has_a_rule_and_a_golden_vector_and_every_rule_an_item() -> None:
    tags = [tag(kind) for kind in structs(KINDS["ledger"])]

    assert sorted(choices("ledger", "ledger-item")) == sorted(map(rule_of, tags))
    assert {item["value"]["t"] for case in CASES for item in case["items"]} == set(tags)


@each_case
def test_a_golden_file_is_what_the_code_writes(case: dict[str, Any], tmp_path: Path) -> None:
    contents, means = contents_of(case), means_of(case, tmp_path)

    for chunk, payload in enumerate(payloads_of(case)):
        means.put(contents.round, chunk, payload)
    means.close(contents.round, infos_of(contents))
    for item in case["items"][1:]:
        settled = msgspec.convert(from_diagnostic(item["value"]), Settled, builtin_types=(bytes,))
        means.commit(contents.round, settled.commit, settled.previous)

    assert means.path(contents.round).read_bytes().hex() == case["file_hex"]


@each_case
def test_a_golden_file_is_a_header_slots_and_items_without_gaps(case: dict[str, Any]) -> None:
    data, contents = bytes.fromhex(case["file_hex"]), contents_of(case)
    slots = b"".join(
        (len(payload).to_bytes(4, "little") + payload).ljust(size, b"\0")
        for payload, size in zip(payloads_of(case), slot_sizes(contents.slots), strict=True)
    )
    header = data[:HEADER_BYTES]

    assert header[:60] == b"prime-async means 1\n" + contents.run_id + len(slots).to_bytes(8, "little")
    assert header[60:] == blake3(header[:60]).digest()
    assert data[HEADER_BYTES:].startswith(slots)
    at = HEADER_BYTES + len(slots)
    for item in case["items"]:
        payload = bytes.fromhex(item["cbor_hex"])
        assert data[at : at + PREFIX_BYTES] == len(payload).to_bytes(4, "little") + blake3(payload).digest()
        assert data[at + PREFIX_BYTES :].startswith(payload)
        at += PREFIX_BYTES + len(payload)
    assert at == len(data)


@each_case
def test_a_golden_file_reads_as_its_description(case: dict[str, Any], tmp_path: Path) -> None:
    contents, means = contents_of(case), means_of(case, tmp_path)
    means.path(contents.round).parent.mkdir()
    means.path(contents.round).write_bytes(bytes.fromhex(case["file_hex"]))

    stored = means.stored(contents.round)

    assert stored is not None
    assert list(stored.infos) == infos_of(contents)
    assert (stored.commit is None) == (len(case["items"]) == 1)
    for chunk, payload in enumerate(payloads_of(case)):
        assert bytes(means.read(contents.round, chunk).payload) == payload
    record = means.record(contents.round)
    if record is not None:
        assert record.means == b"".join(blake3(p).digest() for p in payloads_of(case))
        assert blake3(record.means).digest() == record.commit.digest
        assert next_chain(record.previous, record.commit.state, record.commit.digest) == record.commit.chain


@each_case
def test_the_items_of_a_golden_file_are_what_the_schema_describes(case: dict[str, Any]) -> None:
    for item in case["items"]:
        data = bytes.fromhex(item["cbor_hex"])
        value = decode(data, KINDS["ledger"], limit=MAX_ITEM_BYTES)

        assert cbor2.loads(encode(value)) == from_diagnostic(item["value"])
        assert encode(value) == data
        assert validate("ledger", data, closed=True) is None


def test_the_second_item_names_the_first() -> None:
    first, second = WHOLE["items"]

    assert from_diagnostic(second["value"])["contents"] == blake3(bytes.fromhex(first["cbor_hex"])).digest()


@derandomized
@given(values(Contents))
def test_any_contents_are_what_the_schema_describes(contents: Contents) -> None:
    assert validate("ledger", encode(replace(contents, format=FORMAT)), closed=True) is None


@derandomized
@given(values(Settled))
def test_any_commit_that_is_settled_is_what_the_schema_describes(settled: Settled) -> None:
    assert validate("ledger", encode(settled), closed=True) is None


WRONG: list[tuple[int, dict[str, Any]]] = [
    (0, {"t": "mean"}),
    (0, {"format": 2}),
    (0, {"run_id": bytes(31)}),
    (0, {"round": -1}),
    (0, {"slots": [{"chunks": 1}]}),
    (0, {"slots": [{"chunks": -1, "size": 4}]}),
    (0, {"means": "00"}),
    (0, {"included": [{"chunks": 1, "contributors": bytes(8193), "total_weight": 1}]}),
    (1, {"t": "settle"}),
    (1, {"contents": b""}),
    (1, {"commit": None}),
    (1, {"previous": bytes(33)}),
]


@pytest.mark.parametrize(("number", "wrong"), WRONG, ids=[f"{n}-{w}"[:60] for n, w in WRONG])
def test_a_wrong_field_in_an_item_fits_neither_the_schema_nor_the_code(
    number: int, wrong: dict[str, Any], tmp_path: Path
) -> None:
    items = [bytes.fromhex(item["cbor_hex"]) for item in WHOLE["items"]]
    items[number] = cbor2.dumps(cbor2.loads(items[number]) | wrong, canonical=True)

    assert validate("ledger", items[number]) is not None
    assert reads_as_much_as(items, number, tmp_path)


@pytest.mark.parametrize("number", [0, 1])
def test_an_item_without_one_of_its_fields_fits_neither_the_schema_nor_the_code(number: int, tmp_path: Path) -> None:
    """Without its tag it does fit the code, which knows by the place which item it is."""
    whole = [bytes.fromhex(item["cbor_hex"]) for item in WHOLE["items"]]
    for name in cbor2.loads(whole[number]):
        items = list(whole)
        items[number] = cbor2.dumps({k: v for k, v in cbor2.loads(whole[number]).items() if k != name}, canonical=True)

        assert validate("ledger", items[number]) is not None, name
        assert name == "t" or reads_as_much_as(items, number, tmp_path), name


def reads_as_much_as(items: list[bytes], count: int, directory: Path) -> bool:
    """Whether the code takes ``count`` of the items of a file, and no more."""
    contents, means = contents_of(WHOLE), means_of(WHOLE, directory)
    framed = b"".join(len(item).to_bytes(4, "little") + blake3(item).digest() + item for item in items)
    start = HEADER_BYTES + sum(slot_sizes(contents.slots))
    means.path(contents.round).parent.mkdir(exist_ok=True)
    means.path(contents.round).write_bytes(bytes.fromhex(WHOLE["file_hex"])[:start] + framed)
    stored = means.stored(contents.round)
    return count == (0 if stored is None else 1 if stored.commit is None else 2)


def test_unknown_fields_in_an_item_are_ignored(tmp_path: Path) -> None:
    contents, settled = (cbor2.loads(bytes.fromhex(item["cbor_hex"])) for item in WHOLE["items"])
    first = cbor2.dumps(contents | {"later": [1]}, canonical=True)
    second = cbor2.dumps(settled | {"contents": blake3(first).digest(), "z": None}, canonical=True)

    assert validate("ledger", first) is validate("ledger", second) is None
    assert reads_as_much_as([first, second], 2, tmp_path)
