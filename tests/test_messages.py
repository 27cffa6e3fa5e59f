"""Messages and their encoding, whatever bytes a peer sends."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_async.errors import ProtocolError
from prime_async.messages import (
    MAX_CONTROL_BYTES,
    MAX_DEPTH,
    MAX_TOKENS,
    Behind,
    BulkHeader,
    ChunkInfo,
    ChunkKey,
    Found,
    Member,
    Message,
    Plan,
    Ready,
    Turn,
    View,
    bitmap,
    decode,
    encode,
    positions,
)
from tests.protocols_harness import MOST, values

derandomized = settings(deadline=None, derandomize=True)
thorough = settings(derandomized, max_examples=150)


def member(id: str, *, active: bool = False) -> Member:
    return Member(id=id, name=id, incarnation=1, control="", bulk="", active=active)


def decoded_or_refused(data: bytes, kind: Any) -> Any:
    """The value, or None if it is a ProtocolError. Anything else that is raised fails the test."""
    try:
        return decode(data, kind)
    except ProtocolError:
        return None


@thorough
@given(values(Message))
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert decode(encode(message), Message) == message


@thorough
@given(values(Message))
def test_keys_are_in_order_of_their_encoding(message: Message) -> None:
    def check(tree: Any) -> None:
        if isinstance(tree, dict):
            keys = [cbor2.dumps(key) for key in tree]
            assert keys == sorted(keys)
        for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
            check(inner)

    check(cbor2.loads(encode(message)))


@thorough
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    decoded_or_refused(data, Message)
    decoded_or_refused(data, BulkHeader)


@thorough
@given(values(Message), st.data())
def test_damaged_bytes_are_another_message_or_a_protocol_error(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["flip", "set", "insert", "delete", "cut"])):
            case "flip":
                damaged[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                damaged[at] = data.draw(
                    st.sampled_from([0x00, 0x1B, 0x3B, 0x5B, 0x7B, 0x9B, 0xBB, 0xC2, 0xDB, 0xFB, 0xFF])
                )
            case "insert":
                damaged.insert(at, data.draw(st.integers(0, 255)))
            case "delete" if len(damaged) > 1:
                del damaged[at]
            case _:
                del damaged[max(1, at) :]

    decoded_or_refused(bytes(damaged), Message)


@thorough
@given(values(Message), st.data())
def test_no_message_goes_on_after_its_end_or_stops_before_it(message: Message, data: st.DataObject) -> None:
    whole = encode(message)
    shorter = whole[: data.draw(st.integers(0, len(whole) - 1))]

    assert decoded_or_refused(shorter, Message) is None
    assert decoded_or_refused(whole + data.draw(st.binary(min_size=1, max_size=9)), Message) is None


@derandomized
@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_cbor_that_is_no_message_is_a_protocol_error(tree: Any) -> None:
    with pytest.raises(ProtocolError):
        decode(cbor2.dumps(tree, canonical=True), Message)


@pytest.mark.parametrize("depth", [1, MAX_DEPTH - 1])
def test_nesting_is_allowed_up_to_the_limit(depth: int) -> None:
    nested: Any = 0
    for _ in range(depth):
        nested = [nested]
    data = cbor2.dumps({"t": "behind", "round": 1, "later": nested}, canonical=True)

    assert decode(data, Message) == Behind(round=1)


@pytest.mark.parametrize("depth", [MAX_DEPTH, 2 * MAX_DEPTH, 100_000])
def test_nesting_beyond_the_limit_is_a_protocol_error(depth: int) -> None:
    data = b"\xa3\x61t\x66behind" + b"\x65later" + b"\x81" * depth + b"\x00" + b"\x65round\x01"

    with pytest.raises(ProtocolError, match="nesting"):
        decode(data, Message)


def test_the_limit_of_size_is_inclusive() -> None:
    frame = len(cbor2.dumps({"t": "behind", "round": 1, "later": bytes(2**16)}, canonical=True)) - 2**16
    largest = {"t": "behind", "round": 1, "later": bytes(MAX_CONTROL_BYTES - frame)}
    data = cbor2.dumps(largest, canonical=True)

    assert len(data) == MAX_CONTROL_BYTES
    assert decode(data, Message) == Behind(round=1)
    with pytest.raises(ProtocolError, match=f"at most {MAX_CONTROL_BYTES - 1}"):
        decode(data, Message, limit=MAX_CONTROL_BYTES - 1)


def test_a_protocol_error_says_what_is_wrong_and_where() -> None:
    data = cbor2.dumps({"t": "ready", "round": -1, "weight": 1, "incarnation": 1}, canonical=True)

    with pytest.raises(ProtocolError, match=r"`int` >= 0.*\$\.round"):
        decode(data, Message)


@derandomized
@given(st.sets(st.integers(0, 300)))
def test_a_bitmap_holds_the_positions_that_went_in(where: set[int]) -> None:
    bits = bitmap(sorted(where))

    assert positions(bits) == tuple(sorted(where))
    assert len(bits) == (max(where) // 8 + 1 if where else 0)


def test_bits_count_from_the_least_of_the_first_byte() -> None:
    assert bitmap([0, 9]) == bytes([0b1, 0b10])
    assert positions(bytes([0, 0x80])) == (15,)


def test_a_view_finds_its_members_and_those_that_are_active() -> None:
    view = View(
        lineage=bytes(32),
        epoch=1,
        number=1,
        previous=bytes(32),
        leader="a",
        members=(member("a", active=True), member("b")),
    )

    assert view.member("b") == member("b")
    assert view.member("c") is None
    assert view.active == (member("a", active=True),)


def test_the_name_of_a_chunk_has_an_attempt_only_for_means() -> None:
    assert str(ChunkKey(kind="mean", round=3, chunk=1, epoch=1, attempt=2)) == "mean/3/1/(1, 2)"
    assert str(ChunkKey(kind="state", round=3, chunk=1)) == "state/3/1"


def test_the_weights_of_a_plan_always_add_up_to_a_total_that_a_mean_can_carry() -> None:
    """Else one member with a weight of 2^63 - 1 makes every owner send headers for which it is shut out."""
    assert decoded_or_refused(encode(Ready(round=0, weight=MAX_TOKENS, incarnation=1)), Message) is not None
    assert decoded_or_refused(encode(Ready(round=0, weight=MAX_TOKENS + 1, incarnation=1)), Message) is None

    info = ChunkInfo(digest=bytes(32), contributors=b"\x03", total_weight=65536 * MAX_TOKENS)

    assert decoded_or_refused(encode(Found(id=1, info=info, size=0)), BulkHeader) is not None


def test_a_message_made_here_is_not_checked_so_its_makers_must_keep_the_bounds() -> None:
    """The receiver counts it as a violation: senders cut what they put in."""
    turns = (Turn(epoch=1, attempt=0),)
    for message in (
        Ready(round=-1, weight=0, incarnation=1),
        Plan(round=0, epoch=0, attempt=0, view=0, contributors=b"", weights=(MOST + 1,), turns=turns),
        Plan(round=0, epoch=0, attempt=0, view=0, contributors=b"", weights=(), turns=()),
    ):
        with pytest.raises(ProtocolError):
            decode(encode(message), Message)
