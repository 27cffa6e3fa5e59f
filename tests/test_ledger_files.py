"""The file system that the ledger sees, real and faulty, and the headers of safetensors files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_async.errors import LocalError, StorageError
from prime_async.ledger.errors import DamagedError, DiskFullError, translated
from prime_async.ledger.files import Files, LocalFiles, list_rounds
from prime_async.ledger.tensors import Entry, HeaderError, encode_header, read_header
from tests.faulty_files import Crash, FaultyFiles, crashes, failures, losses


@pytest.fixture(params=[LocalFiles, FaultyFiles])
def files(request: pytest.FixtureRequest) -> Files:
    make: Callable[[], Files] = request.param
    return make()


def write(files: Files, path: Path, data: bytes) -> None:
    files.make_directory(path.parent)
    with files.open(path, create=True) as file:
        file.write_at(0, data)
        file.sync()
    files.sync_directory(path.parent)


def read(files: Files, path: Path) -> bytes:
    with files.open(path, create=False) as file:
        return file.read_at(0, file.size())


def test_what_is_written_at_a_place_is_read_there(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write(files, path, b"hello")
    with files.open(path, create=True) as file:
        file.write_at(8, memoryview(b"world"))
        assert file.size() == 13
        assert file.read_at(0, 13) == b"hello\0\0\0world"
        assert file.read_at(10, 100) == b"rld"
        assert file.read_at(100, 10) == b""
        file.truncate(4)
        file.truncate(6)
        assert file.read_at(0, 10) == b"hell\0\0"
    assert read(files, path) == b"hell\0\0"


def test_a_file_that_is_not_there_is_not_made_for_reading(files: Files, tmp_path: Path) -> None:
    files.make_directory(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.open(tmp_path / "none", create=False)
    assert not files.exists(tmp_path / "none")
    files.remove(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        files.replace(tmp_path / "none", tmp_path / "other")


def test_a_directory_lists_its_names_and_one_that_is_not_there_none(files: Files, tmp_path: Path) -> None:
    write(files, tmp_path / "d" / "a", b"1")
    write(files, tmp_path / "d" / "b", b"2")
    files.make_directory(tmp_path / "d")
    assert sorted(files.list(tmp_path / "d")) == ["a", "b"]
    assert files.list(tmp_path / "none") == []
    files.replace(tmp_path / "d" / "a", tmp_path / "d" / "b")
    assert files.list(tmp_path / "d") == ["b"]
    assert read(files, tmp_path / "d" / "b") == b"1"
    files.remove(tmp_path / "d" / "b")
    assert files.list(tmp_path / "d") == []


def test_a_file_may_be_closed_twice(files: Files, tmp_path: Path) -> None:
    write(files, tmp_path / "d" / "a", b"1")
    file = files.open(tmp_path / "d" / "a", create=False)
    file.close()
    file.close()


def test_a_write_that_the_system_cuts_short_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:3], at))
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 2), at))
    write(LocalFiles(), tmp_path / "a", b"0123456789")
    assert read(LocalFiles(), tmp_path / "a") == b"0123456789"


def test_a_directory_that_cannot_be_synced_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", refuse)
    error = errno.EINVAL
    LocalFiles().sync_directory(tmp_path)
    error = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        LocalFiles().sync_directory(tmp_path)


def test_only_names_of_rounds_are_listed_as_rounds(files: Files, tmp_path: Path) -> None:
    odd = ("0000000000001.x", "7.x", "00000000000٣.x", "x", "000000000009.xx", "000000000009", "-00000000009.x")
    for name in ("000000000007.x", "000000000003.x", "1000000000000.x", *odd):
        write(files, tmp_path / "d" / name, b"")
    assert list_rounds(files, tmp_path / "d", ".x") == [3, 7, 10**12]


@pytest.mark.parametrize(
    ("number", "kind", "advice"),
    [
        (errno.ENOSPC, DiskFullError, "make room"),
        (errno.EDQUOT, DiskFullError, "make room"),
        (errno.EACCES, StorageError, "rights"),
    ],
)
def test_an_error_of_the_system_names_the_path_the_failure_and_what_to_do(
    number: int, kind: type[StorageError], advice: str
) -> None:
    with (
        pytest.raises(kind, match=rf"/d/f: it failed: {os.strerror(number)}.*{advice}"),
        translated(Path("/d/f"), "it failed"),
    ):
        raise OSError(number, os.strerror(number))


def test_a_damage_says_whose_it_is() -> None:
    error = DamagedError(Path("/d/f"), 3, "why")
    assert (error.path, error.chunk) == (Path("/d/f"), 3)
    assert str(error).startswith("/d/f: chunk 3 is damaged (why): ")


# --- the faulty disk itself ---

DIRECTORY = Path("/node")


def replaced(disk: FaultyFiles, *, sync: bool, sync_directory: bool) -> None:
    with disk.open(DIRECTORY / "part", create=True) as file:
        file.write_at(0, b"newer")
        if sync:
            file.sync()
    disk.replace(DIRECTORY / "part", DIRECTORY / "file")
    if sync_directory:
        disk.sync_directory(DIRECTORY)


def with_a_file() -> FaultyFiles:
    disk = FaultyFiles()
    write(disk, DIRECTORY / "file", b"old")
    return disk


def test_the_faulty_disk_keeps_what_was_synced() -> None:
    disk = with_a_file()
    replaced(disk, sync=True, sync_directory=True)
    for found, how in losses(disk):
        assert read(found, DIRECTORY / "file") == b"newer", how


def test_the_faulty_disk_loses_at_times_what_was_not_synced() -> None:
    unsynced, entry = with_a_file(), with_a_file()
    replaced(unsynced, sync=False, sync_directory=True)
    replaced(entry, sync=True, sync_directory=False)
    contents = {read(found, DIRECTORY / "file") for found, _ in losses(unsynced)}
    assert contents >= {b"newer", b"", bytes(5)}
    assert len(contents) > 3
    assert {read(found, DIRECTORY / "file") for found, _ in losses(entry)} == {b"newer", b"old"}
    assert read(unsynced.found_after("process killed", 0), DIRECTORY / "file") == b"newer"


def test_a_killed_process_leaves_what_may_still_be_lost() -> None:
    disk = with_a_file()
    replaced(disk, sync=False, sync_directory=False)
    killed = disk.found_after("process killed", 0)
    assert read(killed, DIRECTORY / "file") == b"newer"
    assert {read(found, DIRECTORY / "file") for found, _ in losses(killed)} >= {b"newer", b"old", b""}


def test_the_faulty_disk_crashes_in_each_operation_and_stays_down() -> None:
    disk = with_a_file()

    def act(cut: FaultyFiles) -> None:
        try:
            replaced(cut, sync=True, sync_directory=True)
        except Crash:
            with pytest.raises(Crash):
                cut.remove(DIRECTORY / "part")
            raise

    found = [(read(d, DIRECTORY / "file"), how) for d, how in crashes(disk, act)]
    assert {content for content, _ in found} == {b"old", b"newer"}
    assert {how.split("'")[1] for _, how in found} == {
        "0: create part", "1: write part 0+5", "2: sync part", "3: replace part file", "4: sync_directory node",
    }  # fmt: skip


def test_the_faulty_disk_fails_in_each_operation_and_is_full_where_it_ends() -> None:
    disk = with_a_file()
    for failing, how in failures(disk, lambda d: replaced(d, sync=True, sync_directory=True)):
        with pytest.raises(OSError, match="No space"):
            replaced(failing, sync=True, sync_directory=True)
        assert read(failing, DIRECTORY / "file") in (b"old", b"newer"), how
    disk.capacity = 7
    with pytest.raises(OSError, match="No space"):
        replaced(disk, sync=True, sync_directory=True)
    disk.remove(DIRECTORY / "file")
    write(disk, DIRECTORY / "other", b"seven b")


# --- headers ---

ENTRIES = (Entry("b", "F32", (2, 3)), Entry("a", "I64", ()), Entry("empty", "BF16", (0, 4)), Entry("c", "BF16", (3,)))
METADATA = {"format": 'with "quotes" and é', "zeros": "0" * 64, "header_digest_": "0" * 64}


def file_of(header: bytes, data: bytes = bytes(38)) -> FaultyFiles:
    disk = FaultyFiles()
    disk.set_content(DIRECTORY / "file", header + data)
    return disk


def test_a_header_is_read_as_it_was_written_and_keeps_the_data_aligned() -> None:
    header = encode_header(ENTRIES, METADATA)
    with file_of(header).open(DIRECTORY / "file", create=False) as file:
        found = read_header(file)
    assert found.entries == ENTRIES
    assert found.data_start == len(header)
    assert len(header) % 8 == 0
    assert {**found.metadata, "header_digest": ""} == {**METADATA, "header_digest": ""}


def test_the_length_of_a_header_does_not_depend_on_what_metadata_of_one_length_say() -> None:
    assert len(encode_header(ENTRIES, {"d": "0" * 64})) == len(encode_header(ENTRIES, {"d": "f" * 64}))


@pytest.mark.parametrize("names", [("a", "a"), ("a", "__metadata__")])
def test_a_name_stands_for_one_tensor(names: tuple[str, str]) -> None:
    with pytest.raises(LocalError, match="rename one"):
        encode_header([Entry(name, "F32", (1,)) for name in names], {})


def test_any_flipped_bit_or_missing_byte_of_a_header_is_noticed() -> None:
    header = encode_header(ENTRIES, METADATA)
    disk = file_of(header)
    for bit in range(8 * len(header)):
        damaged = file_of(header)
        damaged.flip(DIRECTORY / "file", bit)
        with damaged.open(DIRECTORY / "file", create=False) as file, pytest.raises(HeaderError):
            read_header(file)
    whole = disk.content(DIRECTORY / "file")
    for size in range(len(whole)):
        with (
            file_of(whole[:size], b"").open(DIRECTORY / "file", create=False) as file,
            pytest.raises(HeaderError),
        ):
            read_header(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["__metadata__", "a", "dtype"]), inner),
)


@given(st.binary(max_size=200) | JSON.map(lambda tree: json.dumps(tree).encode()))
def test_no_other_bytes_are_taken_for_a_header(text: bytes) -> None:
    for content in (text, len(text).to_bytes(8, "little") + text):
        with file_of(content, b"").open(DIRECTORY / "file", create=False) as file, pytest.raises(HeaderError):
            read_header(file)


def test_a_header_that_is_nested_without_end_is_refused() -> None:
    text = b'{"__metadata__":' + b"[" * 100_000
    with (
        file_of(len(text).to_bytes(8, "little") + text).open(DIRECTORY / "file", create=False) as file,
        pytest.raises(HeaderError),
    ):
        read_header(file)
