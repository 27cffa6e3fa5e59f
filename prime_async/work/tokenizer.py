"""The tokenizer of a run, as a codec and as the JSON of the `tokenizers` library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prime_async.config.schema import RunSpec
from prime_async.errors import ConfigError, DataError
from prime_async.work.corpus import ByteCodec, TextCodec, TokenCorpus, shakespeare
from prime_async.work.text import read_whole
from prime_async.work.tokens import MAGIC, HuggingFaceCodec, TokenFile, encode_pieces

TOKENIZER_FILE = "tokenizer.json"
PIECE_LINES = 100


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A codec, and what makes the same tokens in another program. ``end_text``: how the end token is written, if so."""

    codec: TextCodec
    json: bytes
    end_text: str | None = None


def run_tokenizer(run: RunSpec, data_path: Path | None, given: Path | None = None) -> Tokenizer:
    """The one that made the tokens of ``run``: bytes, or that in the token file at ``data_path``.

    ``given``: a token file, a tokenizer.json or a folder with one, in place of it. Raises :class:`ConfigError` if it is
    nowhere to be found, and :class:`DataError` if a file is not what it should be.
    """
    if given is not None:
        return open_tokenizer(given)
    if run.data == "shakespeare":
        return BYTES
    if run.data != "tokens" or data_path is None:
        raise ConfigError(
            [
                f'[run] data = "{run.data}": the tokenizer is not kept with the weights: name the node\'s TOML file, '
                "whose data_path leads to it, or give --tokenizer: a token file, or a tokenizer.json"
                if run.data == "tokens"
                else f'[run] data = "{run.data}": a tokenizer of data of your own is not known here: give --tokenizer, '
                "a tokenizer.json"
            ]
        )
    file = TokenFile.open(data_path)
    if run.data_digest not in ("", file.header.digest):
        raise ConfigError(
            [
                f"{data_path}: its digest is {file.header.digest}, the run's data_digest is {run.data_digest}: "
                "give --tokenizer, the file that the run trains on"
            ]
        )
    return open_tokenizer(data_path)


def open_tokenizer(path: Path) -> Tokenizer:
    """Of a token file, a tokenizer.json, or a folder with one. Raises :class:`DataError` if it is none of them."""
    if path.is_dir():
        path = path / TOKENIZER_FILE
    if not _is_token_file(path):
        return _from_json(read_whole(path), path)
    file = TokenFile.open(path)
    if not file.header.tokenizer_bytes:
        return BYTES
    return _from_json(file.read_tokenizer(), path)


def shakespeare_in(codec: TextCodec) -> TokenCorpus:
    """The bundled text in tokens of ``codec``, encoded in pieces that end with a line.

    Of it nearly the same parts are held out as of its bytes.
    """
    lines = shakespeare().decode().splitlines(keepends=True)
    pieces = ["".join(lines[i : i + PIECE_LINES]) for i in range(0, len(lines), PIECE_LINES)]
    return TokenCorpus(np.concatenate(encode_pieces(codec, pieces)), codec, seed=0)


def byte_tokenizer() -> bytes:
    """The JSON of a tokenizer whose tokens are the bytes of UTF-8.

    It is byte-level BPE (GPT-2's, whose vocabulary has a printable character for each byte) without any merge.
    """
    tree: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(byte_characters())},
            "merges": [],
        },
    }
    return json.dumps(tree, ensure_ascii=False, indent=1).encode()


def byte_characters() -> str:
    """What GPT-2's byte-level BPE writes for each of the 256 bytes: itself if it is printable, else one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


BYTES = Tokenizer(ByteCodec(), byte_tokenizer())


def _is_token_file(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _from_json(data: bytes, path: Path) -> Tokenizer:
    codec = HuggingFaceCodec.from_json(data, str(path))
    return Tokenizer(codec, data, codec.end_text)
