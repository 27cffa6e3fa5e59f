"""The reference of the configuration is made from the schema, and the page has the newest."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from prime_async.config.load import config_from
from prime_async.config.reference import (
    BEGIN,
    END,
    Setting,
    main,
    reference_markdown,
    replace_reference,
    setting,
    tables,
)
from prime_async.docs import PAGES
from prime_async.errors import ConfigError

PAGE = PAGES / "configuration.md"


def settings() -> Iterator[Setting]:
    return (setting for table in tables() for setting in table.settings)


def test_the_page_has_this_reference() -> None:
    text = PAGE.read_text(encoding="utf-8")

    assert text == replace_reference(text), f"run: python -m prime_async.config.reference {PAGE}"


def test_every_setting_has_a_meaning() -> None:
    assert [s.key for s in settings() if not s.description] == []


def test_every_default_is_valid_when_it_is_written_out() -> None:
    lines = ["[run]", 'name = "x"']
    for table in tables():
        lines += [] if table.key == "run" else [f"[{table.key}]"]
        lines += [f"{s.name} = {s.default}" for s in table.settings if s.default is not None]

    assert config_from(tomllib.loads("\n".join(lines))) == config_from({"run": {"name": "x"}})


def test_only_the_name_of_the_run_must_be_given() -> None:
    assert [s.key for s in settings() if s.default is None] == ["run.name"]


def test_the_reference_has_a_row_for_every_setting_in_a_table_for_every_section() -> None:
    text = reference_markdown()

    assert [line for line in text.split("\n") if line.startswith("####")] == [
        "#### `[run]`",
        "#### `[run.round]`",
        "#### `[run.llama]`",
        "#### `[run.inner]`",
        "#### `[run.outer]`",
        "#### `[run.exchange]`",
        "#### `[node]`",
    ]
    assert text.count("\n| `") == len(list(settings()))
    assert "\n| `learning_rate` | a number greater than 0 | `0.0004` | peak learning rate |\n" in text
    assert "\n| `name` | 1 to 64 letters, digits, dots, underscores or hyphens | required | name of the run |\n" in text


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("run.inner.betas", "a list of 2, each a number at least 0 and less than 1"),
        ("run.inner.schedule", 'one of "cosine", "wsd", "constant"'),
        ("run.exchange.chunk_elements", "a whole number from 256 to 2^26, a multiple of 256"),
        ("run.seed", "a whole number at least 0 and less than 2^63"),
        ("run.mode", 'one of "blocking", "overlapped", "streaming", "eager"'),
        ("node.encrypt", "true or false"),
        ("node.record", 'a path, or ""'),
        ("node.port", "a whole number from 0 to 65535"),
    ],
)
def test_what_a_setting_takes_is_said_in_words(key: str, expected: str) -> None:
    found = setting(key)

    assert found is not None
    assert found.expected == expected


def test_there_is_no_setting_under_another_key() -> None:
    assert setting("run") is None
    assert setting("run.nothing") is None


def test_the_part_between_the_markers_is_replaced_and_nothing_else() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"

    fresh = replace_reference(text)

    assert fresh == f"before\n{BEGIN}\n\n{reference_markdown()}\n{END}\nafter\n"
    assert replace_reference(fresh) == fresh


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END} {BEGIN}"])
def test_a_text_without_both_markers_in_order_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^there is no place for the reference: add the lines {BEGIN} and {END}$"):
        replace_reference(text)


def test_the_command_rewrites_a_file_in_place(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"é\n{BEGIN}\n{END}\n", encoding="utf-8")

    assert main([str(path)]) == 0
    assert path.read_text(encoding="utf-8") == f"é\n{BEGIN}\n\n{reference_markdown()}\n{END}\n"


def test_the_command_says_why_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "README.md"
    path.write_text("nothing")

    assert main([str(path)]) == 1
    assert capsys.readouterr().err == (
        f"{path}: there is no place for the reference: add the lines {BEGIN} and {END}\n"
    )
    assert path.read_text() == "nothing"
