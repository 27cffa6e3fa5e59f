"""Where the tokens of a training run come from.

Which tokens a node reads is a pure function of (seed, stream, step): nothing to save, nothing to hand over, and a
node that comes back goes on where the run is. The number of streams need not be known, for nodes come and go: each
stream draws its own windows from all of the training text, with replacement.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from prime_async.errors import DataError

Tokens: TypeAlias = npt.NDArray[np.unsignedinteger]
Batch: TypeAlias = tuple[Tensor, Tensor]  # inputs and targets, (B, T) int64: the targets are one token further on

SHAKESPEARE_DIGEST = "d7973cdc67262fe41118650b2658f0b37226335976cbeb50fd1baba23dd410b7"
HELD_OUT_SHARE = 20  # one token in so many
MAX_HELD_OUT = 2**22  # tokens; of a large corpus the held-out share is less than 5 %
MAX_STRETCHES = 64
STRETCH_TOKENS = 2**18


@runtime_checkable
class Corpus(Protocol):
    """What a trainer needs of its data. A user's factory returns one; the bundled and the token files are two more."""

    @property
    def vocab_size(self) -> int:
        """Tokens are 0 .. vocab_size - 1."""
        ...

    def batch(self, stream: int, step: int, batch_size: int, sequence_length: int) -> Batch:
        """The batch of ``stream`` at ``step``: the same each time it is asked for, and another for each stream."""
        ...

    def heldout(self, batch_size: int, sequence_length: int) -> Iterator[Batch]:
        """Batches that ``batch`` never touches: always the same, in the same order; the last may be smaller."""
        ...

    def encode(self, text: str) -> list[int] | None:
        """Tokens of ``text``; None if tokens do not stand for text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str | None:
        """Text of ``tokens``; None if tokens do not stand for text."""
        ...


class TextCodec(Protocol):
    """A tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Tokens are 0 .. vocab_size - 1."""
        ...

    @property
    def end_token(self) -> int | None:
        """What stands between two documents, if anything does."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, without special ones."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``; what is no text becomes U+FFFD."""
        ...

    def text_bytes(self, tokens: Sequence[int]) -> int:
        """Bytes of UTF-8 that all of ``tokens`` but the first stand for; an end token is no text."""
        ...


@dataclass(frozen=True, slots=True)
class ByteCodec:
    """UTF-8: a token is a byte. NUL, which text does not contain, ends a document."""

    vocab_size: int = 256
    end_token: int | None = 0

    def encode(self, text: str) -> list[int]:
        """The bytes of ``text``."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the bytes; broken sequences become U+FFFD."""
        return bytes(tokens).decode(errors="replace")

    def text_bytes(self, tokens: Sequence[int]) -> int:
        """One for each but the first, and those that end a document."""
        return sum(token != self.end_token for token in tokens[1:])


@dataclass(frozen=True, slots=True)
class Split:
    """Which tokens of a corpus are held out: a function of its length alone, so the same for all nodes.

    The corpus is cut into equal stretches, and the last 5 % of each are held out (of a large corpus less, 2^22 tokens
    in all). One stretch at the end would judge a model by one book; single blocks would let each held-out
    sequence begin in the middle of a sentence that training has seen.
    """

    count: int  # tokens

    @property
    def stretches(self) -> int:
        """Of about 2^18 tokens, and 64 at most."""
        return max(1, min(MAX_STRETCHES, self.count // STRETCH_TOKENS))

    @property
    def stretch(self) -> int:
        """Tokens of a stretch; the few that are left at the end of the corpus are not used."""
        return self.count // self.stretches

    @property
    def held_out(self) -> int:
        """Tokens at the end of each stretch."""
        return min(self.stretch // HELD_OUT_SHARE, MAX_HELD_OUT // self.stretches)

    def training_starts(self, window: int) -> int:
        """In how many places a window of so many tokens fits into the training part."""
        return self.stretches * max(0, self._room(window))

    def training_start(self, index: npt.NDArray[np.int64], window: int) -> npt.NDArray[np.int64]:
        """The first tokens of windows 0 .. ``training_starts(window)`` - 1."""
        room = self._room(window)
        starts: npt.NDArray[np.int64] = index // room * self.stretch + index % room
        return starts

    def held_out_starts(self, window: int) -> npt.NDArray[np.int64]:
        """Windows that share at most a token, one of each stretch by turns: any first few are a fair sample."""
        places = np.arange(0, self.held_out - window + 1, window - 1, dtype=np.int64)
        ends = np.arange(1, self.stretches + 1, dtype=np.int64) * self.stretch
        return (places[:, None] + ends[None, :] - self.held_out).ravel()

    def _room(self, window: int) -> int:
        """Places in the training part of one stretch."""
        return self.stretch - self.held_out - window + 1


class TokenCorpus:
    """Windows of one long array of tokens, in memory or mapped from a file."""

    def __init__(self, tokens: Tokens, text: TextCodec, seed: int) -> None:
        """``tokens`` ``(count,)``; ``seed`` orders the training windows."""
        self._tokens = tokens
        self._text = text
        self._seed = seed
        self.split = Split(len(tokens))

    @property
    def vocab_size(self) -> int:
        """That of the tokenizer."""
        return self._text.vocab_size

    @property
    def text(self) -> TextCodec:
        """The tokenizer."""
        return self._text

    def encode(self, text: str) -> list[int] | None:
        """Tokens of ``text``."""
        return self._text.encode(text)

    def decode(self, tokens: Sequence[int]) -> str | None:
        """Text of ``tokens``."""
        return self._text.decode(tokens)

    def batch(self, stream: int, step: int, batch_size: int, sequence_length: int) -> Batch:
        """The batch of ``stream`` at ``step``, both in [0, 2^64).

        Raises :class:`~prime_async.errors.DataError` if the corpus has no window of ``sequence_length`` + 1 tokens.
        """
        window = sequence_length + 1
        places = self.split.training_starts(window)
        if places == 0:
            raise DataError(self._too_short("training", sequence_length))
        drawn = draw(self._seed, stream, step, batch_size) % np.uint64(places)
        return self._gather(self.split.training_start(drawn.astype(np.int64), window), window)

    def heldout(self, batch_size: int, sequence_length: int) -> Iterator[Batch]:
        """The held-out windows, in order. Raises as :meth:`batch` does."""
        window = sequence_length + 1
        starts = self.split.held_out_starts(window)
        if len(starts) == 0:
            raise DataError(self._too_short("held-out", sequence_length))
        for first in range(0, len(starts), batch_size):
            yield self._gather(starts[first : first + batch_size], window)

    def _gather(self, starts: npt.NDArray[np.int64], window: int) -> Batch:
        """Inputs and targets of the windows at ``starts`` ``(B,)``."""
        rows = np.stack([self._tokens[start : start + window] for start in starts]).astype(np.int64)
        if rows.max() >= self.vocab_size:
            raise DataError(
                f"the corpus holds token {rows.max()}, but its vocabulary has {self.vocab_size}: make the file again"
            )
        block = torch.from_numpy(rows)
        return block[:, :-1], block[:, 1:]

    def _too_short(self, part: str, sequence_length: int) -> str:
        return (
            f"the corpus has {self.split.count} tokens: too few for one {part} sequence of {sequence_length} "
            f"(its {part} stretches are {self._stretch(part)} long); give more text, or lower [run] sequence_length"
        )

    def _stretch(self, part: str) -> int:
        return self.split.held_out if part == "held-out" else self.split.stretch - self.split.held_out


def draw(seed: int, stream: int, step: int, n: int) -> npt.NDArray[np.uint64]:
    """``n`` uniform 64-bit words, a pure function of the arguments.

    Philox (Salmon et al., SC 2011) keyed by (seed, stream), its counter's high word the step: no two triples share a
    word's key and counter. The raw words are used, since numpy keeps them alike over its versions.
    """
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, 0, step], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=key, counter=counter).random_raw(n), dtype=np.uint64)


def open_shakespeare(seed: int) -> TokenCorpus:
    """The bundled text, in bytes: 42 works of Shakespeare, 5 MB (``data/PROVENANCE.md``).

    Raises :class:`~prime_async.errors.DataError` if the installed file is not the one that the package shipped.
    """
    return TokenCorpus(np.frombuffer(shakespeare(), dtype=np.uint8), ByteCodec(), seed)


def shakespeare() -> bytes:
    """The bundled text. Raises as :func:`open_shakespeare`."""
    packed = resources.files("prime_async.work").joinpath("data/shakespeare.txt.gz").read_bytes()
    try:
        text = gzip.decompress(packed)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"the bundled text does not unpack ({error}): install prime-async again") from error
    if blake3(text).hexdigest() != SHAKESPEARE_DIGEST:
        raise DataError("the bundled text is not the one that was shipped: install prime-async again")
    return text
