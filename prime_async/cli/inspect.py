"""``prime-async inspect``: what is in a node's directory, and what the node would begin with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.table import Table

from prime_async.cli.options import Json
from prime_async.config.load import load_config
from prime_async.config.schema import Config
from prime_async.ledger.examination import MeansFound, SnapshotFound
from prime_async.ledger.inspection import Report, inspect_directory
from prime_async.watch.words import size

CONFIG_FILE = "node.toml"
EXIT_DAMAGED = 1


def inspect(
    directory: Path,
    /,
    *,
    verify: Annotated[bool, Parameter(name="--verify", negative="--no-verify")] = True,
    json_: Json = False,
) -> int:
    """Say what is in a node's directory, whether it is whole, and from which round the node would carry on.

    Changes nothing, and may be called while the node runs. Ends with 1 if something is damaged, or nothing is there.

    Parameters
    ----------
    directory
        The node's `node.directory`, its TOML file, or the folder that `node.toml` is in.
    verify
        Read every chunk and compare it with its digest.
    """
    return show(node_directory(directory)[0], verify=verify, json_=json_)


def node_directory(path: Path) -> tuple[Path, Config | None]:
    """The node's directory that ``path`` means, and the configuration that says so, if one does.

    Raises :class:`ConfigError` if that is wrong.
    """
    file = path / CONFIG_FILE if (path / CONFIG_FILE).is_file() else path
    if file.suffix != ".toml" and not file.is_file():
        return path, None
    config = load_config(file)
    return config.node.directory, config


def show(directory: Path, *, verify: bool, json_: bool) -> int:
    """Print what is in ``directory``. Returns the exit status."""
    report = inspect_directory(directory, verify=verify)
    _say(report, Console(stderr=json_, soft_wrap=True, highlight=False, markup=False))
    if json_:
        print(json.dumps(figures(report), default=bytes.hex))
    return 0 if report.is_good else EXIT_DAMAGED


def figures(report: Report) -> dict[str, Any]:
    """A report as JSON, with bytes for hexadecimal numbers."""
    tree: dict[str, Any] = msgspec.to_builtins(report, builtin_types=(bytes,))
    return {**tree, "good": report.is_good, "conclusion": report.conclusion}


def _say(report: Report, console: Console) -> None:
    console.print(f"{report.directory}: {size(report.total_bytes)}")
    if report.run_id:
        console.print(f"run {report.name or '(its name is not known)'}, run id {report.run_id[:16]}")
    ballot = report.ballot
    if ballot is not None and not ballot.problem:
        voters = ", ".join(ballot.voters)
        console.print(
            f"lineage {ballot.lineage[:16]}, view {ballot.view}, {len(ballot.voters)} voters: {voters}"
            if ballot.view
            else "never a member of the run"
        )
    if report.snapshots or report.means or report.inner:
        console.print(_table(report))
    if report.others:
        console.print("other files: " + ", ".join(f"{o.name} ({size(o.bytes)})" for o in report.others))
    for problem in report.problems:
        console.print(problem)
    console.print(report.conclusion)


def _table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("what", "round", "size", "chunks", "state", "digest"):
        table.add_column(name, justify="right" if name in ("round", "size", "chunks") else "left", no_wrap=True)
    for row in _rows(report):
        table.add_row(*row)
    return table


def _rows(report: Report) -> Iterable[tuple[str, ...]]:
    for snapshot in report.snapshots:
        what = "snapshot" if snapshot.whole else "partial snapshot"
        yield (
            what, str(snapshot.round), size(snapshot.bytes), str(snapshot.chunks), _state(snapshot),
            snapshot.state_digest[:16],
        )  # fmt: skip
    for means in report.means:
        yield (
            "means", str(means.round), size(means.bytes), str(means.chunks), _means_state(means), means.chain[:16]
        )  # fmt: skip
    inner = report.inner
    if inner is not None:
        state = "damaged" if inner.problem else "good"
        yield "inner state", str(inner.round), size(inner.bytes), "", state, inner.state_digest[:16]


def _state(found: SnapshotFound) -> str:
    if found.problem:
        return "damaged" if found.whole else "of no use"
    if not found.checked:
        return "not read"
    if found.missing:
        return f"{len(found.missing)} chunks missing"
    return f"{len(found.bad)} chunks damaged" if found.bad else "good"


def _means_state(found: MeansFound) -> str:
    if found.state == "begun":
        return "not closed"
    if found.problem:
        return f"{found.state}, damaged"
    if not found.checked:
        return found.state
    if found.state == "pending":  # chunks of another attempt may be on their way
        return f"pending, {len(found.bad)} chunks not there" if found.bad else "pending"
    return f"{found.state}, {len(found.bad)} chunks damaged" if found.bad else f"{found.state}, good"
