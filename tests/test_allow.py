"""Whose keys may connect."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from prime_async.machines.vocabulary import KeyToLetIn
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


def invited(path: Path, key: str, until: str) -> AllowList:
    """A list that has an invitation; by the clock on its wall it is noon of 1 May 2026."""
    (path / "invitations.txt").write_text(f"{key} {until}  # made by a test\n", encoding="utf-8")
    return AllowList([], directory=path, today=lambda: datetime(2026, 5, 1, 12, tzinfo=UTC))


def asks(key: str, *, by: str = A, invited: bool = True) -> KeyToLetIn:
    return KeyToLetIn(peer=by, key=key, name="bert # 2\n", invited=invited)


def test_an_invitation_may_connect_until_it_expires_and_only_ask(tmp_path: Path) -> None:
    allow = invited(tmp_path, A, "2026-05-01T12:00:01Z")
    assert allow(A)
    assert allow.may_only_ask(A)
    assert not allow(B)
    assert not invited(tmp_path, A, "2026-05-01T12:00:00Z")(A)


@pytest.mark.parametrize("until", ["", "tomorrow", "2026-05-02", "9999-99-99T00:00:00Z"])
def test_an_invitation_without_a_time_has_expired(tmp_path: Path, until: str) -> None:
    assert not invited(tmp_path, A, until)(A)


def test_a_key_that_an_invitation_names_is_let_in_and_still_is_after_a_restart(tmp_path: Path) -> None:
    allow = invited(tmp_path, A, "2026-05-01T12:00:01Z")
    assert allow.let_in(asks(B)) == ""
    assert allow.let_in(asks(B)) == ""
    for known in (allow, AllowList([], directory=tmp_path)):
        assert known(B)
        assert not known.may_only_ask(B)
    lines = (tmp_path / "let-in-keys.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{B}  # bert  2, let in by {A[:16]}"]


def test_an_invitation_that_expired_or_was_taken_back_while_connected_lets_nobody_in(tmp_path: Path) -> None:
    allow = invited(tmp_path, A, "2026-05-01T12:00:01Z")
    assert allow(A)
    (tmp_path / "invitations.txt").unlink()
    assert "expired" in allow.let_in(asks(B))
    assert not allow(B)
    assert allow.may_only_ask(A)


def test_a_key_that_a_member_vouches_for_needs_no_invitation(tmp_path: Path) -> None:
    allow = AllowList([], directory=tmp_path)
    assert allow.let_in(asks(B, invited=False)) == ""
    assert allow(B)


def test_a_key_whose_line_is_deleted_is_not_let_in_any_more(tmp_path: Path) -> None:
    allow = AllowList([], directory=tmp_path)
    allow.let_in(asks(B, invited=False))
    allow.let_in(asks(C, invited=False))
    write(tmp_path / "let-in-keys.txt", C, 1)
    assert not allow(B)
    assert allow(C)


def test_a_line_is_added_after_one_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "let-in-keys.txt").write_text(f"{C}  # carl", encoding="utf-8")
    allow = AllowList([], directory=tmp_path)
    assert allow.let_in(asks(B, invited=False)) == ""
    assert allow(B)
    assert allow(C)


def test_what_is_no_key_is_not_written(tmp_path: Path) -> None:
    allow = AllowList([], directory=tmp_path)
    assert "64" in allow.let_in(asks("bert", invited=False))
    assert not (tmp_path / "let-in-keys.txt").exists()
