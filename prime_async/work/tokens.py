"""Token files: a corpus tokenized once, then mapped into memory.

A file is a page of 4096 bytes, then the tokens, then the tokenizer:

    0     8 bytes   the magic "PATOKENS"
    8     4 bytes   the format's version, little-endian; this is 1
    12    4 bytes   the header's size, little-endian
    16              the header: a JSON object, the fields of ``Header``; then zeros up to 4096
    4096            ``count`` tokens, little-endian, ``token_bytes`` each
    then            ``tokenizer_bytes`` of the tokenizer's JSON (Hugging Face `tokenizers`); nothing for bytes

``digest`` is the BLAKE3 digest of all that follows the page, and names the data in a run spec (``[run] data_digest``).
The page is written last, and the file gets its name after that: what has the name is whole.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from prime_async.errors import DataError, StorageError
from prime_async.work.corpus import ByteCodec, TextCodec, Tokens
from prime_async.work.text import PIECE_CHARACTERS, kind_of, read_pieces, read_whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAGIC = b"PATOKENS"
VERSION = 1
PAGE_BYTES = 4096
DTYPES: dict[int, np.dtype[np.unsignedinteger]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a token file says of itself."""

    token_bytes: int  # 2 or 4
    vocab_size: int
    count: int  # tokens
    documents: int
    tokenizer_bytes: int  # 0: the tokens are bytes of UTF-8
    tokenizer_digest: str  # BLAKE3 of the tokenizer's JSON
    digest: str  # BLAKE3 of the tokens and the tokenizer's JSON

    @property
    def file_bytes(self) -> int:
        """Of the whole file."""
        return PAGE_BYTES + self.count * self.token_bytes + self.tokenizer_bytes


class HuggingFaceCodec:
    """A tokenizer of the `tokenizers` library, from its JSON."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.end_text = next((name for name in END_TOKENS if tokenizer.token_to_id(name) is not None), None)
        self.end_token = tokenizer.token_to_id(self.end_text) if self.end_text is not None else None

        self._lengths = _byte_lengths(tokenizer)

    @classmethod
    def from_json(cls, data: bytes, name: str) -> HuggingFaceCodec:
        """Raises :class:`~prime_async.errors.DataError`, with ``name``, if ``data`` is no tokenizer."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{name}: not a tokenizer of the Hugging Face `tokenizers` library: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, without special ones."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each of ``texts``; on all cores."""
        return [list(one.ids) for one in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``, special ones included."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def text_bytes(self, tokens: Sequence[int]) -> int:
        """Bytes of UTF-8 that all of ``tokens`` but the first stand for; of special ones, none.

        Exact for byte-level tokenizers; of others a character that is cut at either end counts as U+FFFD.
        """
        if self._lengths is not None:
            return int(self._lengths[np.asarray(tokens[1:], dtype=np.int64)].sum())
        return self._decoded_bytes(tokens) - self._decoded_bytes(tokens[:1])

    def _decoded_bytes(self, tokens: Sequence[int]) -> int:
        return len(str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)).encode())


def _byte_lengths(tokenizer: Tokenizer) -> npt.NDArray[np.int64] | None:
    """How many bytes each token stands for, ``(V,)``, if each character of a token is a byte; else None."""
    if (json.loads(tokenizer.to_str()).get("decoder") or {}).get("type") != "ByteLevel":
        return None
    pieces = tokenizer.get_vocab(with_added_tokens=False)
    lengths = np.zeros(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1, dtype=np.int64)
    for piece, token in pieces.items():
        lengths[token] = len(piece)
    for token, added in tokenizer.get_added_tokens_decoder().items():
        lengths[token] = 0 if added.special else len(added.content.encode())
    return lengths


@dataclass(frozen=True, slots=True)
class TokenFile:
    """An open token file. ``tokens`` ``(count,)`` are mapped: reading them reads the disk."""

    path: Path
    header: Header
    tokens: Tokens
    text: TextCodec

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Map the file at ``path``; its header and size are checked, its tokens are not read (see :meth:`verify`).

        Raises :class:`~prime_async.errors.DataError` if it is not a token file of this version, or not whole.
        """
        try:
            with path.open("rb") as file:
                header = _read_header(path, file)
                file.seek(PAGE_BYTES + header.count * header.token_bytes)
                tokenizer = file.read(header.tokenizer_bytes)
            dtype = DTYPES[header.token_bytes]
            tokens = np.memmap(path, dtype=dtype, mode="r", offset=PAGE_BYTES, shape=(header.count,))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        return cls(path, header, tokens, _codec(header, tokenizer, path))

    def read_tokenizer(self) -> bytes:
        """The tokenizer's JSON; empty if the tokens are bytes."""
        with self.path.open("rb") as file:
            file.seek(PAGE_BYTES + self.header.count * self.header.token_bytes)
            return file.read(self.header.tokenizer_bytes)

    def verify(self) -> None:
        """Read all of it. Raises :class:`~prime_async.errors.DataError` if a bit differs from what was written."""
        digest = blake3()
        with self.path.open("rb") as file:
            file.seek(PAGE_BYTES)
            while piece := file.read(2**20):
                digest.update(piece)
        if digest.hexdigest() != self.header.digest:
            raise DataError(f"{self.path}: damaged, its digest is not that of its header; make or copy it again")


def write_tokens(
    inputs: Sequence[Path],
    tokenizer: Path | None,
    out: Path,
    on_progress: Callable[[int], None] | None = None,
) -> Header:
    """Tokenize ``inputs`` into the token file ``out``, and return its header.

    Inputs are .txt (a file is a document) and .jsonl (a line is a document, its text under "text"), either also as
    .gz; UTF-8. ``tokenizer`` is a `tokenizers` JSON file, None for bytes. Documents end with the tokenizer's end token
    if it has one. The corpus is never in memory as a whole: long documents are encoded in pieces of about a million
    characters, cut at ends of lines (tokens that would reach over a cut are not made).

    ``on_progress`` is called with the tokens so far, and may raise to stop. Whatever stops it, Ctrl-C included, leaves
    neither ``out`` nor a partial file; an older ``out`` stays until the new one is whole.

    Raises :class:`~prime_async.errors.DataError` on an input that is not what its name says, and
    :class:`~prime_async.errors.StorageError` if ``out`` cannot be written.
    """
    tokenizer_json = b"" if tokenizer is None else read_whole(tokenizer)
    codec = ByteCodec() if tokenizer is None else HuggingFaceCodec.from_json(tokenizer_json, str(tokenizer))
    for path in inputs:
        kind_of(path)  # a wrong name is told before hours of work
    partial = _create_partial(out)
    try:
        with partial.open("w+b") as file:
            header = _write_all(file, read_pieces(inputs), codec, tokenizer_json, on_progress)
        partial.replace(out)
        _sync_directory(out.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{out}: cannot be written: {error.strerror or error}") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return header


# Reading


def _read_header(path: Path, file: BinaryIO) -> Header:
    page = file.read(PAGE_BYTES)
    if page[:8] != MAGIC:
        raise DataError(f"{path}: not a token file; make one with `prime-async data`")
    version = int.from_bytes(page[8:12], "little")
    if version != VERSION:
        raise DataError(f"{path}: version {version} of the format, this program reads {VERSION}; make the file again")
    try:
        header = msgspec.json.decode(page[16 : 16 + int.from_bytes(page[12:16], "little")], type=Header)
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: the header is damaged ({error}); make or copy the file again") from error
    if header.token_bytes not in DTYPES or min(header.count, header.vocab_size) < 1 or header.tokenizer_bytes < 0:
        raise DataError(f"{path}: the header makes no sense ({header}); make or copy the file again")
    size = os.fstat(file.fileno()).st_size
    if size != header.file_bytes:
        what = "truncated" if size < header.file_bytes else "longer than it says"
        raise DataError(f"{path}: {what}: {size} bytes, {header.file_bytes} by its header; make or copy it again")
    return header


def _codec(header: Header, tokenizer_json: bytes, path: Path) -> TextCodec:
    if not header.tokenizer_bytes:
        return ByteCodec()
    if blake3(tokenizer_json).hexdigest() != header.tokenizer_digest:
        raise DataError(f"{path}: the tokenizer in it is damaged; make or copy the file again")
    return HuggingFaceCodec.from_json(tokenizer_json, str(path))


# Output


def _write_all(
    file: BinaryIO,
    pieces: Iterator[tuple[str, bool]],
    codec: ByteCodec | HuggingFaceCodec,
    tokenizer_json: bytes,
    on_progress: Callable[[int], None] | None,
) -> Header:
    width = 2 if codec.vocab_size <= 2**16 else 4
    digest = blake3()
    count = documents = 0
    file.seek(PAGE_BYTES)
    for group in _groups(pieces):
        data = _encode_group(codec, group, DTYPES[width]).tobytes()
        digest.update(data)
        file.write(data)
        count += len(data) // width
        documents += sum(ends for _, ends in group)
        if on_progress is not None:
            on_progress(count)
    if count == 0:
        raise DataError("the inputs hold no text")
    digest.update(tokenizer_json)
    file.write(tokenizer_json)
    header = Header(
        token_bytes=width,
        vocab_size=codec.vocab_size,
        count=count,
        documents=documents,
        tokenizer_bytes=len(tokenizer_json),
        tokenizer_digest=blake3(tokenizer_json).hexdigest(),
        digest=digest.hexdigest(),
    )
    encoded = msgspec.json.encode(header)
    file.seek(0)
    file.write(MAGIC + VERSION.to_bytes(4, "little") + len(encoded).to_bytes(4, "little") + encoded)
    file.flush()
    os.fsync(file.fileno())
    return header


def _groups(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Small documents together, so that one call tokenizes many."""
    group: list[tuple[str, bool]] = []
    size = 0
    for text, ends in pieces:
        if not text:
            continue  # an empty document
        group.append((text, ends))
        size += len(text)
        if size >= PIECE_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode_group(
    codec: ByteCodec | HuggingFaceCodec, group: list[tuple[str, bool]], dtype: np.dtype[np.unsignedinteger]
) -> npt.NDArray[np.unsignedinteger]:
    """The tokens of the pieces, one after the other; an end token after each that ends a document."""
    end = b"" if codec.end_token is None else np.array([codec.end_token], dtype=dtype).tobytes()
    parts = [part.astype(dtype).tobytes() for part in encode_pieces(codec, [text for text, _ in group])]
    joined = b"".join(part + (end if ends else b"") for part, (_, ends) in zip(parts, group, strict=True))
    return np.frombuffer(joined, dtype=dtype)


def encode_pieces(codec: TextCodec, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
    """The tokens of each of ``texts``, on all cores."""
    if isinstance(codec, ByteCodec):
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]
    many = codec.encode_many(texts) if isinstance(codec, HuggingFaceCodec) else map(codec.encode, texts)
    return [np.array(tokens, dtype=np.uint32) for tokens in many]


def _create_partial(out: Path) -> Path:
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror or error}") from error
    os.close(handle)
    Path(name).chmod(0o644)  # mkstemp's is for secrets
    return Path(name)


def _sync_directory(directory: Path) -> None:
    """So that the new name, too, survives a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
