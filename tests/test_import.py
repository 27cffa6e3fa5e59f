"""A run begins with an existing model: every node has its very weights, who has them not gets them from a member."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from safetensors.torch import load_file, save_file
from torch import Tensor

from prime_async.cli import app
from prime_async.cli.init import init
from prime_async.config.load import config_from, load_config
from prime_async.config.schema import Config
from prime_async.errors import ConfigError, DataError
from prime_async.huggingface import ExportSettings, Source, export_llama, open_pretrained, read_weights, views
from prime_async.ledger import inspect_directory, read_newest
from prime_async.machines.facts import CaughtUp, RoundFinished, SnapshotWritten, StateMended
from prime_async.node import Node, open_node
from prime_async.transport.memory import MemoryNetwork
from prime_async.work.diloco import build_workload
from prime_async.work.llama import LlamaConfig, build_llama, load_llama
from prime_async.work.tokenizer import BYTES, byte_tokenizer
from tests.programs import block

pytestmark = pytest.mark.xdist_group("real time")
LIMIT_S = 60.0
SHAPE = LlamaConfig(
    vocab_size=300, width=32, layers=2, heads=4, kv_heads=2, ffn_width=48, rope_theta=500.0, norm_eps=1e-3, init_std=0.3
)
SHORT = (
    "run.sequence_length=16", "run.rounds=4", "run.round.inner_steps=2", "run.inner.batch_size=2",
    "run.inner.warmup_steps=1", "run.exchange.chunk_elements=4096", "run.heartbeat_s=0.1", "run.failure_timeout_s=5.0",
    "node.threads=1", "node.snapshot_every=100",
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers made and saved, with heads in groups and an output matrix of its own."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(4)
    make: Any = TheirConfig  # its types do not know of what older versions of it took
    config = make(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=500.0, rms_norm_eps=1e-3, initializer_range=0.3, eos_token_id=[7, 9],
        max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("theirs") / "model"
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def run(*arguments: str) -> int:
    result = app([*arguments], result_action="return_value")
    assert isinstance(result, int)
    return result


def imported(theirs: Path, folder: Path, *settings: str) -> Config:
    assert run("import", str(theirs), str(folder), *(f"--set={s}" for s in (*SHORT, *settings))) == 0
    return load_config(folder / "node.toml")


# --- reading what transformers wrote ---


def test_a_model_of_transformers_gives_the_same_logits_here(theirs: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = open_pretrained(theirs)
    ours = load_llama(found.config, views(*read_weights(found)))
    tokens = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(theirs)(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-4)
    assert (found.ends, found.positions) == (frozenset({7, 9}), 64)


def test_a_tied_model_in_several_bfloat16_files_is_read_too(tmp_path: Path) -> None:
    shape = LlamaConfig(
        vocab_size=300, width=16, layers=2, heads=2, kv_heads=1, ffn_width=24, tied_embeddings=True, norm_eps=1e-6
    )
    weights = build_llama(shape, seed=2).state_dict()
    source = Source(config=shape, weights=weights, tokenizer=BYTES, sequence_length=8, about={})
    export_llama(source, tmp_path / "model", ExportSettings(dtype="bfloat16", shard_bytes=5000))
    assert len([*(tmp_path / "model").glob("*.safetensors")]) > 1

    found = open_pretrained(tmp_path / "model")

    assert found.config == shape
    got = views(*read_weights(found))
    assert got.keys() == weights.keys()
    assert all(torch.equal(got[name], weights[name].bfloat16().float()) for name in weights)


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def change_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return changed


def index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_config(model_type="mistral"), r'model_type is "mistral": only "llama" can be taken over'),
        (change_config(hidden_act="gelu"), r'hidden_act is "gelu": expected "silu"'),
        (change_config(attention_bias=True), "expected matrices without biases"),
        (change_config(head_dim=16), "head_dim is 16: expected hidden_size / num_attention_heads"),
        (change_config(rope_parameters={"rope_type": "yarn"}), 'of type "yarn"'),
        (change_config(rope_parameters=None, rope_scaling={"type": "linear"}), 'of type "linear"'),
        (change_config(num_hidden_layers=0), "num_hidden_layers is 0: expected at least 1"),
        (change_config(hidden_size=30, head_dim=None), "width 30: must be an even multiple"),
        (change_config(vocab_size="x"), "not of the form that transformers writes"),
        (change_config(num_hidden_layers=3), "model.layers.2.* and 6 more are missing"),
        (change_config(num_hidden_layers=1), "model.layers.1.* is no parameter of the model"),
        (change_config(vocab_size=301), r"has shape \(300, 32\), config.json says \(301, 32\)"),
        (change_weights(lambda tensors: tensors.pop(NORM)), f"{NORM} is missing: the files are not whole"),
        (change_weights(lambda tensors: tensors[NORM].fill_(float("nan"))), f"{NORM} has NaN or infinity"),
        (change_weights(lambda tensors: tensors.update({NORM: tensors[NORM].int()})), f"{NORM} is torch.int32"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be read as safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "save the model as safetensors"),
        (index, "names a file in another directory"),
    ],
)
def test_what_cannot_be_taken_over_is_said(tmp_path: Path, change: Callable[[Path], Any], said: str) -> None:
    source = Source(
        config=SHAPE, weights=build_llama(SHAPE, 1).state_dict(), tokenizer=BYTES, sequence_length=8, about={}
    )
    export_llama(source, tmp_path / "model", ExportSettings())
    change(tmp_path / "model")
    with pytest.raises((ConfigError, DataError), match=said):
        read_weights(open_pretrained(tmp_path / "model"))


# --- founding a run ---


def test_what_is_imported_and_exported_again_is_the_same(theirs: Path, tmp_path: Path) -> None:
    config = imported(theirs, tmp_path / "node")

    newest = read_newest(config.node.directory)
    assert newest.digest.hex() == config.run.initial_digest
    given = load_file(theirs / "model.safetensors")
    assert newest.weights.keys() == given.keys()
    assert all(torch.equal(newest.weights[name], given[name]) for name in given)
    assert inspect_directory(config.node.directory, verify=True).is_good

    assert run("export", str(tmp_path / "node"), str(tmp_path / "model")) == 0
    again = load_file(tmp_path / "model" / "model.safetensors")
    assert again.keys() == given.keys()
    assert all(torch.equal(again[name], given[name]) for name in given)
    assert open_pretrained(tmp_path / "model").config == open_pretrained(theirs).config


def test_nothing_is_overwritten_and_the_model_stays_what_it_is(theirs: Path, tmp_path: Path) -> None:
    imported(theirs, tmp_path / "node")
    with pytest.raises(ConfigError, match=r"node\.toml: is already there"):
        imported(theirs, tmp_path / "node")
    (tmp_path / "node" / "node.toml").unlink()
    with pytest.raises(ConfigError, match="holds the state of a run already"):
        imported(theirs, tmp_path / "node")
    for setting in ("run.llama.heads=2", "run.model=llama-1m", f"run.initial_digest={'0' * 64}", "run.vocab_size=400"):
        with pytest.raises(ConfigError):
            imported(theirs, tmp_path / "other", setting)
    assert not (tmp_path / "other").exists()


def test_who_joins_gets_the_settings_with_the_line_that_is_printed(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    founder = imported(theirs, tmp_path / "node")
    line = next(line for line in capsys.readouterr().out.splitlines() if "init --join" in line)

    assert run(*shlex.split(line)[1:], str(tmp_path / "joiner")) == 0

    assert load_config(tmp_path / "joiner" / "node.toml").run == founder.run


def test_the_commands_of_the_readme_found_a_run_on_data_of_the_models_own_tokens(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(theirs, "llama")
    Path("llama/tokenizer.json").write_bytes(byte_tokenizer())
    Path("book.txt").write_text(3000 * "to be or not to be\n")

    for command in block("", "prime-async import llama").splitlines():
        assert run(*shlex.split(command)[1:]) == 0

    config = load_config("node.toml")
    assert inspect_directory(config.node.directory, verify=True).is_good
    assert (config.run.data, config.run.vocab_size, config.node.data_path) == ("tokens", 300, Path("book.tokens"))


# --- the run ---


def joiner(founder: Config, folder: Path, name: str, **node: Any) -> Config:
    there = {"directory": str(folder), "join": [f"{'a' * 64}@127.0.0.1:1"], "threads": 1, "snapshot_every": 100}
    return config_from({"run": founder.run.model_dump(), "node": {**there, "name": name, **node}})


async def rounds(network: MemoryNetwork, config: Config, name: str) -> list[Any]:
    """What a node reports, to the end."""
    workload = build_workload(config.run, config.node, stream=ord(name))
    async with network.open(name * 64) as transport, open_node(config, transport=transport, workload=workload) as node:
        return [fact async for fact in node.events]


async def test_nodes_without_the_weights_get_them_from_the_member_that_has_them(theirs: Path, tmp_path: Path) -> None:
    """Given a founder with imported weights, and two with none, when they run, then all begin with them."""
    founder = imported(theirs, tmp_path / "node", "run.min_members=2")
    network, facts = MemoryNetwork(seed=1), {}

    async def take_part(name: str, config: Config) -> None:
        facts[name] = await rounds(network, config, name)

    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_part, "a", founder)
            nursery.start_soon(take_part, "b", joiner(founder, tmp_path / "b", "b"))
            nursery.start_soon(take_part, "c", joiner(founder, tmp_path / "c", "c", witness=True))

    digests = {name: [f.state_digest for f in found if isinstance(f, RoundFinished)] for name, found in facts.items()}
    assert len(digests["a"]) == 4
    assert digests["a"] == digests["b"]
    assert set(digests["c"]) <= set(digests["a"])
    for name in "bc":
        assert any(isinstance(f, StateMended | CaughtUp) for f in facts[name])
    assert any(isinstance(f, SnapshotWritten) and f.round == 0 for f in facts["b"])
    first = next(s for s in inspect_directory(tmp_path / "b", verify=True).snapshots)
    assert (first.round, first.state_digest) == (0, founder.run.initial_digest)


async def test_who_comes_when_rounds_have_passed_begins_with_the_first_snapshot(theirs: Path, tmp_path: Path) -> None:
    """Given a run whose only snapshot is the imported one, when a node joins later, then it goes on from there."""
    pace = ("run.rounds=0", "run.round.inner_steps=0", "run.round.seconds=0.4")  # else it would not keep up
    founder = imported(theirs, tmp_path / "node", *pace)
    network = MemoryNetwork(seed=1)
    late = joiner(founder, tmp_path / "b", "b")
    with trio.fail_after(LIMIT_S):
        workload = build_workload(founder.run, founder.node, stream=1)
        async with (
            network.open("a" * 64) as transport,
            open_node(founder, transport=transport, workload=workload) as first,
        ):
            async for fact in first.events:
                if isinstance(fact, RoundFinished) and fact.round >= 1:
                    break
            other = build_workload(late.run, late.node, stream=2)
            async with (
                network.open("b" * 64) as transport,
                open_node(late, transport=transport, workload=other) as node,
            ):
                round, digest = await first_round(node)
                assert digest == await digest_after(first, round)
    assert next(s.round for s in inspect_directory(tmp_path / "b", verify=True).snapshots) == 0


async def first_round(node: Node) -> tuple[int, str]:
    """The first that it takes part in, and the digest after it."""
    caught_up = False
    async for fact in node.events:
        assert not isinstance(fact, StateMended), "it began with the means alone"
        caught_up = caught_up or isinstance(fact, CaughtUp)
        if isinstance(fact, RoundFinished):
            assert caught_up
            return fact.round, fact.state_digest
    raise AssertionError("the node ended")


async def digest_after(node: Node, round: int) -> str:
    async for fact in node.events:
        if isinstance(fact, RoundFinished) and fact.round == round:
            return fact.state_digest
    raise AssertionError("the node ended")


async def test_a_founder_without_the_weights_says_so(theirs: Path, tmp_path: Path) -> None:
    founder = imported(theirs, tmp_path / "node")
    elsewhere = founder.node.model_copy(update={"directory": tmp_path / "empty"})
    with pytest.raises(ConfigError, match=r"run\.initial_digest: .* write them there with `prime-async import`"):
        await rounds(MemoryNetwork(seed=1), founder.model_copy(update={"node": elsewhere}), "a")


def test_a_shape_that_does_not_fit_is_refused_with_the_settings_that_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'run.model = "llama" needs run.llama.layers, run.llama.heads'):
        init(tmp_path, set_=("run.model=llama", "run.llama.width=32"))
    with pytest.raises(ConfigError, match=r'expected no \[run.llama\], since run.model is "llama-1m"'):
        init(tmp_path, set_=("run.llama.width=32",))
