"""Small text files of lines, which people edit while a node runs."""

from __future__ import annotations

import os
from pathlib import Path


def read_lines(path: Path) -> list[str]:
    """Without comments, which begin with ``#``, and white space around; one for each line, some may be empty."""
    return [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]


def append_line(path: Path, line: str) -> None:
    """Add ``line``, safe from a crash. The file, and its directory, are made if they are not there.

    If the last line lacks its end, since somebody edited it or a crash cut it off, that is mended first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        broken = file.read(1) not in (b"", b"\n")
        file.write((b"\n" if broken else b"") + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
