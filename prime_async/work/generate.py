"""Text from a model, token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from prime_async.errors import ConfigError, DataError
from prime_async.work.device import Device
from prime_async.work.llama import Cache, Llama

CONTEXT_TOKENS = 8  # enough to decode the next token as it would be in the whole text


class Text(Protocol):
    """Text as tokens: a tokenizer, or a corpus."""

    @property
    def vocab_size(self) -> int:
        """Tokens are 0 .. vocab_size - 1."""
        ...

    def encode(self, text: str) -> list[int] | None:
        """Tokens of ``text``; None if tokens do not stand for text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str | None:
        """Text of ``tokens``; None if tokens do not stand for text."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn, and how many at most.

    ``temperature``: the logits are divided by it; 0: the likeliest token each time. ``top_k``: of the so many likeliest
    tokens alone; 0: of all. ``top_p``: of the fewest likeliest whose probabilities reach it (nucleus sampling, arXiv
    1904.09751); 1: of all.
    """

    max_tokens: int
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.max_tokens < 0:
            problems.append(f"max_tokens {self.max_tokens}: expected 0 or more")
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature {self.temperature}: expected a number of at least 0")
        if self.top_k < 0:
            problems.append(f"top_k {self.top_k}: expected 0, for all tokens, or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p {self.top_p}: expected more than 0 and at most 1")
        if problems:
            raise ConfigError(problems)


def generate(
    model: nn.Module,
    text: Text,
    prompt: str,
    sampling: Sampling,
    *,
    ends: Collection[int] = (),
    device: Device | None = None,
) -> Iterator[str]:
    """What ``model`` writes after ``prompt``, in pieces as they come; the prompt itself is not repeated.

    It stops before a token that is one of ``ends``. ``device``: where the model is, if its precision is not fp32. Of a
    Llama every token is computed once; another model sees all of the text each time. An empty prompt is a line's end.

    Raises :class:`~prime_async.errors.DataError` if tokens of ``text`` do not stand for text.
    """
    tokens = text.encode(prompt or "\n")
    if not tokens:
        raise DataError("this corpus has no tokenizer that makes text of tokens: there is nothing to prompt it with")
    device = device or Device(next(model.parameters()).device, None)
    start = torch.tensor([tokens], device=device.torch_device)
    writer = _Writer(model, device, start, start.shape[1] + sampling.max_tokens)
    yield from _text(text, tokens, _new_tokens(writer, sampler(sampling), text.vocab_size, sampling.max_tokens, ends))


class _Writer:
    """The tokens so far, ``(1, T)``, in memory that was made once; and the keys and values of all but the last."""

    def __init__(self, model: nn.Module, device: Device, start: Tensor, capacity: int) -> None:
        self.model = model
        self._device = device
        self._tokens = start.new_empty((1, capacity))
        self._length = 0
        self._cache: Cache | None = None
        if isinstance(model, Llama):
            dtype = device.autocast_dtype or torch.float32
            self._cache = Cache(model.config, 1, capacity, device.torch_device, dtype)
        self.append(start)

    def append(self, tokens: Tensor) -> None:
        self._tokens[:, self._length : self._length + tokens.shape[1]] = tokens
        self._length += tokens.shape[1]

    def next_logits(self) -> Tensor:
        """Of the token after the last, ``(V,)`` fp32 on the host."""
        with torch.no_grad(), self._device.autocast():
            logits: Tensor
            if self._cache is None:
                logits = self.model(self._tokens[:, : self._length])
            else:
                logits = self.model(self._tokens[:, self._cache.length : self._length], self._cache)
        return logits[0, -1].float().cpu()


def _new_tokens(
    writer: _Writer, pick: Callable[[Tensor], int], vocab_size: int, count: int, ends: Collection[int]
) -> Iterator[int]:
    """At most ``count`` tokens, up to one of ``ends``."""
    was_training = writer.model.training
    writer.model.eval()
    try:
        for _ in range(count):
            token = pick(writer.next_logits()[:vocab_size])
            if token in ends:
                return
            yield token
            writer.append(torch.tensor([[token]]))
    finally:
        writer.model.train(was_training)


def sampler(sampling: Sampling) -> Callable[[Tensor], int]:
    """Picks a token of logits ``(V,)`` fp32."""
    source = torch.Generator().manual_seed(sampling.seed)

    def pick(logits: Tensor) -> int:
        if sampling.temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(probabilities(logits, sampling), 1, generator=source))

    return pick


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Of each token to be drawn, ``(V,)``, from its logits ``(V,)``."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], float("-inf"))
    chances = torch.softmax(logits, dim=0)
    if sampling.top_p < 1:
        ordered, places = chances.sort(descending=True)
        before = ordered.cumsum(0) - ordered
        chances[places[before >= sampling.top_p]] = 0.0  # the likeliest has nothing before it: it stays
    return chances / chances.sum()


def _text(text: Text, prompt: list[int], fresh: Iterable[int]) -> Iterator[str]:
    """The text of ``fresh`` tokens, each piece as soon as it cannot change: a character may take several tokens."""
    tokens = prompt[-CONTEXT_TOKENS:]
    shown = len(_decode(text, tokens))
    for token in fresh:
        tokens.append(token)
        written = _decode(text, tokens)
        if len(written) > shown and not written.endswith("\ufffd"):
            yield written[shown:]
            tokens = tokens[-CONTEXT_TOKENS:]
            shown = len(_decode(text, tokens))
    if rest := _decode(text, tokens)[shown:]:
        yield rest


def _decode(text: Text, tokens: list[int]) -> str:
    decoded = text.decode(tokens)
    if decoded is None:
        raise DataError("this corpus has no tokenizer that makes text of tokens")
    return decoded
