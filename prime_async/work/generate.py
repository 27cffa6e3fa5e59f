"""Text from a model, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from prime_async.errors import DataError
from prime_async.work.corpus import Corpus
from prime_async.work.llama import Cache, Llama

CONTEXT_TOKENS = 8  # enough to decode the next token as it would be in the whole text


def generate(
    model: nn.Module, corpus: Corpus, prompt: str, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """What ``model`` writes after ``prompt``, in pieces as they come; the prompt itself is not repeated.

    ``temperature`` 0 takes the likeliest token each time; else tokens are drawn from the logits divided by it, with
    ``seed``. Of a Llama every token is computed once; another model sees all of the text each time. An empty prompt is
    a line's end.

    Raises :class:`~prime_async.errors.DataError` if the corpus has no text.
    """
    tokens = corpus.encode(prompt or "\n")
    if not tokens:
        raise DataError("this corpus has no tokenizer that makes text of tokens: there is nothing to prompt it with")
    device = next(model.parameters()).device
    pick = _sampler(temperature, seed)
    fresh = _new_tokens(model, torch.tensor([tokens], device=device), corpus.vocab_size, max_new_tokens, pick)
    yield from _text(corpus, tokens, fresh)


def _new_tokens(
    model: nn.Module, tokens: Tensor, vocab_size: int, count: int, pick: Callable[[Tensor], int]
) -> Iterator[int]:
    """``count`` tokens after ``tokens`` ``(1, T)``."""
    next_logits = _cached(model, tokens.shape[1] + count) if isinstance(model, Llama) else _uncached(model)
    was_training = model.training
    model.eval()
    try:
        for _ in range(count):
            with torch.no_grad():
                logits = next_logits(tokens)
            token = pick(logits[:vocab_size].float().cpu())
            yield token
            tokens = torch.cat((tokens, tokens.new_tensor([[token]])), dim=1)
    finally:
        model.train(was_training)


def _cached(model: Llama, capacity: int) -> Callable[[Tensor], Tensor]:
    cache = Cache(model.config, 1, capacity, next(model.parameters()).device)

    def next_logits(tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens[:, cache.length :], cache)[0, -1]
        return logits

    return next_logits


def _uncached(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def next_logits(tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens)[0, -1]
        return logits

    return next_logits


def _sampler(temperature: float, seed: int) -> Callable[[Tensor], int]:
    """Picks a token of logits ``(V,)``."""
    source = torch.Generator().manual_seed(seed)

    def pick(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=source))

    return pick


def _text(corpus: Corpus, prompt: list[int], fresh: Iterable[int]) -> Iterator[str]:
    """The text of ``fresh`` tokens, each piece as soon as it cannot change: a character may take several tokens."""
    tokens = prompt[-CONTEXT_TOKENS:]
    shown = len(_decode(corpus, tokens))
    for token in fresh:
        tokens.append(token)
        text = _decode(corpus, tokens)
        if len(text) > shown and not text.endswith("\ufffd"):
            yield text[shown:]
            tokens = tokens[-CONTEXT_TOKENS:]
            shown = len(_decode(corpus, tokens))
    if rest := _decode(corpus, tokens)[shown:]:
        yield rest


def _decode(corpus: Corpus, tokens: list[int]) -> str:
    text = corpus.decode(tokens)
    if text is None:
        raise DataError("this corpus has no tokenizer that makes text of tokens")
    return text
