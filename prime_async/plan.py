"""What an exchange will cost, before anybody has rented a GPU: bytes, seconds, time spent training, memory.

The model of an exchange of P parameters among n nodes, of which the slowest link decides:

* A node sends its contribution to the owners of the others' chunks, (n - 1) / n of a payload, and the means that it
  owns to all others, as much again, of ``topk`` more; it receives the same. Both halves run together. Of a link's
  rate, payloads get ``LINK_SHARE``.
* ``ROUND_TRIPS``: ready and plan, the first contributions, the first means, have and commit.
* ``FIXED_S`` and ``CPU_S_PER_PARAMETER`` are what is left, measured with ``prime-async bench overlap`` and
  ``prime-async bench exchange`` on two cores that trained meanwhile: syncing to disk, waking up; encoding, decoding,
  hashing and encryption, by one core.

A mode's share of time spent training is T / (T + E) where the node waits, and T / max(T, E) where it does not, with T
the time of the inner steps between two exchanges and E that of an exchange. What the exchange takes from a CPU that
trains is not in it: that is for nodes whose GPU trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from prime_async.config.schema import ContributionCodec, ExchangeSettings
from prime_async.work.codec import make_codec, mean_payload_bytes

LINK_SHARE: Final = 0.92
ROUND_TRIPS: Final = 4.0
FIXED_S: Final = 0.15
CPU_S_PER_PARAMETER: Final = 6e-9
TARGET: Final = 0.98
GOOD_DELAY, BEARABLE_DELAY = 0.05, 0.25
"""Shares of H after which means are applied: at the first the loss is close to that of blocking (`prime-async lab`)."""
RECOMMENDED: Final[tuple[ContributionCodec, ...]] = ("int8", "int4")
"""Whose loss is close to that of fp32. The sparse codec sends much less, and is for who has compared the loss."""
STEPS: Final = (50, 100, 200, 500, 1000, 2000)
CHUNK_ELEMENTS: Final = ExchangeSettings().chunk_elements
INNER_BYTES: Final = 16
"""Per parameter where it is trained: weights, gradients, AdamW's two moments."""
OUTER_BYTES: Final = 8
"""Per parameter on the host: outer weights and momentum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The nodes. ``step_s``: of an inner step. ``up_mbit``, ``down_mbit``: of the slowest. ``cores``: of each."""

    parameters: int
    step_s: float
    nodes: int
    up_mbit: float
    down_mbit: float
    rtt_ms: float
    cores: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Settings of a run. ``inner_steps``: H."""

    mode: str
    codec: ContributionCodec
    inner_steps: int
    fragments: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """``sent_bytes``: by each node in H inner steps, payloads alone; as many come. ``exchange_s``: of one round.

    ``delay``: share of H that passes between the boundary and the moment at which the means are applied.
    ``host_bytes``, ``device_bytes``: of memory.
    """

    choice: Choice
    sent_bytes: int
    training_s: float
    exchange_s: float
    share: float
    delay: float
    host_bytes: int
    device_bytes: int


def payload_bytes(parameters: int, codec: ContributionCodec) -> int:
    """Of a contribution to the whole vector."""
    return _by_chunks(parameters, make_codec(codec).payload_bytes)


def mean_bytes(parameters: int, codec: ContributionCodec, nodes: int) -> int:
    """Of a mean of the whole vector; of ``topk`` contributions one that have no element in common."""
    means = make_codec(ExchangeSettings(codec=codec).codec_of_means)
    return _by_chunks(parameters, lambda elements: mean_payload_bytes(means, elements, nodes))


def _by_chunks(parameters: int, bytes_of: Callable[[int], int]) -> int:
    """What is sent of the whole vector, chunk by chunk of the usual size. ``bytes_of``: of so many elements."""
    chunks, rest = divmod(parameters, CHUNK_ELEMENTS)
    return chunks * bytes_of(CHUNK_ELEMENTS) + (bytes_of(rest) if rest else 0)


def sent_bytes(setup: Setup, codec: ContributionCodec, parameters: int) -> float:
    """By each node in an exchange of so many parameters."""
    both = payload_bytes(parameters, codec) + mean_bytes(parameters, codec, setup.nodes)
    return (setup.nodes - 1) / setup.nodes * both


def exchange_seconds(setup: Setup, codec: ContributionCodec, parameters: int) -> float:
    """From the end of encoding until the means are applied."""
    sent = sent_bytes(setup, codec, parameters)
    transfer_s = sent * 8 / 1e6 / (min(setup.up_mbit, setup.down_mbit) * LINK_SHARE)
    work_s = parameters * CPU_S_PER_PARAMETER / setup.cores
    return max(transfer_s, work_s) + ROUND_TRIPS * setup.rtt_ms / 1000 + FIXED_S


def forecast(setup: Setup, choice: Choice) -> Forecast:
    """Of ``choice`` on ``setup``."""
    fragments = choice.fragments
    training_s = choice.inner_steps * setup.step_s
    exchange_s = exchange_seconds(setup, choice.codec, -(-setup.parameters // fragments))
    between_s = training_s / fragments
    waits = choice.mode == "blocking"
    busy_s = between_s + exchange_s if waits else max(between_s, exchange_s)
    return Forecast(
        choice=choice,
        sent_bytes=round(sent_bytes(setup, choice.codec, setup.parameters)),
        training_s=between_s,
        exchange_s=exchange_s,
        share=between_s / busy_s,
        delay=0.0 if waits else min(exchange_s, between_s) / training_s,
        host_bytes=_host_bytes(setup, choice),
        device_bytes=INNER_BYTES * setup.parameters,
    )


def _host_bytes(setup: Setup, choice: Choice) -> int:
    parameters = setup.parameters
    payload = payload_bytes(parameters, choice.codec)
    mean = mean_bytes(parameters, choice.codec, setup.nodes)
    residual = 4 * parameters if choice.codec == "topk" else 0
    note = 0 if choice.mode == "blocking" else 4 * parameters // choice.fragments
    kept = mean + 2 * payload if choice.mode == "eager" else 0  # the last mean, and two contributions
    return OUTER_BYTES * parameters + payload + mean + note + kept + residual


def choices(
    inner_steps: int, fragments: int, codecs: Sequence[ContributionCodec] = ("int8", "int4", "topk")
) -> list[Choice]:
    """All modes, with each of the codecs, at this H."""
    modes = (("blocking", 1), ("overlapped", 1), ("streaming", fragments), ("eager", 1))
    return [
        Choice(mode=mode, codec=codec, inner_steps=inner_steps, fragments=parts)
        for codec in codecs
        for mode, parts in modes
    ]


def recommend(setup: Setup, fragments: int = 4) -> tuple[Forecast, str]:
    """The settings to begin with, and why: the fewest inner steps, and the simplest mode, that reach ``TARGET``."""
    found = [forecast(setup, c) for c in _by_merit(fragments)]
    for limit in (GOOD_DELAY, BEARABLE_DELAY, 1.0):
        for candidate in found:
            if candidate.share >= TARGET and candidate.delay <= limit:
                return candidate, _reason(candidate, limit)
    best = max(found, key=lambda f: f.share)
    return best, f"nothing reaches {TARGET:.0%} over these links: this comes closest; more inner steps would help"


def _by_merit(fragments: int) -> Iterator[Choice]:
    for inner_steps in STEPS:
        by_codec = choices(inner_steps, fragments, RECOMMENDED)
        yield from (c for c in by_codec if inner_steps % c.fragments == 0)


def _reason(candidate: Forecast, limit: float) -> str:
    if candidate.choice.mode == "blocking":
        return f"the links are so fast that waiting for them costs less than {1 - TARGET:.0%}"
    text = f"the exchange hides behind {candidate.delay:.1%} of the inner steps"
    if limit > GOOD_DELAY:
        text += f"; that is more than {GOOD_DELAY:.0%}, so compare the loss, or take more inner steps"
    return text
