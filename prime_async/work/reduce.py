"""The mean of the contributions to one chunk, as the chunk's owner computes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prime_async.errors import NonFiniteError
from prime_async.work.codec import Codec
from prime_async.work.reducers import Reducer, mean
from prime_async.work.workload import Reduction


def weighted_mean(
    codec: Codec,
    payloads: Sequence[Tensor],
    weights: Sequence[int],
    out: Tensor,
    scratch: tuple[Tensor, Tensor],
    mean_codec: Codec | None = None,
    reducer: Reducer = mean,
) -> Reduction:
    """Write the encoded mean of ``payloads``, each uint8, weighted by ``weights`` (tokens, not negative), into ``out``.

    ``codec`` is that of the payloads, ``mean_codec`` that of the mean; the same if it is not given. ``reducer``
    makes the mean, and says in which order it computes: two owners with the same payloads write the same bytes.

    Payloads that are not valid are left out, and their weights do not count. If nothing of weight is left the mean is
    zero. ``scratch`` is two tensors fp32 (n,), n being the chunk's elements.
    """
    total, term = scratch
    reasons = [codec.check(payload, total.numel()) for payload in payloads]
    valid = [(p, w) for p, w, reason in zip(payloads, weights, reasons, strict=True) if reason is None]
    skipped = [i for i, reason in enumerate(reasons) if reason is not None]
    reducer(codec, valid, total, term)
    mean_codec = mean_codec or codec
    try:
        size = mean_codec.encode(total, out, scratch=term)
    except NonFiniteError:
        # The terms are finite, but contributions near the largest fp32 may add up to just beyond it.
        limit = torch.finfo(torch.float32).max
        size = mean_codec.encode(total.clamp_(-limit, limit), out, scratch=term)
    return Reduction(size, skipped)
