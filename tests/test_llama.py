"""The architecture: each part against an independent reference, the sizes against their names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prime_async.errors import ConfigError
from prime_async.work.llama import (
    Cache,
    Llama,
    LlamaConfig,
    build_llama,
    cross_entropy,
    fill_normal,
    max_z,
    rotary,
    rotate,
)
from prime_async.work.sizes import SIZES, estimate_memory, named_size, parameter_count

TINY = LlamaConfig(vocab_size=50, width=32, layers=3, heads=4, kv_heads=2, ffn_width=48, init_std=0.2)


GOLDEN_INITIAL = "995924bcae477fbbe1fa2c3b29dc5cbb"


def tokens_of(seed: int, batch_size: int, length: int) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-360k", 0.36e6),
        ("llama-1m", 1e6),
        ("llama-10m", 10e6),
        ("llama-100m", 100e6),
        ("llama-150m", 150e6),
        ("llama-1b", 1e9),
        ("llama-10b", 10e9),
    ],
)
def test_a_size_has_about_as_many_parameters_as_its_name_says(name: str, parameters: float) -> None:
    assert parameter_count(SIZES[name]) == pytest.approx(parameters, rel=0.04)


def test_the_10b_size_has_exactly_the_parameters_of_its_shape() -> None:
    attention = 2 * 4096 * 4096 + 2 * 4096 * (8 * 128)
    mlp = 3 * 4096 * 14336
    norms = 2 * 4096
    assert parameter_count(SIZES["llama-10b"]) == 42 * (attention + mlp + norms) + 2 * 128256 * 4096 + 4096


def test_every_size_is_in_the_list_that_is_tested() -> None:
    assert list(SIZES) == ["llama-360k", "llama-1m", "llama-10m", "llama-100m", "llama-150m", "llama-1b", "llama-10b"]


def test_a_size_takes_the_vocabulary_of_the_data() -> None:
    assert named_size("llama-1m", 1000).vocab_size == 1000
    assert named_size("llama-1m").vocab_size == 256


def test_an_unknown_size_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r'\[run\] model = "llama-7b".*llama-1m, llama-10m'):
        named_size("llama-7b")


def test_a_shape_that_cannot_be_is_refused_with_all_that_is_wrong() -> None:
    with pytest.raises(ConfigError) as caught:
        LlamaConfig(vocab_size=10, width=30, layers=1, heads=4, kv_heads=3, ffn_width=8)
    assert len(caught.value.problems) == 2


def test_memory_grows_with_parameters_and_batch() -> None:
    small, large = (estimate_memory(SIZES["llama-1m"], batch, 128) for batch in (1, 16))
    assert small.device_bytes > 16 * parameter_count(SIZES["llama-1m"])
    assert large.device_bytes > small.device_bytes
    assert small.host_bytes == large.host_bytes == 10 * parameter_count(SIZES["llama-1m"])


def test_parameters_have_the_names_of_hugging_face() -> None:
    names = set(dict(Llama(TINY).named_parameters()))
    layer = {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    }
    assert names == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.{i}.{name}" for i in range(3) for name in layer),
    }


def test_tied_embeddings_are_one_parameter() -> None:
    assert "lm_head.weight" not in dict(Llama(SIZES["llama-1m"]).named_parameters())


def test_rotary_positions_agree_with_multiplication_of_complex_numbers() -> None:
    length, width, theta = 7, 8, 10_000.0
    x = torch.randn(2, 3, length, width, generator=torch.Generator().manual_seed(1))
    # reference: element i and i + K/2 are a complex number, which position p turns by p * theta^(-2i/K)
    pairs = torch.complex(x[..., : width // 2].double(), x[..., width // 2 :].double())
    angles = [[p * theta ** (-2 * i / width) for i in range(width // 2)] for p in range(length)]
    turned = pairs * torch.polar(torch.ones(length, width // 2).double(), torch.tensor(angles).double())
    expected = torch.cat((turned.real, turned.imag), dim=-1)

    got = rotate(x, *rotary(torch.arange(length), width, theta))

    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def test_grouped_queries_equal_full_heads_with_repeated_keys_and_values() -> None:
    grouped = build_llama(TINY, 0)
    full = Llama(LlamaConfig(vocab_size=50, width=32, layers=3, heads=4, kv_heads=4, ffn_width=48))
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = weight.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(weights)
    tokens = tokens_of(2, 2, 9)

    torch.testing.assert_close(grouped(tokens), full(tokens))


def test_a_layer_computes_what_its_papers_say() -> None:
    """Reference: one layer written out with loops over positions, in fp64 and without fused operations."""
    config = LlamaConfig(vocab_size=11, width=8, layers=1, heads=2, kv_heads=2, ffn_width=12, init_std=0.3)
    model = build_llama(config, 3)
    w = {name: value.double() for name, value in model.state_dict().items()}
    tokens = torch.tensor([[3, 1, 4, 1, 5]])

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)

    def project(x: Tensor, name: str) -> Tensor:
        weight: Tensor = w[f"model.layers.0.{name}_proj.weight"]
        return x @ weight.T

    x = w["model.embed_tokens.weight"][tokens[0]]  # (T, D)
    cosines, sines = (table.double() for table in rotary(torch.arange(5), 4, config.rope_theta))
    q, k, v = (project(norm(x), f"self_attn.{p}").view(5, 2, 4).transpose(0, 1) for p in "qkv")
    q, k = rotate(q[None], cosines, sines)[0], rotate(k[None], cosines, sines)[0]
    mixed = torch.zeros(5, 2, 4, dtype=torch.float64)
    for head in range(2):
        for t in range(5):
            attention = torch.softmax(k[head, : t + 1] @ q[head, t] / math.sqrt(4), dim=0)
            mixed[t, head] = attention @ v[head, : t + 1]
    x = x + project(mixed.flatten(1), "self_attn.o")
    gate = project(norm(x), "mlp.gate")
    x = x + project(gate * torch.sigmoid(gate) * project(norm(x), "mlp.up"), "mlp.down")
    expected = norm(x) @ w["lm_head.weight"].T

    torch.testing.assert_close(model(tokens)[0].double(), expected, rtol=0, atol=1e-5)


def test_a_later_token_does_not_change_earlier_logits() -> None:
    model = build_llama(TINY, 0)
    tokens = tokens_of(4, 1, 12)
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % TINY.vocab_size

    before, after = model(tokens), model(changed)

    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=1e-6)
    assert (before[:, 8:] - after[:, 8:]).abs().amax() > 1e-3


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 6], [4, 4, 4]])
def test_logits_with_a_cache_are_those_without(pieces: list[int]) -> None:
    model = build_llama(TINY, 0)
    tokens = tokens_of(5, 2, 12)
    cache = Cache(TINY, 2, 12, torch.device("cpu"))

    with torch.no_grad():
        got = torch.cat([model(piece, cache) for piece in torch.split(tokens, pieces, dim=1)], dim=1)

    assert cache.length == 12
    torch.testing.assert_close(got, model(tokens), rtol=1e-5, atol=1e-5)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    first = build_llama(TINY, 7).state_dict()
    torch.manual_seed(2)
    again, other = build_llama(TINY, 7).state_dict(), build_llama(TINY, 8).state_dict()

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    q, k = first["model.layers.0.self_attn.q_proj.weight"], first["model.layers.1.self_attn.q_proj.weight"]
    assert not torch.equal(q, k)


def test_initial_values_are_the_same_bits_everywhere() -> None:
    """The golden values were computed in Python integers from Philox's raw words."""
    values = torch.empty(4)
    fill_normal(values, 0.02, 7, "lm_head.weight")
    assert values.numpy().tobytes().hex() == GOLDEN_INITIAL


def test_initial_values_are_normal() -> None:
    values = torch.empty(200_000)
    fill_normal(values, 0.02, 0, "x")
    z = values.double() / 0.02
    assert abs(float(z.mean())) < 0.01
    assert float(z.std()) == pytest.approx(1, abs=0.01)
    for sigmas in (1.0, 2.0, 3.0):
        within = float((z.abs() < sigmas).double().mean())
        assert within == pytest.approx(math.erf(sigmas / math.sqrt(2)), abs=0.005)


def test_matrices_that_write_to_the_residual_stream_begin_smaller_and_norms_at_one() -> None:
    config = LlamaConfig(vocab_size=256, width=128, layers=8, heads=4, kv_heads=4, ffn_width=256)
    weights = build_llama(config, 0).state_dict()
    layer = "model.layers.3"
    assert float(weights[f"{layer}.self_attn.q_proj.weight"].std()) == pytest.approx(0.02, rel=0.05)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert float(weights[f"{layer}.{name}.weight"].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert torch.equal(weights[f"{layer}.input_layernorm.weight"], torch.ones(128))


def test_losses_are_what_their_formulas_say() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(6))
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    rows = zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True)
    expected = sum(math.log(sum(math.exp(x) for x in row)) - row[target] for row, target in rows) / 6
    assert float(cross_entropy(logits, targets)) == pytest.approx(expected, rel=1e-5)
    assert float(max_z(logits)) == pytest.approx(sum(max(row) ** 2 for row in logits.flatten(0, 1).tolist()) / 6)


def test_losses_of_bf16_logits_are_computed_in_fp32() -> None:
    logits = torch.randn(1, 4, 300, generator=torch.Generator().manual_seed(6)).bfloat16()
    targets = torch.tensor([[0, 1, 2, 299]])
    expected = F.cross_entropy(logits[0].double(), targets[0])
    assert float(cross_entropy(logits, targets)) == pytest.approx(float(expected), rel=1e-5)
