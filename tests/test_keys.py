"""Key files: what is written is read back, nothing is overwritten, and each error names the file and the way out."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import structlog
import zmq
from zmq.utils import z85

from prime_async.errors import ConfigError, LocalError, StorageError
from prime_async.transport import keys


def test_a_written_key_is_read_back(tmp_path: Path) -> None:
    written = keys.write_key_file(tmp_path / "node.key")
    assert keys.read_key_file(tmp_path / "node.key") == written


def test_the_public_key_is_the_one_that_curve_computes_from_the_secret() -> None:
    pair = keys.generate()
    assert z85.decode(zmq.curve_public(z85.encode(pair.secret))) == pair.public


def test_an_id_is_64_lower_case_hexadecimal_digits() -> None:
    id = keys.generate().id
    assert keys.is_id(id)
    assert not keys.is_id(id.upper())
    assert not keys.is_id(id + "\n")


def test_two_keys_differ() -> None:
    assert keys.generate() != keys.generate()


def test_a_key_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    keys.write_key_file(tmp_path / "node.key")
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600


def test_writing_leaves_nothing_but_the_key_file(tmp_path: Path) -> None:
    keys.write_key_file(tmp_path / "node.key")
    assert [p.name for p in tmp_path.iterdir()] == ["node.key"]


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    first = keys.write_key_file(path)
    with pytest.raises(LocalError, match=r"node\.key exists and is not overwritten"):
        keys.write_key_file(path)
    assert keys.read_key_file(path) == first
    assert [p.name for p in tmp_path.iterdir()] == ["node.key"]


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no/node\.key could not be written"):
        keys.write_key_file(tmp_path / "no" / "node.key")


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"node\.key: there is no such file; make one with `prime-async init`"):
        keys.read_key_file(tmp_path / "node.key")


@pytest.mark.parametrize(
    "content",
    [b"", b"# only a comment\n", b"AB" * 32, b"ab" * 31, b"ab" * 32 + b"\n" + b"cd" * 32, b"\xff" * 40, b"#" * 5000],
    ids=["empty", "comment", "upper case", "short", "two keys", "binary", "long"],
)
def test_a_file_that_is_not_a_key_is_refused_without_showing_what_it_holds(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="expected comment lines and one line with 64 lower-case") as caught:
        keys.read_key_file(path)
    assert "abab" not in str(caught.value).lower()


def test_a_file_that_others_may_read_is_used_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    written = keys.write_key_file(path)
    path.chmod(0o644)
    with structlog.testing.capture_logs() as logs:
        assert keys.read_key_file(path) == written
    assert [(entry["event"], entry["fix"]) for entry in logs] == [("key_file_readable_by_others", f"chmod 600 {path}")]


def test_a_private_file_is_used_without_a_warning(tmp_path: Path) -> None:
    keys.write_key_file(tmp_path / "node.key")
    with structlog.testing.capture_logs() as logs:
        keys.read_key_file(tmp_path / "node.key")
    assert logs == []


def test_no_text_of_a_key_shows_the_secret() -> None:
    pair = keys.generate()
    for text in (repr(pair), str(pair), f"{pair}", repr([pair])):
        assert pair.secret.hex() not in text
        assert repr(pair.secret) not in text
