"""The codecs that send few elements: ``topk`` and, for the means of such contributions, ``sparse``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from prime_async.work.codec import as_tensor, make_codec, mean_payload_bytes
from prime_async.work.reduce import weighted_mean

BLOCK = 4096
LEAST = 2.0**-126
Vector = NDArray[np.float32]

LENGTHS = (0, 1, 2, 63, 64, 65, 129, 4095, 4096, 4097, 9000)
KINDS = ("normal", "few that are not zero", "three levels", "all sizes", "equal")
small_vectors = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)
all_kinds = pytest.mark.parametrize("kind", KINDS)
all_lengths = pytest.mark.parametrize("n", LENGTHS)


def vector(kind: str, n: int, seed: int = 0) -> Vector:
    chance = np.random.default_rng([seed, n])
    normal = chance.standard_normal(n)
    with np.errstate(over="ignore", under="ignore"):
        made = {
            "normal": normal,
            "few that are not zero": np.where(chance.random(n) < 0.99, 0, normal),
            "three levels": chance.integers(-1, 2, n),
            "all sizes": normal * 10.0 ** chance.integers(-44, 37, n),
            "equal": np.full(n, -0.75),
        }[kind]
    return made.astype(np.float32)


def encode(name: str, values: Vector) -> bytes:
    codec, given_values = make_codec(name), torch.from_numpy(values.copy())  # type: ignore[arg-type]
    out = torch.full((codec.payload_bytes(len(values)),), 0xAA, dtype=torch.uint8)
    size = codec.encode(given_values, out, scratch=given_values)
    return out[:size].numpy().tobytes()


def decode(name: str, payload: bytes, n: int, weight: float = 1.0) -> Vector:
    out = torch.full((n,), math.nan)
    make_codec(name).decode(as_tensor(memoryview(payload)), out, weight)  # type: ignore[arg-type]
    return out.numpy()


def check(name: str, payload: bytes, n: int) -> str | None:
    return make_codec(name).check(as_tensor(memoryview(payload)), n)  # type: ignore[arg-type]


def bits(numbers: Sequence[int], width: int) -> bytes:
    """So many bits each, the lowest first."""
    joined = sum(number << width * i for i, number in enumerate(numbers))
    return joined.to_bytes(-(-width * len(numbers) // 8), "little")


def reference_topk(values: Vector) -> bytes:
    """The layout and the rules as the docstrings state them, element by element."""
    levels, positions, codes = b"", [], []
    for start in range(0, len(values), BLOCK):
        block = [float(x) for x in values[start : start + BLOCK]]
        sizes = [abs(x) if abs(x) >= LEAST else 0.0 for x in block]
        kept = sorted(sorted(range(len(block)), key=lambda i: (-sizes[i], i))[: math.ceil(len(block) / 64)])
        low, high, first_high = reference_levels(sorted(sizes[i] for i in kept))
        levels += np.array([low, high], "<f4").tobytes()
        positions += kept
        codes += [(sizes[i] >= first_high) | (block[i] < 0 and sizes[i] > 0) << 1 for i in kept]
    return levels + bits(positions, 12) + bits(codes, 2)


def reference_levels(ordered: list[float]) -> tuple[float, float, float]:
    """Low, high, and the smallest magnitude that is high."""
    total, count, zeros = 0.0, len(ordered), ordered.count(0.0)
    sums = [0.0, *(total := total + x for x in ordered)]
    if zeros == count:
        return 0.0, 0.0, math.inf
    places = [zeros] if zeros else [s for s in range(1, count) if ordered[s - 1] < ordered[s]] or [0]

    def explained(s: int) -> float:
        rest = sums[-1] - sums[s]
        return sums[s] * sums[s] / max(s, 1) + rest * rest / (count - s)

    s = max(places, key=lambda s: (explained(s), -s))
    low = 0.0 if zeros else sums[s] / max(s, 1)
    return low, (sums[-1] - sums[s]) / (count - s), ordered[s]


def reference_sparse(values: Vector) -> bytes:
    scales, counts, positions, bitmaps, q = [], [], [], b"", []
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        scale = min(np.float32(np.abs(block).max() / np.float32(127)), np.float32(float.fromhex("0x1.020406p+121")))
        if scale < np.float32(LEAST):
            scale = np.float32(0)
        quotients = [int(np.rint(x / scale)) if scale else 0 for x in block]
        there = [i for i, number in enumerate(quotients) if number]
        scales.append(scale)
        counts.append(len(there))
        if 3 * len(there) < 2 * math.ceil(len(block) / 8):
            positions += there
        else:
            bitmaps += bits([int(number != 0) for number in quotients], 1)
        q += [number & 255 for number in quotients if number]
    head = np.array(scales, "<f4").tobytes() + np.array(counts, "<u2").tobytes()
    return head + bits(positions, 12) + bitmaps + bytes(q)


# --- both -----------------------------------------------------------------------------------------------------------


@all_kinds
@all_lengths
@pytest.mark.parametrize(("name", "reference"), [("topk", reference_topk), ("sparse", reference_sparse)])
def test_bytes_are_those_of_the_documented_layout(name: str, reference: object, kind: str, n: int) -> None:
    assert callable(reference)
    values = vector(kind, n)
    assert encode(name, values) == reference(values)


@settings(max_examples=100)
@given(small_vectors)
def test_bytes_of_any_small_vector_are_those_of_the_documented_layout(values: Vector) -> None:
    assert encode("topk", values) == reference_topk(values)
    assert encode("sparse", values) == reference_sparse(values)


@all_kinds
@all_lengths
def test_what_was_decoded_encodes_to_the_same_payload(kind: str, n: int) -> None:
    payload = encode("topk", vector(kind, n))
    assert check("topk", payload, n) is None
    assert encode("topk", decode("topk", payload, n)) == payload


@settings(max_examples=200)
@given(st.sampled_from(KINDS), st.integers(1, 200), st.data())
def test_a_vector_has_one_payload_and_others_are_refused(kind: str, n: int, data: st.DataObject) -> None:
    """Some bytes of a payload are others: it is refused, or it is the one of another vector."""
    payload = bytearray(encode("topk", vector(kind, n)))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    if check("topk", bytes(payload), n) is None:
        assert encode("topk", decode("topk", bytes(payload), n)) == payload


# --- topk -----------------------------------------------------------------------------------------------------------


def test_a_contribution_is_a_136th_of_fp32_whatever_is_in_it() -> None:
    for kind in KINDS:
        assert len(encode("topk", vector(kind, 10 * BLOCK))) == 10 * 120
    assert [len(encode("topk", vector("normal", n))) for n in (1, 64, 65, 4096, 4097)] == [11, 11, 12, 120, 131]


def test_the_largest_are_kept_and_of_equal_ones_the_first() -> None:
    values = np.ones(256, np.float32)
    values[[200, 17]] = 5, -7
    decoded = decode("topk", encode("topk", values), 256)
    assert np.flatnonzero(decoded).tolist() == [0, 1, 17, 200]
    assert decoded[[0, 1, 17, 200]].tolist() == [1, 1, -6, 6]


def test_no_other_division_into_low_and_high_has_a_smaller_error() -> None:
    for seed in range(5):
        values = vector("normal", BLOCK, seed)
        decoded = decode("topk", encode("topk", values), BLOCK).astype(np.float64)
        kept = np.flatnonzero(decoded)
        sizes = np.sort(np.abs(values[kept].astype(np.float64)))
        errors = [sizes[:s].var() * s + sizes[s:].var() * (64 - s) for s in range(1, 64)]
        assert len(kept) == 64
        assert np.square(values[kept] - decoded[kept]).sum() == pytest.approx(min(errors), rel=1e-5)


def test_zeros_and_what_is_denormal_are_never_moved() -> None:
    values = np.zeros(BLOCK, np.float32)
    values[100:110], values[50:60] = np.arange(1, 11), 1e-40
    decoded = decode("topk", encode("topk", values), BLOCK)
    assert np.flatnonzero(decoded).tolist() == list(range(100, 110))
    assert set(decoded[100:110]) == {5.5}
    assert not decode("topk", encode("topk", values[:64]), 64).any()


def test_decoding_with_a_weight_multiplies_the_magnitudes() -> None:
    payload, weight = encode("topk", vector("normal", 5000)), float(np.float32(1 / 3))
    assert (decode("topk", payload, 5000, weight) == decode("topk", payload, 5000) * np.float32(weight)).all()


TOPK = encode("topk", np.array([4, 0, -1, *[0] * 61, 0, 3, -3], np.float32))  # of 67 elements: 4 and -3 are kept


@pytest.mark.parametrize(
    ("at", "replacement", "reason"),
    [
        (0, np.array([math.nan], "<f4").tobytes(), "NaN"),
        (4, np.array([math.inf], "<f4").tobytes(), "infinite"),
        (0, np.array([-1], "<f4").tobytes(), "negative"),
        (0, np.array([1e-40], "<f4").tobytes(), "denormal"),
        (0, np.array([4.0], "<f4").tobytes(), "not below the high"),
        (0, np.array([5.0], "<f4").tobytes(), "not below the high"),
        (4, bytes(4), "not below the high"),
        (8, bits([65, 0], 12), "do not ascend"),
        (8, bits([65, 65], 12), "do not ascend"),
        (8, bits([0, 67], 12), "beyond the end"),
        (11, b"\x00", "high magnitude is not used"),
        (11, b"\x05", "low magnitude is not used"),
        (11, b"\x19", "behind the last code"),
    ],
)
def test_a_topk_payload_that_no_vector_has_is_refused(at: int, replacement: bytes, reason: str) -> None:
    assert check("topk", TOPK, 67) is None
    assert reason in (check("topk", TOPK[:at] + replacement + TOPK[at + len(replacement) :], 67) or "")


def test_a_zero_in_a_topk_payload_has_its_one_place_and_no_sign() -> None:
    payload = encode("topk", np.array([0, 0, 2, *[0] * 62], np.float32))  # 2, and the first zero
    assert payload[8:] == bits([0, 2], 12) + bits([0, 1], 2)
    for positions, codes, reason in (([1, 2], [0, 1], "not the first one"), ([0, 2], [2, 1], "a zero has a sign")):
        assert reason in (check("topk", payload[:8] + bits(positions, 12) + bits(codes, 2), 65) or "")
    odd = encode("topk", np.ones(1, np.float32))
    assert "half byte" in (check("topk", odd[:9] + b"\x10" + odd[10:], 1) or "")


# --- sparse ---------------------------------------------------------------------------------------------------------


@all_kinds
@all_lengths
def test_sparse_drops_nothing_but_what_int8_would_round_to_zero(kind: str, n: int) -> None:
    values = vector(kind, n)
    payload = encode("sparse", values)
    assert check("sparse", payload, n) is None
    assert len(payload) <= make_codec("sparse").payload_bytes(n)
    decoded = decode("sparse", payload, n).astype(np.float64)
    for start in range(0, n, BLOCK):
        x, y = values[start : start + BLOCK].astype(np.float64), decoded[start : start + BLOCK]
        limit = np.abs(x).max() / 127 * (0.5 + 1e-5)
        assert np.abs(x - y).max() <= (limit if np.abs(x).max() > 127 * LEAST else 127 * LEAST)
        assert not y[x == 0].any()


def test_the_largest_size_is_that_of_a_vector_without_zeros() -> None:
    for n in (1, 7, 8, 4096, 5000):
        assert len(encode("sparse", np.ones(n, np.float32))) == make_codec("sparse").payload_bytes(n)


@pytest.mark.parametrize("count", [1, 340, 341, 342, 4096])
def test_a_block_has_positions_or_a_bitmap_whichever_is_smaller(count: int) -> None:
    values = np.zeros(BLOCK, np.float32)
    values[:count] = 1
    payload = encode("sparse", values)
    assert len(payload) == 6 + min(math.ceil(1.5 * count), 512) + count
    assert check("sparse", payload, BLOCK) is None
    assert (decode("sparse", payload, BLOCK) == values).all()


def test_the_mean_of_topk_contributions_is_exact_on_their_union_but_for_eight_bits() -> None:
    n = 5 * BLOCK + 77
    payloads = [encode("topk", vector("normal", n, seed)) for seed in range(4)]
    codec, means = make_codec("topk"), make_codec("sparse")
    out = torch.empty(means.payload_bytes(n), dtype=torch.uint8)
    tensors = [as_tensor(memoryview(p)) for p in payloads]

    made = weighted_mean(codec, tensors, [1, 2, 3, 2], out, (torch.empty(n), torch.empty(n)), means)

    payload = out[: made.size].numpy().tobytes()
    assert check("sparse", payload, n) is None
    parts = np.stack([decode("topk", p, n) for p in payloads]).astype(np.float64)
    exact = (parts * np.array([1, 2, 3, 2])[:, None] / 8).sum(0)
    decoded = decode("sparse", payload, n)
    assert (decoded[(parts == 0).all(0)] == 0).all()
    assert np.abs(decoded - exact).max() <= np.abs(exact).max() / 250
    assert 0.9 * made.size < mean_payload_bytes(means, n, 4) < 1.1 * made.size
    assert len(payloads[0]) + made.size < 0.4 * n, "10,000 times fewer bytes than fp32 ring all-reduce, at H = 500"


SPARSE = encode("sparse", np.array([0, 127, 0, -3, *[0] * 60], np.float32))  # positions 1 and 3
MAPPED = encode("sparse", np.array([0, 127, -3], np.float32))  # a bitmap


@pytest.mark.parametrize(
    ("payload", "n", "at", "replacement", "reason"),
    [
        (SPARSE, 64, 0, np.array([math.nan], "<f4").tobytes(), "NaN"),
        (SPARSE, 64, 0, np.array([2.7e36], "<f4").tobytes(), "above"),
        (SPARSE, 64, 0, np.array([1e-40], "<f4").tobytes(), "denormal"),
        (SPARSE, 64, 0, bytes(4), "exactly if its block has no elements"),
        (SPARSE, 64, 4, b"\x41\x00", "more elements than it is long"),
        (SPARSE, 64, 4, b"\x01\x00", "11 bytes instead of 9"),
        (SPARSE, 64, 6, bits([3, 1], 12), "do not ascend"),
        (SPARSE, 64, 6, bits([3, 64], 12), "beyond the end"),
        (SPARSE, 64, 9, b"\x7e", "not 127"),
        (SPARSE, 64, 10, b"\x00", "a value is 0"),
        (SPARSE, 64, 10, b"\x80", "-128"),
        (MAPPED, 3, 6, b"\x02", "another number of elements"),
        (MAPPED, 3, 6, b"\x0a", "beyond the end of its block"),
    ],
)
def test_a_sparse_payload_that_no_vector_has_is_refused(
    payload: bytes, n: int, at: int, replacement: bytes, reason: str
) -> None:
    assert check("sparse", payload, n) is None
    assert reason in (check("sparse", payload[:at] + replacement + payload[at + len(replacement) :], n) or "")


@settings(max_examples=200)
@given(st.integers(0, 9000), st.binary(max_size=60))
def test_a_sparse_payload_of_any_bytes_is_refused_or_decodes_to_finite_numbers(n: int, data: bytes) -> None:
    blocks = math.ceil(n / BLOCK)
    for payload in (data, np.ones(blocks, "<f4").tobytes() + data):
        if check("sparse", payload, n) is None:
            assert np.isfinite(decode("sparse", payload, n)).all()


def test_torch_agrees_with_numpy_on_what_is_kept() -> None:
    values = torch.from_numpy(vector("normal", 4 * BLOCK))
    decoded = torch.from_numpy(decode("topk", encode("topk", values.numpy()), 4 * BLOCK)).view(4, BLOCK)
    kept: Tensor = torch.topk(values.abs().view(4, BLOCK), 64, dim=1).indices.sort(dim=1).values
    assert torch.equal(kept, decoded.nonzero()[:, 1].view(4, 64))
