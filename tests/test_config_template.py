"""The file that is written for a user holds every setting, reads well, and reads back as the same configuration."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from prime_async.config.load import PATHS, load_config, parse_config, parse_run
from prime_async.config.reference import tables
from prime_async.config.schema import (
    Config,
    ExchangeSettings,
    InnerSettings,
    LlamaSettings,
    NodeSettings,
    OuterSettings,
    RoundSettings,
    RunSpec,
)
from prime_async.config.spec import flatten, run_id
from prime_async.config.template import COMMON, HEADINGS, WIDTH, node_toml

KEY = "0123456789abcdef" * 4

# --- any valid configuration ---

hexadecimal = st.text("0123456789abcdef", min_size=64, max_size=64)
identifiers = st.text("abcXYZ019_.", min_size=1, max_size=40)
factories = st.builds("{}:{}".format, identifiers, identifiers)
hosts = st.sampled_from(["localhost", "example.org", "192.168.1.5", "::1", "2001:db8::1"])
ports = st.integers(0, 65535)
ratios = st.floats(0, 1)
decays = st.floats(0, 1, exclude_max=True)
positive = st.floats(0, 1e9, exclude_min=True)
counts = st.integers(0, 2**40)
paths = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40).map(Path)
optional_paths = st.none() | paths
contacts = st.builds(
    lambda key, host, port: f"{key}@{f'[{host}]' if ':' in host else host}:{port}",
    hexadecimal,
    hosts,
    st.integers(1, 65535),
)

INNER: dict[str, st.SearchStrategy[Any]] = {
    "optimizer": st.sampled_from(["adamw", "muon", "sgd"]),
    "learning_rate": positive,
    "betas": st.tuples(decays, decays),
    "weight_decay": positive,
    "clip_norm": positive,
    "batch_size": st.integers(1, 2**16),
    "schedule": st.sampled_from(["cosine", "wsd", "constant"]),
    "warmup_steps": st.integers(0, 2**20),
    "total_steps": st.just(0) | st.integers(2**21, 2**40),
    "decay_share": st.floats(0, 0.5),
    "min_learning_rate_ratio": ratios,
    "max_z_loss": positive,
}
OUTER: dict[str, st.SearchStrategy[Any]] = {
    "learning_rate": positive,
    "momentum": decays,
    "schedule": st.just("constant"),  # linear goes with rounds alone
    "warmup_rounds": st.integers(0, 2**20),
    "min_learning_rate_ratio": ratios,
}
ROUND: dict[str, st.SearchStrategy[Any]] = {
    "inner_steps": st.integers(1, 2**10),
    "seconds": st.floats(1e-3, 86_400),
}
EXCHANGE: dict[str, st.SearchStrategy[Any]] = {
    "codec": st.sampled_from(["int8", "fp32"]),
    "mean_codec": st.sampled_from(["same", "int8", "int4"]),
    "error_feedback": st.booleans(),
    "reduce": st.sampled_from(["mean", "rda", "trimmed_mean", "median"]),
    "trim": st.integers(1, 2**15),
    "chunk_elements": st.integers(1, 2**18).map(lambda n: 256 * n),
}
LLAMA: dict[str, st.SearchStrategy[Any]] = {
    "width": st.integers(1, 2**10).map(lambda n: 8 * n),
    "layers": st.integers(1, 2**12),
    "heads": st.sampled_from([2, 4]),
    "kv_heads": st.sampled_from([1, 2]),
    "ffn_width": st.integers(1, 2**22),
    "rope_theta": st.floats(1e-3, 1e9),
    "norm_eps": st.floats(1e-9, 1),
    "tied_embeddings": st.booleans(),
}
RUN: dict[str, st.SearchStrategy[Any]] = {
    "name": st.text("abcXYZ019_.-", min_size=1, max_size=64),
    "model": identifiers | factories,
    "initial_digest": st.just("") | hexadecimal,
    "data": st.sampled_from(["shakespeare", "tokens"]) | factories,
    "data_digest": st.just("") | hexadecimal,
    "vocab_size": st.integers(0, 2**24),
    "sequence_length": st.integers(1, 2**10),
    "seed": st.integers(0, 2**63 - 1),
    "rounds": counts,
    "round": st.one_of([st.builds(RoundSettings, **{name: values}) for name, values in ROUND.items()]),
    "mode": st.sampled_from(["blocking", "overlapped", "eager"]),  # of streaming not all settings go together
    "fragments": st.integers(1, 2**16),
    "warmup_sync_steps": st.just(0),  # others go with more rounds alone, and not with all settings
    "min_members": st.integers(1, 2**16),
    "heartbeat_s": st.floats(1e-3, 100),
    "failure_timeout_s": st.floats(201, 3600),
    "straggler_timeout_s": st.floats(0, 86_400),
    "llama": st.builds(LlamaSettings, **LLAMA),
    "inner": st.builds(InnerSettings, **INNER),
    "outer": st.builds(OuterSettings, **OUTER),
    "exchange": st.builds(ExchangeSettings, **EXCHANGE),
}
NODE: dict[str, st.SearchStrategy[Any]] = {
    "name": st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=64),
    "key": paths,
    "directory": paths,
    "snapshot_every": counts.map(lambda n: n % 2**20),
    "keep_snapshots": st.integers(1, 256),
    "keep_rounds": st.integers(0, 2**20),
    "remote": st.sampled_from(["", "s3://bucket/run", "file:///srv/copy"]),
    "host": hosts,
    "port": ports,
    "bulk_port": ports,
    "advertise": st.just("") | hosts,
    "join": st.lists(contacts, max_size=3),
    "allow": st.lists(hexadecimal | st.just("any"), max_size=3),
    "allow_file": optional_paths,
    "encrypt": st.booleans(),
    "streams": st.integers(1, 64),
    "witness": st.booleans(),
    "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
    "precision": st.sampled_from(["auto", "float32", "bfloat16"]),
    "compile": st.booleans(),
    "threads": st.integers(0, 4096),
    "micro_batch_size": st.sampled_from([0, 1]),
    "data_path": optional_paths,
    "evaluate_every": counts,
    "dashboard": st.sampled_from(["", "127.0.0.1:8080", "0.0.0.0:0", "[::1]:8080"]),
    "sinks": st.lists(st.sampled_from(["tensorboard:logs", "wandb:run", "trackio:run"]), max_size=3),
    "record": optional_paths,
    "audit": optional_paths,
    "log_format": st.sampled_from(["console", "json"]),
    "log_level": st.sampled_from(["debug", "info", "warning", "error"]),
}


@st.composite
def configs(draw: st.DrawFn) -> Config:
    run = draw(st.fixed_dictionaries({}, optional=RUN))
    node = draw(st.fixed_dictionaries({}, optional=NODE))
    run |= {"name": run.get("name", "x")}
    if run.get("heartbeat_s", 1.0) > 4:
        run |= {"failure_timeout_s": run.get("failure_timeout_s", 300.0)}
    if "llama" in run:
        run |= {"model": "llama"}
    if run.get("data") == "tokens":
        node |= {"data_path": node.get("data_path") or Path("t")}
    else:
        run.pop("data_digest", None)
    if run.get("round", RoundSettings()).seconds and not run.get("inner", InnerSettings()).total_steps:
        run |= {"rounds": 0}
    if node.get("port", 7700) == node.get("bulk_port", 7701):
        node |= {"port": 0, "bulk_port": 0}
    return Config(run=RunSpec(**run), node=NodeSettings(**node))


@pytest.mark.parametrize(
    ("model", "strategies"),
    [
        (InnerSettings, INNER),
        (OuterSettings, OUTER),
        (RoundSettings, ROUND),
        (ExchangeSettings, EXCHANGE),
        (LlamaSettings, LLAMA),
        (RunSpec, RUN),
        (NodeSettings, NODE),
    ],
)
def test_the_tests_vary_every_setting(model: type[BaseModel], strategies: dict[str, object]) -> None:
    assert list(strategies) == list(model.model_fields)


# --- round trips ---


@given(configs())
def test_any_configuration_reads_back_as_it_was_written(config: Config) -> None:
    again = parse_config(node_toml(config), "node.toml")

    assert again == config
    assert flatten(again.run) == flatten(config.run)
    assert run_id(again.run) == run_id(config.run)


@given(configs())
def test_a_commented_setting_is_at_its_default_so_that_uncommenting_it_changes_nothing(config: Config) -> None:
    text = re.sub(r"^#(?=[a-z])", "", node_toml(config), flags=re.MULTILINE)

    assert parse_config(text, "node.toml") == config


@given(configs(), configs())
def test_runs_have_the_same_id_exactly_if_nothing_differs(one: Config, other: Config) -> None:
    same = flatten(one.run) == flatten(other.run)

    assert (run_id(one.run) == run_id(other.run)) == same == (one.run == other.run)


@given(configs())
def test_a_joiner_takes_the_run_from_a_file_that_was_written(config: Config) -> None:
    assert parse_run(node_toml(config), "founder.toml") == config.run


def test_a_file_that_was_written_loads_with_its_paths_beside_it(tmp_path: Path) -> None:
    config = Config(run=RunSpec(name="x"), node=NodeSettings(record=Path("log")))
    path = tmp_path / "node.toml"
    path.write_text(node_toml(config), encoding="utf-8")

    loaded = load_config(path)

    beside = {name: tmp_path / value for name in PATHS if (value := getattr(config.node, name))}
    assert loaded.run == config.run
    assert loaded.node == config.node.model_copy(update=beside)


# --- what it looks like ---


def test_every_setting_appears_once_with_its_meaning() -> None:
    text = node_toml(Config(run=RunSpec(name="x")))
    prose = " ".join(re.findall(r"^# (.*)", text, flags=re.MULTILINE))
    everything = tomllib.loads(re.sub(r"^#(?=[a-z])", "", text, flags=re.MULTILINE))

    assert everything["run"]["name"] == "x"
    for table in tables():
        for setting in table.settings:
            assert f"{setting.description} [{setting.expected}" in prose
            assert len(re.findall(rf"^#?{setting.name} = ", text, flags=re.MULTILINE)) == sum(
                s.name == setting.name for t in tables() for s in t.settings
            )


def test_settings_that_are_rarely_changed_are_commented_out_until_they_are() -> None:
    usual = node_toml(Config(run=RunSpec(name="x")))
    changed = node_toml(Config(run=RunSpec(name="x", heartbeat_s=2.0)))

    assert "\n#heartbeat_s = 1.0\n" in usual
    assert "# seconds between two heartbeats [a number greater than 0 and at most 3600; default 1.0]\n" in changed
    assert "\nheartbeat_s = 2.0\n" in changed


def test_a_list_that_is_long_stands_one_item_to_a_line() -> None:
    node = NodeSettings(allow=(KEY, "any"), join=(f"{KEY}@h:1",))

    text = node_toml(Config(run=RunSpec(name="x"), node=node))

    assert f'\njoin = ["{KEY}@h:1"]\n' in text
    assert f'\nallow = ["{KEY}", "any"]\n' in text
    assert f'\nallow = [\n    "{KEY}",\n    "{KEY}",\n]\n' in node_toml(
        Config(run=RunSpec(name="x"), node=NodeSettings(allow=(KEY, KEY)))
    )


def test_a_founder_and_a_joiner_are_told_what_the_run_part_means_for_them() -> None:
    run = RunSpec(name="x")

    assert "# This node founds the run: " in node_toml(Config(run=run))
    assert "# This node joins a run: " in node_toml(Config(run=run, node=NodeSettings(join=(f"{KEY}@h:1",))))


def test_comments_are_wrapped_and_lines_end_without_blanks() -> None:
    lines = node_toml(Config(run=RunSpec(name="x"))).split("\n")

    assert max(map(len, lines)) <= WIDTH
    assert lines == [line.rstrip() for line in lines]
    assert lines[-1] == ""
    assert lines[-2]


def test_what_the_template_knows_by_name_is_in_the_schema() -> None:
    keys = {setting.key for table in tables() for setting in table.settings}

    assert set(COMMON) <= keys
    assert set(HEADINGS) <= keys
