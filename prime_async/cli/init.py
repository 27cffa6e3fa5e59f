"""``prime-async init``: a configuration and a key for a new node."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from prime_async.config.load import config_from
from prime_async.config.schema import Config, RunSpec
from prime_async.config.spec import flatten
from prime_async.config.template import node_toml
from prime_async.errors import ConfigError
from prime_async.node.address import advertised_host
from prime_async.transport.keys import write_key_file

CONFIG_FILE = "node.toml"
KEY_FILE = "node.key"
ALLOW_FILE = "allowed-keys.txt"
ALLOW_TEXT = "# Public keys of nodes that may join through this one, one a line. Read again when it changes.\n"


def init(
    directory: Path = Path(),
    /,
    *,
    join: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
) -> int:
    """Write a commented node.toml and a key, and say how others join.

    Whoever was sent a string by a member uses `prime-async join STRING` instead: it fetches the run's settings too.

    Parameters
    ----------
    directory
        Where to write; made if it is not there. Nothing that is there is overwritten.
    join
        A member of the run to join, KEY@HOST:PORT; several for more than one. The settings of the run are not fetched:
        those that are not at their default have to be --set, as in the line that `init` prints there. Without: this
        node founds a run.
    set_
        A setting other than its default, as TOML: run.model="llama-10m" or node.port=7800. Can be repeated.
    """
    write_node(directory, configuration(join, set_))
    return 0


def refuse_to_overwrite(directory: Path) -> Path:
    """Where the TOML file goes. Raises :class:`ConfigError` if one is there."""
    path = directory / CONFIG_FILE
    if path.exists():
        raise ConfigError([f"{path}: is already there: choose another directory, or move it away"])
    return path


def write_node(directory: Path, config: Config) -> None:
    """Write the TOML file, a key and an empty list of others', and say what to do next."""
    path = refuse_to_overwrite(directory)
    directory.mkdir(parents=True, exist_ok=True)
    key = write_key_file(directory / KEY_FILE)
    allow_file = directory / ALLOW_FILE
    if not allow_file.exists():
        allow_file.write_text(ALLOW_TEXT, encoding="utf-8")
    path.write_text(node_toml(config), encoding="utf-8")

    say = Console(soft_wrap=True, highlight=False, markup=False).print
    say(f"Wrote {path}, {directory / KEY_FILE} and {allow_file}.")
    say(f"This node's public key:\n\n  {key.id}\n")
    if config.node.join:
        say("Ask whoever runs a member you join to add that key to their allowed-keys.txt. Then, here:\n")
        say(_start(path))
        say(_about_the_settings(path))
    else:
        say("Now, here:\n")
        say(_start(path))
        say("While it runs, others `prime-async join STRING`, and get the run's settings so. This prints the string:\n")
        say(f"  prime-async invite {path}\n")
        say("Or by hand: they run this line, which holds the settings of [run] as they are now,\n")
        say(f"  {_join_line(key.id, config)}\n")
        say(f"and you let each of them in by adding the key it prints to {allow_file}.")


def _start(path: Path) -> str:
    return f"  prime-async check {path}\n  prime-async run {path}\n"


def _about_the_settings(path: Path) -> str:
    """What a joiner has to know of [run], which nobody sent it."""
    return (
        f"[run] of {path} is what --set said and the defaults. It must be as the members have it: where it is not they "
        "refuse this node, and say which settings differ. To get [run] from them, and be let in without that list, ask "
        "one of them for what `prime-async invite` prints, and use `prime-async join STRING` instead."
    )


def configuration(join: tuple[str, ...], assignments: tuple[str, ...], run: Mapping[str, Any] | None = None) -> Config:
    """The defaults, with what ``run`` and then the command line sets."""
    data: dict[str, Any] = {"run": {"name": "my-run", **(run or {})}, "node": {"allow_file": ALLOW_FILE}}
    if join:
        data["node"]["join"] = list(join)
    for text in assignments:
        key, _, value = text.partition("=")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value  # a shell ate the quotes of a string
        table = data
        *path, last = key.strip().split(".")
        for name in path:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError([f'--set {text}: "{name}" is a value, not a table'])
        table[last] = parsed
    return config_from(data, "--set")


def _join_line(key: str, config: Config) -> str:
    """The command for a joiner: whom to ask, and every setting of the run that is not at its default."""
    host = advertised_host(config.node)
    bracketed = f"[{host}]" if ":" in host else host
    words = ["prime-async init", f"--join {key}@{bracketed}:{config.node.port}"]
    defaults = flatten(RunSpec(name="my-run"))
    words += [f"--set '{name}={value}'" for name, value in flatten(config.run).items() if defaults[name] != value]
    return " ".join(words)
