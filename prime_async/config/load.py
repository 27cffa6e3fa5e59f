"""From a TOML file to a :class:`Config`, or to one error that lists everything that is wrong with it.

A problem is one line: ``FILE:LINE: KEY: what was expected, what was found``. Nothing hides anything else: settings
that are wrong by themselves are set aside, and the rules that do not need them are checked on the rest.
"""

from __future__ import annotations

import copy
import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from prime_async.config.reference import Setting, setting, tables
from prime_async.config.schema import RULE_ERROR, Config, RunSpec
from prime_async.config.spec import dotted, literal
from prime_async.errors import ConfigError

MAX_SHOWN_CHARACTERS: Final = 80
PATHS: Final = ("key", "directory", "allow_file", "data_path", "record", "audit")
"""The settings of ``[node]`` that are relative to the folder of the file."""


def load_config(path: Path | str) -> Config:
    """The configuration in ``path``; paths inside it are relative to its folder, ``~`` is the home folder.

    Raises :class:`ConfigError` with every problem that the file has.
    """
    path = Path(path)
    return _with_paths_from(path.parent, parse_config(_read(path), str(path)), str(path))


def parse_config(text: str, source: str) -> Config:
    """The configuration in ``text``, its paths as they stand. ``source`` names it in error messages.

    Raises :class:`ConfigError` with every problem that the text has.
    """
    return _validated(_Document(source, text, _toml(text, source)))


def parse_run(text: str, source: str) -> RunSpec:
    """The run spec in the text of another node's file: of that only ``[run]`` is looked at.

    Raises :class:`ConfigError` with every problem that it has.
    """
    data = _toml(text, source)
    run = data.get("run", {})
    # That node's file has its own [node]; a rule that needs one (tokens: a data_path) must hold for ours, later.
    stand_in = {"data_path": "tokens"} if isinstance(run, dict) and run.get("data") == "tokens" else {}
    kept = {key: value for key, value in data.items() if key == "run"}
    return _validated(_Document(source, text, {**kept, "node": stand_in})).run


def run_from(settings: Mapping[str, str], source: str) -> RunSpec:
    """The run spec whose flat settings (:func:`~prime_async.config.spec.flatten`) these are.

    Raises :class:`ConfigError` with every problem that it has; ``source`` says where they stand.
    """
    return parse_run("".join(f"{key} = {value}\n" for key, value in settings.items()), source)


def config_from(data: Mapping[str, Any], source: str = "configuration") -> Config:
    """The configuration in a tree of tables, as ``tomllib`` gives it. Raises :class:`ConfigError` as the others do."""
    return _validated(_Document(source, "", data))


@dataclass(frozen=True, slots=True)
class _Document:
    source: str
    text: str
    """Only for line numbers; "": there are none."""
    data: Mapping[str, Any]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # Windows' editors begin a file with a byte order mark
    except FileNotFoundError as error:
        raise ConfigError([f"{path}: no such file; `prime-async init` writes one"]) from error
    except IsADirectoryError as error:
        raise ConfigError([f"{path}: is a folder; name the TOML file in it"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: byte {error.start} is not UTF-8; save the file in this encoding"]) from error
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # a TOMLDecodeError, or what int() says to a number of thousands of digits
        raise ConfigError([_syntax_problem(str(error), text, source)]) from error


def _syntax_problem(message: str, text: str, source: str) -> str:
    """Bring the place that ``tomllib`` gives, ``(at line 3, column 5)``, to the front, and show that line."""
    what, _, place = message.partition(" (at ")
    if place == "end of document)":
        lines = text.rstrip().split("\n")
        return f"{source}:{len(lines)}: not valid TOML: {what} at the end, after: {_short(lines[-1].strip())}"
    found = re.fullmatch(r"line (\d+), (column \d+)\)", place)
    if found is None:
        return f"{source}: not valid TOML: {message}"
    line = text.split("\n")[int(found[1]) - 1].strip()
    return f"{source}:{found[1]}: not valid TOML: {what} at {found[2]} of: {_short(line)}"


def _validated(document: _Document) -> Config:
    try:
        return Config.model_validate(document.data)
    except ValidationError as error:
        details = error.errors(include_url=False)
    if not any(detail["type"] == RULE_ERROR for detail in details):  # the rules were not come to
        details += _broken_rules(document.data, [detail["loc"] for detail in details])
    raise ConfigError(_problems(details, document))


def _problems(details: Sequence[ErrorDetails], document: _Document) -> tuple[str, ...]:
    """One line each, in the order of the text."""
    lines = _lines(document.text)
    problems = [(_line(key, lines), key, what) for key, what in (_problem(detail, document) for detail in details)]
    texts = (
        f"{document.source}{f':{line}' if line else ''}: {key}: {what}"
        for line, key, what in sorted(problems, key=lambda problem: problem[0])
    )
    return tuple(dict.fromkeys(texts))  # both items of a pair can be wrong in the same words


def _broken_rules(data: Mapping[str, Any], wrong: Sequence[tuple[int | str, ...]]) -> list[ErrorDetails]:
    """The rules that ``data`` breaks, but for those that look at something at the places that are ``wrong``."""
    rest = _without(data, wrong)
    try:
        Config.model_validate(rest)
    except ValidationError as error:
        details = error.errors(include_url=False)
        keys = [".".join(map(str, place)) for place in wrong]
        return [d for d in details if d["type"] == RULE_ERROR and not _touches(d["ctx"]["keys"], keys)]
    return []


def _touches(keys: Iterable[str], wrong: Iterable[str]) -> bool:
    return any(f"{w}.".startswith(f"{key}.") or f"{key}.".startswith(f"{w}.") for key in keys for w in wrong)


def _without(data: Mapping[str, Any], places: Iterable[tuple[int | str, ...]]) -> dict[str, Any]:
    """A copy of ``data`` that has no value at any of ``places``, but a name for the run."""
    rest: dict[str, Any] = copy.deepcopy(dict(data))
    for place in places:
        _remove(rest, place)
    rest.setdefault("run", {}).setdefault("name", "unnamed")
    return rest


def _remove(table: dict[str, Any], place: Sequence[int | str]) -> None:
    first, *deeper = (str(part) for part in place)
    if deeper and isinstance(table.get(first), dict):
        _remove(table[first], deeper)
    else:
        table.pop(first, None)  # a list goes as a whole


def _problem(detail: ErrorDetails, document: _Document) -> tuple[str, str]:
    """The dotted key, and what is wrong there."""
    place, kind = detail["loc"], detail["type"]
    key = dotted(part for part in place if isinstance(part, str))
    known = setting(key)
    if kind == RULE_ERROR:
        return key, detail["ctx"]["text"]
    if kind == "extra_forbidden":
        return key, _unknown(dotted(map(str, place[:-1])), str(place[-1]))
    if known is None:
        return key, _table_problem(key, kind, detail["input"])
    if kind == "missing" and isinstance(place[-1], str):
        return key, f"missing; expected {known.expected}"
    return _value_problem(known, detail, document)


def _value_problem(known: Setting, detail: ErrorDetails, document: _Document) -> tuple[str, str]:
    index = detail["loc"][-1]
    if not isinstance(index, int):
        return known.key, f"expected {known.expected}, got {_shown(detail['input'])}{_choice(known, detail['input'])}"
    if known.expected_item is None:
        return known.key, f"expected {known.expected}, got {_shown(_at(document.data, known.key))}"
    item = f"{known.key}[{index}]"
    if detail["type"] == "contact":
        return item, detail["msg"]
    return item, f"expected {known.expected_item}, got {_shown(detail['input'])}"


def _table_problem(key: str, kind: str, value: Any) -> str:
    if kind == "missing":
        return "missing; the file needs a table [run] with at least the name of the run"
    return f"expected a table, as in [{key}], got {_shown(value)}"


def _choice(known: Setting, value: Any) -> str:
    near = difflib.get_close_matches(value, known.choices, n=1) if isinstance(value, str) else []
    return f'; did you mean "{near[0]}"?' if near else ""


def _unknown(table: str, name: str) -> str:
    """Says what an unknown key might have meant: the same name elsewhere, else a similar one, here before elsewhere."""
    here, everywhere = _keys_in(table), _all_keys()
    near = (
        [k for k in everywhere if _last(k) == name]
        or [k for near in _similar(name, map(_last, here)) for k in here if _last(k) == near]
        or [k for near in _similar(name, map(_last, everywhere)) for k in everywhere if _last(k) == near]
    )
    if near:
        return f"unknown; did you mean {' or '.join(near)}?"
    place = f"[{table}]" if table else "the file"
    return f"unknown; {place} has {', '.join(map(_last, here))}"


def _similar(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(dict.fromkeys(names)), n=1, cutoff=0.7)


def _all_keys() -> tuple[str, ...]:
    return tuple(key for table in tables() for key in (table.key, *(s.key for s in table.settings)))


def _keys_in(table: str) -> tuple[str, ...]:
    return tuple(key for key in _all_keys() if key.rpartition(".")[0] == table)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _at(data: Mapping[str, Any], key: str) -> Any:
    value: Any = data
    for part in key.split("."):
        value = value[part]
    return value


def _shown(value: Any) -> str:
    return _short(literal(value))


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


_HEADER = re.compile(r"\s*\[{1,2}\s*([A-Za-z0-9_.\s\"'-]+?)\s*\]{1,2}\s*(#.*)?$")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z0-9_.\"'-]+(\s*\.\s*[A-Za-z0-9_\"'-]+)*)\s*=")


def _lines(text: str) -> dict[str, int]:
    """The line of each table and key, from a scan that knows headers, assignments and multi-line strings alone."""
    return dict(reversed(list(_numbered(text))))  # the first of two wins


def _numbered(text: str) -> Iterator[tuple[str, int]]:
    table, inside = "", False
    for number, line in enumerate(text.split("\n"), start=1):
        quotes = line.count('"""') + line.count("'''")
        if not inside and (header := _HEADER.match(line)):
            table = f"{_plain(header[1])}."
            yield table[:-1], number
        elif not inside and (assignment := _ASSIGNMENT.match(line)):
            yield table + _plain(assignment[1]), number
        inside ^= quotes % 2 == 1


def _plain(key: str) -> str:
    return re.sub(r"[\s\"']", "", key)


def _line(key: str, lines: Mapping[str, int]) -> int:
    """The line of ``key``, else that of the closest table around it, else 0."""
    key = _plain(key)
    while key:
        if key in lines:
            return lines[key]
        key = _last_dropped(key)
    return 0


def _last_dropped(key: str) -> str:
    return key.rpartition("[")[0] if key.endswith("]") else key.rpartition(".")[0]


def _with_paths_from(folder: Path, config: Config, source: str) -> Config:
    given = {name: getattr(config.node, name) for name in PATHS}
    found, problems = {}, []
    for name, path in given.items():
        try:
            found[name] = path and folder / path.expanduser()
        except RuntimeError:
            problems.append(f"{source}: node.{name}: no home folder for {literal(path)}; write the whole path")
    if problems:
        raise ConfigError(problems)
    return config.model_copy(update={"node": config.node.model_copy(update=found)})
