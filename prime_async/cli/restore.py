"""``prime-async restore``: begin with the remote copy of a node's directory."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from prime_async.cli.inspect import show
from prime_async.cli.options import Json
from prime_async.config.load import load_config
from prime_async.config.spec import run_id
from prime_async.errors import ConfigError
from prime_async.ledger import RemoteCopy


def restore(
    config: Path,
    /,
    *,
    json_: Json = False,
) -> int:
    """Fetch the remote copy of a node's snapshots and means into its directory, which is empty, and inspect it.

    What came of a copy that was cut off is gone on with. The ballot is not in a copy: the node joins its run as a new
    one, or, without `node.join`, founds it anew from what was restored.

    Parameters
    ----------
    config
        The node's TOML file: the copy at `node.remote`, which must be of its run, comes into `node.directory`.
    """
    settings = load_config(config)
    if not settings.node.remote:
        raise ConfigError([f"{config}: node.remote is not set: say there where the copy is, as a URL"])
    names = RemoteCopy(settings.node.remote, settings.node.directory, run_id(settings.run)).pull()
    Console(stderr=json_, soft_wrap=True, highlight=False, markup=False).print(f"{len(names)} files fetched")
    return show(settings.node.directory, verify=True, json_=json_)
