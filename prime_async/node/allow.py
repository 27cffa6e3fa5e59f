"""Whose keys may connect."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from prime_async.machines.vocabulary import KeyToLetIn
from prime_async.node.files import append_line, read_lines

ANY = "any"
INVITATIONS: Final = "invitations.txt"
LET_IN: Final = "let-in-keys.txt"
MAX_LET_IN: Final = 65536
TIME_FORMAT: Final = "%Y-%m-%dT%H:%M:%SZ"
_KEY = re.compile(r"[0-9a-f]{64}")
log = structlog.get_logger(__name__)


class AllowList:
    """The keys of the configuration, of files that may change while the node runs, and of the view's members.

    The leader vouches for its members: who is in the view may connect, so only one member need know a newcomer's key.

    With a ``directory``, two files of it count too. Who holds the key of one of ``invitations.txt`` may connect until
    it expires, to ask what the run is, and to name a key that is then let in; such keys stand in ``let-in-keys.txt``.
    To take an invitation or a key back, delete its line.
    """

    def __init__(
        self,
        keys: Iterable[str],
        file: Path | None = None,
        directory: Path | None = None,
        today: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``today``: the time by the clock on the wall, by which invitations expire."""
        self._keys = frozenset(keys)
        self._files = [_KeyFile(path) for path in (file,) if path is not None]
        self._let_in: _KeyFile | None = None
        self._invitations: _KeyFile | None = None
        if directory is not None:
            self._let_in = _KeyFile(directory / LET_IN, ours=True)
            self._invitations = _KeyFile(directory / INVITATIONS, ours=True)
            self._files.append(self._let_in)
        self._today = today
        self._invited: set[str] = set()  # keys that connected as invitations
        self._adding = threading.Lock()
        self.members: frozenset[str] = frozenset()

    def __call__(self, key: str) -> bool:
        """Whether ``key`` may connect. Asked at each handshake; looks at files only for a key it does not know."""
        if self._is_let_in(key):
            return True
        if self._is_invitation(key):
            self._invited.add(key)
            return True
        return False

    def may_only_ask(self, key: str) -> bool:
        """Whether ``key`` connected as an invitation and is nothing else: it may ask what the run is, and no more."""
        return key in self._invited and not self._is_let_in(key)

    def let_in(self, asked: KeyToLetIn) -> str:
        """Put a key on the list, on disk. Returns why not, or ``""``. Safe to call from any thread."""
        if asked.invited and not self._is_invitation(asked.peer):
            return "this invitation has expired, or was taken back: ask for a new one"
        if not _KEY.fullmatch(asked.key):
            return "a key has 64 lower-case hexadecimal digits"
        with self._adding:
            if self._is_let_in(asked.key):
                return ""
            if self._let_in is None:
                return "this node keeps no list of keys: ask its operator to add the key to node.allow"
            if len(self._let_in.entries()) >= MAX_LET_IN:
                return f"{self._let_in.path.name} is full: ask the operator to delete lines from it"
            name = "".join(c for c in asked.name if c.isprintable() and c != "#")
            try:
                append_line(self._let_in.path, f"{asked.key}  # {name}, let in by {asked.peer[:16]}")
            except OSError as error:
                return f"the list of keys could not be written ({error.strerror}): try again later"
        return ""

    def _is_let_in(self, key: str) -> bool:
        if ANY in self._keys or key in self._keys or key in self.members:
            return True
        return any(key in file.entries() for file in self._files)

    def _is_invitation(self, key: str) -> bool:
        until = self._invitations.entries().get(key) if self._invitations is not None else None
        return until is not None and self._today() < _time(until)


class _KeyFile:
    """Lines of a key each; read again when the file changes.

    One of ``ours`` may have a word after the key, and need not be there: then it is empty. One of the user's that has
    gone, perhaps for a moment, is as it was.
    """

    def __init__(self, path: Path, *, ours: bool = False) -> None:
        self.path = path
        self._ours = ours
        self._entries: dict[str, str] = {}
        self._version: tuple[int, int] | None = None

    def entries(self) -> dict[str, str]:
        """By key: the word after it, or ``""``."""
        try:
            status = self.path.stat()
            version = (status.st_mtime_ns, status.st_size)
            if version == self._version:
                return self._entries
            lines = read_lines(self.path)
        except (OSError, UnicodeDecodeError) as error:
            if self._ours and isinstance(error, FileNotFoundError):
                self._version, self._entries = None, {}
                return self._entries
            log.warning("allow_file_unreadable", file=str(self.path), error=str(error))
            return self._entries
        self._entries = dict(self._entry(number, line) for number, line in enumerate(lines, 1) if line)
        self._entries.pop("", None)
        self._version = version
        return self._entries

    def _entry(self, number: int, line: str) -> tuple[str, str]:
        key, _, word = line.partition(" ")
        if _KEY.fullmatch(key) and (self._ours or not word):
            return key, word.strip()
        log.warning("allow_file_line_ignored", file=str(self.path), line=number, expected="64 hex digits")
        return "", ""


def _time(text: str) -> datetime:
    """Of an invitation. What cannot be read has passed."""
    try:
        return datetime.strptime(text, TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
