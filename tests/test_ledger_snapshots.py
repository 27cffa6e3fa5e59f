"""Snapshots on disk: whole or in the making, never wrong, whatever happens to the disk or the process."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from prime_async.config.schema import OuterSettings
from prime_async.errors import ConfigError, LocalError, ProtocolError, StorageError
from prime_async.ledger import DamagedError, DiskFullError, Files, SnapshotInfo, Snapshots
from prime_async.ledger.snapshot_format import FORMAT
from prime_async.ledger.tensors import Entry, encode_header
from prime_async.messages import Commit, encode, state_digest
from prime_async.work.chunks import Chunks
from prime_async.work.inner import Span
from prime_async.work.outer import OuterState
from tests.faulty_files import FaultyFiles, crashes, failure, failures, losses

RUN, OTHER = b"r" * 32, b"o" * 32
SETTINGS = {"model": "tiny", "inner.steps": "4"}
SPANS = [Span("a.weight", 0, 6, (2, 3)), Span("b", 6, 7, ()), Span("c.weight", 7, 12, (5,))]
CHUNKS = Chunks(12, 5)
DIRECTORY = Path("/node")


def digest(seed: int) -> bytes:
    return blake3(seed.to_bytes(8, "little")).digest()


COMMIT = Commit(round=3, epoch=1, attempt=2, state=digest(1), digest=digest(2), chain=digest(3), view=5)


class State:
    """An outer state to keep, made from a seed."""

    def __init__(self, seed: int, round: int = 3, commit: Commit | None = COMMIT) -> None:
        chance = random.Random(seed)
        self.chunks = [chance.randbytes(8 * CHUNKS.size(c)) for c in range(CHUNKS.count)]
        digests = b"".join(blake3(data).digest() for data in self.chunks)
        self.info = SnapshotInfo(
            round=round, state_digest=state_digest(round, digests), chunk_digests=digests, commit=commit
        )


NEW, OLD = State(1), State(2)


def snapshots(files: Files, directory: Path = DIRECTORY, run: bytes = RUN) -> Snapshots:
    return Snapshots(directory, run, SETTINGS, SPANS, CHUNKS, files)


def write(files: Files, state: State, chunks: range = range(CHUNKS.count), directory: Path = DIRECTORY) -> Snapshots:
    """All chunks and an end, or some."""
    kept = snapshots(files, directory)
    partial = kept.open_partial(state.info)
    for chunk in chunks:
        partial.write(chunk, state.chunks[chunk])
    if len(chunks) == CHUNKS.count:
        partial.finish()
    partial.close()
    return kept


def contents(kept: Snapshots, round: int = 3) -> list[bytes]:
    return [kept.read(round, chunk) for chunk in range(CHUNKS.count)]


def test_a_snapshot_opens_with_safetensors_and_gives_the_tensors_by_their_names(tmp_path: Path) -> None:
    theta = torch.randn(12, generator=torch.Generator().manual_seed(1))
    state = OuterState(theta.clone(), CHUNKS.chunk_elements, OuterSettings())
    for chunk in range(CHUNKS.count):
        state.step(chunk, torch.ones(CHUNKS.size(chunk)), torch.empty(CHUNKS.size(chunk)))
    state.end_round()
    digests = state.chunk_digests
    info = SnapshotInfo(round=1, state_digest=state.digest, chunk_digests=digests, commit=COMMIT)

    kept = Snapshots(tmp_path, RUN, SETTINGS, SPANS, CHUNKS)
    partial = kept.open_partial(info)
    for chunk in range(CHUNKS.count):
        partial.write(chunk, state.export_chunk(chunk))
    partial.finish()

    assert kept.path(1) == tmp_path / "snapshots" / "000000000001.safetensors"
    halves = [state.export_chunk(chunk) for chunk in range(CHUNKS.count)]
    vectors = {
        "": b"".join(half[: len(half) // 2] for half in halves),
        "momentum.": b"".join(half[len(half) // 2 :] for half in halves),
    }
    expected: dict[str, Tensor] = {
        prefix + s.name: torch.frombuffer(bytearray(flat), dtype=torch.float32)[s.start : s.stop].view(s.shape)
        for prefix, flat in vectors.items()
        for s in SPANS
    }
    with safe_open(kept.path(1), framework="pt") as file:
        assert set(file.keys()) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(file.get_tensor(name), tensor)
        metadata = file.metadata()
    assert metadata.pop("header_digest")
    assert metadata == {
        "format": "prime-async outer state 2",
        "run_id": RUN.hex(),
        "run": '{"inner.steps": "4", "model": "tiny"}',
        "round": "1",
        "chunk_elements": "5",
        "state_digest": state.digest.hex(),
        "chunk_digests": digests.hex(),
        "commit": encode(COMMIT).hex(),
    }
    assert kept.info(1) == info
    assert [kept.read(1, c) for c in range(CHUNKS.count)] == [state.export_chunk(c) for c in range(CHUNKS.count)]


def test_the_data_are_the_flat_weights_and_then_the_flat_momentum() -> None:
    disk = FaultyFiles()
    data = disk.content(write(disk, NEW).path(3))[-96:]
    halves = [(c[: len(c) // 2], c[len(c) // 2 :]) for c in NEW.chunks]
    assert data == b"".join(weights for weights, _ in halves) + b"".join(momentum for _, momentum in halves)


def test_chunks_may_be_written_and_read_by_several_threads(tmp_path: Path) -> None:
    kept = Snapshots(tmp_path, RUN, SETTINGS, SPANS, CHUNKS)
    partial = kept.open_partial(NEW.info)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial.write, range(CHUNKS.count), NEW.chunks))
        partial.finish()
        assert list(pool.map(lambda chunk: kept.read(3, chunk), range(CHUNKS.count))) == NEW.chunks


def test_a_partial_is_gone_on_with_where_it_was_left() -> None:
    disk = FaultyFiles()
    kept = write(disk, NEW, range(2))
    assert (kept.rounds(), kept.partials()) == ([], [3])
    assert kept.partial_info(3) == NEW.info
    partial = snapshots(disk).open_partial(NEW.info)
    assert partial.present == {0, 1}
    with pytest.raises(LocalError, match="1 of 3 chunks are missing"):
        partial.finish()
    partial.write(2, NEW.chunks[2])
    partial.finish()
    assert (kept.rounds(), kept.partials()) == ([3], [])
    assert contents(kept) == NEW.chunks


def test_a_damaged_chunk_of_a_partial_is_missing_and_a_missing_chunk_is_not_zeros() -> None:
    disk = FaultyFiles()
    kept = write(disk, NEW, range(2))
    disk.flip(kept.partial_path(3), 8 * len(disk.content(kept.partial_path(3))) - 8 * 96 + 3)
    assert kept.open_partial(NEW.info).present == {1}
    disk.unreadable.add(kept.partial_path(3))
    with pytest.raises(StorageError, match=r"Input/output"):
        kept.open_partial(NEW.info)


def test_a_partial_of_another_state_is_begun_anew() -> None:
    disk = FaultyFiles()
    write(disk, OLD, range(2))
    partial = snapshots(disk).open_partial(NEW.info)
    assert partial.present == frozenset()
    assert snapshots(disk).partial_info(3) == NEW.info
    assert disk.content(snapshots(disk).partial_path(3))[-96:] == bytes(96)  # its room is given back


def test_of_a_whole_snapshot_no_chunk_is_missing() -> None:
    disk = FaultyFiles()
    kept = write(disk, NEW)
    partial = kept.open_partial(NEW.info)
    assert partial.present == {0, 1, 2}
    partial.write(1, NEW.chunks[1])
    partial.finish()
    assert (kept.rounds(), kept.partials()) == ([3], [])
    assert contents(kept) == NEW.chunks


def test_a_finished_snapshot_takes_the_place_of_one_of_another_state() -> None:
    disk = FaultyFiles()
    kept = write(disk, OLD)
    assert contents(kept) == OLD.chunks
    partial = kept.open_partial(NEW.info)
    for chunk, data in enumerate(NEW.chunks):
        partial.write(chunk, data)
    partial.finish()
    assert contents(kept) == NEW.chunks


def test_bytes_that_are_not_the_chunks_are_refused() -> None:
    disk = FaultyFiles()
    partial = snapshots(disk).open_partial(NEW.info)
    for wrong in (OLD.chunks[0], NEW.chunks[1], b"", NEW.chunks[0][:-1]):
        with pytest.raises(ProtocolError, match="chunk 0 after round 3"):
            partial.write(0, wrong)
    partial.close()
    partial.close()
    with pytest.raises(LocalError, match="closed"):
        partial.write(0, NEW.chunks[0])
    assert snapshots(disk).open_partial(NEW.info).present == frozenset()


def test_an_info_that_does_not_fit_is_our_own_fault() -> None:
    good = NEW.info
    bad = [
        SnapshotInfo(round=4, state_digest=good.state_digest, chunk_digests=good.chunk_digests),
        SnapshotInfo(round=3, state_digest=state_digest(3, b""), chunk_digests=b""),
        SnapshotInfo(round=-1, state_digest=good.state_digest, chunk_digests=good.chunk_digests),
    ]
    for info in bad:
        with pytest.raises(LocalError):
            snapshots(FaultyFiles()).open_partial(info)


def test_a_snapshot_of_another_run_is_refused_as_a_matter_of_configuration() -> None:
    disk = FaultyFiles()
    write(disk, NEW)
    write(disk, State(7, round=4), range(1))
    with pytest.raises(ConfigError, match="another run"):
        snapshots(disk, run=OTHER).info(3)
    assert snapshots(disk, run=OTHER).partial_info(4) is None


def test_a_snapshot_of_another_model_or_in_other_chunks_is_refused() -> None:
    disk = FaultyFiles()
    write(disk, NEW)
    shapes = [Span("a.weight", 0, 6, (3, 2)), *SPANS[1:]]
    for kept in (
        Snapshots(DIRECTORY, RUN, SETTINGS, shapes, CHUNKS, disk),
        Snapshots(DIRECTORY, RUN, SETTINGS, SPANS, Chunks(12, 4), disk),
    ):
        with pytest.raises(StorageError, match="another model, or in other chunks"):
            kept.info(3)


def test_what_is_not_there_is_a_storage_error_with_its_path() -> None:
    kept = snapshots(FaultyFiles())
    for act in (lambda: kept.info(5), lambda: kept.read(5, 0), lambda: kept.demote(5)):
        with pytest.raises(StorageError, match=r"/node/snapshots/000000000005\.safetensors: .*No such file"):
            act()
    assert kept.partial_info(5) is None
    assert (kept.rounds(), kept.partials()) == ([], [])
    kept.remove(5)
    kept.remove_partial(5)


def test_what_is_removed_is_gone() -> None:
    disk = FaultyFiles()
    write(disk, NEW)
    kept = write(disk, State(4, round=10**12), range(1))
    contents(kept)
    kept.remove(3)
    assert (kept.rounds(), kept.partials()) == ([], [10**12])
    with pytest.raises(StorageError):
        kept.read(3, 0)
    kept.remove_partial(10**12)
    assert disk.names() == set()


# --- damage ---


def test_any_flipped_bit_is_found_and_in_a_chunk_told_with_the_chunk() -> None:
    disk = FaultyFiles()
    path = write(disk, NEW).path(3)
    size = len(disk.content(path))
    owner = [c for _ in range(2) for c in range(CHUNKS.count) for _ in range(4 * CHUNKS.size(c))]
    for bit in range(8 * size):
        damaged = disk.copy()
        damaged.flip(path, bit)
        kept = snapshots(damaged)
        with pytest.raises(DamagedError) as caught:
            contents(kept)
        position = bit // 8 - (size - 96)
        assert caught.value.chunk == (owner[position] if position >= 0 else None), bit
        assert caught.value.path == path


def test_a_damage_that_comes_after_the_header_was_read_is_found() -> None:
    disk = FaultyFiles()
    kept = write(disk, NEW)
    assert contents(kept) == NEW.chunks
    disk.flip(kept.path(3), 8 * len(disk.content(kept.path(3))) - 1)
    with pytest.raises(DamagedError) as caught:
        contents(kept)
    assert caught.value.chunk == 2
    disk.unreadable.add(kept.path(3))
    with pytest.raises(DamagedError):
        kept.read(3, 0)


def test_a_demoted_snapshot_keeps_its_good_chunks() -> None:
    disk = FaultyFiles()
    kept = write(disk, NEW)
    disk.flip(kept.path(3), 8 * len(disk.content(kept.path(3))) - 1)
    kept.demote(3)
    assert (kept.rounds(), kept.partials()) == ([], [3])
    partial = kept.open_partial(NEW.info)
    assert partial.present == {0, 1}
    partial.write(2, NEW.chunks[2])
    partial.finish()
    assert contents(kept) == NEW.chunks


@pytest.mark.parametrize("ending", [b"", b"more"])
def test_a_demoted_snapshot_may_have_another_length(ending: bytes) -> None:
    disk = FaultyFiles()
    kept = write(disk, NEW)
    disk.set_content(kept.path(3), disk.content(kept.path(3))[: None if ending else -40] + ending)
    with pytest.raises(DamagedError):
        kept.info(3)
    kept.demote(3)
    partial = kept.open_partial(NEW.info)
    for chunk in set(range(3)) - partial.present:
        partial.write(chunk, NEW.chunks[chunk])
    partial.finish()
    assert contents(snapshots(disk)) == NEW.chunks


def test_a_snapshot_that_is_cut_off_anywhere_is_damaged_and_can_be_filled_again() -> None:
    disk = FaultyFiles()
    path = write(disk, NEW).path(3)
    whole = disk.content(path)
    for size in range(len(whole)):
        disk.set_content(path, whole[:size])
        with pytest.raises(DamagedError):
            snapshots(disk).info(3)
        disk.set_content(snapshots(disk).partial_path(3), whole[:size])
        assert snapshots(disk).partial_info(3) in (None, NEW.info)
        assert contents(write(disk.copy(), NEW)) == NEW.chunks


@given(st.binary(max_size=300))
def test_a_file_of_any_bytes_is_damaged_or_none_of_ours(data: bytes) -> None:
    disk = FaultyFiles()
    disk.set_content(snapshots(disk).path(3), data)
    disk.set_content(snapshots(disk).partial_path(3), data)
    with pytest.raises(StorageError):
        snapshots(disk).info(3)
    assert snapshots(disk).partial_info(3) is None
    assert contents(write(disk, NEW)) == NEW.chunks


GOOD = {
    "format": FORMAT,
    "run_id": RUN.hex(),
    "run": "{}",
    "round": "3",
    "chunk_elements": "5",
    "state_digest": NEW.info.state_digest.hex(),
    "chunk_digests": NEW.info.chunk_digests.hex(),
    "commit": "",
}
WRONG = ("many", "-1", "ff", "³", "9" * 5000)
CHANGES: list[dict[str, str | None]] = [
    *[dict[str, str | None]({name: None}) for name in GOOD if name != "run"],
    *[dict[str, str | None]({name: value}) for name in GOOD if name not in ("run", "run_id") for value in WRONG],
    {"format": "prime-async outer state 3"},
    {"round": "4"},
    {"commit": encode(COMMIT)[:-1].hex()},
    {"chunk_digests": OLD.info.chunk_digests.hex()},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change)[:60])
def test_a_header_that_is_whole_but_wrong_is_refused(change: dict[str, str | None]) -> None:
    changed = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    entries = [Entry(prefix + s.name, "F32", s.shape) for prefix in ("", "momentum.") for s in SPANS]
    disk = FaultyFiles()
    disk.set_content(snapshots(disk).path(3), encode_header(entries, changed) + bytes(96))
    with pytest.raises((StorageError, ConfigError), match=r"(?i)move (it|the file) away"):
        snapshots(disk).info(3)


# --- crashes ---


def nothing() -> FaultyFiles:
    return FaultyFiles()


def some_chunks() -> FaultyFiles:
    disk = FaultyFiles()
    write(disk, NEW, range(2))
    return disk  # and perhaps not on disk yet


def other_partial() -> FaultyFiles:
    disk = FaultyFiles()
    write(disk, State(5), range(2))
    return disk.settle()


def other_whole() -> FaultyFiles:
    disk = FaultyFiles()
    write(disk, OLD)
    return disk


def damaged_whole() -> FaultyFiles:
    disk = FaultyFiles()
    kept = write(disk, NEW)
    disk.flip(kept.path(3), 8 * len(disk.content(kept.path(3))) - 1)
    kept.demote(3)
    return disk


SETUPS: list[Callable[[], FaultyFiles]] = [nothing, some_chunks, other_partial, other_whole, damaged_whole]


def check_what_is_found(disk: FaultyFiles, how: str) -> None:
    """Whole files are right, partials can be finished, and then the snapshot survives."""
    kept = snapshots(disk)
    assert set(kept.rounds()) <= {1, 3}, how
    for round in kept.rounds():
        expected = {NEW.info: NEW, OLD.info: OLD, BEFORE.info: BEFORE}[kept.info(round)]
        assert contents(kept, round) == expected.chunks, how
    assert kept.partial_info(3) in (None, NEW.info, State(5).info), how
    partial = kept.open_partial(NEW.info)
    for chunk in set(range(CHUNKS.count)) - partial.present:
        partial.write(chunk, NEW.chunks[chunk])
    partial.finish()
    for found, later in losses(disk):
        assert contents(snapshots(found)) == NEW.chunks, (how, later)
        assert snapshots(found).info(3) == NEW.info, (how, later)


BEFORE = State(6, round=1, commit=None)


@pytest.mark.parametrize("setup", SETUPS)
def test_a_crash_while_a_snapshot_is_written_leaves_what_was_there_or_what_can_be_finished(
    setup: Callable[[], FaultyFiles],
) -> None:
    disk = setup()
    write(disk, BEFORE)
    for found, how in crashes(disk, lambda cut: write(cut, NEW)):
        assert 1 in snapshots(found).rounds(), how
        if setup is other_whole:
            assert 3 in snapshots(found).rounds(), how
        check_what_is_found(found, how)


def test_a_second_crash_is_no_worse_than_the_first() -> None:
    for once, how in crashes(nothing(), lambda cut: write(cut, NEW)):
        if how.startswith("process killed before"):
            for twice, again in crashes(once, lambda cut: write(cut, NEW), seeds=range(1)):
                check_what_is_found(twice, f"{how}, and then {again}")


@pytest.mark.parametrize("act", [Snapshots.demote, Snapshots.remove])
def test_a_crash_while_a_snapshot_is_demoted_or_removed_leaves_no_wrong_one(
    act: Callable[[Snapshots, int], None],
) -> None:
    disk = write_both()
    for found, how in [*crashes(disk, lambda cut: act(snapshots(cut), 3))]:
        assert 1 in snapshots(found).rounds(), how
        check_what_is_found(found, how)
    act(snapshots(disk), 3)
    for found, how in losses(disk):
        check_what_is_found(found, how)


def write_both() -> FaultyFiles:
    disk = FaultyFiles()
    write(disk, BEFORE)
    write(disk, NEW)
    return disk


def test_a_partial_that_was_opened_is_known_after_a_loss_of_power() -> None:
    disk = FaultyFiles()
    write(disk, NEW, range(2))
    for found, how in losses(disk):
        assert snapshots(found).partial_info(3) == NEW.info, how


def test_a_snapshot_that_was_demoted_stays_so_after_a_loss_of_power() -> None:
    disk = write_both()
    snapshots(disk).demote(3)
    for found, how in losses(disk):
        assert (snapshots(found).rounds(), snapshots(found).partials()) == ([1], [3]), how


def test_a_finished_snapshot_survives_a_loss_of_power() -> None:
    disk = write_both()
    for found, how in losses(disk):
        assert snapshots(found).rounds() == [1, 3], how
        assert contents(snapshots(found)) == NEW.chunks, how


# --- a full disk ---


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("setup", SETUPS)
def test_a_disk_that_is_full_or_fails_leaves_what_was_there(setup: Callable[[], FaultyFiles], error: int) -> None:
    disk = setup()
    write(disk, BEFORE)
    for failing, how in failures(disk, lambda d: write(d, NEW), error):
        caught = failure(failing, lambda d: write(d, NEW))
        if caught:  # some operations cannot fail for want of room
            assert "/node/snapshots/000000000003." in str(caught), how
            assert isinstance(caught, DiskFullError) == (error != errno.EIO), how
        assert contents(snapshots(failing), 1) == BEFORE.chunks, how
        check_what_is_found(failing, how)


def test_a_chunk_or_an_end_that_failed_can_be_tried_again() -> None:
    for failing, how in failures(nothing(), lambda d: write(d, NEW)):
        try:
            partial = snapshots(failing).open_partial(NEW.info)
        except StorageError:
            partial = snapshots(failing).open_partial(NEW.info)
        for chunk, data in enumerate(NEW.chunks):
            try:
                partial.write(chunk, data)
            except StorageError:
                with pytest.raises(LocalError, match="missing"):
                    partial.finish()
                partial.write(chunk, data)
        try:
            partial.finish()
        except StorageError:
            partial.finish()
        for found, later in losses(failing):
            assert contents(snapshots(found)) == NEW.chunks, (how, later)
