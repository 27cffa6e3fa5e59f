"""``prime-async invite``: the string with which others join a run."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from prime_async.config.load import load_config
from prime_async.node.allow import INVITATIONS
from prime_async.node.invite import make_invitation


def invite(
    config: Path,
    /,
    *,
    hours: Annotated[float, Parameter(validator=Number(gt=0, lte=24 * 3650))] = 24.0,
    token: bool = True,
) -> int:
    """Print a string with which others join the run: `prime-async join STRING`.

    The node whose file this is has to run when they do. It need not be started again.

    Parameters
    ----------
    config
        The node's TOML file.
    hours
        For how long the string lets its bearer in.
    token
        Without it, a joiner's key must be let in otherwise: node.allow, node.allow_file.
    """
    settings = load_config(config)
    until = datetime.now(UTC) + timedelta(hours=hours) if token else None
    invitation = make_invitation(settings, until)
    print(invitation)
    say = Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print
    say(f"\nOthers join {settings.run.name!r} with `prime-async join STRING`, while this node runs.")
    if until is not None:
        say(
            f"Whoever has the string may join until {until:%Y-%m-%d %H:%M} UTC: send it to those alone. To end it "
            f"earlier, delete its line from {settings.node.directory / INVITATIONS}."
        )
    return 0
