"""Text files as documents: .txt (a file is one) and .jsonl (a line is one, its text under "text"), either also as .gz.

Nothing is held in memory but a piece of about a million characters, cut at the end of a line.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from prime_async.errors import DataError

PIECE_CHARACTERS = 2**20


def read_pieces(paths: Iterable[Path]) -> Iterator[tuple[str, bool]]:
    """The text of all files, in order: (text, whether a document ends with it).

    Raises :class:`~prime_async.errors.DataError` on a file that is not what its name says.
    """
    for path in paths:
        with _input_errors(path), _open_text(path) as file:
            yield from _lines_of_json(path, file) if kind_of(path) == ".jsonl" else _pieces_of_text(file)


def _pieces_of_text(file: TextIO) -> Iterator[tuple[str, bool]]:
    piece: list[str] = []
    size = 0
    while line := file.readline(PIECE_CHARACTERS):
        if size + len(line) > PIECE_CHARACTERS:
            yield "".join(piece), False
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    yield "".join(piece), True


def _lines_of_json(path: Path, file: TextIO) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
        text = document.get("text") if isinstance(document, dict) else None
        if not isinstance(text, str):
            raise DataError(f'{path}, line {number}: not an object with a string under "text"')
        yield text, True


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")  # as they are: "\r\n" stays
    return path.open(encoding="utf-8", newline="")


def kind_of(path: Path) -> str:
    """ ".txt" or ".jsonl". Raises :class:`~prime_async.errors.DataError` if the name says neither."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".txt", ".jsonl"):
        raise DataError(f"{path}: not .txt, .jsonl, .txt.gz or .jsonl.gz")
    return kind


@contextlib.contextmanager
def _input_errors(path: Path) -> Iterator[None]:
    """So that an unreadable input is not taken for a full disk."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start} of what was read last") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or not gzip: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_whole(path: Path) -> bytes:
    """The bytes of a small file. Raises :class:`~prime_async.errors.DataError` if it cannot be read."""
    with _input_errors(path):
        return path.read_bytes()
