"""The inner steps, the devices they run on, and what builds them from settings."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn

from prime_async.config.schema import InnerSettings, NodeSettings, RunSpec
from prime_async.errors import ConfigError
from prime_async.work.corpus import ByteCodec, TokenCorpus, open_shakespeare
from prime_async.work.device import Device, host_memory, set_threads, usable_cores
from prime_async.work.factory import build_model, open_corpus, open_inner_trainer
from prime_async.work.inner import InnerTrainer
from prime_async.work.llama import LlamaConfig, build_llama
from prime_async.work.tokens import write_tokens
from prime_async.work.workload import StepReport

CPU = Device.open("cpu")
TINY = LlamaConfig(vocab_size=256, width=32, layers=2, heads=2, kv_heads=1, ffn_width=64, tied_embeddings=True)


def run_spec(**inner: object) -> RunSpec:
    chosen = {"batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, "schedule": "constant", **inner}
    return RunSpec(name="test", sequence_length=32, inner=InnerSettings.model_validate(chosen))


def trainer_of(
    run: RunSpec, micro_batch_size: int = 0, stream: int = 1, model: nn.Module | None = None
) -> InnerTrainer:
    return InnerTrainer(model or build_llama(TINY, 0), open_shakespeare(0), run, CPU, stream, micro_batch_size)


def ignore(report: StepReport) -> None:
    """For whoever has no use for reports."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The flat vector


def test_parameters_are_views_into_the_flat_vector_and_stay_so() -> None:
    trainer = trainer_of(run_spec())
    trainer.train(0, 2, ignore)
    trainer.reset_optimizer()
    trainer.train(2, 1, ignore)

    parameters = dict(trainer.model.named_parameters())
    assert [span.name for span in trainer.spans] == sorted(parameters)
    assert trainer.spans[-1].stop == len(trainer.flat) == sum(p.numel() for p in parameters.values())
    for name, start, stop, shape in trainer.spans:
        assert parameters[name].data_ptr() == trainer.flat[start:].data_ptr()
        assert torch.equal(parameters[name].detach(), trainer.flat[start:stop].view(shape))
        gradient = parameters[name].grad
        assert gradient is not None
        assert gradient.data_ptr() == trainer.gradients[start:].data_ptr()


def test_writing_the_flat_vector_changes_the_model() -> None:
    trainer = trainer_of(run_spec())
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    trainer.flat.zero_()
    assert not trainer.model(tokens).any()


def test_flattening_keeps_the_weights() -> None:
    expected = build_llama(TINY, 0).state_dict()
    got = trainer_of(run_spec()).model.state_dict()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_layouts_that_cannot_be_averaged_have_different_digests() -> None:
    def digest(model: nn.Module) -> bytes:
        return trainer_of(run_spec(), model=model).layout_digest

    assert digest(nn.Linear(2, 6)) == digest(nn.Linear(2, 6))
    assert digest(nn.Linear(2, 6)) != digest(nn.Linear(6, 2, bias=False))


def test_parameters_of_other_types_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    with pytest.raises(ConfigError, match=r"1\.bias is torch\.float16") as caught:
        trainer_of(run_spec(), model=model)
    assert len(caught.value.problems) == 3  # both parameters, and what to do
    with pytest.raises(ConfigError, match="no parameters"):
        trainer_of(run_spec(), model=nn.Identity())


def test_a_buffer_that_is_not_averaged_is_warned_of() -> None:
    with capture_logs() as logs:
        trainer_of(run_spec(), model=nn.BatchNorm1d(3))
    assert [(log["event"], log["buffer"]) for log in logs] == [
        ("buffer_is_not_averaged", "running_mean"),
        ("buffer_is_not_averaged", "running_var"),
    ]


# Steps


def test_a_step_is_adamw_with_decay_on_matrices_only_and_clipping() -> None:
    """Reference: torch's plain AdamW on a model that was not flattened."""
    run = run_spec(clip_norm=0.3, weight_decay=0.5, max_z_loss=1e-3, warmup_steps=4)
    corpus = open_shakespeare(0)
    reference = build_llama(TINY, 0)
    decayed = [p for p in reference.parameters() if p.ndim == 2]
    plain = [p for p in reference.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    for step in range(3):
        inputs, targets = corpus.batch(1, step, 4, 32)
        logits = reference(inputs)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (loss + 1e-3 * logits.amax(-1).square().mean()).backward()
        assert nn.utils.clip_grad_norm_(reference.parameters(), 0.3) > 0.3
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 4
        optimizer.step()

    trainer = trainer_of(run)
    trainer.train(0, 3, ignore)

    for name, value in reference.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_gradients_that_add_up_are_those_of_the_whole_batch(micro_batch_size: int) -> None:
    whole, parts = trainer_of(run_spec(learning_rate=1e-4)), trainer_of(run_spec(learning_rate=1e-4), micro_batch_size)
    reports: list[StepReport] = []
    for trainer in (whole, parts):
        trainer.train(0, 1, reports.append)
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-5)
    torch.testing.assert_close(parts.gradients, whole.gradients, rtol=1e-3, atol=1e-6)
    assert float(whole.gradients.norm()) > 0.01


def test_where_the_run_is_decides_batch_and_rate_and_a_pause_changes_nothing() -> None:
    at_once, paused = trainer_of(run_spec()), trainer_of(run_spec())
    at_once.train(5, 4, ignore)
    paused.train(5, 1, ignore)
    paused.train(6, 3, ignore)
    assert torch.equal(at_once.flat, paused.flat)

    elsewhere = trainer_of(run_spec(), stream=2)
    elsewhere.train(5, 4, ignore)
    assert not torch.equal(at_once.flat, elsewhere.flat)


def test_steps_are_reported_and_a_report_may_stop_them() -> None:
    trainer = trainer_of(run_spec())
    reports: list[StepReport] = []

    def stop_after_three(report: StepReport) -> None:
        reports.append(report)
        if report.step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trainer.train(100, 10, stop_after_three)
    assert [report.step for report in reports] == [1, 2, 3] == list(range(1, trainer.steps_done + 1))
    assert {report.tokens for report in reports} == {4 * 32}
    assert all(4 < report.loss < 7 and report.seconds > 0 for report in reports)


def test_a_reset_optimizer_is_a_new_one() -> None:
    used, fresh = trainer_of(run_spec()), trainer_of(run_spec())
    weights = fresh.flat.clone()
    used.train(0, 3, ignore)
    used.flat.copy_(weights)
    used.reset_optimizer()
    for trainer in (used, fresh):
        trainer.train(3, 2, ignore)
    assert torch.equal(used.flat, fresh.flat)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    trainer = trainer_of(run_spec())
    trainer.train(0, 1, ignore)
    trainer.flat[7] = math.nan
    before = trainer.flat.clone()
    reports: list[StepReport] = []
    with capture_logs() as logs:
        trainer.train(1, 2, reports.append)
    assert trainer.flat.equal(before) or bool((trainer.flat == before).sum() == len(before) - 1)
    assert all(math.isnan(report.loss) for report in reports)
    assert trainer.steps_skipped == 2
    assert [(log["event"], log["step"]) for log in logs] == [("step_skipped", 1), ("step_skipped", 2)]

    trainer.flat[7] = 0.0
    trainer.train(3, 1, reports.append)
    assert math.isfinite(reports[-1].loss)
    assert trainer.flat.isfinite().all()


def test_training_learns() -> None:
    trainer = trainer_of(run_spec(batch_size=8, learning_rate=1e-2))
    before = trainer.evaluate(2)
    reports: list[StepReport] = []
    trainer.train(0, 60, reports.append)
    after = trainer.evaluate(2)
    assert before == pytest.approx(math.log(256), abs=0.3)
    assert after < 3.3
    assert reports[0].loss == pytest.approx(before, abs=0.3)
    assert reports[-1].loss == pytest.approx(after, abs=0.4)


def test_a_compiled_model_is_the_same_model() -> None:
    """With the eager backend: the graph is captured, but no compiler is needed."""
    plain, compiled = trainer_of(run_spec()), trainer_of(run_spec())
    compiled._forward = torch.compile(compiled.model, backend="eager")
    for trainer in (plain, compiled):
        trainer.train(0, 2, ignore)
    torch.testing.assert_close(plain.flat, compiled.flat)
    assert compiled.spans == plain.spans
    compiled.flat.zero_()
    assert not compiled._logits(torch.zeros(4, 32, dtype=torch.int64)).any()


# Evaluation


def test_evaluation_is_a_mean_over_tokens_whatever_the_pieces() -> None:
    corpus = TokenCorpus(np.arange(3000).astype(np.uint8), ByteCodec(), 0)  # 150 held out: 4 windows of 32 and a rest
    whole = InnerTrainer(build_llama(TINY, 0), corpus, run_spec(batch_size=3), CPU, 0)
    parts = InnerTrainer(build_llama(TINY, 0), corpus, run_spec(batch_size=3), CPU, 0, micro_batch_size=2)
    inputs, targets = (torch.cat(side) for side in zip(*corpus.heldout(1, 32), strict=True))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(whole.model(inputs).flatten(0, 1), targets.flatten())
    assert len(inputs) == 4
    assert whole.evaluate(None) == pytest.approx(float(expected), rel=1e-6)
    assert parts.evaluate(None) == pytest.approx(float(expected), rel=1e-6)
    assert whole.evaluate(1) != whole.evaluate(None)


def test_other_weights_are_evaluated_without_a_trace() -> None:
    trainer = trainer_of(run_spec())
    start = trainer.flat.clone()
    first = trainer.evaluate(1)
    trainer.train(0, 3, ignore)
    moved = trainer.flat.clone()
    other = start.clone()

    assert trainer.evaluate(1, other) == first
    assert trainer.evaluate(1) < first
    assert torch.equal(trainer.flat, moved)
    assert torch.equal(other, start)


def test_an_evaluation_can_be_stopped_after_each_piece_of_a_batch_and_gives_the_weights_back() -> None:
    trainer = trainer_of(run_spec(batch_size=4), micro_batch_size=2)
    before, other = trainer.flat.clone(), torch.zeros_like(trainer.flat)
    pieces: list[int] = []

    def stop_after_three() -> None:
        pieces.append(1)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(None, other, stop_after_three)
    assert len(pieces) == 3
    assert torch.equal(trainer.flat, before)
    assert not other.any()


def test_a_failing_evaluation_gives_the_weights_back() -> None:
    trainer = trainer_of(run_spec())
    before, other = trainer.flat.clone(), torch.zeros_like(trainer.flat)
    trainer.corpus = TokenCorpus(np.zeros(3, np.uint8), ByteCodec(), 0)
    with pytest.raises(Exception, match="too few"):
        trainer.evaluate(1, other)
    assert torch.equal(trainer.flat, before)
    assert not other.any()


def test_a_model_that_makes_no_logits_is_told_what_is_wanted() -> None:
    model = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 100))
    with pytest.raises(ConfigError, match=r"made \(4, 32, 100\) of tokens \(4, 32\), not logits \(4, 32, 256\)"):
        trainer_of(run_spec(), model=model).train(0, 1, ignore)


# Devices


def test_the_cpu_computes_in_fp32_unless_told_otherwise() -> None:
    assert Device.open("cpu").autocast_dtype is None
    assert Device.open("cpu", "bfloat16").autocast_dtype is torch.bfloat16
    assert Device.open("auto", "float32").autocast_dtype is None


def test_bf16_computes_in_bf16_and_keeps_parameters_in_fp32() -> None:
    run = run_spec()
    trainer = InnerTrainer(build_llama(TINY, 0), open_shakespeare(0), run, Device.open("cpu", "bfloat16"), 1)
    with trainer.device.autocast():
        assert trainer.model(torch.zeros(1, 2, dtype=torch.int64)).dtype is torch.bfloat16
    reports: list[StepReport] = []
    trainer.train(0, 2, reports.append)
    assert trainer.flat.dtype is torch.float32
    exact: list[StepReport] = []
    trainer_of(run).train(0, 2, exact.append)
    assert [r.loss for r in reports] == pytest.approx([r.loss for r in exact], abs=0.02)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", "cuda:", "", "mps"])
def test_a_device_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match='not one of "auto", "cpu", "cuda", "cuda:N"'):
        Device.open(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_without_a_gpu_the_error_says_what_to_do(name: str) -> None:
    with pytest.raises(ConfigError, match=rf'\[node\] device = "{name}": .*; set device = "cpu"'):
        Device.open(name)
    assert Device.open("auto").torch_device == torch.device("cpu")


def test_copies_by_way_of_staging_keep_every_element() -> None:
    source, staging, back = torch.arange(1000.0), CPU.staging(1000), CPU.empty(1000)
    CPU.to_host(source, staging)
    CPU.synchronize()
    CPU.to_device(staging, back)
    CPU.synchronize()
    assert torch.equal(back, source)
    assert CPU.moved(source) is source


def test_memory_is_that_of_this_machine() -> None:
    memory = CPU.memory()
    assert 2**26 < memory.available_bytes <= memory.total_bytes < 2**50
    assert memory.total_bytes == host_memory().total_bytes


def test_threads_are_set_for_every_thread_of_the_process() -> None:
    assert set_threads(0) == usable_cores() >= 1
    assert set_threads(1) == 1
    seen: list[int] = []
    worker = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    worker.start()
    worker.join()
    assert seen == [1]


# From settings


NODE = NodeSettings(threads=1, device="cpu", micro_batch_size=2)

USER_MODULE = """
import torch
from prime_async.work.corpus import ByteCodec, TokenCorpus
import numpy as np

class Model(torch.nn.Module):
    def __init__(self, width, vocab_size):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, width)
        self.out = torch.nn.Linear(width, vocab_size)
    def forward(self, tokens):
        return self.out(self.table(tokens))

def model(run, vocab_size):
    torch.manual_seed(run.seed)
    return Model(run.sequence_length, vocab_size)

class Nested:
    @staticmethod
    def data(run, node):
        return TokenCorpus(np.arange(4000).astype(np.uint8), ByteCodec(), run.seed)

def nothing(*arguments):
    return None

number = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "users_own.py").write_text(USER_MODULE)
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_not_here")
    (tmp_path / "fails.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "users_own"
    for name in ("users_own", "needs_more", "fails"):
        sys.modules.pop(name, None)


def test_a_trainer_is_built_from_settings() -> None:
    run = RunSpec(name="x", sequence_length=16, seed=5, inner=InnerSettings(batch_size=4))
    trainer = open_inner_trainer(run, NODE, stream=2**64 - 1)
    trainer.train(0, 1, ignore)
    assert trainer.corpus.vocab_size == 256
    assert trainer.steps_done == 1
    assert len(trainer.flat) == pytest.approx(1e6, rel=0.04)


def test_users_own_model_and_data_train(user_module: str) -> None:
    run = run_spec().model_copy(update={"model": f"{user_module}:model", "data": f"{user_module}:Nested.data"})
    trainer = open_inner_trainer(run, NODE, stream=0)
    reports: list[StepReport] = []
    trainer.train(0, 20, reports.append)
    assert [span.name for span in trainer.spans] == ["out.bias", "out.weight", "table.weight"]
    assert reports[-1].loss < reports[0].loss


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("no_such_module:f", 'there is no module "no_such_module"; install it, or put its directory on PYTHONPATH'),
        ("prime_async.nothing:f", 'there is no module "prime_async.nothing"'),
        ("needs_more:f", 'it needs "a_module_that_is_not_here"'),
        ("fails:f", "importing it failed: ZeroDivisionError"),
        ("users_own:absent", 'module "users_own" has no "absent"'),
        ("users_own:Nested.absent", 'has no "Nested.absent"'),
        ("users_own:number", "is a int, which cannot be called"),
        ("users_own:nothing", "returned a NoneType, not a torch.nn.Module"),
        ("users_own:", "not of the form"),
        (":f", "not of the form"),
        ("llama-2m", "not a named size"),
    ],
)
def test_a_bad_model_setting_is_explained(value: str, complaint: str) -> None:
    run = run_spec().model_copy(update={"model": value})
    with pytest.raises(ConfigError, match=complaint) as caught:
        build_model(run, 256)
    assert f'[run] model = "{value}"' in str(caught.value)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("value", "complaint"),
    [("users_own:nothing", "returned a NoneType, not a prime_async"), ("wikipedia", 'not "shakespeare", "tokens" or')],
)
def test_a_bad_data_setting_is_explained(value: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        open_corpus(run_spec().model_copy(update={"data": value}), NODE)
    assert f'[run] data = "{value}"' in str(caught.value)


def test_a_token_file_must_be_the_one_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 1000)
    header = write_tokens([tmp_path / "a.txt"], None, tmp_path / "a.tokens")
    node = NODE.model_copy(update={"data_path": tmp_path / "a.tokens"})
    run = run_spec().model_copy(update={"data": "tokens", "data_digest": header.digest})

    assert open_corpus(run, node).batch(0, 0, 2, 8)[0].shape == (2, 8)
    with pytest.raises(ConfigError, match="get the file that the run trains on"):
        open_corpus(run.model_copy(update={"data_digest": "0" * 64}), node)
    with pytest.raises(ConfigError, match=r"set \[node\] data_path"):
        open_corpus(run, NODE)


class Halves(nn.Module):
    """Two names for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Embedding(256, 8)
        self.two = nn.Linear(8, 256, bias=False)
        self.two.weight = self.one.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.two(self.one(tokens))
        return logits


def test_tied_parameters_are_in_the_flat_vector_once() -> None:
    model = Halves()
    trainer = trainer_of(run_spec(), model=model)
    trainer.train(0, 2, ignore)
    assert [span.name for span in trainer.spans] == ["one.weight"]
    assert model.one.weight is model.two.weight
    assert model.two.weight.data_ptr() == trainer.flat.data_ptr()
