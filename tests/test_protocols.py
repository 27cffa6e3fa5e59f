"""``protocols/v1`` and the code hold each other to what crosses the wire: schemas, golden vectors, rejected bytes."""

from __future__ import annotations

from typing import Any

import cbor2
import msgspec
import msgspec.inspect as mi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_async.errors import ProtocolError
from prime_async.messages import (
    MAX_CONTROL_BYTES,
    MAX_HEADER_BYTES,
    Change,
    ChunkInfo,
    ChunkKey,
    Commit,
    HeldMean,
    Included,
    Member,
    Plan,
    Rate,
    Refuse,
    Stretch,
    Turn,
    View,
    decode,
    encode,
)
from prime_async.transport.bulk import MAX_WAIT_S
from tests.protocols_harness import (
    ALL,
    KINDS,
    MOST,
    ROOTS,
    PlaneName,
    bytes_of,
    choices,
    from_diagnostic,
    load,
    rule_of,
    structs,
    tag,
    validate,
    values,
)

LIMITS: dict[PlaneName, int] = {
    "control": MAX_CONTROL_BYTES,
    "bulk": MAX_HEADER_BYTES,
    "records": MAX_CONTROL_BYTES,  # there is none but that of payloads, which is the run's
}
PARTS = (Member, View, Commit, Change, Turn, Plan, HeldMean, Rate, ChunkKey, ChunkInfo, Included, Stretch)
"""What messages are made of, beside plain values."""

VECTORS: list[tuple[PlaneName, dict[str, Any]]] = [
    *(("control", v) for v in load("vectors/control.json")),
    *(("bulk", v) for v in load("vectors/bulk.json")),
    *(("records", v) for v in load("vectors/records.json")),
]
REJECTED: list[tuple[PlaneName, dict[str, Any]]] = [
    *(("control", v) for v in load("rejected/control.json")),
    *(("bulk", v) for v in load("rejected/bulk.json")),
    *(("records", v) for v in load("rejected/records.json")),
]

each_message = pytest.mark.parametrize(("plane", "kind"), ALL, ids=[tag(kind) for _, kind in ALL])
each_vector = pytest.mark.parametrize(("plane", "vector"), VECTORS, ids=[v["name"] for _, v in VECTORS])
each_rejected = pytest.mark.parametrize(("plane", "case"), REJECTED, ids=[f"{p}-{c['name']}" for p, c in REJECTED])
quick = settings(max_examples=40, deadline=None, derandomize=True)


def tree_of(data: bytes) -> dict[str, Any]:
    tree = cbor2.loads(data)
    assert isinstance(tree, dict)
    return tree


def fields_of(kind: type) -> tuple[mi.Field, ...]:
    info = mi.type_info(kind)
    assert isinstance(info, mi.StructType)
    return info.fields


def example_of(plane: PlaneName, kind: type) -> dict[str, Any]:
    """The map of the first golden vector of this kind."""
    return tree_of(next(bytes_of(v) for p, v in VECTORS if p == plane and v["kind"] == tag(kind)))


def is_rejected(plane: PlaneName, tree: dict[str, Any]) -> tuple[bool, bool]:
    """By (the code, the schema)."""
    data = cbor2.dumps(tree, canonical=True)
    try:
        decode(data, KINDS[plane], limit=LIMITS[plane])
        refused = False
    except ProtocolError:
        refused = True
    return refused, validate(plane, data) is not None


# --- nothing is left out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plane", "union"), list(ROOTS.items())[:3])
def test_every_message_has_a_rule_and_every_rule_a_message(plane: PlaneName, union: str) -> None:
    assert sorted(choices(plane, union)) == sorted(rule_of(tag(kind)) for kind in structs(KINDS[plane]))


@each_message
def test_every_message_has_golden_vectors(plane: PlaneName, kind: type) -> None:
    assert [v for p, v in VECTORS if p == plane and v["kind"] == tag(kind)]


def test_every_reason_for_a_refusal_has_a_golden_vector() -> None:
    reasons = {v["value"]["reason"] for _, v in VECTORS if v["kind"] == "refuse"}

    assert reasons == set(next(f.type for f in fields_of(Refuse) if f.name == "reason").values)  # type: ignore[attr-defined]


def test_every_vector_and_every_rejected_case_has_a_name_of_its_own() -> None:
    for cases in (VECTORS, REJECTED):
        names = [(plane, case["name"]) for plane, case in cases]
        assert len(names) == len(set(names))


# --- code to schema -------------------------------------------------------------------------------------------------


@each_message
def test_what_the_code_encodes_is_what_the_schema_describes_field_by_field(plane: PlaneName, kind: type) -> None:
    @quick
    @given(values(kind))
    def holds(message: Any) -> None:
        data = encode(message)

        assert validate(plane, data, closed=True) is None
        assert decode(data, KINDS[plane], limit=LIMITS[plane]) == message

    holds()


@each_message
def test_unknown_fields_are_ignored_by_the_code_and_allowed_by_the_schema(plane: PlaneName, kind: type) -> None:
    leaf = st.one_of(st.none(), st.booleans(), st.integers(-MOST, MOST), st.floats(), st.text("xyé"), st.binary())
    anything = st.recursive(leaf, lambda x: st.lists(x) | st.dictionaries(st.text("ab", max_size=3), x), max_leaves=8)

    @quick
    @given(values(kind), st.dictionaries(st.sampled_from(["z", "zz", "a_later_field"]), anything, min_size=1))
    def holds(message: Any, unknown: dict[str, Any]) -> None:
        data = cbor2.dumps(tree_of(encode(message)) | unknown, canonical=True)

        assert decode(data, KINDS[plane], limit=LIMITS[plane]) == message
        assert validate(plane, data) is None

    holds()


def test_unknown_fields_are_ignored_inside_a_message_too() -> None:
    empty = View(lineage=bytes(32), epoch=1, number=1, previous=bytes(32), leader="a", members=())
    view = tree_of(encode(empty))
    member = {"id": "a", "name": "", "incarnation": 1, "control": "", "bulk": "", "later": [1]}
    view |= {"members": [member], "since": 3}
    data = cbor2.dumps({"t": "view", "epoch": 1, "decided": True, "view": view}, canonical=True)

    (read,) = decode(data, KINDS["control"]).view.members

    assert read == Member(id="a", name="", incarnation=1, control="", bulk="")
    assert validate("control", data) is None


@each_message
def test_a_field_may_be_left_out_exactly_if_it_has_a_default(plane: PlaneName, kind: type) -> None:
    example = example_of(plane, kind)
    for field in fields_of(kind):
        without = {k: v for k, v in example.items() if k != field.name}

        assert is_rejected(plane, without) == (field.required, field.required), field.name


@pytest.mark.parametrize("part", PARTS)
def test_a_field_inside_may_be_left_out_exactly_if_it_has_a_default(part: type) -> None:
    for field in fields_of(part):
        for plane, tree, place in places_of(part):
            removed = place.pop(field.name)

            assert is_rejected(plane, tree) == (field.required, field.required), field.name

            place[field.name] = removed


def places_of(part: type) -> list[tuple[PlaneName, dict[str, Any], dict[str, Any]]]:
    """(plane, a message as a map, the map in it that is such a part)."""
    info = mi.type_info(part)
    assert isinstance(info, mi.StructType)
    names = {f.name for f in info.fields} | ({"t"} if info.tag else set())
    found: list[tuple[PlaneName, dict[str, Any], dict[str, Any]]] = []
    for plane, vector in VECTORS:
        if vector.get("decode_only"):
            continue
        tree = tree_of(bytes_of(vector))
        found += [(plane, tree, inside) for inside in maps_inside(tree) if set(inside) == names]
    assert found
    return found[:4]


def maps_inside(value: Any) -> list[dict[str, Any]]:
    """All maps in a map or an array, at any depth, without itself."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [m for v in inner for m in ([v] if isinstance(v, dict) else []) + maps_inside(v)]


WRONG: dict[type, list[Any]] = {
    mi.IntType: ["1", b"1", True, 1.0, float("nan"), None, [1], {}, -1, MOST + 1],
    mi.BoolType: ["true", 1, 0, None, b"", []],
    mi.StrType: [1, b"text", None, True, ["a"], {}],
    mi.BytesType: ["0" * 32, 1, None, [0] * 32, {}],
    mi.LiteralType: ["", "another", 1, None, True, []],  # and bytes, on which pycddl panics
    mi.DictType: [[], "", None, {"a": 1}, {"a": b"b"}, {"a": None}],
    mi.VarTupleType: [{}, "", b"", None, 0, [True], [[]], [None]],
    mi.StructType: [[], "", b"", None, 1, {}],
    mi.UnionType: [[], "", b"", True, 1, {}],  # a struct or null
}


@each_message
def test_values_of_another_type_are_rejected_by_the_code_and_by_the_schema(plane: PlaneName, kind: type) -> None:
    example = example_of(plane, kind)
    for field in fields_of(kind):
        for wrong in WRONG[type(field.type)]:
            assert is_rejected(plane, example | {field.name: wrong}) == (True, True), (field.name, wrong)


@pytest.mark.parametrize("part", PARTS)
def test_values_of_another_type_inside_are_rejected_by_the_code_and_by_the_schema(part: type) -> None:
    for field in fields_of(part):
        plane, tree, place = places_of(part)[0]
        for wrong in WRONG[type(field.type)]:
            place[field.name] = wrong

            assert is_rejected(plane, tree) == (True, True), (field.name, wrong)


@pytest.mark.parametrize("part", PARTS)
def test_null_stands_inside_exactly_for_what_there_may_be_none_of(part: type) -> None:
    for field in fields_of(part):
        optional = isinstance(field.type, mi.UnionType) and field.type.includes_none
        for plane, tree, place in places_of(part):
            there, place[field.name] = place[field.name], None

            assert is_rejected(plane, tree) == (not optional, not optional), field.name

            place[field.name] = there


@each_message
def test_what_is_a_little_out_of_bounds_is_rejected(plane: PlaneName, kind: type) -> None:
    example = example_of(plane, kind)
    for field in fields_of(kind):
        for wrong in just_outside(field.type):
            refused, against_schema = is_rejected(plane, example | {field.name: wrong})

            assert refused, (field.name, wrong)
            # CDDL counts the bytes of a text and the code its characters.
            assert against_schema or isinstance(wrong, str), (field.name, wrong)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_a_little_out_of_bounds_inside_is_rejected(part: type) -> None:
    for field in fields_of(part):
        plane, tree, place = places_of(part)[0]
        for wrong in just_outside(field.type):
            place[field.name] = wrong
            refused, against_schema = is_rejected(plane, tree)

            assert refused, (field.name, wrong)
            assert against_schema or isinstance(wrong, str), (field.name, wrong)


def just_outside(kind: mi.Type) -> list[Any]:
    match kind:
        case mi.IntType(ge=int(low), le=int(high)):
            return [low - 1, high + 1]
        case mi.StrType(max_length=int(high)):
            return ["x" * (high + 1), "é" * (high + 1)]
        case mi.BytesType(min_length=low, max_length=int(high)):
            return [bytes(high + 1), *([bytes(low - 1)] if low else [])]
        case mi.DictType(max_length=int(high)):
            return [{str(i): "" for i in range(high + 1)}]
        case mi.VarTupleType(item_type=mi.IntType(), max_length=int(high)):
            return [[0] * (high + 1)]
        case mi.VarTupleType(item_type=mi.StructType(cls=part), min_length=low, max_length=int(high)):
            one = least_of(part)
            return [[one] * (high + 1), *([[one] * (low - 1)] if low else [])]
        case mi.VarTupleType(item_type=mi.StrType(), max_length=int(high)):
            return [[""] * (high + 1)]
        case _:
            return []


def least_of(part: type) -> dict[str, Any]:
    """The shortest map of such a part that a golden vector has, without what may be left out."""
    _, _, place = min(places_of(part), key=lambda p: len(cbor2.dumps(p[2])))
    return {f.name: place[f.name] for f in fields_of(part) if f.required}


# --- vectors --------------------------------------------------------------------------------------------------------


@each_vector
def test_a_golden_vector_decodes_to_its_value(plane: PlaneName, vector: dict[str, Any]) -> None:
    message = decode(bytes_of(vector), KINDS[plane], limit=LIMITS[plane])

    assert tree_of(encode(message)) == from_diagnostic(vector["value"])
    assert tag(type(message)) == vector["kind"]


@each_vector
def test_a_value_encodes_to_the_bytes_of_its_golden_vector(plane: PlaneName, vector: dict[str, Any]) -> None:
    message = msgspec.convert(from_diagnostic(vector["value"]), KINDS[plane], builtin_types=(bytes,))

    assert (encode(message) == bytes_of(vector)) is not vector.get("decode_only", False)


@each_vector
def test_a_golden_vector_is_what_the_schema_describes(plane: PlaneName, vector: dict[str, Any]) -> None:
    assert validate(plane, bytes_of(vector), closed=not vector.get("decode_only", False)) is None


# --- rejected -------------------------------------------------------------------------------------------------------


@each_rejected
def test_rejected_bytes_are_a_protocol_error(plane: PlaneName, case: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        decode(bytes_of(case), KINDS[plane], limit=LIMITS[plane])


@each_rejected
def test_rejected_bytes_do_not_fit_the_schema_unless_marked_as_beyond_it(
    plane: PlaneName, case: dict[str, Any]
) -> None:
    assert (validate(plane, bytes_of(case)) is None) == case["beyond_cddl"]


def test_rejected_sizes_are_one_too_many() -> None:
    sizes = {case["name"]: len(bytes_of(case)) for _, case in REJECTED}

    assert sizes["too_large"] == MAX_CONTROL_BYTES + 1
    assert sizes["header_too_large"] == MAX_HEADER_BYTES + 1


def test_a_get_may_ask_for_a_longer_wait_than_a_server_grants() -> None:
    (wait,) = [f.type for f in fields_of(structs(KINDS["bulk"])[0]) if f.name == "wait_ms"]

    assert isinstance(wait, mi.IntType)
    assert wait.le is not None
    assert wait.le >= MAX_WAIT_S * 1000
