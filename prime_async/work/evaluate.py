"""How well a model knows a text that it has not seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from prime_async.work.corpus import Corpus, TextCodec, TokenCorpus
from prime_async.work.device import Device
from prime_async.work.llama import cross_entropy


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The loss of ``tokens`` tokens, ``nats`` in all. ``text_bytes``: of their text; None if it is not known."""

    nats: float
    tokens: int
    text_bytes: int | None

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, as the loss per token is not."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much is read: ``batches`` of so many sequences of so many tokens; None: all that is held out."""

    batches: int | None
    batch_size: int
    sequence_length: int


def evaluate(model: nn.Module, corpus: Corpus, device: Device, amount: Amount) -> HeldOut:
    """The loss of ``model``, which is on ``device``, on the held-out part of ``corpus``: the same one each time.

    Raises :class:`~prime_async.errors.DataError` if the corpus is too short for it.
    """
    codec = corpus.text if isinstance(corpus, TokenCorpus) else None
    nats = torch.zeros((), dtype=torch.float64, device=device.torch_device)
    tokens = text_bytes = 0
    model.eval()
    for inputs, targets in islice(corpus.heldout(amount.batch_size, amount.sequence_length), amount.batches):
        with torch.no_grad(), device.autocast():
            loss = cross_entropy(model(device.moved(inputs)), device.moved(targets))
        nats += loss.double() * targets.numel()
        tokens += targets.numel()
        text_bytes += _text_bytes(codec, inputs, targets) if codec is not None else 0
    return HeldOut(float(nats), tokens, None if codec is None else text_bytes)


def _text_bytes(codec: TextCodec, inputs: Tensor, targets: Tensor) -> int:
    """Of the targets, ``(B, T)``, each row after the first of its inputs."""
    rows = torch.cat((inputs[:, :1], targets), dim=1).tolist()
    return sum(map(codec.text_bytes, rows))
