"""A model that is no Llama, as a user's own module has it."""

from __future__ import annotations

from torch import nn

from prime_async.config.schema import RunSpec
from prime_async.work.llama import fill_normal


def build(run: RunSpec, vocab_size: int) -> nn.Module:
    """A bigram model."""
    model = nn.Sequential(nn.Embedding(vocab_size, 16), nn.Linear(16, vocab_size))
    for name, parameter in model.named_parameters():
        fill_normal(parameter.detach().view(-1), 0.1, run.seed, name)
    return model
