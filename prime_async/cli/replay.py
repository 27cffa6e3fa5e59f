"""``prime-async replay``: drive a node's machines again from its message log."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console

from prime_async.log import read_log
from prime_async.log import replay as replay_log


def replay(log: Path, /) -> int:
    """Drive the machines of a recorded node again, and compare every effect.

    Needs no network, no model and no clock. Ends with an error at the first event whose effects are not the recorded
    ones.

    Parameters
    ----------
    log
        A file that a node with `record = "..."` wrote.
    """
    recorded = read_log(log)
    calls: Counter[str] = Counter()
    effects = 0
    for step in replay_log(recorded):
        calls[step.record.actor] += 1
        effects += len(step.effects)
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    say(f"{log}: node {recorded.header.node[:8]}, {len(recorded.records)} events, {effects} effects, all as recorded")
    for actor, count in sorted(calls.items()):
        say(f"  {actor}: {count} events")
    if recorded.torn_bytes:
        say(f"  the last {recorded.torn_bytes} bytes are a torn record, and were left out")
    return 0
