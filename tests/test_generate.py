"""Text out of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prime_async.errors import DataError
from prime_async.work.corpus import ByteCodec, TokenCorpus
from prime_async.work.generate import generate
from prime_async.work.llama import LlamaConfig, build_llama

BYTES = TokenCorpus(np.zeros(1000, dtype=np.uint8), ByteCodec(), seed=0)
MODEL = build_llama(
    LlamaConfig(vocab_size=256, width=32, layers=2, heads=4, kv_heads=2, ffn_width=48, init_std=0.2), seed=0
)


class Uncached(nn.Module):
    """A user's model, as far as ``generate`` can see: it takes tokens and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.inner(tokens)
        return logits


class Parrot(nn.Module):
    """Writes ``text``, whatever it is asked."""

    def __init__(self, text: bytes, prompt_tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.text = text
        self.prompt_tokens = prompt_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 256)
        logits[0, -1, self.text[tokens.shape[1] - self.prompt_tokens]] = 1.0
        return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_does_not_change_what_is_written(temperature: float) -> None:
    cached = "".join(generate(MODEL, BYTES, "To be", 40, temperature, seed=3))
    assert cached == "".join(generate(Uncached(MODEL), BYTES, "To be", 40, temperature, seed=3))
    assert cached


def test_the_seed_decides_what_is_drawn() -> None:
    first, again, other = ("".join(generate(MODEL, BYTES, "A", 30, 1.0, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_characters_of_several_bytes_come_whole() -> None:
    text = "naïve – 雪☃🙂 end"
    pieces = list(generate(Parrot(text.encode(), 2), BYTES, "é", len(text.encode()), 0.0, 0))
    assert pieces == list(text)


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    assert "".join(generate(Parrot(b"a\xff\xc3", 2), BYTES, "ab", 3, 0.0, 0)) == "a\ufffd\ufffd"


def test_an_empty_prompt_will_do() -> None:
    assert "".join(generate(Parrot(b"hello", 1), BYTES, "", 5, 0.0, 0)) == "hello"


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    MODEL.train()
    pieces = generate(MODEL, BYTES, "x", 5, 0.0, 0)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert MODEL.training


def test_a_corpus_without_text_explains_itself() -> None:
    class Numbers(TokenCorpus):
        def encode(self, text: str) -> list[int] | None:  # noqa: ARG002
            return None

    with pytest.raises(DataError, match="no tokenizer"):
        next(generate(MODEL, Numbers(np.zeros(9, np.uint8), ByteCodec(), 0), "x", 5, 0.0, 0))
