"""The weighted mean: the bytes that the documented order of operations gives, and nothing of what is not valid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from prime_async.work.block_scales import BLOCK
from prime_async.work.codec import Codec, CodecName, as_bytes, make_codec
from prime_async.work.reduce import weighted_mean
from prime_async.work.reducers import shares
from prime_async.work.workload import Reduction

FLT_MAX = float(np.finfo(np.float32).max)


def encode(codec: Codec, values: Tensor) -> Tensor:
    out = torch.empty(codec.payload_bytes(values.numel()), dtype=torch.uint8)
    codec.encode(values, out, torch.empty_like(values))
    return out


def decode(codec: Codec, payload: Tensor, n: int) -> Tensor:
    out = torch.empty(n)
    codec.decode(payload, out)
    return out


def mean(codec: Codec, payloads: Sequence[Tensor], weights: Sequence[int], n: int) -> tuple[Tensor, list[int]]:
    out = torch.empty(codec.payload_bytes(n), dtype=torch.uint8)
    made = weighted_mean(codec, payloads, weights, out, (torch.empty(n), torch.empty(n)))
    assert made.size == out.numel()
    assert codec.check(out, n) is None
    return out, made.left_out


def reference_sum(payloads: Sequence[bytes], weights: Sequence[int], n: int) -> NDArray[np.float32]:
    """Of int8 payloads, in numpy's fp32: q * (scale * share), added in the order given."""
    blocks = math.ceil(n / BLOCK)
    total = None
    for payload, weight in zip(payloads, weights, strict=True):
        share = np.float32(np.float64(weight) / np.float64(sum(weights)))
        scales = np.frombuffer(payload[: 4 * blocks], "<f4") * share
        q = np.frombuffer(payload[4 * blocks :], np.int8).astype(np.float32)
        term = q * np.repeat(scales, BLOCK)[:n]
        total = term if total is None else total + term
    assert total is not None
    return total


def contributions(count: int, n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) * 10.0**i for i in range(-2, count - 2)]


@given(
    count=st.integers(1, 5),
    n=st.sampled_from([1, 255, 256, 257, 700]),
    weights=st.lists(st.integers(1, 2**40), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
def test_mean_is_the_numpy_reference_bit_for_bit(count: int, n: int, weights: list[int], seed: int) -> None:
    codec = make_codec("int8")
    payloads = [encode(codec, x) for x in contributions(count, n, seed)]
    expected = reference_sum([bytes(as_bytes(p)) for p in payloads], weights[:count], n)
    out, skipped = mean(codec, payloads, weights[:count], n)
    assert skipped == []
    assert torch.equal(out, encode(codec, torch.from_numpy(expected)))


def test_weights_1_2_3_count_as_sixths() -> None:
    codec = make_codec("fp32")
    x = contributions(3, 300)
    out, _ = mean(codec, [encode(codec, v) for v in x], [1, 2, 3], 300)
    expected = (x[0].double() + 2 * x[1].double() + 3 * x[2].double()) / 6
    torch.testing.assert_close(decode(codec, out, 300).double(), expected, rtol=1e-6, atol=1e-6)


def test_shares_are_rounded_once_in_fp64_and_once_in_fp32() -> None:
    assert shares([1, 2, 3]) == [float(np.float32(w / 6)) for w in (1, 2, 3)]
    assert shares([10**30, 10**30]) == [0.5, 0.5]
    assert shares([0, 0]) == [0.0, 0.0]


def test_order_of_summation_is_the_order_given() -> None:
    """fp32 addition is not associative: the test fails if the sum is taken in some other order."""
    codec = make_codec("fp32")
    x = [encode(codec, torch.tensor([v])) for v in (1e8, 1.0, -1e8)]
    forwards, _ = mean(codec, x, [1, 1, 1], 1)
    third = np.float32(1 / 3)
    a, b, c = (np.float32(v) * third for v in (1e8, 1.0, -1e8))
    assert decode(codec, forwards, 1).numpy()[0] == (a + b) + c
    other, _ = mean(codec, [x[0], x[2], x[1]], [1, 1, 1], 1)
    assert decode(codec, other, 1).numpy()[0] == (a + c) + b
    assert not torch.equal(forwards, other)


@pytest.mark.parametrize("name", ["int8", "int4", "e3m0", "fp16", "fp32"])
def test_payload_with_nan_is_left_out_and_the_others_share_its_weight(name: CodecName) -> None:
    codec = make_codec(name)
    good = [encode(codec, x) for x in contributions(2, 300)]
    bad = good[0].clone()
    bad[:4].copy_(torch.tensor([math.nan]).view(torch.uint8))
    without, _ = mean(codec, good, [1, 3], 300)
    out, skipped = mean(codec, [good[0], bad, good[1], good[1][:-1]], [1, 100, 3, 5], 300)
    assert skipped == [1, 3]
    assert torch.equal(out, without)


@pytest.mark.parametrize("name", ["int8", "int4", "e3m0", "fp16", "fp32"])
@pytest.mark.parametrize("case", ["none", "all invalid", "weight zero"])
def test_mean_of_nothing_is_zero(name: CodecName, case: str) -> None:
    codec = make_codec(name)
    good = encode(codec, torch.ones(300))
    payloads, weights, expected = {
        "none": ([], [], []),
        "all invalid": ([good[:-1], good[1:]], [1, 2], [0, 1]),
        "weight zero": ([good], [0], []),
    }[case]
    out, skipped = mean(codec, payloads, weights, 300)
    assert skipped == expected
    assert not decode(codec, out, 300).any()


@pytest.mark.parametrize("name", ["int8", "int4", "e3m0", "fp16", "fp32"])
def test_contributions_at_the_largest_fp32_have_a_finite_mean(name: CodecName) -> None:
    codec = make_codec(name)
    payloads = [encode(codec, torch.full((300,), FLT_MAX))] * 7  # seven times fp32(1/7) is more than 1
    out, skipped = mean(codec, payloads, [1] * 7, 300)
    assert skipped == []
    largest = 65504 if name == "fp16" else FLT_MAX
    assert float(decode(codec, out, 300)[0]) > 0.999 * largest


def test_two_quantisations_of_four_nodes_are_off_by_less_than_1_05_percent() -> None:
    """Nodes agree in part, as pseudo-gradients do: a common normal direction, and as much of their own."""
    codec, n = make_codec("int8"), 2**17
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(n, generator=generator)
    x = [common + torch.randn(n, generator=generator) for _ in range(4)]
    out, _ = mean(codec, [encode(codec, v) for v in x], [1, 1, 1, 1], n)
    exact = torch.stack(x).double().mean(0)
    error = float((decode(codec, out, n) - exact).norm() / exact.norm())
    print(f"relative L2 error of two quantisations, 4 nodes: {100 * error:.3f} %")
    assert error < 0.0105


def test_a_mean_can_have_a_codec_of_its_own() -> None:
    codec, mean_codec, n = make_codec("int4"), make_codec("int8"), 300
    payloads = [encode(codec, x) for x in contributions(3, n)]
    total, term = torch.empty(n), torch.empty(n)
    out = torch.empty(mean_codec.payload_bytes(n), dtype=torch.uint8)
    assert weighted_mean(codec, payloads, [1, 2, 5], out, (total, term), mean_codec) == Reduction(out.numel(), [])
    decoded = torch.stack([decode(codec, p, n) for p in payloads]).double()
    exact = (decoded * torch.tensor([1, 2, 5])[:, None]).sum(0) / 8
    assert float((decode(mean_codec, out, n) - exact).abs().max()) < float(exact.abs().max()) / 200
    bad = payloads[1].clone()
    bad[-1] = 0x88
    assert weighted_mean(codec, [payloads[0], bad], [1, 2], out, (total, term), mean_codec).left_out == [1]
