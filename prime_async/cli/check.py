"""``prime-async check``: what would go wrong, before it does, and the fix beside it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import trio

from prime_async.cli.options import Json
from prime_async.cli.preflight import preflight, print_findings


def check(config: Path, /, *, json_: Json = False) -> int:
    """Try everything that a node needs, without joining the run: exits with 1 if something is in the way.

    Parameters
    ----------
    config
        The node's TOML file.
    """
    findings = trio.run(preflight, config)
    bad = [f for f in findings if f.verdict == "problem"]
    if json_:
        print(json.dumps({"ok": not bad, "findings": msgspec.to_builtins(findings)}))
    else:
        print_findings(findings)
    return 1 if bad else 0
