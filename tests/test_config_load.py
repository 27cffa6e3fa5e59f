"""What is wrong with a file is said in full, at once, with its place and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prime_async.config.load import MAX_SHOWN_CHARACTERS, config_from, load_config, parse_config, parse_run
from prime_async.config.reference import tables
from prime_async.config.schema import RULES, Config, InnerSettings, NodeSettings, RoundSettings, RunSpec
from prime_async.errors import ConfigError

KEY = "0123456789abcdef" * 4


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "node.toml")
    return caught.value.problems


def problem(**settings: Any) -> tuple[str, ...]:
    """What is wrong with a valid configuration after these settings, ``run__inner__x=...``, are put into it."""
    tree: dict[str, Any] = {"run": {"name": "demo"}}
    for key, value in settings.items():
        *tables, name = key.split("__")
        table = tree
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = value
    with pytest.raises(ConfigError) as caught:
        config_from(tree)
    return caught.value.problems


def outcome(tree: dict[str, Any]) -> tuple[str, ...]:
    try:
        config_from(tree)
    except ConfigError as error:
        return error.problems
    return ()


def test_a_file_with_nothing_but_a_name_has_all_defaults() -> None:
    assert parse_config('[run]\nname = "demo"', "node.toml") == Config(run=RunSpec(name="demo"))


def test_the_example_of_the_handbook_reads_as_it_is_written_there() -> None:
    assert problem(run__inner__learning_rate=-1) == (
        "configuration: run.inner.learning_rate: expected a number greater than 0, got -1",
    )


def test_everything_that_is_wrong_is_said_at_once_in_the_order_of_the_file() -> None:
    text = """\
[run]
port = 7
failure_timeout_s = 3
heartbeat_s = 2
model = 5
[run.inner]
learning_rate = -1
betas = [0.9, 1.5]
[node]
bulk_port = 7700
join = ["abc", 4]
micro_batch_size = 3
"""
    assert problems(text) == (
        "node.toml:1: run.name: missing; expected 1 to 64 letters, digits, dots, underscores or hyphens",
        "node.toml:2: run.port: unknown; did you mean node.port?",
        "node.toml:3: run.failure_timeout_s: expected more than twice run.heartbeat_s (2.0), "
        "so that one lost heartbeat is no death, got 3.0",
        'node.toml:5: run.model: expected a name such as "llama-1m", or "package.module:factory", got 5',
        "node.toml:7: run.inner.learning_rate: expected a number greater than 0, got -1",
        "node.toml:8: run.inner.betas: expected a list of 2, each a number at least 0 and less than 1, got [0.9, 1.5]",
        "node.toml:10: node.bulk_port: expected another port than node.port, or 0 for any free one, got 7700",
        'node.toml:11: node.join[0]: expected KEY@HOST:PORT, got "abc"',
        'node.toml:11: node.join[1]: expected a contact "KEY@HOST:PORT", got 4',
        "node.toml:12: node.micro_batch_size: expected a divisor of run.inner.batch_size (16), "
        "or 0 for the whole batch, got 3",
    )


def test_a_rule_is_not_checked_against_a_value_that_is_wrong_itself() -> None:
    assert problem(run__heartbeat_s="no", run__failure_timeout_s=0.001) == (
        'configuration: run.heartbeat_s: expected a number greater than 0 and at most 3600, got "no"',
    )


# --- values ---


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"run__name": ""}, 'run.name: expected 1 to 64 letters, digits, dots, underscores or hyphens, got ""'),
        ({"run__name": "a b"}, 'run.name: expected 1 to 64 letters, digits, dots, underscores or hyphens, got "a b"'),
        ({"run__seed": -1}, "run.seed: expected a whole number at least 0 and less than 2^63, got -1"),
        ({"run__seed": 2**63}, f"run.seed: expected a whole number at least 0 and less than 2^63, got {2**63}"),
        ({"run__seed": 1.0}, "run.seed: expected a whole number at least 0 and less than 2^63, got 1.0"),
        ({"run__min_members": 0}, "run.min_members: expected a whole number from 1 to 65536, got 0"),
        ({"run__min_members": 65537}, "run.min_members: expected a whole number from 1 to 65536, got 65537"),
        (
            {"run__data": "shakespear"},
            'run.data: expected "shakespeare", "tokens" or "package.module:factory", got "shakespear"',
        ),
        ({"run__data_digest": "ab"}, 'run.data_digest: expected 64 lower-case hexadecimal digits, or "", got "ab"'),
        (
            {"run__mode": "blokking"},
            'run.mode: expected one of "blocking", "overlapped", "streaming", "eager", got "blokking"; '
            'did you mean "blocking"?',
        ),
        (
            {"run__inner__schedule": "cosin"},
            'run.inner.schedule: expected one of "cosine", "wsd", "constant", got "cosin"; did you mean "cosine"?',
        ),
        ({"run__inner__batch_size": True}, "run.inner.batch_size: expected a whole number from 1 to 2^20, got true"),
        ({"run__inner__weight_decay": float("inf")}, "run.inner.weight_decay: expected a number at least 0, got inf"),
        ({"run__inner__weight_decay": float("nan")}, "run.inner.weight_decay: expected a number at least 0, got nan"),
        (
            {"run__inner__betas": [0.9]},
            "run.inner.betas: expected a list of 2, each a number at least 0 and less than 1, got [0.9]",
        ),
        (
            {"run__inner__betas": [1, 1]},
            "run.inner.betas: expected a list of 2, each a number at least 0 and less than 1, got [1, 1]",
        ),
        ({"run__outer__momentum": 1}, "run.outer.momentum: expected a number at least 0 and less than 1, got 1"),
        (
            {"run__exchange__chunk_elements": 1000},
            "run.exchange.chunk_elements: expected a whole number from 256 to 2^26, a multiple of 256, got 1000",
        ),
        ({"run__inner": 3}, "run.inner: expected a table, as in [run.inner], got 3"),
        ({"run": 3}, "run: expected a table, as in [run], got 3"),
        ({"node": []}, "node: expected a table, as in [node], got []"),
        ({"node__port": "7700"}, 'node.port: expected a whole number from 0 to 65535, got "7700"'),
        ({"node__name": "a\nb"}, 'node.name: expected at most 64 characters on one line, got "a\\nb"'),
        ({"node__key": ""}, 'node.key: expected a path, got ""'),
        ({"node__record": 5}, 'node.record: expected a path, or "", got 5'),
        ({"node__dashboard": "8080"}, 'node.dashboard: expected HOST:PORT, or "", got "8080"'),
        ({"node__dashboard": "[::1]:80800"}, 'node.dashboard: expected HOST:PORT, or "", got "[::1]:80800"'),
        (
            {"node__sinks": ["stdout:x"]},
            'node.sinks[0]: expected "tensorboard:FOLDER", "wandb:PROJECT" or "trackio:PROJECT", got "stdout:x"',
        ),
        ({"node__host": ""}, 'node.host: expected a host name or address without a port, got ""'),
        (
            {"node__advertise": "h:7"},
            'node.advertise: expected a host name or address without a port, or "", got "h:7"',
        ),
        (
            {"node__allow": ["AB"]},
            'node.allow[0]: expected a public key of 64 lower-case hexadecimal digits, or "any", got "AB"',
        ),
        (
            {"node__allow": "any"},
            'node.allow: expected a list, each a public key of 64 lower-case hexadecimal digits, or "any", got "any"',
        ),
        (
            {"node__join": [f"{KEY}@::1:7"]},
            'node.join[0]: expected an IPv6 address in brackets, as in "[2001:db8::1]:7700", got "::1"',
        ),
        ({"node__device": "gpu"}, 'node.device: expected "auto", "cpu", "cuda" or "cuda:N", got "gpu"'),
        ({"node__encrypt": "yes"}, 'node.encrypt: expected true or false, got "yes"'),
        ({"node__encrypt": {"x": 1}}, "node.encrypt: expected true or false, got { x = 1 }"),
    ],
)
def test_a_wrong_value_is_told_what_it_should_be(settings: dict[str, Any], line: str) -> None:
    assert problem(**settings) == (f"configuration: {line}",)


def test_a_value_that_is_very_long_is_shown_in_part() -> None:
    (line,) = problem(node__device="x" * 1000)

    assert line.endswith(f', got "{"x" * (MAX_SHOWN_CHARACTERS - 1)}...')


names = st.sampled_from([part for table in tables() for s in table.settings for part in s.key.split(".")]) | st.text()
values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates() | st.just(KEY)
trees = st.recursive(
    values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=20,
)


@given(
    st.fixed_dictionaries(
        {"run": st.fixed_dictionaries({"inner": st.dictionaries(names, trees)}) | trees},
        optional={"node": st.dictionaries(names, trees) | trees},
    )
)
def test_whatever_stands_in_a_file_the_answer_is_a_configuration_or_its_problems(tree: dict[str, Any]) -> None:
    assert all(line.startswith("configuration: ") and "\n" not in line for line in outcome(tree))


@given(st.text())
def test_whatever_text_a_file_has_the_answer_is_a_configuration_or_its_problems(text: str) -> None:
    with pytest.raises(ConfigError):  # no text that is found by chance has a run with a name
        parse_config(text, "node.toml")


# --- rules ---


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"run__failure_timeout_s": 2},
            "run.failure_timeout_s: expected more than twice run.heartbeat_s (1.0), "
            "so that one lost heartbeat is no death, got 2.0",
        ),
        (
            {"run__data": "tokens"},
            'node.data_path: missing; run.data = "tokens" needs the token file that `prime-async data` makes',
        ),
        ({"run__data_digest": KEY}, 'run.data_digest: expected "" since run.data is "shakespeare" and not "tokens"'),
        (
            {"run__exchange__codec": "topk"},
            'run.exchange.error_feedback: expected true since run.exchange.codec is "topk": without feedback 63 of 64 '
            "weights would never learn what their node found, got false",
        ),
        (
            {"run__exchange__codec": "topk", "run__exchange__error_feedback": True, "run__exchange__reduce": "median"},
            'run.exchange.reduce: expected "mean" or "rda" since run.exchange.codec is "topk": most nodes send nothing '
            'of a weight, so what the middle of them says is zero, got "median"',
        ),
        (
            {"run__exchange__mean_codec": "topk"},
            'run.exchange.mean_codec: expected one of "same", "int8", "int4", "e3m0", "fp16", "fp32", got "topk"',
        ),
        ({"node__port": 7701}, "node.bulk_port: expected another port than node.port, or 0 for any free one, got 7701"),
        (
            {"node__micro_batch_size": 5},
            "node.micro_batch_size: expected a divisor of run.inner.batch_size (16), or 0 for the whole batch, got 5",
        ),
        (
            {"node__micro_batch_size": 32},
            "node.micro_batch_size: expected a divisor of run.inner.batch_size (16), or 0 for the whole batch, got 32",
        ),
        (
            {"run__inner__total_steps": 50},
            "run.inner.warmup_steps: expected at most run.inner.total_steps (50), got 100",
        ),
        (
            {"run__inner__total_steps": 150, "run__inner__schedule": "wsd", "run__inner__decay_share": 0.5},
            "run.inner.decay_share: expected the decay to fit between run.inner.warmup_steps (100) "
            "and run.inner.total_steps (150), got 0.5",
        ),
        (
            {"run__inner__batch_size": 2**20, "run__sequence_length": 2**17},
            "run.inner.batch_size: expected at most 68719476736 tokens per node and round, "
            "got 13743895347200 (with run.sequence_length and run.round.inner_steps)",
        ),
        (
            {"run__inner__batch_size": 2**20, "run__sequence_length": 2**17, "run__round__seconds": 60},
            "run.inner.batch_size: expected at most 68719476736 tokens per node and round, "
            "got 137438953472 (with run.sequence_length and run.round.inner_steps)",
        ),
        (
            {"run__round__inner_steps": 100, "run__round__seconds": 60},
            "run.round.seconds: expected 0 since run.round.inner_steps is 100: give one of the two, got 60.0",
        ),
        (
            {"run__outer__schedule": "linear"},
            "run.rounds: expected more than run.outer.warmup_rounds (0) for run.outer.schedule, got 0",
        ),
        (
            {
                "run__outer__schedule": "linear",
                "run__outer__warmup_rounds": 3,
                "run__warmup_sync_steps": 5,
                "run__rounds": 8,
            },
            "run.rounds: expected more than run.warmup_sync_steps (5) and run.outer.warmup_rounds (3) together for "
            "run.outer.schedule, got 8",
        ),
        (
            {"run__warmup_sync_steps": 5, "run__rounds": 5},
            "run.rounds: expected more than run.warmup_sync_steps (5), which are rounds of the run, or 0 for no end, "
            "got 5",
        ),
        (
            {"run__warmup_sync_steps": 5, "run__mode": "streaming"},
            'run.warmup_sync_steps: expected 0 since run.mode is "streaming": such a round exchanges all weights, and '
            "not one of run.fragments; got 5",
        ),
        (
            {"run__warmup_sync_steps": 5, "run__round__seconds": 60},
            "run.warmup_sync_steps: expected 0 since run.round.seconds is 60.0: it goes with run.round.inner_steps "
            "alone; got 5",
        ),
        (
            {"run__warmup_sync_steps": 5, "run__exchange__codec": "topk", "run__exchange__error_feedback": True},
            'run.warmup_sync_steps: expected 0 since run.exchange.codec is "topk", which sends a 64th of what an inner '
            "step changes; got 5",
        ),
        (
            {"run__mode": "streaming", "run__fragments": 3},
            "run.fragments: expected a number that divides run.round.inner_steps (100), so that all rounds are equally "
            "long, got 3",
        ),
        (
            {"run__round__inner_steps": 0},
            "run.round.seconds: expected a number greater than 0 since run.round.inner_steps is 0: "
            "give one of the two, got 0.0",
        ),
        (
            {"run__round__seconds": 60, "run__rounds": 7},
            "run.inner.total_steps: expected the inner steps that a node does in all 7 rounds, since run.round.seconds "
            'does not say; or set run.inner.schedule = "constant", got 0',
        ),
        (
            {"run__data": "tokens", "node__witness": True},
            'node.data_path: missing; run.data = "tokens" needs the token file that `prime-async data` makes',
        ),
        (
            {"run__data": "tokens", "run__vocab_size": 256},
            'node.data_path: missing; run.data = "tokens" needs the token file that `prime-async data` makes',
        ),
    ],
)
def test_settings_that_do_not_go_together_are_told_so(settings: dict[str, Any], line: str) -> None:
    assert problem(**settings) == (f"configuration: {line}",)


@pytest.mark.parametrize(
    "config",
    [
        {"run": {"name": "x", "inner": {"total_steps": 50, "schedule": "constant"}}},
        {"run": {"name": "x", "inner": {"total_steps": 200, "schedule": "wsd", "decay_share": 0.5}}},
        {"run": {"name": "x", "data": "tokens", "data_digest": KEY}, "node": {"data_path": "t"}},
        {"run": {"name": "x", "min_members": 65536}},
        {"run": {"name": "x", "round": {"seconds": 0.5}}},
        {"run": {"name": "x", "round": {"seconds": 60, "inner_steps": 0}}},
        {"run": {"name": "x", "round": {"seconds": 0, "inner_steps": 1}}},
        {"run": {"name": "x", "round": {"seconds": 60}, "rounds": 7, "inner": {"total_steps": 400}}},
        {"run": {"name": "x", "round": {"seconds": 60}, "rounds": 7, "inner": {"schedule": "constant"}}},
        {"run": {"name": "x", "data": "tokens", "vocab_size": 32000}, "node": {"witness": True}},
        {"run": {"name": "x", "straggler_timeout_s": 0}},
        {"run": {"name": "x", "warmup_sync_steps": 2**20, "mode": "eager"}},
        {"run": {"name": "x", "warmup_sync_steps": 5, "rounds": 6, "outer": {"schedule": "linear"}}},
        {"run": {"name": "x"}, "node": {"port": 0, "bulk_port": 0, "micro_batch_size": 16}},
        {"run": {"name": "x"}, "node": {"allow": ["any", KEY], "join": [f"{KEY}@[::1]:7"], "host": "::"}},
    ],
)
def test_what_is_at_the_edge_but_right_is_accepted(config: dict[str, Any]) -> None:
    config_from(config)


def test_the_rules_hold_too_where_no_file_is_read() -> None:
    with pytest.raises(ValidationError, match=r"expected another port than node\.port"):
        Config(run=RunSpec(name="x"), node=NodeSettings(port=1, bulk_port=1))


def test_every_key_of_a_rule_is_a_setting() -> None:
    config = Config(run=RunSpec(name="x"))
    for rule in RULES:
        for key in rule.keys:
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)


# --- unknown keys ---


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[run]\nname = "x"\nport = 1', "3: run.port: unknown; did you mean node.port?"),
        (
            '[run]\nname = "x"\nlearning_rate = 1',
            "3: run.learning_rate: unknown; did you mean run.inner.learning_rate or run.outer.learning_rate?",
        ),
        ('seed = 1\n[run]\nname = "x"', "1: seed: unknown; did you mean run.seed?"),
        ('[run]\nname = "x"\nsead = 1', "3: run.sead: unknown; did you mean run.seed?"),
        ('[run]\nname = "x"\n[inner]\nclip_norm = 1', "3: inner: unknown; did you mean run.inner?"),
        (
            '[run]\nname = "x"\nmicro_batchsize = 1',
            "3: run.micro_batchsize: unknown; did you mean node.micro_batch_size?",
        ),
        ('[run]\nname = "x"\nrun = 1', "3: run.run: unknown; did you mean run?"),
        (
            '[run]\nname = "x"\n[run.outer]\nzzz = 1',
            "4: run.outer.zzz: unknown; [run.outer] has learning_rate, momentum, "
            "schedule, warmup_rounds, min_learning_rate_ratio",
        ),
        ('zzz = 1\n[run]\nname = "x"', "1: zzz: unknown; the file has run, node"),
    ],
)
def test_an_unknown_key_is_told_what_it_might_have_meant(text: str, line: str) -> None:
    assert problems(text) == (f"node.toml:{line}",)


def test_a_misspelt_table_is_both_missing_and_unknown() -> None:
    assert problems('[runn]\nname = "x"') == (
        "node.toml: run: missing; the file needs a table [run] with at least the name of the run",
        "node.toml:1: runn: unknown; did you mean run?",
    )


def test_a_key_with_a_dot_is_not_taken_for_one_in_a_table() -> None:
    (line,) = problems('[run]\nname = "x"\n"inner.seed" = 1')

    assert line.startswith('node.toml:3: run."inner.seed": unknown; ')


def test_a_key_that_cannot_be_printed_is_escaped() -> None:
    assert problems('[run]\nname = "x"\n"\\u001b[2J" = 1')[0].startswith('node.toml:1: run."\\u001b[2J": unknown; ')


# --- lines ---


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[run]\nname = "x"\n\nseed = -1', 4),
        ('[ run ] # the run\nname = "x"\n  seed = -1', 3),
        ('[run]\nname = "x"\n"seed" = -1', 3),
        ('run.name = "x"\nrun.seed = -1', 2),
        ('\nrun = { name = "x", seed = -1 }', 2),
        ('[node]\nname = """\nseed = 3\n[run]\\\n"""\n[run]\nname = "x"\nseed = -1', 8),
    ],
)
def test_a_problem_is_given_its_line(text: str, line: int) -> None:
    expected = f"node.toml:{line}: run.seed: expected a whole number at least 0 and less than 2^63, got -1"
    assert expected in problems(text)


def test_a_key_after_an_array_of_tables_is_not_taken_for_one_before_it() -> None:
    assert problems('[run]\nname = "x"\n[[node]]\nname = 1') == (
        "node.toml:3: node: expected a table, as in [node], got [{ name = 1 }]",
    )


# --- files ---


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[run]\nname = demo", "node.toml:2: not valid TOML: Invalid value at column 8 of: name = demo"),
        ("[run]\nname = [", "node.toml:2: not valid TOML: Invalid value at the end, after: name = ["),
        ("a = 1\n\x0b", "node.toml:2: not valid TOML: Invalid statement at column 1 of: "),
        (
            '[run]\nname = "a"\nname = "b"\n\nseed = 1',
            'node.toml:3: not valid TOML: Cannot overwrite a value at column 11 of: name = "b"',
        ),
    ],
)
def test_what_is_not_toml_is_shown(text: str, line: str) -> None:
    assert problems(text) == (line,)


def test_a_number_that_python_does_not_read_is_no_crash() -> None:
    (line,) = problems(f"a = 1{'0' * 5000}")

    assert line.startswith("node.toml: not valid TOML: Exceeds the limit")


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert caught.value.problems == (f"{path}: no such file; `prime-async init` writes one",)


def test_a_folder_is_not_taken_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)

    assert caught.value.problems == (f"{tmp_path}: is a folder; name the TOML file in it",)


def test_a_path_through_a_file_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "file" / "node.toml")

    assert caught.value.problems == (f"{tmp_path}/file/node.toml: cannot be read: Not a directory",)


def test_another_encoding_than_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes('[run]\nname = "é"'.encode("latin-1"))

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert caught.value.problems == (f"{path}: byte 14 is not UTF-8; save the file in this encoding",)


def test_a_file_from_a_windows_editor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(b'\xef\xbb\xbf[run]\r\nname = "demo"\r\n')

    assert load_config(path).run == RunSpec(name="demo")


def test_paths_are_relative_to_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    path = tmp_path / "node.toml"
    path.write_text(
        '[run]\nname = "x"\ndata = "tokens"\n[node]\nrecord = "logs/a"\ndata_path = "~/t"\n'
        'allow_file = "/etc/keys"\ndirectory = "../s"\n'
    )

    node = load_config(path).node

    assert node.key == tmp_path / "node.key"
    assert node.directory == tmp_path / "../s"
    assert node.record == tmp_path / "logs/a"
    assert node.data_path == Path("/home/someone/t")
    assert node.allow_file == Path("/etc/keys")


def test_paths_that_are_not_given_stay_so(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text('[run]\nname = "x"\n[node]\nrecord = ""\n')

    assert load_config(path).node.record is None


def test_a_home_folder_that_does_not_exist_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text('[run]\nname = "x"\n[node]\nkey = "~no-such-user-here/k"\n')

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert caught.value.problems == (
        f'{path}: node.key: no home folder for "~no-such-user-here/k"; write the whole path',
    )


# --- a joiner ---


def test_a_joiner_takes_the_run_from_a_members_file_whatever_that_members_node_is() -> None:
    text = '[run]\nname = "x"\ndata = "tokens"\n[run.round]\ninner_steps = 7\n[node]\nport = "broken"\n'

    assert parse_run(text, "founder.toml") == RunSpec(name="x", data="tokens", round=RoundSettings(inner_steps=7))


def test_what_is_wrong_with_a_members_run_is_said() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run('[run]\nname = "x"\nsedd = 1\n[run.inner]\ntotal_steps = 3', "founder.toml")

    assert caught.value.problems == (
        "founder.toml:3: run.sedd: unknown; did you mean run.seed?",
        "founder.toml:4: run.inner.warmup_steps: expected at most run.inner.total_steps (3), got 100",
    )


def test_a_members_batch_need_not_suit_the_defaults_of_a_node() -> None:
    run = RunSpec(name="x", inner=InnerSettings(batch_size=7))
    assert parse_run('[run]\nname = "x"\ninner.batch_size = 7', "founder.toml") == run


# --- how a round ends ---


def test_seconds_alone_make_a_round_that_ends_with_the_clock() -> None:
    run = parse_config('[run]\nname = "x"\nround = { seconds = 60 }', "node.toml").run
    assert (run.round.inner_steps, run.round.seconds) == (0, 60.0)
    assert RoundSettings(seconds=60.0) == run.round
    assert RoundSettings() == RoundSettings(inner_steps=100) == RoundSettings(seconds=0.0)
