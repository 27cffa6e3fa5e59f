"""What each setting takes, read from the schema: the source of error messages, templates and the reference in docs.

``python -m prime_async.config.reference prime_async/docs/configuration.md`` rewrites what is there between two markers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from prime_async.config.schema import Config
from prime_async.config.spec import literal
from prime_async.errors import ConfigError

BEGIN: Final = "<!-- config reference -->"
END: Final = "<!-- end of config reference -->"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting in words. ``default`` is TOML; ``None``: the setting must be given."""

    key: str
    description: str
    expected: str
    expected_item: str | None
    """What each item of a list takes; ``None`` where the setting is no list, or its items are not told apart."""
    choices: tuple[str, ...]
    default: str | None

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One TOML table: its own settings, without those of the tables inside it."""

    key: str
    description: str
    settings: tuple[Setting, ...]


@cache
def tables() -> tuple[Table, ...]:
    """Every table of the file, in the order of the schema, an outer one before those inside it."""
    schema = Config.model_json_schema()
    return tuple(
        table for key, part in schema["properties"].items() for table in _tables(key, _referred(part, schema), schema)
    )


def setting(key: str) -> Setting | None:
    """The setting with this dotted key, if there is one."""
    return next((s for table in tables() for s in table.settings if s.key == key), None)


def reference_markdown() -> str:
    """The reference of the configuration file: a heading, a line and a Markdown table for each TOML table."""
    return "\n\n".join(_markdown(table) for table in tables()) + "\n"


def replace_reference(text: str) -> str:
    """``text`` with a fresh reference between its markers. Raises :class:`ConfigError` if they are not there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError([f"there is no place for the reference: add the lines {BEGIN} and {END}"])
    return f"{before}{BEGIN}\n\n{reference_markdown()}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    """Rewrite the reference in each of the files named. Returns the exit status."""
    for path in map(Path, arguments):
        try:
            path.write_text(replace_reference(path.read_text(encoding="utf-8")), encoding="utf-8")
        except (ConfigError, OSError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
    return 0


def _tables(key: str, part: dict[str, Any], schema: dict[str, Any]) -> Iterator[Table]:
    required = part.get("required", ())
    settings, inner = [], []
    for name, field in part["properties"].items():
        if "$ref" in field:
            inner.append((f"{key}.{name}", _referred(field, schema)))
        else:
            settings.append(_setting(f"{key}.{name}", field, name in required))
    yield Table(key=key, description=part["description"], settings=tuple(settings))
    for inner_key, inner_part in inner:
        yield from _tables(inner_key, inner_part, schema)


def _referred(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = schema["$defs"][field["$ref"].rpartition("/")[2]]
    return part


def _setting(key: str, field: dict[str, Any], required: bool) -> Setting:
    return Setting(
        key=key,
        description=field.get("description", ""),
        expected=_expected(field),
        expected_item=_expected(field["items"]) if "items" in field else None,
        choices=tuple(field.get("enum", ())),
        default=None if required else literal(field["default"]),
    )


def _expected(field: dict[str, Any]) -> str:
    """A JSON schema in words."""
    match field:
        case {"expected": str(words)}:
            return words
        case {"const": value}:
            return literal(value)
        case {"enum": [*values]}:
            return f"one of {', '.join(map(literal, values))}"
        case {"anyOf": [inner, {"type": "null"}]}:
            return f'{_expected(inner)}, or ""'
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "integer"}:
            return f"a whole number{_bounds(field)}"
        case {"type": "number"}:
            return f"a number{_bounds(field)}"
        case {"format": "path"}:
            return "a path"
        case {"prefixItems": [first, *_] as items}:
            return f"a list of {len(items)}, each {_expected(first)}"
        case {"items": item}:
            at_most = f" of at most {field['maxItems']}" if "maxItems" in field else ""
            return f"a list{at_most}, each {_expected(item)}"
    raise NotImplementedError(f"no words for {field}")


def _bounds(field: dict[str, Any]) -> str:
    match field:
        case {"minimum": low, "maximum": high}:
            bounds = f" from {low} to {_number(high)}"
        case _:
            words = {"minimum": "at least", "exclusiveMinimum": "greater than"}
            words |= {"maximum": "at most", "exclusiveMaximum": "less than"}
            parts = [f"{text} {_number(field[key])}" for key, text in words.items() if key in field]
            bounds = f" {' and '.join(parts)}" if parts else ""
    return bounds + (f", a multiple of {field['multipleOf']}" if "multipleOf" in field else "")


def _number(bound: float) -> str:
    """A large power of two as one: 2^40 reads better than 1099511627776."""
    whole = int(bound)
    return f"2^{whole.bit_length() - 1}" if whole >= 2**20 and whole & (whole - 1) == 0 else str(bound)


def _markdown(table: Table) -> str:
    rows = [
        f"| `{s.name}` | {_cell(s.expected)} | {'required' if s.default is None else f'`{s.default}`'} "
        f"| {_cell(s.description)} |"
        for s in table.settings
    ]
    head = ["| setting | takes | default | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([f"#### `[{table.key}]`", "", table.description, "", *head, *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
