"""``prime-async bench restart``: how soon a killed node is back with what is on its disk."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from prime_async.bench.restart import RestartBench, measure
from prime_async.cli.options import SEVERAL, Json, Runs
from prime_async.cli.report import figures_table, report
from prime_async.watch.words import size


def restart(
    *,
    models: Annotated[list[str], SEVERAL] = ["llama-10m", "llama-100m"],  # noqa: B006  (kept)
    runs: Runs = 3,
    json_: Json = False,
) -> int:
    """Kill a node, and time how long it takes to be back with what is on its disk; and how much memory it had.

    Keep the machine idle meanwhile.

    Parameters
    ----------
    models
        Named sizes; of two or more the memory per parameter is told, without what every process takes.
    runs
        Kills of each.
    """
    return report(partial(_measure, models, runs), (_table,), json_)


async def _measure(models: list[str], runs: int, console: Console) -> dict[str, Any]:
    result: dict[str, Any] = {"models": {}}
    for model in models:
        console.print(f"a node with {model} is killed, {runs} times ...")
        bench = RestartBench(model=model, runs=runs)
        result["models"][model] = await measure(bench)
    sizes = sorted((m["parameters"], m["peak_bytes"]) for m in result["models"].values())
    if len(sizes) > 1:
        (few, less), (many, more) = sizes[0], sizes[-1]
        result["bytes_per_parameter"] = round((more - less) / (many - few), 2)
    return result


def _table(result: dict[str, Any]) -> Table:
    """One row a model."""
    title = "killed, and back from the disk"
    if "bytes_per_parameter" in result:
        title += f"; {result['bytes_per_parameter']:.1f} bytes of memory per parameter"
    table = figures_table(title, ("model",), ("parameters", "median", "least", "most", "of that, disk", "peak memory"))
    for model, figures in result["models"].items():
        seconds = figures["seconds"]
        times = (figures["median_s"], min(seconds), max(seconds), figures["restoring_s"])
        row = (f"{s:.2f} s" for s in times)
        table.add_row(model, f"{figures['parameters']:,}", *row, size(figures["peak_bytes"]))
    return table
