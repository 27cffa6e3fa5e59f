"""The command ``prime-async``. Each subcommand is a module of its own, imported when it is called."""

from __future__ import annotations

import sys

from cyclopts import App

from prime_async.docs import page_of
from prime_async.errors import ConfigError, PrimeAsyncError

app = App(
    name="prime-async",
    help="Train one language model on computers that belong to many people, over ordinary internet links.",
)
app.command("prime_async.cli.demo:demo", name="demo")
app.command("prime_async.cli.init:init", name="init")
app.command("prime_async.cli.invite:invite", name="invite")
app.command("prime_async.cli.join:join", name="join")
app.command("prime_async.cli.import_:import_", name="import")
app.command("prime_async.cli.check:check", name="check")
app.command("prime_async.cli.run:run", name="run")
app.command("prime_async.cli.status:status", name="status")
app.command("prime_async.cli.recover:recover", name="recover")
app.command("prime_async.cli.inspect:inspect", name="inspect")
app.command("prime_async.cli.restore:restore", name="restore")
app.command("prime_async.cli.export:export", name="export")
app.command("prime_async.cli.generate:generate", name="generate")
app.command("prime_async.cli.evaluate:evaluate", name="eval")
app.command("prime_async.cli.data:data", name="data")
app.command("prime_async.cli.replay:replay", name="replay")
app.command("prime_async.cli.audit:audit", name="audit")
app.command("prime_async.cli.bench:app", name="bench")
app.command("prime_async.cli.simulate:simulate", name="simulate")
app.command("prime_async.cli.lab:lab", name="lab")
app.command("prime_async.cli.plan:plan", name="plan")
app.command("prime_async.cli.bandwidth:bandwidth", name="bandwidth")
app.command("prime_async.cli.docs:docs", name="docs")

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
