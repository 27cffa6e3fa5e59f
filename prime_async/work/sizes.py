"""Named sizes, and what a size costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prime_async.config.schema import NodeSettings, RunSpec
from prime_async.errors import ConfigError
from prime_async.work.chunks import USUAL_CONTRIBUTORS
from prime_async.work.codec import make_codec, mean_payload_bytes
from prime_async.work.llama import EMBEDDING, Llama, LlamaConfig

BYTES = 256  # vocabulary of the byte tokenizer
LLAMA_2 = 32_000
LLAMA_3 = 128_256

SIZES = {
    "llama-360k": LlamaConfig(  # for `prime-async lab`: many runs of many workers on one machine
        vocab_size=BYTES, width=96, layers=3, heads=3, kv_heads=3, ffn_width=256, tied_embeddings=True, init_std=0.05
    ),
    "llama-1m": LlamaConfig(  # of eight shapes with 1 M parameters the best loss per second of a CPU's core
        vocab_size=BYTES,
        width=160,
        layers=3,
        heads=5,
        kv_heads=5,
        ffn_width=448,
        tied_embeddings=True,
        init_std=0.05,  # 0.02 is for wider models: here it reached 2.08 nats where 0.05 reached 1.99
    ),
    "llama-10m": LlamaConfig(
        vocab_size=BYTES, width=384, layers=6, heads=6, kv_heads=6, ffn_width=960, tied_embeddings=True
    ),
    "llama-100m": LlamaConfig(
        vocab_size=LLAMA_2, width=768, layers=12, heads=12, kv_heads=12, ffn_width=1792, tied_embeddings=True
    ),
    "llama-150m": LlamaConfig(
        vocab_size=LLAMA_2, width=896, layers=12, heads=14, kv_heads=14, ffn_width=2560, tied_embeddings=True
    ),
    "llama-1b": LlamaConfig(
        vocab_size=LLAMA_3,
        width=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        ffn_width=5632,
        rope_theta=500_000.0,
        tied_embeddings=True,
    ),
    "llama-10b": LlamaConfig(  # INTELLECT-1's (arXiv 2412.01152): Llama 3 8B with ten more layers
        vocab_size=LLAMA_3, width=4096, layers=42, heads=32, kv_heads=8, ffn_width=14336, rope_theta=500_000.0
    ),
}


def named_size(name: str, vocab_size: int | None = None) -> LlamaConfig:
    """The size called ``name``, with the vocabulary of the data in place of its own if that is given."""
    config = SIZES.get(name)
    if config is None:
        known = ", ".join(SIZES)
        raise ConfigError([f'[run] model = "{name}": not a named size ({known}), nor "package.module:factory"'])
    return config if vocab_size is None else replace(config, vocab_size=vocab_size)


def run_size(run: RunSpec, vocab_size: int) -> LlamaConfig:
    """The shape of a run's Llama, by its name or number by number, with the vocabulary of the data.

    Raises :class:`~prime_async.errors.ConfigError` if ``run.model`` is neither.
    """
    if run.model != "llama":
        return named_size(run.model, vocab_size)
    shape = run.llama
    return LlamaConfig(
        vocab_size=vocab_size,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        ffn_width=shape.ffn_width,
        rope_theta=shape.rope_theta,
        norm_eps=shape.norm_eps,
        tied_embeddings=shape.tied_embeddings,
    )


def llama_shape(run: RunSpec, weights: Mapping[str, Tensor]) -> LlamaConfig:
    """The shape of the Llama that ``weights``, by the parameters' names, are of, trained by ``run``.

    Raises :class:`~prime_async.errors.ConfigError` if ``run.model`` is not a Llama of ours.
    """
    table = weights.get(EMBEDDING)
    if ":" in run.model or table is None:
        raise ConfigError([f'[run] model = "{run.model}": a model of your own, not a Llama: its code alone knows it'])
    return run_size(run, len(table))


def parameter_count(config: LlamaConfig) -> int:
    """Elements of all parameters, tied ones once. Takes no memory."""
    with torch.device("meta"):
        model = Llama(config)
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a node needs, roughly; activations are the uncertain part."""

    device_bytes: int
    host_bytes: int


def estimate_memory(config: LlamaConfig, micro_batch_size: int, sequence_length: int) -> MemoryEstimate:
    """Of a node that trains: on a CPU, device and host bytes add up.

    Per parameter on the device: weights 4, gradients 4, AdamW 8. On the host: outer weights and momentum 8,
    contribution 1, mean 1.
    """
    parameters = parameter_count(config)
    activations = micro_batch_size * sequence_length * _activation_bytes_per_token(config)
    return MemoryEstimate(device_bytes=16 * parameters + activations, host_bytes=10 * parameters)


def _activation_bytes_per_token(config: LlamaConfig) -> int:
    """What the backward pass needs, in fp32: with bf16 autocast the matrices' inputs take half of it."""
    attention = 6 * config.width + 3 * config.kv_heads * config.head_width  # residual, norm, q, rotations, k, v, mixed
    mlp = 2 * config.width + 4 * config.ffn_width
    logits = 3 * config.vocab_size  # logits, their fp32 copy, and the gradient
    return 4 * (config.layers * (attention + mlp) + logits)


@dataclass(frozen=True, slots=True)
class DiskEstimate:
    """What a node's directory holds at most, without audits and message logs. ``grows``: of means, more and more."""

    snapshot_bytes: int
    mean_bytes: int
    inner_bytes: int
    grows: bool

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.snapshot_bytes + self.mean_bytes + self.inner_bytes


def estimate_disk(run: RunSpec, node: NodeSettings, parameters: int) -> DiskEstimate:
    """Of a node that has run for a while, while it writes a snapshot: those that are kept, and that one.

    The means of ``keep_rounds`` rounds are kept, and all since the oldest snapshot that is: with ``snapshot_every`` 0
    all of the run. The inner optimiser's state is 8 bytes per parameter, what topk dropped 4 more; both are there twice
    while they are written.
    """
    codec, chunk = make_codec(run.exchange.codec_of_means), run.exchange.chunk_elements
    mean = mean_payload_bytes(codec, chunk, USUAL_CONTRIBUTORS) * parameters // (chunk * run.fragment_count)
    since = node.keep_snapshots * node.snapshot_every or run.rounds
    moments = 8 * (run.inner.optimizer != "sgd")
    residual = 4 * (run.exchange.codec == "topk" and run.exchange.error_feedback)
    return DiskEstimate(
        snapshot_bytes=8 * parameters * (node.keep_snapshots + 1),
        mean_bytes=mean * max(node.keep_rounds, since),
        inner_bytes=2 * (moments + residual) * parameters * (not node.witness),
        grows=node.snapshot_every == 0 and run.rounds == 0,
    )
