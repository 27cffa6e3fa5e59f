"""How fast links must be for a share of the time to go into training, by size of the model: the forecast, inverted.

:mod:`prime_async.plan` says which share training gets over given links; here the share is given. A node that waits may
wait E = T (1 - u) / u for a share u of the time, one that does not E = T / u, with T the inner steps between two
exchanges. What E leaves after round trips and fixed costs is for the payloads; where the CPU alone takes longer than
that, no link is fast enough.

``data-parallel`` is a ring all-reduce of fp32 gradients after each step, for which nodes wait, without any other cost:
2 (n - 1) / n of 4 bytes per parameter.

``PUBLISHED`` is from Streaming DiLoCo (arXiv 2501.18512, table 4): a simulation too, with other assumptions, for 1, 10
and 100 B parameters in 24, 48 and 108 layers, steps at 60 % of the peak FLOPs, H = 100 and fragments of 3 layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from prime_async.plan import (
    CPU_S_PER_PARAMETER,
    FIXED_S,
    LINK_SHARE,
    ROUND_TRIPS,
    Choice,
    Setup,
    sent_bytes,
)

TARGETS: Final = (0.5, 0.8, 0.9, 0.95, 0.99)
GRADIENT_BYTES: Final = 4
PUBLISHED_INNER_STEPS: Final = 100
PUBLISHED: Final[dict[tuple[int, float], dict[str, tuple[float, ...]]]] = {
    (10**9, 0.1): {
        "Data-Parallel": (86.8, 152.6, 184.2, 222.3, 569.0),
        "Vanilla DiLoCo": (1.4, 6.2, 13.3, 23.3, 86.8),
        "Streaming DiLoCo": (1.4, 5.2, 9.1, 16.0, 28.1),
        "Streaming, overlapped": (1.4, 4.3, 6.2, 9.1, 11.0),
        "Streaming, overlapped, FP4": (0.4, 0.9, 1.7, 2.0, 3.0),
    },
    (10**10, 0.8): {
        "Data-Parallel": (104.8, 222.3, 222.3, 268.3, 471.5),
        "Vanilla DiLoCo": (1.7, 7.5, 16.0, 33.9, 104.8),
        "Streaming DiLoCo": (1.7, 5.2, 9.1, 13.3, 19.3),
        "Streaming, overlapped": (1.7, 3.6, 5.2, 6.2, 7.5),
        "Streaming, overlapped, FP4": (0.4, 0.9, 1.4, 1.4, 1.7),
    },
    (10**11, 4.9): {
        "Data-Parallel": (184.2, 323.8, 390.7, 390.7, 471.5),
        "Vanilla DiLoCo": (3.0, 11.0, 23.3, 49.4, 184.2),
        "Streaming DiLoCo": (2.4, 6.2, 9.1, 11.0, 19.3),
        "Streaming, overlapped": (1.7, 3.6, 4.3, 5.2, 5.2),
        "Streaming, overlapped, FP4": (0.5, 0.9, 1.1, 1.1, 1.4),
    },
}
"""By parameters and seconds of a step: Gbit/s for each of ``TARGETS``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Gbit/s for each of ``TARGETS``; None: no link is fast enough. ``published``: by others."""

    name: str
    gbit: tuple[float | None, ...]
    published: bool = False


def needs(setup: Setup, inner_steps: int, fragments: int) -> list[Need]:
    """By method, for the model of ``setup``, whose links do not matter; then what is published of the same case."""
    ours = [Need(name="data-parallel fp32", gbit=tuple(_data_parallel(setup, share) for share in TARGETS))]
    for choice in _choices(inner_steps, fragments):
        gbit = tuple(needed_gbit(setup, choice, share) for share in TARGETS)
        ours.append(Need(name=f"{choice.mode} {choice.codec}", gbit=gbit))
    return ours + _published(setup, inner_steps)


def needed_gbit(setup: Setup, choice: Choice, share: float) -> float | None:
    """Of each node, each way, so that ``share`` of the time goes into training. None: no link is fast enough."""
    parameters = -(-setup.parameters // choice.fragments)
    between_s = choice.inner_steps * setup.step_s / choice.fragments
    allowed_s = _waiting_s(between_s, share) if choice.mode == "blocking" else between_s / share
    payload_s = allowed_s - ROUND_TRIPS * setup.rtt_ms / 1000 - FIXED_S
    if payload_s <= 0 or parameters * CPU_S_PER_PARAMETER / setup.cores > payload_s:
        return None
    return sent_bytes(setup, choice.codec, parameters) * 8 / 1e9 / (payload_s * LINK_SHARE)


def _data_parallel(setup: Setup, share: float) -> float:
    sent = 2 * (setup.nodes - 1) / setup.nodes * GRADIENT_BYTES * setup.parameters
    return sent * 8 / 1e9 / (_waiting_s(setup.step_s, share) * LINK_SHARE)


def _waiting_s(training_s: float, share: float) -> float:
    return training_s * (1 - share) / share


def _choices(inner_steps: int, fragments: int) -> list[Choice]:
    modes = (("blocking", 1), ("overlapped", 1), ("streaming", fragments))
    return [
        Choice(mode=mode, codec=codec, inner_steps=inner_steps, fragments=parts)
        for mode, parts in modes
        for codec in ("int8", "int4")
    ]


def _published(setup: Setup, inner_steps: int) -> list[Need]:
    found = PUBLISHED.get((setup.parameters, setup.step_s), {}) if inner_steps == PUBLISHED_INNER_STEPS else {}
    return [Need(name=name, gbit=gbit, published=True) for name, gbit in found.items()]
