"""The codecs: what goes in comes out within the promised bound, as the same bytes everywhere, and never as NaN."""

from __future__ import annotations

import gc
import math
import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from prime_async.errors import NonFiniteError
from prime_async.work.block_scales import BLOCK
from prime_async.work.codec import MAX_SCALE, MIN_SCALE, Codec, CodecName, as_bytes, as_tensor, make_codec
from prime_async.work.codec_4bit import E3m0Codec, Int4Codec
from prime_async.work.threads import torch_threads

FLT_MAX = float(np.finfo(np.float32).max)
ODD_LENGTHS = (0, 1, 2, 255, 256, 257, 511, 512, 1000)
NAMES: tuple[CodecName, ...] = ("int8", "int4", "e3m0", "fp16", "fp32", "topk", "sparse")
WITH_SCALES: tuple[CodecName, ...] = ("int8", "int4", "e3m0")
FOUR_BITS: tuple[CodecName, ...] = ("int4", "e3m0")
LARGEST_CODE = {"int8": 127.0, "int4": 7.0, "e3m0": 1.0}
E3M0_LEVELS = np.array([0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])

finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
finite_vectors = hnp.arrays(np.float32, st.integers(0, 700), elements=finite_floats)


@pytest.fixture(params=NAMES)
def codec(request: pytest.FixtureRequest) -> Codec:
    return make_codec(request.param)


def encode(codec: Codec, values: Tensor) -> Tensor:
    out = torch.full((codec.payload_bytes(values.numel()),), 0xAA, dtype=torch.uint8)
    return out[: codec.encode(values, out, torch.empty_like(values))]


def round_trip(codec: Codec, values: Tensor) -> Tensor:
    payload = encode(codec, values)
    assert codec.check(payload, values.numel()) is None
    out = torch.full_like(values, math.nan)
    codec.decode(payload, out)
    return out


def reference_int8(values: NDArray[np.float32]) -> bytes:
    """The layout as the module's docstring states it, element by element and without torch."""
    scales, q = b"", b""
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        scale = min(np.float32(np.abs(block).max() / np.float32(127)), np.float32(MAX_SCALE))
        if scale < np.float32(MIN_SCALE):
            scale = np.float32(0)
        quotient = np.rint(block / scale) if scale else np.zeros_like(block)
        scales += scale.astype("<f4").tobytes()
        q += quotient.astype(np.int8).tobytes()
    return scales + q


def reference_four_bits(name: CodecName, values: NDArray[np.float32]) -> bytes:
    """As :func:`reference_int8`, by the docstring of the codecs of four bits."""
    scales, codes = b"", []
    levels, least, most = {"int4": (7, 2.0**-126, float.fromhex("0x1.249248p+125")), "e3m0": (1, 2.0**-120, FLT_MAX)}[
        name
    ]
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        scale = min(np.float32(np.abs(block).max() / np.float32(levels)), np.float32(most))
        if scale < np.float32(least):
            scale = np.float32(0)
        scales += scale.astype("<f4").tobytes()
        for x in block:
            quotient = float(x / scale) if scale else 0.0
            if name == "int4":
                codes.append(int(np.rint(quotient)) & 15)
            else:
                nearest = max(range(8), key=lambda e: (-abs(abs(quotient) - E3M0_LEVELS[e]), e))
                codes.append(nearest | (8 if nearest and quotient < 0 else 0))
    pairs = zip(codes[::2], [*codes[1::2], 0], strict=False)
    return scales + bytes(low | high << 4 for low, high in pairs)


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", ODD_LENGTHS)
def test_payload_has_the_size_that_was_announced_for_any_length(codec: Codec, n: int) -> None:
    values = normal(n)
    four_bits = 4 * math.ceil(n / 256) + math.ceil(n / 2)
    sizes = {"int8": 4 * math.ceil(n / 256) + n, "int4": four_bits, "e3m0": four_bits, "fp16": 2 * n, "fp32": 4 * n}
    blocks, kept = math.ceil(n / 4096), math.ceil(n / 64)
    sizes |= {"topk": 8 * blocks + math.ceil(1.5 * kept) + math.ceil(kept / 4)}
    sizes |= {"sparse": 6 * blocks + math.ceil(n / 8) + n}  # at most
    assert codec.payload_bytes(n) == sizes[codec.name]
    if codec.name != "sparse":
        assert encode(codec, values).numel() == sizes[codec.name]
    assert round_trip(codec, values).shape == values.shape


@pytest.mark.parametrize(("name", "levels"), [("int8", 127), ("int4", 7)])
@given(values=finite_vectors)
def test_the_error_of_integers_is_at_most_half_a_scale(
    name: CodecName, levels: int, values: NDArray[np.float32]
) -> None:
    decoded = round_trip(make_codec(name), torch.from_numpy(values)).numpy()
    for start in range(0, len(values), BLOCK):
        x, y = values[start : start + BLOCK].astype(np.float64), decoded[start : start + BLOCK].astype(np.float64)
        absmax = np.abs(x).max()
        if absmax < levels * MIN_SCALE * (1 - 1e-6):
            assert not y.any()
        elif absmax > levels * MIN_SCALE * (1 + 1e-6):
            # Half a scale, and the roundings of the scale, the quotient and the product, relative 2^-24 each.
            assert np.abs(x - y).max() <= absmax / levels / 2 + 2**-22 * absmax


@given(finite_vectors)
def test_int8_bytes_are_those_of_the_documented_layout(values: NDArray[np.float32]) -> None:
    payload = encode(make_codec("int8"), torch.from_numpy(values))
    assert payload.numpy().tobytes() == reference_int8(values)


@pytest.mark.parametrize("name", FOUR_BITS)
@settings(max_examples=50)
@given(values=finite_vectors)
def test_bytes_of_four_bit_codecs_are_those_of_the_documented_layout(
    name: CodecName, values: NDArray[np.float32]
) -> None:
    payload = encode(make_codec(name), torch.from_numpy(values))
    assert payload.numpy().tobytes() == reference_four_bits(name, values)


@given(finite_vectors)
def test_e3m0_error_is_at_most_a_third_of_an_element_or_a_128th_of_the_scale(values: NDArray[np.float32]) -> None:
    decoded = round_trip(make_codec("e3m0"), torch.from_numpy(values)).numpy()
    for start in range(0, len(values), BLOCK):
        x, y = values[start : start + BLOCK].astype(np.float64), decoded[start : start + BLOCK].astype(np.float64)
        scale = np.abs(x).max() if np.abs(x).max() >= 2.0**-120 else 0.0
        if scale:
            limit = np.where(np.abs(x) >= scale / 64, np.abs(x) / 3, scale / 128)
            assert (np.abs(x - y) <= limit + 2**-22 * scale).all()
            assert (x[y != 0] * y[y != 0] > 0).all(), "the sign stays"
        else:
            assert not y.any()


@given(finite_vectors)
def test_fp16_is_that_of_ieee_754_within_its_range(values: NDArray[np.float32]) -> None:
    payload = encode(make_codec("fp16"), torch.from_numpy(values))
    assert payload.numpy().tobytes() == np.clip(values, -65504, 65504).astype("<f2").tobytes()


@given(finite_vectors)
def test_fp32_comes_back_bit_for_bit(values: NDArray[np.float32]) -> None:
    assert round_trip(make_codec("fp32"), torch.from_numpy(values)).numpy().tobytes() == values.tobytes()


@given(finite_vectors)
def test_encoding_twice_gives_the_same_bytes(values: NDArray[np.float32]) -> None:
    for name in NAMES:
        codec = make_codec(name)
        first, second = encode(codec, torch.from_numpy(values)), encode(codec, torch.from_numpy(values.copy()))
        assert torch.equal(first, second)


def test_number_of_torch_threads_does_not_change_a_bit(codec: Codec) -> None:
    values = normal(2**18 + 77)
    with torch_threads(1):
        alone = encode(codec, values)
    with torch_threads(2):
        assert torch.equal(encode(codec, values), alone)


def test_scratch_may_be_the_values_themselves(codec: Codec) -> None:
    values = normal(1000)
    expected = encode(codec, values)
    out = torch.empty_like(expected)
    codec.encode(values, out, scratch=values)
    assert torch.equal(out, expected)


def test_int8_golden_bytes() -> None:
    values = torch.tensor([1.0, -127.0, 63.5, 0.5, 1.5, 2.5])  # scale 1; ties go to even: 63.5 -> 64, 0.5 -> 0
    assert encode(make_codec("int8"), values).numpy().tobytes().hex() == "0000803f" + "018140000202"


def test_four_bit_golden_bytes() -> None:
    values = torch.tensor([1.0, -7.0, 3.5, 0.5, 1.5])  # scale 1; ties go to even: 3.5 -> 4, 0.5 -> 0, 1.5 -> 2
    assert encode(make_codec("int4"), values).numpy().tobytes().hex() == "0000803f" + "910402"
    values = torch.tensor([-1.0, 0.75, 0.74, 1 / 128, -0.0077])  # from 0.75 on it is 1, from 1/128 on it is 1/64
    assert encode(make_codec("e3m0"), values).numpy().tobytes().hex() == "0000803f" + "7f1600"


@pytest.mark.parametrize("name", WITH_SCALES)
@pytest.mark.parametrize("sign", [1, -1])
def test_zeros_stay_zero_and_have_scale_zero(name: CodecName, sign: int) -> None:
    payload = encode(make_codec(name), torch.zeros(300) * sign)
    assert not payload.any()


@pytest.mark.parametrize("value", [1.0, -3.3e-7, 12345.678, 1e-30, -1e30])
@pytest.mark.parametrize("name", WITH_SCALES)
def test_constant_block_comes_back_within_one_ulp(name: CodecName, value: float) -> None:
    values = torch.full((256,), value)
    decoded = round_trip(make_codec(name), values).numpy()
    assert np.abs(decoded - values.numpy()).max() <= np.spacing(np.abs(values.numpy())).max()


@pytest.mark.parametrize("value", [FLT_MAX, -FLT_MAX])
def test_block_that_reaches_the_largest_fp32_comes_back_finite(codec: Codec, value: float) -> None:
    values = torch.linspace(-1, 1, 256) * abs(value)
    values[7] = value
    decoded = round_trip(codec, values)
    assert torch.isfinite(decoded).all()
    if codec.name == "fp16":
        assert decoded.abs().max() == 65504
    elif codec.name != "topk":
        share = {"int8": 1 / 127 / 2, "sparse": 1 / 127 / 2, "int4": 1 / 7 / 2, "e3m0": 1 / 3, "fp32": 0.0}[codec.name]
        assert float((decoded - values).abs().max()) <= FLT_MAX * share * 1.001


@pytest.mark.parametrize(("most", "levels"), [(MAX_SCALE, 127), (Int4Codec.MOST_SCALE, 7), (E3m0Codec.MOST_SCALE, 1)])
def test_largest_scale_is_the_largest_that_is_finite_times_the_largest_code(most: float, levels: int) -> None:
    with np.errstate(over="ignore"):
        scale = torch.tensor([most, float(np.nextafter(np.float32(most), np.float32(np.inf)))])
    assert torch.isfinite(scale * levels).tolist() == [True, False]


@pytest.mark.parametrize("absmax", [1e-45, 2.66e-43, 1e-40, 1e-38, 1.4e-36])
@pytest.mark.parametrize("name", WITH_SCALES)
def test_block_whose_scale_would_be_denormal_becomes_zero(name: CodecName, absmax: float) -> None:
    values = torch.linspace(-absmax, absmax, 256) * (LARGEST_CODE[name] / 127)
    assert not round_trip(make_codec(name), values).any()


@pytest.mark.parametrize("name", WITH_SCALES)
def test_denormals_beside_normal_values_become_zero(name: CodecName) -> None:
    values = torch.tensor([1e-40, 1.0, -1e-45])
    assert round_trip(make_codec(name), values).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("name", WITH_SCALES)
def test_what_is_decoded_is_never_denormal(name: CodecName) -> None:
    values = torch.cat([torch.logspace(-40, -34, 1000), torch.logspace(-36, -35, 25)])
    decoded = round_trip(make_codec(name), values)
    assert not ((decoded != 0) & (decoded.abs() < MIN_SCALE)).any()


def test_denormals_survive_fp32() -> None:
    values = torch.tensor([1e-40, -1e-45, 0.0, -0.0])
    assert as_bytes(round_trip(make_codec("fp32"), values)) == as_bytes(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 255, 256, 299])
def test_element_that_is_not_finite_is_an_error_and_leaves_the_values_alone(
    codec: Codec, bad: float, position: int
) -> None:
    values = normal(300)
    values[position] = bad
    before = values.clone()
    with pytest.raises(NonFiniteError):
        codec.encode(values, torch.empty(codec.payload_bytes(300), dtype=torch.uint8), scratch=values)
    assert as_bytes(values) == as_bytes(before)


@pytest.mark.parametrize("n", [1, 257])
@pytest.mark.parametrize("change", [-1, 1, 256])
def test_payload_of_the_wrong_size_is_refused(codec: Codec, n: int, change: int) -> None:
    payload = torch.zeros(codec.payload_bytes(n) + change, dtype=torch.uint8)
    assert "bytes instead of" in (codec.check(payload, n) or "")


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (math.nan, "NaN"),
        (math.inf, "infinite"),
        (-math.inf, "infinite"),
        (-1.0, "negative"),
        (2.7e36, "above"),
        (1e-40, "denormal"),
    ],
)
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("name", WITH_SCALES)
def test_scale_that_decodes_to_nonsense_is_refused(name: CodecName, scale: float, reason: str, block: int) -> None:
    codec = make_codec(name)
    if reason == "above":
        scale *= 127 / LARGEST_CODE[name]
        reason = "infinite" if name == "e3m0" else reason  # what is above its largest scale is not finite itself
    payload = encode(codec, normal(300))
    payload[4 * block : 4 * block + 4].copy_(torch.tensor([scale]).view(torch.uint8))
    assert reason in (codec.check(payload, 300) or "")


def test_value_of_minus_128_is_refused() -> None:
    codec = make_codec("int8")
    payload = encode(codec, normal(300))
    payload[-1] = 0x80
    assert "-128" in (codec.check(payload, 300) or "")


@pytest.mark.parametrize("name", FOUR_BITS)
@pytest.mark.parametrize(("at", "byte"), [(8, 0x18), (8, 0x81), (-1, 0x08), (-1, 0x80)])
def test_code_that_is_a_sign_alone_is_refused(name: CodecName, at: int, byte: int) -> None:
    codec = make_codec(name)
    payload = encode(codec, normal(300))
    payload[at] = byte
    assert "a code is 8" in (codec.check(payload, 300) or "")


@pytest.mark.parametrize("name", FOUR_BITS)
def test_code_beyond_the_last_element_is_refused(name: CodecName) -> None:
    codec = make_codec(name)
    payload = encode(codec, normal(301))
    assert codec.check(payload, 301) is None
    payload[-1] |= 0x10
    assert "odd" in (codec.check(payload, 301) or "")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_floating_point_payload_that_is_not_finite_is_refused(name: CodecName, dtype: torch.dtype, bad: float) -> None:
    codec = make_codec(name)
    payload = encode(codec, normal(300))
    payload[-dtype.itemsize :].copy_(torch.tensor([bad], dtype=dtype).view(torch.uint8))
    assert "NaN or infinite" in (codec.check(payload, 300) or "")


@settings(max_examples=200)
@given(n=st.integers(1, 300), data=st.binary(min_size=2000, max_size=2000))
def test_whatever_passes_the_check_decodes_to_finite_numbers(n: int, data: bytes) -> None:
    for name in NAMES:
        codec = make_codec(name)
        payload = torch.frombuffer(bytearray(data[: codec.payload_bytes(n)]), dtype=torch.uint8)
        if codec.check(payload, n) is None:
            out = torch.empty(n)
            codec.decode(payload, out)
            assert torch.isfinite(out).all()


def test_decoding_with_a_weight_multiplies_the_scales() -> None:
    codec, weight = make_codec("int8"), float(np.float32(1 / 3))
    payload = encode(codec, normal(300))
    out = torch.empty(300)
    codec.decode(payload, out, weight)
    raw = as_bytes(payload)
    scales = np.frombuffer(raw[:8], "<f4") * np.float32(weight)
    expected = np.frombuffer(raw[8:], np.int8).astype(np.float32) * np.repeat(scales, BLOCK)[:300]
    assert out.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize(("name", "most"), [("int8", 0.0105), ("int4", 0.15), ("e3m0", 0.21), ("fp16", 0.0003)])
def test_one_quantisation_of_normal_data_is_off_by_less_than(name: CodecName, most: float) -> None:
    values = normal(2**18)
    error = float((round_trip(make_codec(name), values) - values).norm() / values.norm())
    print(f"relative L2 error of one quantisation, {name}: {100 * error:.3f} %")
    assert most / 3 < error < most


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_payload_may_lie_at_any_address(codec: Codec, offset: int) -> None:
    values = normal(300)
    payload = encode(codec, values)
    frame = bytearray(offset + payload.numel())
    frame[offset:] = as_bytes(payload)
    moved = as_tensor(memoryview(frame)[offset:])
    assert codec.check(moved, 300) is None
    out, expected = torch.empty(300), torch.empty(300)
    codec.decode(moved, out)
    codec.decode(payload, expected)
    assert torch.equal(out, expected)


def test_read_only_buffer_becomes_a_tensor_without_a_copy_or_a_warning() -> None:
    data = bytes(range(10))
    tensor = as_tensor(memoryview(data))
    assert tensor.data_ptr() == np.frombuffer(data, np.uint8).ctypes.data
    assert tensor.tolist() == list(range(10))


def test_tensor_keeps_the_buffer_alive() -> None:
    class Owner(np.ndarray[tuple[int], np.dtype[np.uint8]]):
        """An array that can be referred to weakly."""

    owner = np.arange(1000, dtype=np.uint8).view(Owner)
    gone = threading.Event()
    weakref.finalize(owner, gone.set)
    view = as_tensor(owner.data)[500:]
    del owner
    gc.collect()
    assert not gone.is_set()
    assert int(view[0]) == 500 % 256
    del view
    gc.collect()
    assert gone.is_set()


def test_empty_buffer_becomes_an_empty_tensor() -> None:
    assert as_tensor(memoryview(b"")).numel() == 0
