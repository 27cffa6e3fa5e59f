"""The configuration file that ``prime-async init`` writes: every setting, with its meaning, from the schema."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Final

from prime_async.config.reference import Setting, Table, tables
from prime_async.config.schema import Config
from prime_async.config.spec import literal

WIDTH: Final = 100

COMMON: Final = (
    "run.name",
    "run.model",
    "run.data",
    "run.sequence_length",
    "run.seed",
    "run.rounds",
    "run.round.inner_steps",
    "run.inner.learning_rate",
    "run.inner.batch_size",
    "run.inner.warmup_steps",
    "node.name",
    "node.key",
    "node.directory",
    "node.port",
    "node.bulk_port",
    "node.join",
    "node.allow",
    "node.device",
    "node.micro_batch_size",
)
"""Settings that stand uncommented, though they have their default."""

HEADINGS: Final = {
    "run.name": "What is trained",
    "run.rounds": "How long, and with whom",
    "node.name": "Who this node is, and what it keeps",
    "node.host": "Where others find it, and who may",
    "node.witness": "How it computes",
    "node.data_path": "What it reads and reports",
    "node.dashboard": "Who may watch",
}
"""A heading before some of the settings; what follows belongs to it, up to the next."""


def node_toml(config: Config) -> str:
    """The text of a file that holds ``config``: each setting of the schema with its meaning and what it takes.

    A setting that is rarely changed and has its default is commented out (``#key = value``). The text reads back,
    with :func:`~prime_async.config.load.parse_config`, as an equal configuration. For a joiner, ``config.run`` is
    what :func:`~prime_async.config.load.parse_run` gets from a member's file, and ``config.node.join`` that member.
    """
    return "".join(f"{line}\n" for line in _lines(config))


def _lines(config: Config) -> Iterator[str]:
    yield from _comment("The configuration of one node of prime-async.")
    yield from _comment('"#key = value" is a setting at its default: take the "#" away to change it.')
    for table in tables():
        yield from _table_lines(table, config)


def _table_lines(table: Table, config: Config) -> Iterator[str]:
    yield from ("", "", f"[{table.key}]")
    yield from _comment(table.description)
    if table.key == "run":
        yield from _comment(_about_the_run(config))
    for setting in table.settings:
        if setting.key in HEADINGS:
            yield from ("", f"# --- {HEADINGS[setting.key]} ".ljust(WIDTH, "-"))
        yield from _setting_lines(setting, config)


def _about_the_run(config: Config) -> str:
    if config.node.join:
        return (
            "This node joins a run: it is refused, and told what differs, unless all of this is as the others have it."
        )
    return "This node founds the run: give this part to everyone who joins, and change it only together with them."


def _setting_lines(setting: Setting, config: Config) -> Iterator[str]:
    value = _value(config, setting.key)
    usual = literal(value) == setting.default
    default = "" if usual or setting.default is None else f"; default {setting.default}"
    yield ""
    meaning, takes = setting.description, f"[{setting.expected}{default}]"
    together = _comment(f"{meaning} {takes}")
    yield from together if len(together) == 1 else _comment(meaning) + _comment(takes)
    yield from _assignment("#" if usual and setting.key not in COMMON else "", setting.name, value)


def _assignment(mark: str, name: str, value: object) -> Iterator[str]:
    line = f"{mark}{name} = {literal(value)}"
    if not isinstance(value, tuple) or len(line) <= WIDTH:
        yield line
        return
    yield f"{name} = ["
    for item in value:
        yield f"    {literal(item)},"
    yield "]"


def _value(config: Config, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
        break_on_hyphens=False,
        break_long_words=False,
    )
