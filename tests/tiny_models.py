"""Nodes of a run whose model is tiny, without a network: their workloads, and exchanges among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from prime_async.config.schema import (
    ContributionCodec,
    ExchangeSettings,
    InnerSettings,
    OuterSettings,
    RoundSettings,
    RunSpec,
)
from prime_async.ledger import Ledger
from prime_async.work.codec import make_codec
from prime_async.work.corpus import open_shakespeare
from prime_async.work.device import Device
from prime_async.work.diloco import DilocoWorkload
from prime_async.work.inner import InnerTrainer, list_spans
from prime_async.work.llama import LlamaConfig, build_llama
from prime_async.work.outer import OuterState
from prime_async.work.schedule import pace
from prime_async.work.witness import OuterWorkload
from prime_async.work.workload import StepReport, Workload

TINY = LlamaConfig(vocab_size=256, width=48, layers=2, heads=4, kv_heads=2, ffn_width=96, tied_embeddings=True)
CHUNK = 2**14


def run_spec(
    codec: ContributionCodec = "int8",
    inner_steps: int = 3,
    inner: InnerSettings | None = None,
    outer: OuterSettings | None = None,
) -> RunSpec:
    return RunSpec(
        name="test",
        sequence_length=32,
        seed=7,
        rounds=8,
        round=RoundSettings(inner_steps=inner_steps),
        inner=inner or InnerSettings(batch_size=8, learning_rate=5e-3, warmup_steps=5),
        outer=outer or OuterSettings(),
        exchange=ExchangeSettings(codec=codec, chunk_elements=CHUNK),
    )


def tiny_workload(run: RunSpec, stream: int) -> DilocoWorkload:
    trainer = InnerTrainer(build_llama(TINY, run.seed), open_shakespeare(run.seed), run, Device.open("cpu"), stream)
    outer = OuterState(
        trainer.flat.clone(), run.exchange.chunk_elements, run.outer, run.fragment_count, 0, run.warmup_sync_steps
    )
    codec, mean_codec = make_codec(run.exchange.codec), make_codec(run.exchange.codec_of_means)
    return DilocoWorkload(
        trainer,
        outer,
        codec,
        pace(run),
        1,
        mean_codec,
        overlaps=run.overlaps,
        error_feedback=run.exchange.error_feedback,
        eager=run.mode == "eager",
    )


def tiny_witness(run: RunSpec) -> OuterWorkload:
    model = build_llama(TINY, run.seed)
    spans = list_spans(model)
    theta = torch.cat([model.get_parameter(span.name).detach().flatten() for span in spans])
    outer = OuterState(theta, run.exchange.chunk_elements, run.outer, 1, 0, run.warmup_sync_steps)
    codec, mean_codec = make_codec(run.exchange.codec), make_codec(run.exchange.codec_of_means)
    return OuterWorkload(outer, spans, codec, mean_codec=mean_codec)


def hand_over(source: Workload, target: Workload) -> bytes:
    """``target`` imports the state of ``source``."""
    for chunk in range(source.chunk_count):
        target.import_state(chunk, memoryview(source.export_state(chunk)))
    return target.end_import(source.round)


def ignore(report: StepReport) -> None:
    pass


def encoded(node: Workload, chunk: int) -> memoryview:
    out = memoryview(bytearray(node.payload_bytes(chunk)))
    node.encode(chunk, out)
    return out.toreadonly()  # as a received frame is


def exchange(nodes: Sequence[Workload], weights: Sequence[int] | None = None) -> list[bytes]:
    """All chunks of a round: each is reduced by one node, and applied by all. Returns the digests."""
    for chunk in range(nodes[0].chunk_count):
        payloads = [encoded(node, chunk) for node in nodes]
        mean = memoryview(bytearray(nodes[0].mean_bytes(chunk)))
        owner = nodes[chunk % len(nodes)]
        made = owner.reduce(chunk, payloads, weights or [1] * len(nodes), mean, owner.round)
        assert made.left_out == []
        for node, payload in zip(nodes, payloads, strict=True):
            node.apply(chunk, mean[: made.size].toreadonly(), included=True, own=payload)
    return [node.end_round() for node in nodes]


def committed(node: Workload, others: Sequence[Workload], included: bool = False) -> bytes:
    """A round in which ``others`` contribute, applied by all. Returns the digest of ``node``."""
    for chunk in range(node.chunk_count):
        mean = memoryview(bytearray(node.mean_bytes(chunk)))
        payloads = [encoded(other, chunk) for other in others]
        others[0].reduce(chunk, payloads, [1] * len(others), mean, node.round)
        for other in others:
            other.apply(chunk, mean, included=True)
        node.apply(chunk, mean, included)
    digests = {other.end_round() for other in others} | {node.end_round()}
    assert len(digests) == 1
    return digests.pop()


def local_weights(node: DilocoWorkload) -> torch.Tensor:
    return node.trainer.flat


def outer_weights(node: Workload) -> torch.Tensor:
    halves = [node.export_state(c)[: node.state_bytes(c) // 2] for c in range(node.chunk_count)]
    return torch.from_numpy(np.frombuffer(b"".join(halves), np.float32).copy())


def kept(directory: Path, workload: OuterWorkload) -> Ledger:
    """Where ``workload`` is kept."""
    return Ledger(directory, bytes(32), {}, workload, run_spec().exchange.chunk_elements)
