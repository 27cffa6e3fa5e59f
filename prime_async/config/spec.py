"""The run spec as flat text: what a node sends when it asks to join, and its digest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from prime_async.config.schema import RunSpec, Settings
from prime_async.messages import encode


def flatten(run: RunSpec) -> dict[str, str]:
    """Every setting of the run, those left at their defaults too: dotted key to its value as TOML.

    Two specs are equal exactly if these are; an integer given for a float, or a negative zero, makes no difference.
    """
    return dict(_leaves(run, "run"))


def run_id(run: RunSpec) -> bytes:
    """BLAKE3 of the deterministic CBOR (RFC 8949, section 4.2) of :func:`flatten`: 32 bytes that name the run.

    Defaults are part of it: two versions of the program with different defaults must not meet in one run.
    """
    return settings_id(flatten(run))


def settings_id(settings: dict[str, str]) -> bytes:
    """The run id of a run spec that is flat already, as :func:`flatten` gives it."""
    return blake3(encode(settings)).digest()


def literal(value: Any) -> str:
    """``value`` as TOML has it, on one line, with escapes for what cannot be printed.

    ``None`` is ``""``, since TOML has no null.
    """
    match value:
        case None:
            return '""'
        case bool():
            return "true" if value else "false"
        case float():
            return repr(value + 0.0)  # -0.0 + 0.0 is 0.0
        case str() | Path():
            return f'"{"".join(map(_escaped, str(value)))}"'
        case list() | tuple():
            return f"[{', '.join(map(literal, value))}]"
        case dict():
            return (
                f"{{ {', '.join(f'{dotted([key])} = {literal(item)}' for key, item in value.items())} }}"
                if value
                else "{}"
            )
        case _:
            return str(value)


def dotted(parts: Iterable[str]) -> str:
    """A TOML key of these parts, those quoted that need it."""
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else literal(part) for part in parts)


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    code = ord(character)
    return {"\n": "\\n", "\t": "\\t"}.get(character, f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}")


def _leaves(settings: Settings, key: str) -> Iterator[tuple[str, str]]:
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from _leaves(value, f"{key}.{name}")
        else:
            yield f"{key}.{name}", literal(value)
