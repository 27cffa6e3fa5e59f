"""The flat run spec, its digest, and what differs: the same for equal runs, however they were written."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from prime_async.config.load import parse_config
from prime_async.config.reference import tables
from prime_async.config.schema import ExchangeSettings, InnerSettings, RoundSettings, RunSpec
from prime_async.config.spec import flatten, literal, run_id
from prime_async.messages import Hello, Member, Message, decode, encode

GOLDEN = "f61269873251954fbece472d83b82dfa1221ec1733fe4b9783e6a2b93fb24fbe"


def run_of(text: str) -> RunSpec:
    return parse_config(text, "node.toml").run


def test_the_run_id_does_not_change_by_accident() -> None:
    # Every node must get this one. If a setting or a default was meant to change: runs of older versions end here.
    assert run_id(RunSpec(name="golden")).hex() == GOLDEN


def test_the_run_id_is_32_bytes() -> None:
    assert len(run_id(RunSpec(name="x"))) == 32


@pytest.mark.parametrize(
    "text",
    [
        '[run]\nname = "x"\nseed = 3',
        '[run]\nseed = 3\nname = "x"',
        'run = { seed = 3, name = "x" }',
        '[run.inner]\nlearning_rate = 4e-4\n[run]\nname = "x"\nseed = 3',
        '[run]\nname = "x"\nseed = 3\nfailure_timeout_s = 10\nheartbeat_s = 1\n[run.inner]\nclip_norm = 1',
        '[run]\nname = "x"\nseed = 3\n[run.inner]\nmax_z_loss = -0.0',
        '[node]\nport = 1\nname = "another"\n[run]\nname = "x"\nseed = 3',
    ],
)
def test_order_defaults_written_out_and_the_form_of_numbers_make_no_other_run(text: str) -> None:
    assert run_id(run_of(text)) == run_id(RunSpec(name="x", seed=3))


def test_every_setting_of_the_run_is_in_the_flat_spec() -> None:
    settings = {setting.key for table in tables() for setting in table.settings}

    assert set(flatten(RunSpec(name="x"))) == {key for key in settings if key.startswith("run.")}


def test_another_value_makes_another_run() -> None:
    plain = RunSpec(name="x")
    changes: list[dict[str, Any]] = [
        {"name": "y"},
        {"seed": 1},
        {"heartbeat_s": 2.0},
        {"data_digest": "0" * 64},
        {"vocab_size": 256},
        {"straggler_timeout_s": 0.0},
        {"round": RoundSettings(inner_steps=1)},
        {"round": RoundSettings(seconds=60.0)},
        {"inner": InnerSettings(betas=(0.9, 0.9))},
        {"exchange": ExchangeSettings(codec="fp32")},
        {"exchange": ExchangeSettings(reduce="rda")},
        {"exchange": ExchangeSettings(trim=2)},
    ]

    ids = {run_id(plain.model_copy(update=change)) for change in changes} | {run_id(plain)}

    assert len(ids) == len(changes) + 1


def test_the_flat_spec_has_every_setting_under_its_dotted_key_as_toml() -> None:
    flat = flatten(RunSpec(name="x"))

    assert flat["run.name"] == '"x"'
    assert flat["run.data_digest"] == '""'
    assert flat["run.round.inner_steps"] == "100"
    assert flat["run.round.seconds"] == "0.0"
    assert flat["run.straggler_timeout_s"] == "300.0"
    assert flat["run.inner.learning_rate"] == "0.0004"
    assert flat["run.inner.betas"] == "[0.9, 0.95]"
    assert flat["run.exchange.chunk_elements"] == "1048576"


def test_the_longest_spec_fits_into_a_hello() -> None:
    settings = flatten(RunSpec(name="n" * 64, model="m" * 256, data=f"{'d' * 254}:f", data_digest="0" * 64))
    member = Member(id="a", name="a", incarnation=0, control="", bulk="")
    hello = Hello(protocol=1, run_id=bytes(32), settings=settings, member=member)

    assert decode(encode(hello), Message) == hello
    assert msgspec.convert(settings, dict[str, str]) == settings


def test_a_table_is_shown_on_one_line() -> None:
    assert literal({"a-b": {}, "c\n": [1, True]}) == '{ a-b = {}, "c\\n" = [1, true] }'


def test_text_that_toml_cannot_hold_raw_is_escaped() -> None:
    assert literal('a"\\\n\x00\x7fé') == '"a\\"\\\\\\n\\u0000\\u007fé"'
