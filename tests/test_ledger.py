"""The outer state on disk: replaced whole or not at all, and only ever this run's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prime_async import ledger
from prime_async.errors import ConfigError, StorageError
from prime_async.ledger import STATE_FILE, StateFile
from prime_async.work.buffer_workload import BufferWorkload
from prime_async.work.codec import make_codec
from prime_async.work.workload import StepReport

RUN, OTHER = b"r" * 32, b"o" * 32


class KeptBuffer(BufferWorkload):
    """A buffer that has something to keep."""

    def named_state(self) -> Mapping[str, Tensor]:
        return {"weight": self.values[:600].view(2, 300), "momentum.weight": self.values[600:].view(2, 300)}

    def load_named_state(self, tensors: Mapping[str, Tensor], round: int) -> bytes:
        if tensors["weight"].shape != (2, 300):
            raise ValueError("weight has another shape")
        both = torch.cat([tensors["weight"].flatten(), tensors["momentum.weight"].flatten()])
        for chunk in range(self.chunk_count):
            part = both[chunk * 256 : chunk * 256 + 256].numpy().tobytes()
            self.import_state(chunk, memoryview(part))
        return self.end_import(round)


def workload(seed: int = 1, round: int = 0) -> KeptBuffer:
    generator = torch.Generator().manual_seed(seed)
    made = KeptBuffer(torch.randn(1200, generator=generator), 256, make_codec("fp32"))
    made.end_import(round)
    return made


def saved(directory: Path, seed: int = 1, round: int = 3, run: bytes = RUN) -> KeptBuffer:
    made = workload(seed, round)
    assert StateFile(directory, run).save(made) == directory / STATE_FILE
    return made


def test_what_was_saved_is_loaded_again_bit_for_bit(tmp_path: Path) -> None:
    before, after = saved(tmp_path / "new" / "folder"), workload(seed=2)
    assert StateFile(tmp_path / "new" / "folder", RUN).load(after)
    assert (after.round, after.state_digest()) == (3, before.state_digest())
    assert torch.equal(after.values, before.values)


def test_the_file_can_be_read_by_anything_that_reads_safetensors(tmp_path: Path) -> None:
    before = saved(tmp_path)
    tensors = load_file(tmp_path / STATE_FILE)
    assert set(tensors) == {"weight", "momentum.weight"}
    assert torch.equal(tensors["weight"].flatten(), before.values[:600])
    with safe_open(tmp_path / STATE_FILE, framework="pt") as file:
        assert file.metadata() == {
            "format": ledger.FORMAT,
            "run_id": RUN.hex(),
            "round": "3",
            "state_digest": before.state_digest().hex(),
        }


def test_without_a_file_nothing_is_loaded(tmp_path: Path) -> None:
    assert not StateFile(tmp_path, RUN).load(workload())


def test_nothing_is_written_before_the_first_round_or_if_there_is_nothing_to_keep(tmp_path: Path) -> None:
    assert StateFile(tmp_path, RUN).save(workload(round=0)) is None
    plain = BufferWorkload.random(100, 256, make_codec("fp32"), 1)
    plain.end_import(5)
    assert StateFile(tmp_path, RUN).save(plain) is None
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    file, made = StateFile(tmp_path, RUN), workload(round=3)
    assert file.save(made)
    (tmp_path / STATE_FILE).unlink()
    assert file.save(made) == tmp_path / STATE_FILE
    assert not (tmp_path / STATE_FILE).exists()
    made.end_round()
    assert file.save(made)
    assert (tmp_path / STATE_FILE).exists()


def test_a_state_that_was_loaded_is_not_written_again(tmp_path: Path) -> None:
    saved(tmp_path)
    file, made = StateFile(tmp_path, RUN), workload()
    file.load(made)
    stamp = (tmp_path / STATE_FILE).stat().st_mtime_ns
    assert file.save(made)
    assert (tmp_path / STATE_FILE).stat().st_mtime_ns == stamp


def test_a_disk_that_is_full_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved(tmp_path)
    later = workload(seed=2, round=4)

    def full(tensors: object, path: Path, metadata: object) -> None:
        del tensors, metadata
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger, "save_file", full)
    with pytest.raises(StorageError, match=r"could not be written.*No space left"):
        StateFile(tmp_path, RUN).save(later)
    assert [p.name for p in tmp_path.iterdir()] == [STATE_FILE]
    loaded = workload()
    assert StateFile(tmp_path, RUN).load(loaded)
    assert loaded.state_digest() == before.state_digest()


def test_the_state_of_another_run_is_refused_as_a_matter_of_configuration(tmp_path: Path) -> None:
    saved(tmp_path)
    mine = workload(seed=2)
    digest = mine.state_digest()
    with pytest.raises(ConfigError, match="another run"):
        StateFile(tmp_path, OTHER).load(mine)
    assert mine.state_digest() == digest


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


CHANGES: Sequence[Callable[[dict[str, Tensor], dict[str, str]], object]] = (
    lambda tensors, _: tensors["weight"].view(-1)[7:8].add_(1),
    lambda tensors, _: tensors.pop("weight"),
    lambda tensors, _: tensors.update(weight=torch.zeros(3)),
    lambda _, metadata: metadata.update(state_digest="00" * 32),
    lambda _, metadata: metadata.update(round="many"),
    lambda _, metadata: metadata.pop("round"),
    lambda _, metadata: metadata.pop("state_digest"),  # defect: a bare KeyError
    lambda _, metadata: metadata.pop("format"),
    lambda _, metadata: metadata.pop("run_id"),
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_state_is_not_used_and_one_is_told_what_to_do(
    tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]
) -> None:
    saved(tmp_path)
    rewritten(tmp_path / STATE_FILE, lambda tensors, metadata: (change(tensors, metadata), None)[1])
    with pytest.raises((StorageError, ConfigError), match=r"(?i)move (it|the file) away"):
        StateFile(tmp_path, RUN).load(workload())


def test_a_file_that_is_cut_off_anywhere_is_damaged(tmp_path: Path) -> None:
    saved(tmp_path)
    data = (tmp_path / STATE_FILE).read_bytes()
    for cut in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        (tmp_path / STATE_FILE).write_bytes(data[:cut])
        with pytest.raises(StorageError, match="damaged"):
            StateFile(tmp_path, RUN).load(workload())


def test_a_workload_here_does_not_train() -> None:
    def step(report: StepReport) -> None:
        raise AssertionError(report)

    workload().train(3, step)
    assert math.isnan(workload().evaluate())
