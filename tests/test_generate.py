"""Text out of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prime_async.errors import ConfigError, DataError
from prime_async.work.corpus import ByteCodec, TokenCorpus
from prime_async.work.device import Device
from prime_async.work.generate import Sampling, generate, probabilities, sampler
from prime_async.work.llama import Cache, LlamaConfig, build_llama

BYTES = ByteCodec()
MODEL = build_llama(
    LlamaConfig(vocab_size=256, width=32, layers=2, heads=4, kv_heads=2, ffn_width=48, init_std=0.2), seed=0
)


def greedy(tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=0.0)


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
    sampling = Sampling(max_tokens=40, temperature=temperature, seed=3)
    cached = "".join(generate(MODEL, BYTES, "To be", sampling))
    assert cached == "".join(generate(Uncached(MODEL), BYTES, "To be", sampling))
    assert cached


def test_the_cache_does_not_change_the_logits() -> None:
    """Given tokens that come a few at a time, when they are computed with a cache, then they are as in one piece."""
    tokens = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(1))
    cache = Cache(MODEL.config, 1, 30, torch.device("cpu"))
    with torch.no_grad():
        pieces = [MODEL(piece, cache) for piece in torch.split(tokens, [7, 1, 1, 13, 1, 7], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), MODEL(tokens), rtol=0, atol=1e-5)


def test_the_cache_has_the_precision_that_is_computed_in() -> None:
    device = Device.open("cpu", "bfloat16")
    written = "".join(generate(MODEL, BYTES, "To be", greedy(20), device=device))
    assert written == "".join(generate(Uncached(MODEL), BYTES, "To be", greedy(20), device=device))


def test_the_seed_decides_what_is_drawn() -> None:
    drawn = (Sampling(max_tokens=30, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    first, again, other = ("".join(generate(MODEL, BYTES, "A", sampling)) for sampling in drawn)
    assert first == again != other


def test_characters_of_several_bytes_come_whole() -> None:
    text = "naïve – 雪☃🙂 end"
    pieces = list(generate(Parrot(text.encode(), 2), BYTES, "é", greedy(len(text.encode()))))
    assert pieces == list(text)


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    assert "".join(generate(Parrot(b"a\xff\xc3", 2), BYTES, "ab", greedy(3))) == "a\ufffd\ufffd"


def test_it_stops_before_an_end_token() -> None:
    said = "".join(generate(Parrot(b"hello\0more", 2), BYTES, "ab", greedy(10), ends={0}))
    assert said == "hello"


def test_an_empty_prompt_will_do() -> None:
    assert "".join(generate(Parrot(b"hello", 1), BYTES, "", greedy(5))) == "hello"


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    MODEL.train()
    pieces = generate(MODEL, BYTES, "x", greedy(5))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert MODEL.training


def test_a_corpus_without_text_explains_itself() -> None:
    class Numbers(TokenCorpus):
        def encode(self, text: str) -> list[int] | None:  # noqa: ARG002
            return None

    with pytest.raises(DataError, match="no tokenizer"):
        next(generate(MODEL, Numbers(np.zeros(9, np.uint8), ByteCodec(), 0), "x", greedy(5)))


# --- what tokens are drawn from ---


def test_only_the_likeliest_tokens_are_drawn() -> None:
    chances = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    for top_k, top_p, kept in (
        (0, 1.0, [0, 1, 2, 3, 4]),
        (2, 1.0, [1, 3]),
        (9, 1.0, [0, 1, 2, 3, 4]),
        (0, 0.3, [1]),
        (0, 0.5, [1, 3]),
        (0, 0.84, [1, 3, 4]),
        (0, 0.86, [0, 1, 3, 4]),
        (3, 0.5, [1, 3]),
    ):
        got = probabilities(chances.log(), Sampling(max_tokens=1, temperature=1.0, top_k=top_k, top_p=top_p))
        expected = torch.zeros(5)
        expected[kept] = chances[kept] / chances[kept].sum()
        torch.testing.assert_close(got, expected)


def test_tokens_come_as_often_as_their_probability_says() -> None:
    chances = torch.tensor([0.1, 0.2, 0.7])
    pick = sampler(Sampling(max_tokens=1, temperature=2.0, seed=5))
    drawn = torch.bincount(torch.tensor([pick(chances.log()) for _ in range(4000)]), minlength=3) / 4000
    torch.testing.assert_close(drawn, chances.sqrt() / chances.sqrt().sum(), rtol=0, atol=0.03)


def test_what_cannot_be_drawn_from_is_refused_with_all_that_is_wrong() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(max_tokens=-1, temperature=float("nan"), top_k=-2, top_p=0.0)
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
    ]
