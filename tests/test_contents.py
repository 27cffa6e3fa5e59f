"""Files that a group shares, on disk: what is given, what is coming, and what a crash leaves of it."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
from msgspec.structs import replace

from prime_async.errors import LocalError, ProtocolError, StorageError
from prime_async.ledger.contents import (
    BytesContent,
    ComingBytes,
    ComingFile,
    FileContent,
    make_manifest,
    manifest_digest,
    read_manifest,
)
from prime_async.ledger.errors import DamagedError, DiskFullError
from prime_async.messages import FileManifest, Manifest, encode

CHUNK = 1024
DATA = random.Random(1).randbytes(5 * CHUNK + 100)


def content(data: bytes = DATA) -> BytesContent:
    return BytesContent(data, CHUNK)


def part_of(path: Path, manifest: FileManifest) -> Path:
    return path.with_name(f"{path.name}.{manifest_digest(manifest).hex()[:16]}.part")


def coming(path: Path, data: bytes = DATA) -> tuple[ComingFile, BytesContent]:
    source = content(data)
    return ComingFile(path, manifest_digest(source.manifest)), source


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 100])
def test_a_file_that_comes_chunk_by_chunk_is_the_same_file(tmp_path: Path, size: int) -> None:
    (tmp_path / "there").write_bytes(DATA[:size])
    there = FileContent.open(tmp_path / "there", CHUNK)
    manifest = there.manifest
    assert manifest == content(DATA[:size]).manifest
    path = tmp_path / "here"
    here = ComingFile(path, manifest_digest(manifest))

    missing = here.begin(manifest)
    for chunk in reversed(missing):
        here.write(chunk, there.read(chunk))
    given = here.finish()

    assert len(missing) == -(-size // CHUNK)
    assert path.read_bytes() == DATA[:size]
    assert b"".join(bytes(given.read(c)) for c in missing) == DATA[:size]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "there"]
    there.close()
    given.close()
    given.close()


def test_chunks_that_came_before_a_crash_are_found_by_their_digests(tmp_path: Path) -> None:
    """Given a part with a whole chunk, a damaged and a torn one, when it goes on, then all others are missing."""
    path = tmp_path / "here"
    first, source = coming(path)
    first.begin(source.manifest)
    for chunk in (0, 2, 3):
        first.write(chunk, source.read(chunk))
    part = part_of(path, source.manifest)
    torn = bytearray(part.read_bytes())
    torn[2 * CHUNK + 5] ^= 1
    part.write_bytes(torn[: 3 * CHUNK + 400])

    again = ComingFile(path, manifest_digest(source.manifest))
    missing = again.begin(source.manifest)

    assert missing == (1, 2, 3, 4, 5)
    for chunk in missing:
        again.write(chunk, source.read(chunk))
    again.finish().close()
    assert path.read_bytes() == DATA


def test_a_part_that_is_too_long_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "here"
    _, source = coming(path)
    part_of(path, source.manifest).write_bytes(DATA + b"and more")
    here = ComingFile(path, manifest_digest(source.manifest))

    assert here.begin(source.manifest) == ()
    here.finish().close()
    assert path.read_bytes() == DATA


def test_wrong_bytes_are_refused_and_leave_the_chunk_missing(tmp_path: Path) -> None:
    here, source = coming(tmp_path / "here")
    here.begin(source.manifest)
    for wrong in (DATA[1 : CHUNK + 1], DATA[: CHUNK - 1], b""):
        with pytest.raises(ProtocolError, match="chunk 0 is not what the manifest says"):
            here.write(0, wrong)
    here.leave()
    assert ComingFile(tmp_path / "here", manifest_digest(source.manifest)).begin(source.manifest) == (0, 1, 2, 3, 4, 5)


def test_what_is_left_before_anything_came_leaves_no_file(tmp_path: Path) -> None:
    here, source = coming(tmp_path / "here")
    here.leave()
    assert list(tmp_path.iterdir()) == []
    here, source = coming(tmp_path / "here")
    here.begin(source.manifest)
    here.write(0, source.read(0))
    here.leave()
    assert [p.name for p in tmp_path.iterdir()] == [part_of(tmp_path / "here", source.manifest).name]


def test_the_file_that_was_there_is_replaced_when_all_has_come_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    path.write_bytes(b"before")
    here, source = coming(path)
    for chunk in here.begin(source.manifest):
        here.write(chunk, source.read(chunk))
    assert path.read_bytes() == b"before"
    here.finish().close()
    assert path.read_bytes() == DATA


def test_what_is_given_is_what_was_shared_though_another_file_takes_its_place(tmp_path: Path) -> None:
    """Given a shared file, when another is renamed over it, then it is given still; if it is written to, it is not."""
    path = tmp_path / "there"
    path.write_bytes(DATA)
    there = FileContent.open(path, CHUNK)
    (tmp_path / "other").write_bytes(DATA[::-1])
    (tmp_path / "other").replace(path)
    assert there.read(1) == DATA[CHUNK : 2 * CHUNK]

    there = FileContent.open(path, CHUNK)
    with path.open("r+b") as file:
        file.write(b"x")
    with pytest.raises(DamagedError, match=r"chunk 0 is damaged \(its bytes are not what they were when"):
        there.read(0)
    there.close()
    with pytest.raises(StorageError, match="not shared any more"):
        there.read(1)


def test_what_cannot_be_shared_or_written_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none: the file cannot be read: No such file"):
        FileContent.open(tmp_path / "none", CHUNK)
    with pytest.raises(StorageError, match="a directory cannot be shared: share its files"):
        FileContent.open(tmp_path, CHUNK)
    with pytest.raises(StorageError, match=r"part: nothing can be written there: No such file.*look after .* path"):
        ComingFile(tmp_path / "no" / "such", bytes(32))
    with pytest.raises(StorageError, match="this is a directory: give the path of a file in it"):
        ComingFile(tmp_path, bytes(32))


def test_a_full_disk_is_told_and_what_came_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, source = coming(tmp_path / "here")
    here.begin(source.manifest)
    here.write(0, source.read(0))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(here._file, "write_at", full)
    with pytest.raises(DiskFullError, match=r"chunk 1 could not be written: .*choose a path on another disk"):
        here.write(1, source.read(1))
    again = ComingFile(tmp_path / "here", manifest_digest(source.manifest))
    assert again.begin(source.manifest) == (1, 2, 3, 4, 5)


def test_bytes_come_into_memory() -> None:
    source, here = content(), ComingBytes()
    for chunk in here.begin(source.manifest):
        here.write(chunk, source.read(chunk))
    given = here.finish()
    assert given.data == DATA
    assert given.read(5) == DATA[5 * CHUNK :]
    with pytest.raises(ProtocolError, match="chunk 1"):
        here.write(1, source.read(0))


# --- manifests ------------------------------------------------------------------------------------------------------


def test_a_manifest_must_have_the_digest_that_names_its_file() -> None:
    manifest = content().manifest
    assert read_manifest(encode(manifest), manifest_digest(manifest), CHUNK) == manifest
    with pytest.raises(ProtocolError, match="does not have the digest"):
        read_manifest(encode(replace(manifest, size=manifest.size - 1)), manifest_digest(manifest), CHUNK)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (Manifest(round=1, chunks=b""), "is not of a file"),
        (FileManifest(size=10, chunk_bytes=CHUNK + 1, chunks=bytes(32)), "in chunks of 1024 bytes"),
        (FileManifest(size=10, chunk_bytes=CHUNK, chunks=bytes(64)), "another number of digests"),
        (FileManifest(size=CHUNK + 1, chunk_bytes=CHUNK, chunks=bytes(32)), "another number of digests"),
        (FileManifest(size=0, chunk_bytes=CHUNK, chunks=bytes(31)), "another number of digests"),
    ],
)
def test_a_manifest_under_its_own_digest_is_read_with_care(payload: Manifest | FileManifest, error: str) -> None:
    from blake3 import blake3

    data = encode(payload)
    with pytest.raises(ProtocolError, match=error):
        read_manifest(data, blake3(data).digest(), CHUNK)


def test_a_file_of_too_many_chunks_is_refused_before_it_is_read() -> None:
    def read(_at: int, _size: int) -> bytes:
        raise AssertionError("it was read")

    with pytest.raises(LocalError, match=r"big: .* choose a larger run\.exchange\.chunk_elements"):
        make_manifest("big", read, 1 << 40, CHUNK)


def test_a_file_that_becomes_shorter_while_it_is_read_is_no_file() -> None:
    with pytest.raises(LocalError, match="short: it became shorter while it was read"):
        make_manifest("short", lambda at, size: bytes(size if at == 0 else size - 1), 2 * CHUNK, CHUNK)
