"""The examples in deploy/ load, and those that belong to one run are one run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prime_async.config.contact import Contact
from prime_async.config.load import load_config
from prime_async.config.spec import flatten, run_id

DEPLOY = Path(__file__).parent.parent / "deploy"
EXAMPLES = sorted(DEPLOY.glob("*.toml"))
CARDS = ("card-24gb.toml", "card-80gb.toml")
RUNS = (("lan-first.toml", "lan-second.toml"), ("internet-first.toml", "internet-joiner.toml"))


def test_the_examples_are_the_ones_that_are_known_here() -> None:
    assert {path.name for path in EXAMPLES} == {"laptop.toml", *CARDS, *RUNS[0], *RUNS[1]}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_loads(path: Path) -> None:
    config = load_config(path)

    assert config.node.key == DEPLOY / "node.key"
    assert config.run.inner.warmup_steps < config.run.rounds * config.run.round.inner_steps


@pytest.mark.parametrize(("first", "second"), RUNS)
def test_examples_that_belong_together_are_one_run(first: str, second: str) -> None:
    ours, theirs = load_config(DEPLOY / first).run, load_config(DEPLOY / second).run

    assert flatten(ours) == flatten(theirs)
    assert run_id(ours) == run_id(theirs)


def test_examples_that_do_not_belong_together_are_other_runs() -> None:
    names = ("laptop.toml", *CARDS, *(first for first, _ in RUNS))

    assert len({run_id(load_config(DEPLOY / name).run) for name in names}) == len(names)


@pytest.mark.parametrize(("first", "second"), RUNS)
def test_the_second_joins_the_first_where_it_listens_and_both_allow_each_other(first: str, second: str) -> None:
    founder, joiner = load_config(DEPLOY / first).node, load_config(DEPLOY / second).node
    contact = Contact.parse(joiner.join[0])

    assert founder.join == ()
    assert (contact.host, contact.port) == (founder.advertise, founder.port)
    assert {Contact.parse(text).id for text in joiner.join} <= set(joiner.allow)
    assert "2" * 64 in founder.allow


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_keys_in_an_example_are_placeholders(path: Path) -> None:
    for key in re.findall(r"[0-9a-f]{64}", path.read_text(encoding="utf-8")):
        assert len(set(key)) == 1


def test_the_readme_names_every_example() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")

    assert [path.name for path in EXAMPLES if f"`{path.name}`" not in text] == []
