"""The mean of the contributions to one chunk, as the chunk's owner computes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prime_async.errors import NonFiniteError
from prime_async.work.codec import Codec


def weighted_mean(
    codec: Codec,
    payloads: Sequence[Tensor],
    weights: Sequence[int],
    out: Tensor,
    scratch: tuple[Tensor, Tensor],
    mean_codec: Codec | None = None,
) -> list[int]:
    """Write the encoded mean of ``payloads``, each uint8, weighted by ``weights`` (tokens, not negative), into ``out``.

    ``codec`` is that of the payloads, ``mean_codec`` that of the mean; the same if it is not given.

    Payloads that are not valid are left out, and their weights do not count; the positions of those are returned.
    If nothing of weight is left the mean is zero. ``scratch`` is two tensors fp32 (n,), n being the chunk's elements.

    The share of payload i is ``weights[i] / total``, the correctly rounded fp64 quotient of two integers, rounded to
    fp32. The sum is in fp32 and in the order given: ``share_0 * x_0 + share_1 * x_1 + ...``, with a multiplication and
    an addition per term. So two owners with the same payloads write the same bytes.
    """
    total, term = scratch
    reasons = [codec.check(payload, total.numel()) for payload in payloads]
    valid = [(p, w) for p, w, reason in zip(payloads, weights, reasons, strict=True) if reason is None]
    skipped = [i for i, reason in enumerate(reasons) if reason is not None]
    _sum(codec, valid, total, term)
    mean_codec = mean_codec or codec
    try:
        mean_codec.encode(total, out, scratch=term)
    except NonFiniteError:
        # The terms are finite, but contributions near the largest fp32 may add up to just beyond it.
        limit = torch.finfo(torch.float32).max
        mean_codec.encode(total.clamp_(-limit, limit), out, scratch=term)
    return skipped


def shares(weights: Sequence[int]) -> list[float]:
    """Each weight over their sum, rounded to fp32; zeros if the sum is zero."""
    total = sum(weights)
    return [float(np.float32(weight / total)) if total else 0.0 for weight in weights]


def _sum(codec: Codec, terms: Sequence[tuple[Tensor, int]], total: Tensor, scratch: Tensor) -> None:
    """The weighted mean of ``terms``, (payload, weight), into ``total``."""
    if not terms:
        total.zero_()
    for i, ((payload, _), share) in enumerate(zip(terms, shares([w for _, w in terms]), strict=True)):
        if i == 0:
            codec.decode(payload, total, share)
        else:
            codec.decode(payload, scratch, share)
            total.add_(scratch)
