"""DiLoCo over a real trainer: replicas agree bit for bit after every round, and int8 costs next to nothing.

Whole rounds run in this process, without a network: what travels is what the protocol lets travel.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prime_async.config.schema import (
    MAX_ROUND_STEPS,
    ContributionCodec,
    ExchangeSettings,
    InnerSettings,
    NodeSettings,
    OuterSettings,
    RoundSettings,
    RunSpec,
)
from prime_async.errors import ConfigError, LocalError, NonFiniteError, ProtocolError
from prime_async.work.buffer_workload import BufferWorkload
from prime_async.work.codec import CodecName, Int8Codec, make_codec
from prime_async.work.corpus import Corpus
from prime_async.work.diloco import DilocoWorkload, build_workload, open_diloco
from prime_async.work.workload import StepReport, Workload, nothing
from tests.tiny_models import (
    CHUNK,
    committed,
    encoded,
    exchange,
    hand_over,
    ignore,
    kept,
    local_weights,
    outer_weights,
    run_spec,
    tiny_witness,
    tiny_workload,
)


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


def test_runs_end_within_a_few_percent_of_the_fp32_run() -> None:
    """Four nodes, H = 20, on the bundled text; the same seeds and the same data for all codecs."""
    losses: dict[str, list[float]] = {}
    limits: dict[ContributionCodec, float] = {"fp16": 0.01, "int8": 0.01, "int4": 0.05, "e3m0": 0.05}
    codecs: tuple[ContributionCodec, ...] = ("fp32", *limits)
    for codec in codecs:
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
    fp32 = losses.pop("fp32")
    assert fp32[-1] < 0.5 * fp32[0]
    for codec, limit in limits.items():
        gap = losses[codec][-1] / fp32[-1] - 1
        print(f"{codec} / fp32 - 1 = {100 * gap:+.3f} %")
        assert losses[codec] != fp32
        assert abs(gap) < limit


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
    asked = spied(node)
    node.train(2, ignore)
    node.train(3, ignore)
    exchange([node])
    node.train(5, ignore)
    assert asked == [(0, 2, 0), (2, 3, 2), (5, 5, 5)]


def spied(node: DilocoWorkload) -> list[tuple[int, int, int | None]]:
    """What the trainer will have been asked for: first step of the schedule, how many, and the first batch."""
    asked: list[tuple[int, int, int | None]] = []
    train = node.trainer.train

    def spy(first_step: int, steps: int, on_step: Callable[[StepReport], None], first_batch: int | None = None) -> None:
        asked.append((first_step, steps, first_batch))
        train(first_step, steps, on_step, first_batch)

    node.trainer.train = spy  # type: ignore[method-assign]
    return asked


def test_a_slow_node_is_where_the_run_is_and_never_gets_a_batch_twice() -> None:
    """Of H = 5 steps it does 2 in round 0, 2 in round 1 and the last one in round 2."""
    run = run_spec(inner_steps=5)
    slow, fast = tiny_workload(run, 0), tiny_workload(run, 1)
    asked = spied(slow)
    for steps in (2, 2):
        fast.train(1, ignore)
        slow.train(steps, ignore)
        committed(slow, [fast])
    slow.train(1, ignore)
    fast.train(1, ignore)
    exchange([slow, fast])
    slow.train(5, ignore)
    assert [first for first, _, _ in asked] == [batch for _, _, batch in asked] == [0, 5, 10, 15]


def test_a_node_that_catches_up_has_the_rate_of_the_round_it_is_at() -> None:
    run = run_spec(inner_steps=5)
    ahead, behind = tiny_workload(run, 1), tiny_workload(run, 0)
    asked = spied(behind)
    behind.train(2, ignore)
    for _ in range(3):
        exchange([ahead])
    hand_over(ahead, behind)
    behind.train(3, ignore)
    assert asked == [(0, 2, 0), (15, 3, 15)]


def test_where_rounds_end_with_the_clock_the_schedule_is_divided_among_them() -> None:
    inner = InnerSettings(batch_size=8, warmup_steps=5, total_steps=32)
    run = run_spec(inner=inner).model_copy(update={"round": RoundSettings(seconds=1.0)})  # 8 rounds
    node = tiny_workload(run, 0)
    asked = spied(node)
    for steps in (6, 1, 1):  # 4 were its share
        node.train(steps, ignore)
        exchange([node])
    assert asked == [(0, 6, 0), (6, 1, MAX_ROUND_STEPS), (8, 1, 2 * MAX_ROUND_STEPS)]


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
    node.train(3, ignore)
    fresh.trainer.train(0, 3, ignore, first_batch=3)  # the schedule begins again, the data that ended badly do not
    assert torch.equal(local_weights(node), local_weights(fresh))


def test_joiner_that_imports_the_state_goes_on_bit_for_bit() -> None:
    run = run_spec()
    member = tiny_workload(run, 0)
    member.train(3, ignore)
    exchange([member])
    joiner = tiny_workload(run, 1)
    for chunk in range(member.chunk_count):
        data = member.export_state(chunk)
        assert blake3.blake3(data).digest() == member.chunk_digests()[32 * chunk : 32 * chunk + 32]
        joiner.import_state(chunk, memoryview(data))
    assert joiner.end_import(member.round) == member.state_digest()
    assert torch.equal(local_weights(joiner), local_weights(member))
    for node in (member, joiner):
        node.train(3, ignore)
    assert len(set(exchange([member, joiner]))) == 1


def test_a_node_that_catches_up_keeps_its_progress() -> None:
    run = run_spec("fp32")
    ahead, behind = tiny_workload(run, 1), tiny_workload(run, 0)
    behind.train(3, ignore)
    progress = local_weights(behind) - outer_weights(behind)
    for _ in range(2):
        ahead.train(3, ignore)
        exchange([ahead])
    assert hand_over(ahead, behind) == ahead.state_digest()
    assert torch.equal(outer_weights(behind), outer_weights(ahead))
    torch.testing.assert_close(local_weights(behind) - outer_weights(behind), progress, rtol=0, atol=1e-6)
    assert progress.abs().max() > 1e-3
    before = outer_weights(behind)
    contribution = torch.cat(
        [torch.from_numpy(np.frombuffer(encoded(behind, c), np.float32).copy()) for c in range(behind.chunk_count)]
    )
    torch.testing.assert_close(contribution, -progress, rtol=0, atol=1e-6)
    assert behind.evaluate() == ahead.evaluate()
    assert len(set(exchange([ahead, behind]))) == 1
    assert torch.equal(local_weights(behind), outer_weights(ahead))
    assert not torch.equal(local_weights(behind), before)


def test_a_node_without_progress_that_catches_up_has_exactly_the_outer_weights() -> None:
    """Bit for bit: also where a weight is a negative zero. With half of the chunks it is still so."""
    run = run_spec()
    ahead, behind = tiny_workload(run, 1), tiny_workload(run, 0)
    behind.train(3, ignore)
    exchange([behind])
    state = bytearray(ahead.export_state(0))
    state[:4] = np.float32(-0.0).tobytes()
    ahead.import_state(0, memoryview(state))
    for chunk in range(0, behind.chunk_count, 2):
        behind.import_state(chunk, memoryview(ahead.export_state(chunk)))
    assert local_weights(behind).numpy().tobytes() == outer_weights(behind).numpy().tobytes()
    hand_over(ahead, behind)
    assert local_weights(behind).numpy().tobytes() == outer_weights(ahead).numpy().tobytes()


def test_progress_survives_a_state_that_was_given_up_half_way() -> None:
    run = run_spec()
    first, second, behind = (tiny_workload(run, stream) for stream in range(3))
    behind.train(3, ignore)
    progress = local_weights(behind) - outer_weights(behind)
    for node in (first, second):
        node.train(3, ignore)
        exchange([node])
    behind.import_state(0, memoryview(first.export_state(0)))
    hand_over(second, behind)
    torch.testing.assert_close(local_weights(behind) - outer_weights(behind), progress, rtol=0, atol=1e-6)


def test_the_moments_stay_when_a_node_catches_up() -> None:
    run = run_spec()
    node, straight = tiny_workload(run, 0), tiny_workload(run, 0)
    for n in (node, straight):
        n.train(3, ignore)
    hand_over(tiny_workload(run, 1), node)  # the same outer state
    for n in (node, straight):
        n.train(1, ignore)
    torch.testing.assert_close(local_weights(node), local_weights(straight), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_is_refused_and_changes_nothing(value: float) -> None:
    node = tiny_workload(run_spec(), 0)
    node.train(1, ignore)
    before, local = node.export_state(0), local_weights(node).clone()
    bad = bytearray(before)
    bad[-4:] = np.float32(value).tobytes()
    for data in (bad, before[:-4]):
        with pytest.raises(ProtocolError, match="fetch it from another member"):
            node.import_state(0, memoryview(data))
    assert node.export_state(0) == before
    assert torch.equal(local_weights(node), local)


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
        mean = memoryview(bytearray(nodes[0].mean_bytes(chunk)))
        nodes[0].reduce(chunk, payloads, [1] * len(payloads), mean, nodes[0].round)
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


def test_state_comes_back_from_disk_bit_for_bit_and_the_inner_optimiser_with_it(tmp_path: Path) -> None:
    node, back = (tiny_workload(run_spec(), 0) for _ in range(2))
    node.train(3, ignore)
    exchange([node])
    job = kept(tmp_path, node).begin_snapshot(None)
    for chunk in range(node.chunk_count):
        job.before_change(chunk)
    job.finish()
    kept(tmp_path, node).inner.save(0, bytes(32), node.inner_state())
    back.train(1, ignore)
    assert kept(tmp_path, back).restore().digest == node.state_digest()
    back.restore()
    assert back.round == 1
    assert torch.equal(local_weights(back), local_weights(node))
    moments = kept(tmp_path, back).inner.load(0, bytes(32))
    assert moments is not None
    assert back.load_inner_state(moments)
    for one in (node, back):
        one.train(2, ignore)
    assert torch.equal(local_weights(back), local_weights(node)), "fresh moments would lead elsewhere"
    tensors = load_file(tmp_path / "snapshots" / f"{1:012d}.safetensors")
    parameters = {span.name for span in node.trainer.spans}
    assert set(tensors) == parameters | {f"momentum.{name}" for name in parameters}


class Noted:
    """A corpus that notes which blocks are read: stream and number."""

    def __init__(self, corpus: Corpus) -> None:
        self.read: list[tuple[int, int]] = []
        self._corpus = corpus
        self.vocab_size = corpus.vocab_size
        self.heldout, self.encode, self.decode = corpus.heldout, corpus.encode, corpus.decode

    def batch(self, stream: int, step: int, batch_size: int, sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.read.append((stream, step))
        return self._corpus.batch(stream, step, batch_size, sequence_length)


def test_no_block_counts_twice_over_starts_though_one_that_was_not_counted_may_be_read_again(tmp_path: Path) -> None:
    """A start in the middle of each round: what it had read of that round is in no mean."""
    run = run_spec()
    counted: list[tuple[int, int]] = []
    steps = run.round.inner_steps
    for _ in range(4):
        node = tiny_workload(run, 3)
        noted = Noted(node.trainer.corpus)  # type: ignore[attr-defined]
        node.trainer.corpus = noted  # type: ignore[attr-defined]
        kept(tmp_path, node).restore()
        node.train(steps, ignore)
        exchange([node])
        counted += noted.read
        job = kept(tmp_path, node).begin_snapshot(None)
        for chunk in range(node.chunk_count):
            job.before_change(chunk)
        job.finish()
        node.train(1, ignore)  # of the next round, and then it is killed
    assert len(set(counted)) == len(counted) == 4 * steps


@pytest.mark.parametrize("fault", ["missing", "shape", "other"])
def test_moments_that_do_not_fit_the_model_are_not_taken(fault: str) -> None:
    node, other = (tiny_workload(run_spec(), 0) for _ in range(2))
    node.train(1, ignore)
    tensors = {name: tensor.clone() for name, tensor in node.inner_state().items()}
    name = next(n for n in sorted(tensors) if n.startswith("exp_avg_sq"))
    wrong = tensors.pop(name)
    if fault != "missing":
        tensors[name if fault == "shape" else name + "x"] = wrong.flatten()[:-1] if fault == "shape" else wrong
    assert not other.load_inner_state(tensors)
    assert not other.inner_state()


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
            mean = memoryview(bytearray(nodes[0].mean_bytes(chunk)))
            nodes[0].reduce(chunk, payloads, [1, 1], mean, nodes[0].round)
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
        def encode(self, values: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> int:
            counts.append(torch.get_num_threads())
            return super().encode(values, out, scratch)

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


def test_a_second_mean_of_a_round_changes_nothing() -> None:
    node = tiny_workload(run_spec(), 0)
    node.apply(0, encoded(node, 0), included=True)
    before = node.export_state(0)
    with pytest.raises(LocalError, match="twice"):
        node.apply(0, encoded(node, 0), included=True)
    assert node.export_state(0) == before


@pytest.mark.parametrize("codec", ["int8", "int4", "e3m0", "fp16", "fp32"])
def test_a_payload_is_checked_without_being_applied(codec: ContributionCodec) -> None:
    run = run_spec(codec)
    buffer = BufferWorkload.random(CHUNK + 300, CHUNK, make_codec(codec), seed=1)
    for node, source in ((tiny_workload(run, 0),) * 2, (tiny_witness(run), tiny_workload(run, 0)), (buffer, buffer)):
        last = node.chunk_count - 1
        good = encoded(source, last)
        before = node.export_state(last)
        assert node.check(last, good)
        assert not node.check(0, good)
        assert not node.check(last, good[:-1])
        assert not node.check(last, memoryview(b""))
        for value in (math.nan, math.inf):
            bad = bytearray(good)
            bad[:4] = np.float32(value).tobytes()
            assert not node.check(last, memoryview(bad))
        assert node.export_state(last) == before


def test_a_witness_has_the_outer_state_of_the_nodes_that_train() -> None:
    run = run_spec()
    nodes, witness = [tiny_workload(run, stream) for stream in range(2)], tiny_witness(run)
    assert witness.state_digest() == nodes[0].state_digest()
    assert (witness.elements, witness.chunk_count) == (nodes[0].elements, nodes[0].chunk_count)
    for node in nodes:
        node.train(3, ignore)
    assert committed(witness, nodes) == nodes[0].state_digest()
    for chunk in range(witness.chunk_count):
        assert witness.export_state(chunk) == nodes[0].export_state(chunk)
    joiner = tiny_witness(run)
    assert hand_over(witness, joiner) == witness.state_digest()
    late = tiny_workload(run, 5)
    assert hand_over(joiner, late) == witness.state_digest()
    assert torch.equal(local_weights(late), outer_weights(witness))


def test_a_witness_makes_the_mean_that_others_make() -> None:
    run = run_spec()
    node, witness = tiny_workload(run, 0), tiny_witness(run)
    node.train(3, ignore)
    payload = encoded(node, 1)
    means = [memoryview(bytearray(node.payload_bytes(1))) for _ in range(2)]
    for owner, mean in zip((node, witness), means, strict=True):
        assert owner.reduce(1, [payload, payload[:-1]], [3, 4], mean, 0).left_out == [1]
    assert bytes(means[0]) == bytes(means[1])


def test_a_witness_trains_nothing_and_says_so() -> None:
    witness = tiny_witness(run_spec())
    with pytest.raises(LocalError, match=r"node\.witness = false"):
        witness.train(1, ignore)
    with pytest.raises(LocalError, match=r"node\.witness = false"):
        encoded(witness, 0)
    assert math.isnan(witness.evaluate(nothing))
    witness.restore()


def test_a_witness_loads_what_a_node_that_trains_has_kept(tmp_path: Path) -> None:
    run = run_spec()
    node, witness = tiny_workload(run, 0), tiny_witness(run)
    node.train(3, ignore)
    exchange([node])
    job = kept(tmp_path, node).begin_snapshot(None)
    for chunk in range(node.chunk_count):
        job.before_change(chunk)
    job.finish()
    assert kept(tmp_path, witness).restore().digest == node.state_digest()


@pytest.mark.parametrize("model", ["llama-1m", "tests.test_diloco:factory"])
def test_a_witness_that_is_built_from_the_settings_has_the_same_initial_weights_and_no_data(model: str) -> None:
    data = "tests.test_diloco:unreadable"
    run = RunSpec(name="test", model=model, sequence_length=16, vocab_size=256)
    trains = build_workload(run, NodeSettings(device="cpu", threads=1), stream=3)
    without_data = run.model_copy(update={"data": data})
    witness = build_workload(without_data, NodeSettings(witness=True, threads=1), stream=3)
    assert isinstance(trains, DilocoWorkload)
    assert not isinstance(witness, DilocoWorkload)
    assert witness.state_digest() == trains.state_digest()


def test_a_witness_of_a_run_that_does_not_say_its_vocabulary_reads_it_from_the_data() -> None:
    run = RunSpec(name="test", model="tests.test_diloco:factory")
    witness = build_workload(run, NodeSettings(witness=True, threads=1), stream=3)
    assert witness.elements == 256 * 4
    with pytest.raises(RuntimeError, match="nobody can read this"):
        build_workload(
            run.model_copy(update={"data": "tests.test_diloco:unreadable"}), NodeSettings(witness=True), stream=3
        )


def test_a_model_may_know_more_tokens_than_the_data_have_and_not_fewer() -> None:
    run = RunSpec(name="test", model="tests.test_diloco:factory", vocab_size=320)
    assert build_workload(run, NodeSettings(device="cpu", threads=1), stream=0).elements == 320 * 4
    with pytest.raises(ConfigError, match=r"run\.vocab_size: expected at least 256, which the data have, got 255"):
        build_workload(run.model_copy(update={"vocab_size": 255}), NodeSettings(device="cpu", threads=1), stream=0)


def factory(run: RunSpec, vocab_size: int) -> torch.nn.Module:
    """A model of one's own, as ``[run] model`` can name it."""
    torch.manual_seed(run.seed)
    return torch.nn.Embedding(vocab_size, 4)


def unreadable(run: RunSpec, node: NodeSettings) -> None:  # noqa: ARG001
    """Data that this node does not have."""
    raise RuntimeError("nobody can read this")


def test_workload_is_built_from_the_settings() -> None:
    run = RunSpec(name="test", sequence_length=16, exchange=ExchangeSettings(chunk_elements=2**18))
    node = open_diloco(run, NodeSettings(device="cpu", threads=1), stream=3)
    assert (node.round, node.chunk_count) == (0, -(-local_weights(node).numel() // 2**18))
    assert node.payload_bytes(0) == 2**18 + 4 * 2**10
    assert node.state_bytes(0) == 8 * 2**18
    assert torch.equal(local_weights(node), outer_weights(node))
    assert local_weights(node).data_ptr() != outer_weights(node).data_ptr()


@pytest.mark.parametrize("codec", ["int8", "int4", "e3m0", "fp16", "fp32"])
def test_buffers_become_their_mean_on_every_node(codec: CodecName) -> None:
    n = 3 * CHUNK + 77
    nodes = [BufferWorkload.random(n, CHUNK, make_codec(codec), seed) for seed in range(4)]
    exact = torch.stack([node.values for node in nodes]).double().mean(0)
    assert len(set(exchange(nodes))) == 1
    error = float((nodes[0].values - exact).norm() / exact.norm())
    limits = {"int8": 0.02, "int4": 0.25, "e3m0": 0.35, "fp16": 0.001, "fp32": 1e-6}
    assert error < limits[codec]  # independent data: the mean is half as large as its terms
    assert len({node.values.numpy().tobytes() for node in nodes}) == 1


@pytest.mark.parametrize(
    ("codec", "mean_codec"), [("int4", "int8"), ("int8", "int4"), ("fp32", "e3m0"), ("topk", "int4")]
)
def test_means_can_have_a_codec_of_their_own(codec: ContributionCodec, mean_codec: CodecName) -> None:
    run = run_spec(codec)
    run = run.model_copy(update={"exchange": run.exchange.model_copy(update={"mean_codec": mean_codec})})
    nodes = [tiny_workload(run, stream) for stream in range(3)]
    witness = tiny_witness(run)
    chunk = nodes[0].chunk_count - 1
    size = nodes[0].elements - chunk * CHUNK
    assert nodes[0].payload_bytes(chunk) == make_codec(codec).payload_bytes(size)
    assert nodes[0].mean_bytes(chunk) == witness.mean_bytes(chunk) == make_codec(mean_codec).payload_bytes(size)
    for node in nodes:
        node.train(3, ignore)
    assert not nodes[0].check(chunk, encoded(nodes[0], chunk)), "a contribution is no mean"
    before = nodes[0].state_digest()
    assert len({committed(witness, nodes), *(node.state_digest() for node in nodes)}) == 1
    assert nodes[0].state_digest() != before


def test_means_of_topk_are_sparse_and_equal_on_all_nodes_and_the_witness() -> None:
    exchange_settings = ExchangeSettings(codec="topk", error_feedback=True, chunk_elements=CHUNK)
    run = run_spec().model_copy(update={"exchange": exchange_settings})
    nodes: list[Workload] = [tiny_workload(run, stream) for stream in range(3)]
    witness = tiny_witness(run)
    for chunk in range(witness.chunk_count):
        assert nodes[0].payload_bytes(chunk) < 0.03 * CHUNK
        assert nodes[0].usual_mean_bytes(chunk) < 0.3 * CHUNK < witness.mean_bytes(chunk)
    for _ in range(2):
        for node in nodes:
            node.train(3, ignore)
        payloads = [[encoded(node, chunk) for node in nodes] for chunk in range(witness.chunk_count)]
        for chunk, of_chunk in enumerate(payloads):
            out = memoryview(bytearray(witness.mean_bytes(chunk)))
            mean = out[: witness.reduce(chunk, of_chunk, [1, 1, 1], out, witness.round).size]
            assert len(mean) < 0.15 * CHUNK
            assert all(node.check(chunk, mean) for node in (*nodes, witness))
            assert not witness.check(chunk, out), "what is behind the mean is not of it"
            for node, own in zip(nodes, of_chunk, strict=True):
                node.apply(chunk, mean, True, own)
            witness.apply(chunk, mean, False)
        assert len({node.end_round() for node in (*nodes, witness)}) == 1


def test_buffer_can_be_handed_over() -> None:
    source = BufferWorkload.random(1000, 256, make_codec("int8"), seed=1)
    target = BufferWorkload.random(1000, 256, make_codec("int8"), seed=2)
    exchange([source])
    for chunk in range(source.chunk_count):
        target.import_state(chunk, memoryview(source.export_state(chunk)))
    assert target.end_import(source.round) == source.state_digest()
    assert math.isnan(target.evaluate(lambda: None))
    with pytest.raises(ProtocolError):
        target.import_state(0, memoryview(b"123"))
