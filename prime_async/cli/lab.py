"""``prime-async lab``: compare algorithms, with many workers in one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from prime_async.cli.options import SEVERAL, Count, Model, Positive, Repetitions
from prime_async.cli.report import figures_table
from prime_async.config.schema import ExchangeSettings, InnerSettings, OuterSettings, RoundSettings, RunSpec
from prime_async.errors import ConfigError
from prime_async.lab.experiment import Job, Outcome
from prime_async.lab.lab import Plan, Summary, best_rates, run_jobs, summarise, write_report
from prime_async.lab.methods import METHODS, find_methods
from prime_async.lab.plot import plot as draw
from prime_async.watch.words import size
from prime_async.work.device import usable_cores

WARMUP_SHARE = 10


def lab(
    directory: Path,
    *,
    methods: Annotated[list[str] | None, SEVERAL] = None,
    seeds: Repetitions = 3,
    workers: Annotated[int, Parameter(validator=Number(gte=1, lte=64))] = 4,
    rounds: Count = 50,
    inner_steps: Count = 20,
    learning_rates: Annotated[list[float], SEVERAL] = [2e-3, 4e-3, 8e-3],  # noqa: B006  (not changed)
    model: Model = "llama-360k",
    batch_size: Count = 8,
    sequence_length: Count = 64,
    outer_learning_rate: Positive = 0.7,
    outer_momentum: Annotated[float, Parameter(validator=Number(gte=0, lt=1))] = 0.9,
    processes: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    plot: bool = True,
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
) -> int:
    """Train the same model in many ways, on the bundled text, and compare the held-out loss of the outer weights.

    Each method gets the learning rate that is best for it on one half of the held-out text, with a seed of its own;
    then all train from the same seeds, and are compared on the other half, seed by seed. Writes lab.json and lab.png
    into the directory. Started again there, it goes on with the runs that are missing.

    Parameters
    ----------
    directory
        Where the outcome of each run is kept.
    methods
        Which to compare, and with whatever they are compared with; all if none is named.
    seeds
        Runs of each that are reported.
    workers
        That train together in each run.
    rounds
        Times that the weights are exchanged.
    inner_steps
        H: from one exchange of the same weights to the next.
    learning_rates
        Of the inner optimiser, to choose from; with one there is nothing to tune.
    batch_size
        As run.inner.batch_size, of each worker.
    sequence_length
        As run.sequence_length.
    outer_learning_rate
        As run.outer.learning_rate.
    outer_momentum
        As run.outer.momentum.
    processes
        Runs at once, with a thread each; 0: as many as there are cores.
    plot
        Write lab.png.
    list_
        Only list the methods.
    """
    console = Console(highlight=False)
    if list_:
        console.print(_list())
        return 0
    base = RunSpec(
        name="lab",
        model=model,
        sequence_length=sequence_length,
        rounds=rounds,
        round=RoundSettings(inner_steps=inner_steps),
        inner=InnerSettings(batch_size=batch_size, warmup_steps=rounds * inner_steps // WARMUP_SHARE),
        outer=OuterSettings(learning_rate=outer_learning_rate, momentum=outer_momentum),
        exchange=ExchangeSettings(chunk_elements=2**16),
    )
    plan = Plan(
        base=base,
        methods=tuple(find_methods(methods or [])),
        workers=workers,
        seeds=seeds,
        learning_rates=tuple(learning_rates),
    )
    _compare(plan, directory, processes or usable_cores(), plot, console)
    return 0


def _compare(plan: Plan, directory: Path, processes: int, plot: bool, console: Console) -> None:
    base = plan.base
    for method in plan.methods:
        method.spec(base)  # raises what is wrong with the settings before anything is run
    summaries, outcomes = _run(plan, directory, processes, console)
    write_report(directory / "lab.json", plan, summaries, outcomes)
    steps = f"{base.rounds} x {base.round.inner_steps} inner steps"
    title = f"{base.model}, {plan.workers} workers, {steps}, {plan.seeds} seeds"
    console.print(_table(title, summaries))
    if plot:
        _draw(directory / "lab.png", title, summaries, outcomes, console)


def _run(plan: Plan, directory: Path, processes: int, console: Console) -> tuple[list[Summary], list[Outcome]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def run(what: str, jobs: list[Job]) -> list[Outcome]:
            task = progress.add_task(what, total=len(jobs))
            return run_jobs(jobs, directory / "runs", processes, lambda _: progress.advance(task))

        rates = best_rates(run("tuning", plan.tuning()), plan)
        outcomes = run("comparing", plan.reported(rates))
    return summarise(outcomes, plan), outcomes


def _draw(path: Path, title: str, summaries: list[Summary], outcomes: list[Outcome], console: Console) -> None:
    """Or say what is missing: the figures are written already."""
    try:
        draw(path, title, summaries, outcomes)
    except ConfigError as error:
        console.print(f"no plot: {error}")


def _table(title: str, summaries: list[Summary]) -> Table:
    table = figures_table(title, ("method",), ("rate", "loss", "gap", "spread", "to", "sent"))
    for s in summaries:
        gap = f"{s.gap:+.2%}" if s.gaps else ""
        spread = f"{s.gap_spread:.2%}" if math.isfinite(s.gap_spread) else ""
        table.add_row(s.method, f"{s.learning_rate:g}", f"{s.loss:.4f}", gap, spread, s.against, size(s.sent_bytes))
    return table


def _list() -> Table:
    table = Table("method", "", "compared with", box=box.SIMPLE_HEAD)
    for method in METHODS.values():
        table.add_row(method.name, method.about, method.against)
    return table
