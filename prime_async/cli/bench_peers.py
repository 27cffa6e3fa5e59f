"""How ``prime-async bench exchange`` shows what else it measured."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from prime_async.bench.exchange import GROUPS
from prime_async.cli.report import figures_table
from prime_async.watch.words import size

NAMES = ("median", "ratio", "wire", "CPU", "error", "equal")


def peers_table(result: dict[str, Any]) -> Table:
    """One row for each mode of ours, gloo, and each setting of a peer beside it; or why it failed."""
    title = "beside others, in the same processes (ratio: ours to theirs; CPU: seconds of a process)"
    table = figures_table(title, ("",), NAMES)
    for mode in GROUPS:
        if mode in result:
            table.add_row(f"ours, {mode}", *_cells({**result[mode], "ratio": 1.0}))
            for name, figures in result[mode]["peers"].items():
                table.add_row(name, *_cells(figures))
    table.caption_justify = "left"
    table.caption = "\n".join(
        f"{name} failed: {figures['failed']}"
        for mode in GROUPS
        for name, figures in result.get(mode, {}).get("peers", {}).items()
        if "failed" in figures
    )
    return table


def _cells(figures: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in figures:
        return ("failed", *("" for _ in NAMES[1:]))
    return (
        f"{figures['median_s']:.3f}",
        f"{figures['ratio']:.2f}",
        size(figures["wire_bytes"]),
        f"{figures['cpu_s_per_process']:.3f}",
        f"{figures['relative_error']:.3%}",
        "yes" if figures["bitwise_equal"] else "NO",
    )
