"""What the tests of ``protocols/`` share: the files, CDDL validation, and strategies made from the message types."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import cbor2
import msgspec.inspect as mi
from hypothesis import strategies as st
from pycddl import Schema, ValidationError

from prime_async.ledger.means_format import Contents, Settled
from prime_async.machines.vocabulary import Event
from prime_async.messages import DIGEST_BYTES, BulkHeader, FileManifest, Manifest, Message, Record

V1: Final = Path(__file__).parent.parent / "protocols" / "v1"
MOST: Final = 2**63 - 1

PlaneName: TypeAlias = Literal["control", "bulk", "records", "log", "ballot", "ledger"]

FILES: Final[dict[PlaneName, tuple[str, ...]]] = {
    "control": ("control.cddl", "common.cddl"),
    "bulk": ("bulk.cddl", "common.cddl"),
    "records": ("records.cddl", "common.cddl"),
    "log": ("log.cddl", "control.cddl", "records.cddl", "common.cddl"),
    "ballot": ("ballot.cddl", "common.cddl"),
    "ledger": ("ledger.cddl", "common.cddl"),
}
KINDS: Final[dict[PlaneName, Any]] = {
    "control": Message,
    "bulk": BulkHeader,
    "records": Manifest | Record | FileManifest,
    "ledger": Contents | Settled,
}
ROOTS: Final[dict[PlaneName, str]] = {
    "control": "control-message",
    "bulk": "bulk-header",
    "records": "ledger-payload",
    "log": "log-item",
    "ledger": "ledger-item",
}
RULES: Final = {
    "view": "view-update",
    "log": "log-header",
    "step": "log-step",
    "means": "means-contents",
    "settled": "means-settled",
}
"""Tags whose rule is not called as they are."""
NULLABLE: Final = re.compile(r'\? "([a-z_]+)": ([a-z-]+) / null')
"""A field that may be missing, or null, which is the same."""
VALID: Final[dict[str, dict[str, Any]]] = {
    "commit": {
        "round": 0,
        "epoch": 0,
        "attempt": 0,
        "state": bytes(32),
        "digest": bytes(32),
        "chain": bytes(32),
        "view": 0,
    },
    "change": {"epoch": 0, "leader": "a"},
    "exchange-settings": {"me": "a", "chunk_count": 0},
    "checkpoint-settings": {"me": "a", "chunk_count": 0},
    "training-settings": {"me": "a", "inner_steps": 0},
    "sharing-settings": {"me": "a"},
    "view": {
        "lineage": bytes(32),
        "epoch": 0,
        "number": 0,
        "previous": bytes(32),
        "leader": "a",
        "members": [],
    },
    "plan": {
        "t": "plan",
        "round": 0,
        "epoch": 0,
        "attempt": 0,
        "view": 0,
        "contributors": b"",
        "weights": [],
        "turns": [{"epoch": 0, "attempt": 0}],
    },
    "figures": {"phase": ""},
    "ballot": {"incarnations": []},
}
"""Something for each rule that may be null in its place."""
FUTURE: Final = "future = ( * tstr => any )"


def structs(union: Any) -> list[type]:
    """The types of a union of structs."""
    return list(get_args(union))


def tag(struct: type) -> str:
    """The tag by which a message or event is told from others."""
    info = mi.type_info(struct)
    assert isinstance(info, mi.StructType)
    assert isinstance(info.tag, str)
    return info.tag


def load(name: str) -> Any:
    """A JSON file of ``protocols/v1``."""
    return json.loads((V1 / name).read_text(encoding="utf-8"))


def from_diagnostic(value: Any) -> Any:
    """What a vector's JSON stands for."""
    match value:
        case {"hex": str(digits), **rest} if not rest:
            return bytes.fromhex(digits)
        case {"float": str(number), **rest} if not rest:
            return float(number)
        case dict():
            return {k: from_diagnostic(v) for k, v in value.items()}
        case list():
            return [from_diagnostic(v) for v in value]
        case _:
            return value


def bytes_of(case: dict[str, Any]) -> bytes:
    """The bytes of a case, written out or in parts that repeat."""
    if "parts" in case:
        return b"".join(bytes.fromhex(digits) * times for digits, times in case["parts"])
    return bytes.fromhex(case["cbor_hex"])


# --- CDDL -----------------------------------------------------------------------------------------------------------


@cache
def cddl(plane: PlaneName) -> str:
    """The schema of a plane: its files, joined."""
    return "\n".join((V1 / name).read_text(encoding="utf-8") for name in FILES[plane])


def choices(plane: PlaneName, rule: str) -> list[str]:
    """The names of the rules that ``rule`` is a choice of."""
    found = re.search(rf"^{rule} = ([^;]*?)\n\n", cddl(plane), re.MULTILINE)
    assert found is not None
    return [name.strip() for name in found.group(1).split("/")]


def rule_of(name: str) -> str:
    """The rule of the message, event or log item with this tag."""
    return RULES.get(name, name.replace("_", "-"))


def validate(plane: PlaneName, data: bytes, *, closed: bool = False) -> str | None:
    """Why ``data`` is not what the schema says, or None. ``closed``: no fields are allowed that the schema lacks.

    pycddl 0.6.4 carries state from one alternative of a choice of maps into the next, and then fails on valid data
    (or panics). So each choice is narrowed to the rule that the data's own tag names; to any one if there is none of
    that name. It also panics where a literal is wanted and the field is missing or no text: none of our rules lets
    that pass.

    In a map that may also be null it lets too much pass. So data must fit the schema as it is, and also, with
    something valid in the place of nulls, the schema that has none.
    """
    try:
        narrowed = _narrowed(plane, data)
        _schema(plane, narrowed, closed).validate_cbor(data)
        _schema(plane, narrowed, closed, null=False).validate_cbor(_without_nulls(plane, data))
    except _NoTagError as error:
        return str(error)
    except ValidationError as error:
        return str(error)
    return None


class _NoTagError(Exception):
    """A map that should be one of a choice does not say which."""


@cache
def _schema(plane: PlaneName, narrowed: tuple[tuple[str, str], ...], closed: bool, *, null: bool = True) -> Any:
    text = cddl(plane)
    if not null:
        text = NULLABLE.sub(r'? "\1": \2', text)
    for rule, choice in narrowed:
        text, count = re.subn(rf"^{rule} = [^;]*?\n\n", f"{rule} = {choice}\n\n", text, count=1, flags=re.MULTILINE)
        assert count == 1
    # For pycddl "tstr .size n" lets bytes and integers pass, "bstr .size n" text, and a range of integers bytes.
    text = re.sub(r"(?<=[=:] )([0-9]+\.\.[0-9]+)", r"(\1) .and int", text)
    text = re.sub(r"\b(tstr|bstr) \.size (\([0-9.]+\)|[0-9]+)", r"(\1 .size \2) .and \1", text)
    if closed:
        assert FUTURE in text
        text = text.replace(FUTURE, "future = ()")
    return Schema(text)


def _without_nulls(plane: PlaneName, data: bytes) -> bytes:
    """The same item with something valid in the place of each null that may be one."""
    rules = dict(NULLABLE.findall(cddl(plane)))

    def fill(value: Any) -> Any:
        match value:
            case dict():
                return {k: VALID[rules[k]] if v is None and k in rules else fill(v) for k, v in value.items()}
            case list():
                return [fill(v) for v in value]
            case _:
                return value

    item = cbor2.loads(data)
    try:
        filled = fill(item)
    except RecursionError:  # a reference to itself, which is beyond a schema
        return data
    return data if filled == item else cbor2.dumps(filled, canonical=True)


def _narrowed(plane: PlaneName, data: bytes) -> tuple[tuple[str, str], ...]:
    try:
        item = cbor2.loads(data)
    except (cbor2.CBORDecodeError, ValueError):
        item = 0
    if plane == "ballot":
        return ()  # there is but one rule
    root = ROOTS[plane]
    event = item.get("event") if isinstance(item, dict) else None
    message = event.get("message") if isinstance(event, dict) else None
    wanted = [(root, item, "t"), ("event", event, "type"), ("control-message", message, "t")]
    return tuple(
        (rule, _choice(plane, rule, value, tag_field)) for rule, value, tag_field in wanted if value is not None
    )


def _choice(plane: PlaneName, rule: str, value: Any, tag_field: str) -> str:
    names = choices(plane, rule)
    if not isinstance(value, dict):
        return names[0]
    name = value.get(tag_field)
    if not isinstance(name, str):
        raise _NoTagError(f"a map without the text {tag_field!r}")
    return rule_of(name) if rule_of(name) in names else names[0]


# --- strategies -----------------------------------------------------------------------------------------------------

TEXT: Final = st.characters(exclude_categories=["Cs"])
"""Characters without surrogates, which UTF-8 has not."""


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type with all its bounds, as often as not at one of them.

    The types of events have no bounds, since a node makes them itself: there, numbers are counts (or -1, in
    ``position`` and ``pending``), texts are ids, and bytes are digests.
    """
    return _strategy(mi.type_info(kind), "")


def _strategy(kind: mi.Type, name: str) -> st.SearchStrategy[Any]:
    match kind:
        case mi.IntType():
            low = kind.ge if kind.ge is not None else -1 if name in ("position", "pending") else 0
            high = kind.le if kind.le is not None else MOST
            return st.one_of(st.integers(low, high), st.sampled_from([low, high]))
        case mi.FloatType():
            return st.floats() if name == "loss" else st.floats(min_value=0)
        case mi.BoolType():
            return st.booleans()
        case mi.StrType(pattern=str(pattern)):
            return st.from_regex(re.compile(pattern, re.ASCII))
        case mi.StrType():
            low, high = kind.min_length or int(kind.max_length is None), kind.max_length or 64
            at_bound = st.sampled_from(["a", "é", "\U0001f980"]).map(lambda c: c * high)
            return st.one_of(st.text(TEXT, min_size=low, max_size=min(high, 80)), at_bound)
        case mi.BytesType():
            low, high = kind.min_length or 0, kind.max_length or DIGEST_BYTES
            low = low if kind.max_length is not None else high
            sizes = st.sampled_from([low, high])
            return st.one_of(st.binary(min_size=low, max_size=min(high, 64)), sizes.map(lambda size: bytes(size)))
        case mi.NoneType():
            return st.none()
        case mi.LiteralType():
            return st.sampled_from(sorted(kind.values, key=str))
        case mi.DictType():
            return st.dictionaries(_strategy(kind.key_type, ""), _strategy(kind.value_type, ""), max_size=4)
        case mi.VarTupleType():
            return st.lists(_strategy(kind.item_type, ""), min_size=kind.min_length or 0, max_size=3).map(tuple)
        case mi.UnionType():
            return st.one_of([_strategy(choice, "") for choice in kind.types])
        case mi.StructType():
            return st.builds(kind.cls, **{f.name: _strategy(f.type, f.name) for f in kind.fields})
        case _:
            raise TypeError(f"no strategy for {kind}: add one")


ALL: Final[list[tuple[PlaneName, type]]] = [
    *(("control", s) for s in structs(Message)),
    *(("bulk", s) for s in structs(BulkHeader)),
    *(("records", s) for s in structs(KINDS["records"])),
]
EVENTS: Final = structs(Event)
