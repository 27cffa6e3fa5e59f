"""The Llama architecture (arXiv 2302.13971), with the parameter names of Hugging Face transformers.

Pre-normalisation with RMSNorm (1910.07467), rotary positions (2104.09864) in the rotate-half convention, grouped
query attention (2305.13245) and SwiGLU (2002.05202). Shapes: B sequences, T tokens, D width, H heads, G key and value
heads, K elements per head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor, nn
from torch.nn import functional as F

from prime_async.errors import ConfigError

EMBEDDING = "model.embed_tokens.weight"
"""The parameter of the tokens' vectors, ``(V, D)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """What makes one Llama differ from another."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn_width: int
    rope_theta: float = 10_000.0
    tied_embeddings: bool = False
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        problems = []
        if self.width % self.heads or (self.width // self.heads) % 2:
            problems.append(f"width {self.width}: must be an even multiple of the {self.heads} heads")
        if self.heads % self.kv_heads:
            problems.append(f"kv_heads {self.kv_heads}: must divide the {self.heads} heads")
        if problems:
            raise ConfigError(problems)

    @property
    def head_width(self) -> int:
        """K: elements per head."""
        return self.width // self.heads


class Cache:
    """The keys and values of the tokens already seen: for generation, where each token is computed once."""

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Room for ``capacity`` tokens, made once. ``dtype``: what the model computes in."""
        shape = (config.layers, batch_size, config.kv_heads, capacity, config.head_width)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``(B, G, T, K)`` behind ``length``; returns all of the layer's, ``(B, G, length + T, K)``.

        The model advances ``length`` after its last layer.
        """
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def rotary(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``(T, K)`` fp32 each, of the angles by which position ``(T,)`` turns each pair."""
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    angles = positions.to(torch.float32)[:, None] / theta**exponents
    both_halves = torch.cat((angles, angles), dim=-1)
    return both_halves.cos(), both_halves.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of ``x`` ``(B, H, T, K)``; in fp32, and back to the dtype of ``x``."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cosines + turned * sines).to(x.dtype)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with H heads of queries and G of keys and values."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_width = config.head_width
        self.q_proj = nn.Linear(config.width, config.heads * config.head_width, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_width, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_width, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_width, config.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        """``(B, T, D)`` to ``(B, T, D)``."""
        queries = rotate(self._heads(self.q_proj(x)), *rope)
        keys = rotate(self._heads(self.k_proj(x)), *rope)
        values = self._heads(self.v_proj(x))
        if cache is not None:
            keys, values = cache.extend(self.layer, keys, values)
        mixed = _attend(queries, keys.to(queries.dtype), values.to(queries.dtype))
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """``(B, T, heads * K)`` to ``(B, heads, T, K)``."""
        return x.view(*x.shape[:-1], -1, self.head_width).transpose(1, 2)


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``(B, H, T, K)``, of T queries that are the last of S keys ``(B, G, S, K)``."""
    count, seen = queries.shape[2], keys.shape[2]
    grouped = queries.shape[1] != keys.shape[1]
    mask = None
    if 1 < count < seen:  # is_causal would align the first query with the first key
        mask = torch.ones(count, seen, dtype=torch.bool, device=queries.device).tril(seen - count)
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=count == seen and count > 1, enable_gqa=grouped
    )


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, D)`` to ``(B, T, D)``."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention, then SwiGLU, each on the normalised residual stream."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        """``(B, T, D)`` to ``(B, T, D)``."""
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Backbone(nn.Module):
    """All but the output matrix; the attribute names are those of Hugging Face's ``LlamaModel``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        # On the meta device nn.Embedding's own first values would import torch's compiler, nearly a second of CPU time.
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            torch.empty(config.vocab_size, config.width), freeze=False
        )
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)


class Llama(nn.Module):
    """Tokens to logits. Its parameters are not initialised: see :func:`build_llama`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = None if config.tied_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits ``(B, T, V)`` of the token after each of ``tokens`` ``(B, T)`` int64, in the dtype of autocast."""
        first = 0 if cache is None else cache.length
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        rope = rotary(positions, self.config.head_width, self.config.rope_theta)
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, rope, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(self.model.norm(x), head.weight)


def build_llama(config: LlamaConfig, seed: int) -> Llama:
    """A Llama on the host with weights that depend on ``config`` and ``seed`` alone.

    Matrices are normal with ``init_std``; those that write to the residual stream are divided by sqrt(2 layers), so
    that its size does not grow with the depth (GPT-2). Norm weights are one.
    """
    model = _uninitialised(config)
    residual_std = config.init_std / math.sqrt(2 * config.layers)
    for name, parameter in model.named_parameters():
        values = parameter.detach().view(-1)
        if parameter.ndim == 1:
            values.fill_(1.0)
            continue
        std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else config.init_std
        fill_normal(values, std, seed, name)
    return model


def empty_llama(config: LlamaConfig) -> Llama:
    """A Llama on the host whose weights are all zero."""
    model = _uninitialised(config)
    for parameter in model.parameters():
        parameter.detach().zero_()
    return model


def load_llama(config: LlamaConfig, weights: Mapping[str, Tensor]) -> Llama:
    """A Llama whose parameters are ``weights`` themselves, by name: no copy is made.

    Raises :class:`~prime_async.errors.ConfigError` if they are not those of ``config``.
    """
    model = _without_weights(config)
    try:
        model.load_state_dict(dict(weights), strict=True, assign=True)
    except RuntimeError as error:
        raise ConfigError([f"the weights are not those of {config}: {error}"]) from error
    return model


def _without_weights(config: LlamaConfig) -> Llama:
    with torch.device("meta"):
        return Llama(config)


def _uninitialised(config: LlamaConfig) -> Llama:
    """A Llama on the host whose weights are whatever the memory held.

    As ``to_empty`` would make it, which imports sympy on the way, a fifth of a second of CPU time.
    """
    model = _without_weights(config)
    model.load_state_dict({name: torch.empty(p.shape) for name, p in model.named_parameters()}, assign=True)
    return model


def fill_normal(out: Tensor, std: float, seed: int, name: str) -> None:
    """Fill host ``out`` ``(n,)`` fp32 with normal values that are a pure function of ``seed`` and ``name``.

    The same bits on every processor, which torch's own generator does not promise (its Box-Muller uses the vector
    unit's logarithm): all nodes of a run must begin with equal weights. Each value is the sum of 12 uniform 16-bit
    integers, whose variance is 1 (Irwin-Hall; it ends at 6 standard deviations), so that all but the last
    multiplication is done in integers.
    """
    key = np.array([seed, int.from_bytes(blake3(name.encode()).digest(8), "little")], dtype=np.uint64)
    source = np.random.Philox(key=key)
    scale = np.float32(std / 2**16)
    values = out.numpy()
    for start, stop in _pieces(len(values), 2**16):
        words = source.random_raw(3 * (stop - start)).astype("<u8", copy=False)
        sums = words.view("<u2").reshape(-1, 12).sum(axis=1, dtype=np.int32) - 6 * 65535
        np.multiply(sums.astype(np.float32), scale, out=values[start:stop])


def _pieces(n: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, n)) for start in range(0, n, size))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all tokens, in nats: a scalar, of ``logits`` ``(B, T, V)`` and ``targets`` ``(B, T)`` int64."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def max_z(logits: Tensor) -> Tensor:
    """Mean square of each token's largest logit: a scalar. Keeps logits small, so that bf16 keeps their differences.

    The max-z loss of Baichuan 2 (arXiv 2309.10305, with weight 2e-4), which INTELLECT-1 used too (2412.01152).
    """
    return logits.float().amax(dim=-1).square().mean()
