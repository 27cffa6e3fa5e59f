"""``prime-async audit``: make the means of a run anew from what went into them, and compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from prime_async.audit import Audit
from prime_async.audit import audit as audit_folders
from prime_async.cli.options import Json
from prime_async.watch.words import counted

SHOWN = 10
EXIT_DIFFERENT = 1


def audit(
    *folders: Annotated[Path, Parameter(required=True)],
    json_: Json = False,
) -> int:
    """Make every mean that nodes settled anew from the contributions that it names, and compare the bytes.

    Ends with 1 if a mean is not that of its contributions, if two nodes settled different ones, or if a file is
    damaged.

    Parameters
    ----------
    folders
        What the nodes' `audit = "..."` named, or folders that hold those. All nodes' together: a mean is checked if
        the contributions of all that it names are there.
    """
    found = audit_folders(folders)
    _say(found, Console(stderr=json_, soft_wrap=True, highlight=False, markup=False))
    if json_:
        print(json.dumps(figures(found)))
    return EXIT_DIFFERENT if found.differences else 0


def figures(found: Audit) -> dict[str, Any]:
    """An audit as JSON. ``counted``: by node, in how many of the means its contribution is."""
    return {
        "nodes": sorted(found.nodes),
        "rounds": sorted(found.rounds),
        "means": found.means,
        "copies": found.copies,
        "counted": {node: rounds.total() for node, rounds in sorted(found.counted.items())},
        "differences": found.differences,
        "unchecked": found.unchecked,
    }


def _say(found: Audit, console: Console) -> None:
    console.print(
        f"{counted(found.means, 'mean')} of {counted(len(found.rounds), 'round')} made anew from the contributions, "
        f"and compared with the {found.copies:,} that {counted(len(found.nodes), 'node')} settled: "
        + (counted(len(found.differences), "DIFFERENCE").upper() if found.differences else "all are bitwise equal")
    )
    _list(found.differences, console)
    if found.unchecked:
        console.print(f"{len(found.unchecked)} could not be checked:")
        _list(found.unchecked, console)


def _list(lines: Sequence[str], console: Console) -> None:
    for line in lines[:SHOWN]:
        console.print(f"  {line}")
    if len(lines) > SHOWN:
        console.print(f"  and {len(lines) - SHOWN} more")
