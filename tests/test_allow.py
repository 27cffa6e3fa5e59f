"""Whose keys may connect."""

from __future__ import annotations

import os
from pathlib import Path

from structlog.testing import capture_logs

from prime_async.node.allow import AllowList

A, B, C = "a" * 64, "b" * 64, "c" * 64


def write(path: Path, text: str, stamp: int) -> None:
    """``stamp`` is the time of the change, so that the test need not wait for the clock of the file system."""
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(stamp, stamp))


def test_nobody_may_connect_by_default() -> None:
    assert not AllowList([])(A)


def test_configured_keys_may_connect() -> None:
    allow = AllowList([A])
    assert allow(A)
    assert not allow(B)


def test_any_lets_everybody_in() -> None:
    assert AllowList(["any"])(B)


def test_members_of_the_view_may_connect_and_no_longer_when_they_are_gone() -> None:
    allow = AllowList([A])
    allow.members = frozenset([B])
    assert allow(B)
    allow.members = frozenset()
    assert not allow(B)
    assert allow(A)


def test_keys_of_a_file_may_connect_with_comments_and_blank_lines(tmp_path: Path) -> None:
    write(tmp_path / "allow", f"# friends\n\n{A}  # Ada\n  {B}\n", 1)
    allow = AllowList([], tmp_path / "allow")
    assert allow(A)
    assert allow(B)
    assert not allow(C)


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    write(tmp_path / "allow", A, 1)
    allow = AllowList([], tmp_path / "allow")
    assert not allow(B)
    write(tmp_path / "allow", B, 2)
    assert allow(B)
    assert not allow(A)


def test_the_file_may_come_later_and_go_without_taking_its_keys(tmp_path: Path) -> None:
    allow = AllowList([], tmp_path / "allow")
    with capture_logs() as logs:
        assert not allow(A)
    assert [line["event"] for line in logs] == ["allow_file_unreadable"]
    write(tmp_path / "allow", A, 1)
    assert allow(A)
    (tmp_path / "allow").unlink()
    with capture_logs():
        assert allow(A)


def test_lines_that_are_no_keys_are_named_once(tmp_path: Path) -> None:
    write(tmp_path / "allow", f"{A}\n{A.upper()}\nany\n{A[:63]}\n{A} {B}\n", 1)
    allow = AllowList([], tmp_path / "allow")
    with capture_logs() as logs:
        assert not allow(B)
        assert not allow(C)
    assert [line["line"] for line in logs] == [2, 3, 4, 5]
    assert allow(A)


def test_a_file_that_is_not_text_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "allow").write_bytes(b"\xff\xfe\x00")
    with capture_logs() as logs:
        assert not AllowList([], tmp_path / "allow")(A)
    assert [line["event"] for line in logs] == ["allow_file_unreadable"]
