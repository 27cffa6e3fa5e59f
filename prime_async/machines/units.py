"""Numbers as people read them."""

from __future__ import annotations


def to_ms(seconds: float) -> float:
    """Seconds, to the millisecond: a report needs no more digits."""
    return round(seconds, 3)
