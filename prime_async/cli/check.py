"""``prime-async check``: what would go wrong, before it does, and the fix beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import msgspec
import trio
from cyclopts import Parameter
from rich.console import Console

from prime_async.cli.preflight import Finding, preflight


def check(config: Path, /, *, json_: Annotated[bool, Parameter(name="--json", negative="")] = False) -> int:
    """Try everything that a node needs, without joining the run: exits with 1 if something is in the way.

    Parameters
    ----------
    config
        The node's TOML file.
    json_
        Print one JSON object as the last line of stdout.
    """
    findings = trio.run(preflight, config)
    bad = [f for f in findings if f.verdict == "problem"]
    if json_:
        print(json.dumps({"ok": not bad, "findings": msgspec.to_builtins(findings)}))
    else:
        _print(findings)
    return 1 if bad else 0


def _print(findings: list[Finding]) -> None:
    say = Console(highlight=False, soft_wrap=True).print
    marks = {"good": "[green]ok[/green]  ", "warning": "[yellow]note[/yellow]", "problem": "[red]bad[/red] "}
    for finding in findings:
        say(f"{marks[finding.verdict]} [bold]{finding.subject:<8}[/bold] ", end="")
        say(finding.text, markup=False)
        if finding.fix:
            say(f"              fix: {finding.fix}", markup=False)
