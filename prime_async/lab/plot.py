"""What the lab found, as a picture (needs ``prime-async[lab]``)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from prime_async.errors import ConfigError
from prime_async.lab.experiment import Outcome
from prime_async.lab.lab import Summary

SIZE_INCHES = (13.0, 6.0)


def plot(path: Path, title: str, summaries: Sequence[Summary], outcomes: Sequence[Outcome]) -> None:
    """Left the mean held-out loss over the inner steps, right the gap of each method to what it is compared with.

    A method has one colour on both sides; the points are the seeds. Raises :class:`ConfigError` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
    except ImportError as error:
        raise ConfigError(["a plot needs matplotlib: install prime-async[lab], or give --no-plot"]) from error
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    curves, gaps = figure.subplots(1, 2, width_ratios=[3, 2])
    figure.suptitle(title)
    colors = {}
    for index, summary in enumerate(summaries):
        style = ("-", "--", ":")[index // 10 % 3]
        steps, losses = mean_curve([o for o in outcomes if o.method == summary.method])
        (curve,) = curves.plot(steps, losses, style, label=f"{summary.method}  {summary.loss:.3f}")
        colors[summary.method] = curve.get_color()
    curves.set(xlabel="inner steps", ylabel="held-out loss of the outer weights, nats per token", yscale="log")
    curves.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)))
    curves.yaxis.set_major_formatter(ScalarFormatter())
    curves.yaxis.set_minor_formatter(NullFormatter())
    curves.legend(fontsize="small")
    curves.grid(alpha=0.3, which="both")
    compared = [s for s in summaries if s.gaps][::-1]
    for place, summary in enumerate(compared):
        gaps.barh(place, 100 * summary.gap, alpha=0.5, color=colors[summary.method])
        gaps.plot([100 * gap for gap in summary.gaps], [place] * len(summary.gaps), "k.")
    gaps.set_yticks(range(len(compared)), [f"{s.method} to {s.against}" for s in compared])
    gaps.set(xlabel="gap of the final loss, %")
    gaps.axvline(0, color="black", linewidth=0.8)
    gaps.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)


def mean_curve(outcomes: Sequence[Outcome]) -> tuple[list[int], list[float]]:
    """Of the seeds that have the point."""
    points: dict[int, list[float]] = {}
    for outcome in outcomes:
        for step, loss in outcome.curve:
            points.setdefault(step, []).append(loss)
    return sorted(points), [statistics.fmean(points[step]) for step in sorted(points)]
