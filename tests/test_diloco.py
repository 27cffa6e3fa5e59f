"""DiLoCo over a real trainer: replicas agree bit for bit after every round, and int8 costs next to nothing.

Whole rounds run in this process, without a network: what travels is what the protocol lets travel.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prime_async.config.schema import (
    ExchangeSettings,
    InnerSettings,
    NodeSettings,
    OuterSettings,
    RoundSettings,
    RunSpec,
)
from prime_async.errors import LocalError, NonFiniteError, ProtocolError
from prime_async.work.buffer_workload import BufferWorkload
from prime_async.work.codec import CodecName, Int8Codec, make_codec
from prime_async.work.corpus import open_shakespeare
from prime_async.work.device import Device
from prime_async.work.diloco import DilocoWorkload, build_workload
from prime_async.work.inner import InnerTrainer
from prime_async.work.llama import LlamaConfig, build_llama
from prime_async.work.outer import OuterState
from prime_async.work.workload import StepReport, Workload

TINY = LlamaConfig(vocab_size=256, width=48, layers=2, heads=4, kv_heads=2, ffn_width=96, tied_embeddings=True)
CHUNK = 2**14


def run_spec(
    codec: CodecName = "int8",
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
    outer = OuterState(trainer.flat.clone(), run.exchange.chunk_elements, run.outer)
    return DilocoWorkload(trainer, outer, make_codec(run.exchange.codec), run.round.inner_steps, threads=1)


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
        mean = memoryview(bytearray(nodes[0].payload_bytes(chunk)))
        owner = nodes[chunk % len(nodes)]
        assert owner.reduce(chunk, payloads, weights or [1] * len(nodes), mean) == []
        for node in nodes:
            node.apply(chunk, mean.toreadonly(), included=True)
    return [node.end_round() for node in nodes]


def local_weights(node: DilocoWorkload) -> torch.Tensor:
    return node.trainer.flat


def outer_weights(node: DilocoWorkload) -> torch.Tensor:
    halves = [node.export_state(c)[: node.state_bytes(c) // 2] for c in range(node.chunk_count)]
    return torch.from_numpy(np.frombuffer(b"".join(halves), np.float32).copy())


def test_four_nodes_agree_bit_for_bit_after_every_round() -> None:
    nodes = [tiny_workload(run_spec(), stream) for stream in range(4)]
    start = {node.state_digest() for node in nodes}
    assert len(start) == 1
    seen = set(start)
    for number in range(1, 4):
        for node in nodes:
            node.train(3, ignore)
        assert len({local_weights(node).numpy().tobytes() for node in nodes}) == 4  # other data, other weights
        digests = set(exchange(nodes, weights=[1, 2, 3, 4]))
        assert len(digests) == 1
        seen |= digests
        assert {node.round for node in nodes} == {number}
        assert {node.state_digest() for node in nodes} == digests
        for node in nodes:
            assert torch.equal(local_weights(node), outer_weights(nodes[0]))
    assert len(seen) == 4


def test_int8_run_ends_within_one_percent_of_the_fp32_run() -> None:
    """Four nodes, H = 20, on the bundled text; the same seeds and the same data for both codecs."""
    losses: dict[str, list[float]] = {}
    for codec in ("int8", "fp32"):
        inner = InnerSettings(batch_size=16, learning_rate=1e-2, warmup_steps=10, schedule="constant")
        run = run_spec(codec, 20, inner, OuterSettings(learning_rate=0.7, momentum=0.5))
        nodes = [tiny_workload(run, stream) for stream in range(4)]
        losses[codec] = [nodes[0].evaluate()]
        for _ in range(run.rounds):
            for node in nodes:
                node.train(20, ignore)
            assert len(set(exchange(nodes))) == 1
            losses[codec].append(nodes[0].evaluate())
        print(f"{codec}: held-out loss " + " ".join(f"{loss:.4f}" for loss in losses[codec]))
    int8, fp32 = losses["int8"][-1], losses["fp32"][-1]
    print(f"int8 / fp32 - 1 = {100 * (int8 / fp32 - 1):+.3f} %")
    assert losses["int8"] != losses["fp32"]
    assert fp32 < 0.5 * losses["fp32"][0]
    assert abs(int8 / fp32 - 1) < 0.01


def test_one_plain_step_per_round_is_the_mean_of_the_nodes_weights() -> None:
    """With an outer rate of 1 and no momentum DiLoCo is local SGD: theta becomes the mean of the local weights."""
    nodes = [tiny_workload(run_spec("fp32", 1, outer=OuterSettings(learning_rate=1, momentum=0)), s) for s in range(4)]
    for node in nodes:
        node.train(1, ignore)
    expected = torch.stack([local_weights(node) for node in nodes]).mean(0)
    exchange(nodes)
    torch.testing.assert_close(outer_weights(nodes[0]), expected, rtol=1e-6, atol=1e-6)


def test_schedule_and_data_go_on_where_the_round_stands() -> None:
    """A node that trains 2 + 3 + (exchange) + 5 steps asks for steps 0, 2, and then 1 * H."""
    node = tiny_workload(run_spec(inner_steps=5), 0)
    asked: list[tuple[int, int]] = []
    train = node.trainer.train

    def spy(first_step: int, steps: int, on_step: Callable[[StepReport], None]) -> None:
        asked.append((first_step, steps))
        train(first_step, steps, on_step)

    node.trainer.train = spy  # type: ignore[method-assign]
    node.train(2, ignore)
    node.train(3, ignore)
    exchange([node])
    node.train(5, ignore)
    assert asked == [(0, 2), (2, 3), (5, 5)]


def test_training_that_was_stopped_between_two_steps_goes_on_with_the_next_one() -> None:
    class Stop(Exception):
        pass

    def stop_after_two(report: StepReport) -> None:
        if report.step == 2:
            raise Stop

    stopped, straight = tiny_workload(run_spec(), 0), tiny_workload(run_spec(), 0)
    with pytest.raises(Stop):
        stopped.train(3, stop_after_two)
    stopped.train(1, ignore)
    straight.train(3, ignore)
    assert torch.equal(local_weights(stopped), local_weights(straight))


def test_restore_gives_up_local_progress_and_moments() -> None:
    node, fresh = tiny_workload(run_spec(), 0), tiny_workload(run_spec(), 0)
    node.train(3, ignore)
    node.restore()
    assert torch.equal(local_weights(node), outer_weights(node))
    for n in (node, fresh):
        n.train(3, ignore)
    assert torch.equal(local_weights(node), local_weights(fresh))


def test_joiner_that_imports_the_state_goes_on_bit_for_bit() -> None:
    run = run_spec()
    member = tiny_workload(run, 0)
    member.train(3, ignore)
    exchange([member])
    joiner = tiny_workload(run, 1)
    joiner.train(2, ignore)
    for chunk in range(member.chunk_count):
        data = member.export_state(chunk)
        assert blake3.blake3(data).digest() == member.chunk_digest(chunk)
        joiner.import_state(chunk, memoryview(data))
    assert joiner.end_import(member.round) == member.state_digest()
    assert torch.equal(local_weights(joiner), local_weights(member))
    for node in (member, joiner):
        node.train(3, ignore)
    assert len(set(exchange([member, joiner]))) == 1


def test_node_that_was_left_out_keeps_its_progress_for_the_next_round() -> None:
    """Of three nodes one is in no chunk, another in every second one."""
    nodes = [tiny_workload(run_spec("fp32"), stream) for stream in range(3)]
    for node in nodes:
        node.train(3, ignore)
    before = [local_weights(node) - outer_weights(node) for node in nodes]
    partly = torch.arange(len(before[2])) // CHUNK % 2 == 0
    for chunk in range(nodes[0].chunk_count):
        inside = [True, False, chunk % 2 == 0]
        payloads = [encoded(node, chunk) for node, yes in zip(nodes, inside, strict=True) if yes]
        mean = memoryview(bytearray(nodes[0].payload_bytes(chunk)))
        nodes[0].reduce(chunk, payloads, [1] * len(payloads), mean)
        for node, yes in zip(nodes, inside, strict=True):
            node.apply(chunk, mean, included=yes)
    assert len({node.end_round() for node in nodes}) == 1
    after = [local_weights(node) - outer_weights(node) for node in nodes]
    assert not after[0].any()
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(after[2], torch.where(partly, 0, before[2]), rtol=0, atol=1e-6)
    assert len({node.evaluate() for node in nodes}) == 1
    exchange(nodes)
    assert torch.equal(local_weights(nodes[1]), outer_weights(nodes[0]))


def test_node_without_inner_steps_that_was_left_out_has_exactly_the_outer_weights() -> None:
    trained, idle = (tiny_workload(run_spec(), stream) for stream in range(2))
    trained.train(3, ignore)
    for chunk in range(trained.chunk_count):
        mean = encoded(trained, chunk)
        trained.apply(chunk, mean, included=True)
        idle.apply(chunk, mean, included=False)
    assert trained.end_round() == idle.end_round()
    assert torch.equal(local_weights(idle), outer_weights(trained))


def test_state_comes_back_from_disk_bit_for_bit(tmp_path: Path) -> None:
    node, back = (tiny_workload(run_spec(), stream) for stream in range(2))
    node.train(3, ignore)
    exchange([node])
    save_file(dict(node.named_state()), tmp_path / "state")
    back.train(1, ignore)
    tensors = load_file(tmp_path / "state")
    assert back.load_named_state(tensors, node.round) == node.state_digest()
    assert back.round == 1
    assert torch.equal(local_weights(back), local_weights(node))
    parameters = {span.name for span in node.trainer.spans}
    assert set(tensors) == parameters | {f"momentum.{name}" for name in parameters}


@pytest.mark.parametrize("fault", ["missing", "shape", "dtype"])
def test_state_that_does_not_fit_the_model_is_refused_and_changes_nothing(fault: str) -> None:
    node = tiny_workload(run_spec(), 0)
    before = node.state_digest()
    tensors = {name: tensor + 1 for name, tensor in node.named_state().items()}
    name = sorted(tensors)[-1]
    wrong = tensors.pop(name)
    if fault != "missing":
        tensors[name] = wrong.flatten()[:-1] if fault == "shape" else wrong.double()
    with pytest.raises((KeyError, ValueError), match=name):
        node.load_named_state(tensors, 3)
    assert node.round == 0
    node.restore()
    assert torch.equal(local_weights(node), local_weights(tiny_workload(run_spec(), 0)))
    assert node.state_digest() == before


def test_held_out_loss_is_that_of_the_outer_weights_at_any_time() -> None:
    node = tiny_workload(run_spec(), 0)
    before, state = node.evaluate(), node.state_digest()
    node.train(3, ignore)
    local = local_weights(node).clone()
    assert node.evaluate() == before
    assert torch.equal(local_weights(node), local)
    assert torch.equal(outer_weights(node), outer_weights(tiny_workload(run_spec(), 1)))
    assert node.state_digest() == state


def test_chunks_may_be_worked_on_side_by_side() -> None:
    """The same round, with one worker and with eight: the same bits."""

    def round_with(workers: int) -> bytes:
        nodes = [tiny_workload(run_spec(), stream) for stream in range(2)]
        for node in nodes:
            node.train(2, ignore)

        def chunk_round(chunk: int) -> None:
            payloads = [encoded(node, chunk) for node in nodes]
            mean = memoryview(bytearray(nodes[0].payload_bytes(chunk)))
            nodes[0].reduce(chunk, payloads, [1, 1], mean)
            for node in nodes:
                node.apply(chunk, mean, included=True)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(chunk_round, range(nodes[0].chunk_count)))
        digests = {node.end_round() for node in nodes}
        assert len(digests) == 1
        return digests.pop()

    assert round_with(1) == round_with(8)


def test_codec_work_is_not_divided_among_torch_threads() -> None:
    counts: list[int] = []

    class Spy(Int8Codec):
        def encode(self, values: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
            counts.append(torch.get_num_threads())
            super().encode(values, out, scratch)

        def decode(self, payload: torch.Tensor, out: torch.Tensor, weight: float = 1.0) -> None:
            counts.append(torch.get_num_threads())
            super().decode(payload, out, weight)

    def work() -> None:
        torch.set_num_threads(2)
        exchange([BufferWorkload.random(100, 256, Spy(), seed=0)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert counts == [1] * 4  # contribution, term, mean, and its decoding


def test_codec_work_leaves_the_torch_threads_of_its_thread_as_they_were() -> None:
    node = tiny_workload(run_spec(), 0)
    counts: list[int] = []

    def work() -> None:
        torch.set_num_threads(2)
        encoded(node, 0)
        node.train(1, ignore)
        counts.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert counts == [2]


def test_weights_that_are_not_finite_are_an_error_of_this_node() -> None:
    node = tiny_workload(run_spec(), 0)
    local_weights(node)[5] = math.nan
    with pytest.raises(NonFiniteError):
        encoded(node, 0)
    node.restore()
    encoded(node, 0)


def test_mean_that_is_not_valid_changes_nothing() -> None:
    node = tiny_workload(run_spec(), 0)
    before = node.export_state(0)
    bad = bytearray(encoded(node, 0))
    bad[:4] = np.float32(math.inf).tobytes()
    with pytest.raises(ProtocolError, match="infinite"):
        node.apply(0, memoryview(bad), included=True)
    with pytest.raises(ProtocolError, match="bytes instead of"):
        node.apply(0, memoryview(bad)[:-1], included=True)
    assert node.export_state(0) == before
    node.apply(0, encoded(node, 0), included=True)
    with pytest.raises(LocalError, match="twice"):
        node.apply(0, encoded(node, 0), included=True)


def test_workload_is_built_from_the_settings() -> None:
    run = RunSpec(name="test", sequence_length=16, exchange=ExchangeSettings(chunk_elements=2**18))
    node = build_workload(run, NodeSettings(device="cpu", threads=1), stream=3)
    assert (node.round, node.chunk_count) == (0, -(-local_weights(node).numel() // 2**18))
    assert node.payload_bytes(0) == 2**18 + 4 * 2**10
    assert node.state_bytes(0) == 8 * 2**18
    assert torch.equal(local_weights(node), outer_weights(node))
    assert local_weights(node).data_ptr() != outer_weights(node).data_ptr()


@pytest.mark.parametrize("codec", ["int8", "fp32"])
def test_buffers_become_their_mean_on_every_node(codec: CodecName) -> None:
    n = 3 * CHUNK + 77
    nodes = [BufferWorkload.random(n, CHUNK, make_codec(codec), seed) for seed in range(4)]
    exact = torch.stack([node.values for node in nodes]).double().mean(0)
    assert len(set(exchange(nodes))) == 1
    error = float((nodes[0].values - exact).norm() / exact.norm())
    assert error < {"int8": 0.02, "fp32": 1e-6}[codec]  # independent data: the mean is half as large as its terms
    assert len({node.values.numpy().tobytes() for node in nodes}) == 1


def test_buffer_can_be_handed_over() -> None:
    source = BufferWorkload.random(1000, 256, make_codec("int8"), seed=1)
    target = BufferWorkload.random(1000, 256, make_codec("int8"), seed=2)
    exchange([source])
    for chunk in range(source.chunk_count):
        target.import_state(chunk, memoryview(source.export_state(chunk)))
    assert target.end_import(source.round) == source.state_digest()
    assert math.isnan(target.evaluate())
    with pytest.raises(ProtocolError):
        target.import_state(0, memoryview(b"123"))
