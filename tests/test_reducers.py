"""What owners make of contributions: the bits that are written down, the formulas, and their extremes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from prime_async.config.schema import ReducerName
from prime_async.work.chunks import ChunkCodec, Chunks
from prime_async.work.codec import CodecName, make_codec
from prime_async.work.reducers import (
    NORM_BLOCK,
    SORT_BLOCK,
    Reducer,
    TrimmedMean,
    by_direction_and_size,
    make_reducer,
    mean,
    norm,
)
from prime_async.work.threads import torch_threads

Vector = NDArray[np.float32]
FP32 = make_codec("fp32")
FLT_MAX = float(np.finfo(np.float32).max)
REDUCERS: dict[ReducerName, Reducer] = {
    name: make_reducer(name, 1) for name in ("mean", "rda", "trimmed_mean", "median")
}
VECTORS = st.integers(1, 6).flatmap(
    lambda count: npst.arrays(
        np.float32,
        st.tuples(st.just(count), st.sampled_from([1, 2, 5, 300])),
        elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
    )
)


def reduced(reducer: Reducer, vectors: Iterable[Vector], weights: Sequence[int] | None = None) -> Vector:
    payloads = [torch.from_numpy(v.copy()).view(torch.uint8) for v in vectors]
    n = payloads[0].numel() // 4
    out, scratch = torch.full((n,), math.nan), torch.full((n,), math.nan)
    reducer(FP32, list(zip(payloads, weights or [1] * len(payloads), strict=True)), out, scratch)
    return out.numpy()


def normal(count: int, n: int, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).standard_normal((count, n), np.float32)


def the_same_bits(a: Vector, b: Vector) -> bool:
    return a.tobytes() == b.tobytes()


# --- the norm -------------------------------------------------------------------------------------------------------


def sum_by_halves(squares: list[float]) -> float:
    """As the protocol has it, in Python's fp64, by recursion on the places and not on slices."""
    if len(squares) <= 1:
        return sum(squares)
    rest = len(squares) // 2
    kept = len(squares) - rest
    return sum_by_halves([squares[i] + squares[kept + i] if i < rest else squares[i] for i in range(kept)])


def reference_norm(values: Vector) -> float:
    squares = [float(x) * float(x) for x in values]
    blocks = [squares[i : i + NORM_BLOCK] for i in range(0, len(squares), NORM_BLOCK)]
    total = 0.0
    for block in blocks:
        total += sum_by_halves(block)
    return math.sqrt(total)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 255, 257, NORM_BLOCK, NORM_BLOCK + 5])
def test_the_norm_is_that_of_the_documented_order_bit_for_bit(n: int) -> None:
    values = normal(1, n)[0] * np.float32(3e4)
    found = norm(torch.from_numpy(values))
    assert found == reference_norm(values)
    assert found == pytest.approx(math.sqrt(math.fsum(float(x) ** 2 for x in values)), rel=1e-14)


def test_the_order_of_addition_is_seen_in_the_norm() -> None:
    """As a control: for most vectors the sum in the order of the elements is another one."""
    others = 0
    for values in normal(40, 1000):
        in_order = 0.0
        for x in values:
            in_order += float(x) ** 2
        others += math.sqrt(in_order) != norm(torch.from_numpy(values)) == reference_norm(values)
    assert others > 20


def test_the_norm_does_not_depend_on_threads_or_on_where_the_values_lie() -> None:
    values = torch.from_numpy(normal(1, 3 * NORM_BLOCK + 1)[0])
    expected = norm(values)
    with torch_threads(4):
        assert norm(values) == expected
    for offset in range(1, 4):
        moved = torch.empty(values.numel() + offset)[offset:].copy_(values)
        assert norm(moved) == expected


def test_the_norm_of_the_largest_and_of_the_smallest_numbers_is_right() -> None:
    assert norm(torch.full((4,), FLT_MAX)) == 2 * FLT_MAX
    assert norm(torch.full((4,), 2.0**-149)) == 2.0**-148


# --- direction and size ---------------------------------------------------------------------------------------------


def exact_rda(vectors: Vector, weights: Sequence[int]) -> NDArray[np.longdouble]:
    """The paper's formula, in 64 bits of mantissa."""
    x, w = vectors.astype(np.longdouble), np.array(weights, np.longdouble) / sum(weights)
    sizes = np.sqrt((x * x).sum(1))
    directions = x / np.where(sizes > 0, sizes, 1)[:, None]
    u = (w[:, None] * directions).sum(0)
    length = np.sqrt((u * u).sum())
    return np.asarray((w * sizes).sum() * u / length if length > 0 else u)


def documented_rda(vectors: Vector, weights: Sequence[int]) -> Vector:
    """In the order that the protocol writes down, in numpy."""
    size, u = 0.0, np.zeros(vectors.shape[1], np.float32)
    for x, weight in zip(vectors, weights, strict=True):
        share, length = weight / sum(weights), reference_norm(x)
        size += share * length
        if length:
            u = u + (x.astype(np.float64) * (share / length)).astype(np.float32)
    length = reference_norm(u)
    if length <= len(vectors) * 2.0**-24:
        return np.zeros_like(u)
    with np.errstate(over="ignore"):
        return (u.astype(np.float64) * (size / length)).astype(np.float32)


@given(VECTORS, st.lists(st.integers(1, 2**40), min_size=6, max_size=6))
def test_rda_is_the_documented_reference_bit_for_bit(vectors: Vector, weights: list[int]) -> None:
    weights = weights[: len(vectors)]
    assert the_same_bits(reduced(by_direction_and_size, vectors, weights), documented_rda(vectors, weights))


@pytest.mark.parametrize("count", [2, 3, 8])
def test_rda_is_the_papers_formula(count: int) -> None:
    scales = np.float32(10.0) ** np.arange(count, dtype=np.float32)[:, None]
    vectors, weights = normal(count, 1000) * scales, list(range(1, count + 1))
    found, expected = reduced(by_direction_and_size, vectors, weights), exact_rda(vectors, weights)
    np.testing.assert_allclose(found, expected.astype(np.float64), rtol=1e-5, atol=1e-6 * float(abs(expected).max()))


def test_rda_keeps_the_size_that_averaging_loses() -> None:
    """Given contributions that have nothing to do with each other: their mean is half as long as each of four."""
    vectors = normal(4, 4096)
    sizes = [float(np.linalg.norm(v)) for v in vectors]
    assert np.linalg.norm(reduced(mean, vectors)) == pytest.approx(np.mean(sizes) / 2, rel=0.05)
    assert np.linalg.norm(reduced(by_direction_and_size, vectors)) == pytest.approx(np.mean(sizes), rel=1e-6)


def test_rda_goes_no_further_towards_who_moved_further() -> None:
    a, b = normal(2, 500)
    near, far = reduced(by_direction_and_size, [a, b]), reduced(by_direction_and_size, [a, b * np.float32(64)])
    np.testing.assert_allclose(near / np.linalg.norm(near), far / np.linalg.norm(far), atol=1e-6)
    assert np.linalg.norm(far) == pytest.approx((np.linalg.norm(a) + 64 * np.linalg.norm(b)) / 2, rel=1e-6)


@given(VECTORS, st.integers(1, 5))
def test_rda_of_contributions_that_agree_is_what_they_agree_on(vectors: Vector, count: int) -> None:
    found = reduced(by_direction_and_size, [vectors[0]] * count, list(range(1, count + 1)))
    np.testing.assert_allclose(found, vectors[0], rtol=1e-6, atol=1e-37)


def test_a_contribution_of_zeros_makes_rda_shorter_and_does_not_turn_it() -> None:
    x, zero = normal(1, 300)[0], np.zeros(300, np.float32)
    np.testing.assert_allclose(reduced(by_direction_and_size, [x, zero], [1, 3]), x / 4, rtol=1e-6)
    assert not reduced(by_direction_and_size, [zero, zero]).any()


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.1, 1e30])
def test_rda_of_opposite_directions_is_zero_and_not_what_rounding_left(factor: float) -> None:
    """Given a contribution and its opposite, of another size: what is left of u is noise, and has no direction."""
    x = normal(1, 300)[0]
    assert not reduced(by_direction_and_size, [x, x * np.float32(-factor)]).any()
    nearly = x.copy()
    nearly[0] += np.float32(1)
    assert reduced(by_direction_and_size, [x, -nearly]).any()


def test_many_directions_are_not_taken_for_none() -> None:
    """The more contributions the shorter u is; it stays far above what counts as none."""
    found = reduced(by_direction_and_size, normal(64, 2048))
    assert np.linalg.norm(found) == pytest.approx(math.sqrt(2048), rel=0.02)


def test_rda_bears_the_largest_and_the_smallest_numbers() -> None:
    huge, tiny = np.full(9, FLT_MAX, np.float32), np.full(9, 2.0**-149, np.float32)
    np.testing.assert_allclose(reduced(by_direction_and_size, [huge, tiny]), FLT_MAX / 2, rtol=1e-6)
    turned = -huge
    turned[0] = huge[0]
    assert reduced(by_direction_and_size, [huge, turned]).tolist() == [math.inf] + [0.0] * 8  # the encoder is told


# --- order statistics -----------------------------------------------------------------------------------------------


def exact_trimmed(vectors: Vector, trim: int | None) -> Vector:
    ordered = np.sort(vectors + np.float32(0), axis=0)
    most = (len(ordered) - 1) // 2
    cut = most if trim is None else min(trim, most)
    kept = ordered[cut : len(ordered) - cut]
    total = kept[0] * np.float32(1 / len(kept))
    for row in kept[1:]:
        total = total + row * np.float32(1 / len(kept))
    return np.asarray(total)


@given(VECTORS, st.sampled_from([None, 1, 2, 9]))
def test_trimmed_mean_and_median_are_those_of_sorted_values_bit_for_bit(vectors: Vector, trim: int | None) -> None:
    found = reduced(TrimmedMean(trim), vectors)
    assert the_same_bits(found, exact_trimmed(vectors, trim))
    if trim is None:
        np.testing.assert_allclose(found, np.median(vectors.astype(np.float64), axis=0), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("count", [*range(1, 18), 33])
def test_any_number_of_contributions_is_sorted(count: int) -> None:
    vectors = np.random.default_rng(count).integers(-3, 3, (count, SORT_BLOCK + 3)).astype(np.float32)
    assert the_same_bits(reduced(TrimmedMean(2), vectors), exact_trimmed(vectors, 2))


def test_the_order_of_contributions_and_their_weights_make_no_difference_to_a_trimmed_mean() -> None:
    vectors = normal(5, 300)
    vectors[1, :9], vectors[2, :9] = 0.0, -0.0
    for reducer in (TrimmedMean(1), TrimmedMean(None)):
        expected = reduced(reducer, vectors)
        assert the_same_bits(reduced(reducer, vectors[[3, 1, 4, 0, 2]], [1, 2**40, 3, 4, 5]), expected)


@given(VECTORS, st.integers(1, 3), st.data())
def test_what_a_few_contribute_moves_a_trimmed_mean_no_further_than_the_others_are(
    honest: Vector, liars: int, data: st.DataObject
) -> None:
    """Given up to ``trim`` that say anything, and more that do not: each element is within what these say."""
    if len(honest) <= liars:
        return
    wild = data.draw(npst.arrays(np.float32, (liars, honest.shape[1]), elements=st.sampled_from([-3e38, 0.0, 3e38])))
    for reducer in (TrimmedMean(liars), TrimmedMean(None)):
        found = reduced(reducer, [*wild, *honest], [2**40] * liars + [1] * len(honest))
        slack = 1e-5 * np.abs(honest).max(0)
        assert (found <= honest.max(0) + slack).all()
        assert (found >= honest.min(0) - slack).all()


def test_contributions_without_weight_are_in_no_trimmed_mean() -> None:
    vectors = normal(4, 300)
    assert the_same_bits(reduced(TrimmedMean(None), vectors, [1, 0, 1, 1]), exact_trimmed(vectors[[0, 2, 3]], None))


# --- all of them ----------------------------------------------------------------------------------------------------


def made(reduce: ReducerName, codec: CodecName, vectors: Iterable[Vector], bad: Sequence[bytes] = ()) -> bytes:
    """The encoded mean of a chunk, as a node makes it; ``bad`` payloads come after the first."""
    vectors = list(vectors)
    n = len(vectors[0])
    chunk = ChunkCodec(make_codec(codec), Chunks(n, 2**20))
    payloads = []
    for vector in vectors:
        payloads.append(memoryview(bytearray(chunk.payload_bytes(0))))
        chunk.encode(torch.from_numpy(vector.copy()), payloads[-1], torch.empty(n))
    payloads[1:1] = [memoryview(bytearray(b)) for b in bad]
    out = memoryview(bytearray(chunk.mean_bytes(0)))
    reduced = chunk.reduce(0, payloads, [3] * len(payloads), out, REDUCERS[reduce])
    assert reduced.left_out == list(range(1, 1 + len(bad)))
    assert chunk.is_valid(0, out)
    return bytes(out)


@pytest.mark.parametrize("codec", ["int8", "int4", "e3m0", "fp16", "fp32"])
@pytest.mark.parametrize("reduce", REDUCERS)
def test_every_reducer_leaves_out_what_is_not_valid_in_every_codec(reduce: ReducerName, codec: CodecName) -> None:
    vectors = normal(3, 700)
    expected = made(reduce, codec, vectors)
    assert made(reduce, codec, vectors, bad=[expected[:-1], b"\xff" * len(expected)]) == expected
    out = torch.empty(700)
    decoded = torch.frombuffer(bytearray(expected), dtype=torch.uint8)
    make_codec(codec).decode(decoded, out)
    reference = reduced(REDUCERS[reduce], vectors)
    assert float((out - torch.from_numpy(reference)).norm() / np.linalg.norm(reference)) < 0.35  # e3m0, twice


@pytest.mark.parametrize("codec", ["int8", "int4", "e3m0", "fp16", "fp32"])
@pytest.mark.parametrize("reduce", REDUCERS)
def test_every_reducer_makes_a_valid_mean_of_the_largest_numbers(reduce: ReducerName, codec: CodecName) -> None:
    huge = np.full(300, FLT_MAX, np.float32)
    turned = huge.copy()
    turned[7:] = -FLT_MAX
    made(reduce, codec, [huge, huge, huge])
    made(reduce, codec, [huge, turned])


@pytest.mark.parametrize("reduce", REDUCERS)
def test_nothing_is_reduced_to_zero(reduce: ReducerName) -> None:
    out, scratch = torch.full((300,), math.nan), torch.full((300,), math.nan)
    for terms in ([], [(torch.ones(300).view(torch.uint8), 0)] * 2):
        REDUCERS[reduce](FP32, terms, out.fill_(math.nan), scratch)
        assert not out.any()


class Watching(TorchFunctionMode):
    """Notes which functions of torch are called with more than one number."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(isinstance(arg, torch.Tensor) and arg.numel() > 1 for arg in args):
            self.seen.add(func.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("reduce", REDUCERS)
def test_elements_are_never_added_to_each_other_by_torch(reduce: ReducerName) -> None:
    """The order in which it does that differs between processors, which no test on one of them would see."""
    elementwise = {"add_", "mul", "mul_", "copy_", "zero_", "minimum", "maximum"}
    views = {"split", "__getitem__", "view", "unbind", "__iter__"}
    others = {"numel", "numpy", "dim", "__len__"}
    with Watching() as watching:
        reduced(REDUCERS[reduce], normal(3, 1000))
    assert "add_" in watching.seen
    assert watching.seen <= elementwise | views | others
