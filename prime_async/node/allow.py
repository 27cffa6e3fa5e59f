"""Whose keys may connect."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import structlog

ANY = "any"
_KEY = re.compile(r"[0-9a-f]{64}")
log = structlog.get_logger(__name__)


class AllowList:
    """The keys of the configuration, of a file that may change while the node runs, and of the view's members.

    The leader vouches for its members: who is in the view may connect, so only one member need know a newcomer's key.
    """

    def __init__(self, keys: Iterable[str], file: Path | None = None) -> None:
        self._keys = frozenset(keys)
        self._file = file
        self._file_keys: frozenset[str] = frozenset()
        self._file_version: tuple[int, int] | None = None
        self.members: frozenset[str] = frozenset()

    def __call__(self, key: str) -> bool:
        """Whether ``key`` may connect. Asked at each handshake; looks at the file only for a key it does not know."""
        if ANY in self._keys or key in self._keys or key in self.members:
            return True
        self._read_file()
        return key in self._file_keys

    def _read_file(self) -> None:
        if self._file is None:
            return
        try:
            status = self._file.stat()
            version = (status.st_mtime_ns, status.st_size)
            if version == self._file_version:
                return
            lines = self._file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            log.warning("allow_file_unreadable", file=str(self._file), error=str(error))
            return
        words = [line.split("#")[0].strip() for line in lines]
        for number, word in enumerate(words, 1):
            if word and not _KEY.fullmatch(word):
                log.warning("allow_file_line_ignored", file=str(self._file), line=number, expected="64 hex digits")
        self._file_version = version
        self._file_keys = frozenset(w for w in words if _KEY.fullmatch(w))
