"""The inner optimiser's state on disk: the whole of one save, or nothing."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from structlog.testing import capture_logs
from torch import Tensor

from prime_async.errors import LocalError
from prime_async.ledger import DiskFullError, Files, InnerFile
from prime_async.ledger.inner import PIECE_BYTES
from tests.faulty_files import FaultyFiles, crashes, failure, failures, losses

RUN, OTHER = b"r" * 32, b"o" * 32
DIRECTORY = Path("/node")
STATE = b"s" * 32


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "b.exp_avg": torch.randn(2, 3, generator=generator),
        "step": torch.tensor(seed),
        "a.half": torch.randn(3, generator=generator).bfloat16(),
        "empty": torch.empty(0, 4),
        "rng": torch.randint(2**62, (2,), generator=generator),
    }


def inner(files: Files, run: bytes = RUN) -> InnerFile:
    return InnerFile(DIRECTORY, run, files)


def save(files: Files, round: int) -> None:
    inner(files).save(round, STATE, tensors(round))


def same(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> bool:
    return (
        found is not None
        and list(found) == list(expected)
        and all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
    )


def rounds(files: Files) -> set[int]:
    """Of which round a state is found, whole; and nothing is damaged."""
    with capture_logs() as logs:
        found = {round: inner(files).load(round, STATE) for round in (1, 2)}
    assert logs == []
    there = {round for round, state in found.items() if state is not None}
    assert all(same(found[round], tensors(round)) for round in there)
    return there


def test_what_was_saved_is_loaded_again_bit_for_bit() -> None:
    disk = FaultyFiles()
    save(disk, 1)
    assert same(inner(disk).load(1, STATE), tensors(1))
    save(disk, 2)
    assert rounds(disk) == {2}
    assert disk.names() == {"inner.safetensors"}


def test_the_file_opens_with_safetensors(tmp_path: Path) -> None:
    file = InnerFile(tmp_path / "new", RUN)
    file.save(7, STATE, tensors(7))
    with safe_open(file.path, framework="pt") as opened:
        assert same({n: opened.get_tensor(n) for n in tensors(7)}, tensors(7))
        metadata = opened.metadata()
    assert metadata["round"] == "7"
    assert metadata["state_digest"] == STATE.hex()
    assert metadata["run_id"] == RUN.hex()
    assert re.fullmatch("[0-9a-f]{64}", metadata["data_digest"])


def test_the_state_of_another_round_or_outer_state_or_run_is_not_loaded() -> None:
    disk = FaultyFiles()
    save(disk, 1)
    with capture_logs() as logs:
        assert inner(disk).load(2, STATE) is None
        assert inner(disk).load(1, b"t" * 32) is None
        assert inner(disk, OTHER).load(1, STATE) is None
        assert inner(FaultyFiles()).load(1, STATE) is None
    assert logs == []


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, dtype=torch.float64), torch.zeros(2, 3).t(), torch.zeros(2, device="meta")],
    ids=["dtype", "strides", "device"],
)
def test_a_tensor_of_another_kind_is_refused(tensor: Tensor) -> None:
    disk = FaultyFiles()
    save(disk, 1)
    with pytest.raises(LocalError, match="odd is"):
        inner(disk).save(2, STATE, {"odd": tensor})
    assert rounds(disk) == {1}


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.lists(st.integers(0, 3), max_size=3), st.sampled_from([torch.float32, torch.int64, torch.bfloat16])
        ),
        max_size=5,
    )
)
def test_tensors_of_any_name_shape_and_kind_are_kept(shapes: dict[str, tuple[list[int], torch.dtype]]) -> None:
    state = {name: torch.full(shape, 3, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    disk = FaultyFiles()
    inner(disk).save(1, STATE, state)
    assert same(inner(disk).load(1, STATE), state)


def test_it_is_written_and_read_in_pieces() -> None:
    state = {"a": torch.arange(PIECE_BYTES // 4 * 2 + 3, dtype=torch.float32)}
    disk = FaultyFiles()
    inner(disk).save(1, STATE, state)
    sizes = [int(match[1]) for line in disk.log if (match := re.search(r"write inner\.part \d+\+(\d+)", line))]
    assert sizes[:3] == [PIECE_BYTES, PIECE_BYTES, 12]
    assert same(inner(disk).load(1, STATE), state)


def test_a_damaged_file_is_nothing_and_said_in_the_log() -> None:
    disk = FaultyFiles()
    save(disk, 1)
    path = inner(disk).path
    whole = disk.content(path)
    flipped = [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in (1, 64)]
    for content in [*flipped, *(whole[:size] for size in range(len(whole))), whole + b"\0"]:
        disk.set_content(path, content)
        with capture_logs() as logs:
            assert inner(disk).load(1, STATE) is None
        assert [log["event"] for log in logs] == ["inner_state_not_loaded"]
    save(disk, 2)
    assert rounds(disk) == {2}


def test_a_file_that_cannot_be_read_is_nothing_and_said_in_the_log() -> None:
    disk = FaultyFiles()
    save(disk, 1)
    disk.unreadable.add(inner(disk).path)
    with capture_logs() as logs:
        assert inner(disk).load(1, STATE) is None
    assert [log["event"] for log in logs] == ["inner_state_not_loaded"]


@pytest.mark.parametrize("before", [None, 1])
def test_a_crash_leaves_the_state_before_or_the_new_one(before: int | None) -> None:
    disk = FaultyFiles()
    if before:
        save(disk, before)
    for found, how in crashes(disk, lambda cut: save(cut, 2)):
        assert rounds(found) in ({before} - {None}, {2}), how
        save(found, 1)
        assert rounds(found) == {1}, how
    save(disk, 2)
    for found, how in losses(disk):
        assert rounds(found) == {2}, how


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_is_full_or_fails_leaves_the_state_before(error: int) -> None:
    disk = FaultyFiles()
    save(disk, 1)
    for failing, how in failures(disk, lambda d: save(d, 2), error):
        caught = failure(failing, lambda d: save(d, 2))
        if caught:
            assert "/node/inner.safetensors: the inner state could not be written: " in str(caught), how
            assert isinstance(caught, DiskFullError) == (error != errno.EIO), how
        after_rename = any("sync_directory" in line for line in failing.log)
        assert rounds(failing) == ({2} if after_rename or not caught else {1}), how
        assert failing.names() == {"inner.safetensors"}, how
