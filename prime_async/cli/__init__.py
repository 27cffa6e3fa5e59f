"""The command ``prime-async``. Each subcommand is a module of its own, imported when it is called."""

from __future__ import annotations

import sys

from cyclopts import App

from prime_async.cli.commands import add_commands
from prime_async.docs import page_of
from prime_async.errors import ConfigError, PrimeAsyncError

app = App(
    name="prime-async",
    help="Train one language model on computers that belong to many people, over ordinary internet links.",
)
add_commands(
    app,
    {
        "demo": "demo:demo",
        "init": "init:init",
        "invite": "invite:invite",
        "join": "join:join",
        "import": "import_:import_",
        "check": "check:check",
        "run": "run:run",
        "status": "status:status",
        "recover": "recover:recover",
        "inspect": "inspect:inspect",
        "restore": "restore:restore",
        "export": "export:export",
        "generate": "generate:generate",
        "eval": "evaluate:evaluate",
        "data": "data:data",
        "replay": "replay:replay",
        "audit": "audit:audit",
        "simulate": "simulate:simulate",
        "lab": "lab:lab",
        "plan": "plan:plan",
        "bandwidth": "bandwidth:bandwidth",
        "docs": "docs:docs",
    },
)
app.command("prime_async.cli.bench:app", name="bench", help="Measure this program on this machine.")

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Run a subcommand. What goes wrong on purpose is printed without a traceback, and ends with where to read more."""
    try:
        sys.exit(app(sys.argv[1:]))
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        _point_to_page(error)
        sys.exit(EXIT_USAGE)
    except PrimeAsyncError as error:
        print(f"error: {error}", file=sys.stderr)
        _point_to_page(error)
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _point_to_page(error: PrimeAsyncError) -> None:
    page = page_of(error)
    if page is not None:
        print(f"more: prime-async docs {page}", file=sys.stderr)
