"""What is exported is loaded by transformers, computes the same, and writes the same."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prime_async.cli import app
from prime_async.config.schema import RunSpec
from prime_async.errors import ConfigError, DataError, StorageError
from prime_async.huggingface import ExportSettings, Source, export_llama
from prime_async.ledger import read_newest
from prime_async.work.generate import Sampling, probabilities
from prime_async.work.llama import Llama, LlamaConfig, build_llama, load_llama
from prime_async.work.sizes import llama_shape
from prime_async.work.tokenizer import BYTES, byte_tokenizer, open_tokenizer, run_tokenizer
from prime_async.work.tokens import HuggingFaceCodec, write_tokens
from tests.programs import block
from tests.trained_node import train

TOLERANCE = 1e-4
GROUPED = LlamaConfig(
    vocab_size=300, width=32, layers=2, heads=4, kv_heads=2, ffn_width=48, rope_theta=500.0, norm_eps=1e-3, init_std=0.3
)
TEXT = "né☃🙂 \0\r\nĀ end  of <s> text"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with node.toml and state, of a run of three rounds on the bundled text."""
    folder = tmp_path_factory.mktemp("trained") / "node"
    train(folder)
    return folder


def source(config: LlamaConfig = GROUPED, weights: Mapping[str, Tensor] | None = None) -> Source:
    weights = weights or build_llama(config, seed=1).state_dict()
    return Source(config=config, weights=weights, tokenizer=BYTES, sequence_length=64, about={})


def loaded(directory: Path) -> Any:
    """With transformers, which takes seconds to import."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    return model.eval()


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    made = model.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False, attention_mask=None)
    return [int(token) for token in made[0, len(tokens) :]]


def own_greedy(model: Llama, tokens: list[int], count: int) -> list[int]:
    """Without a cache, and up to the end token."""
    for _ in range(count):
        with torch.no_grad():
            tokens = [*tokens, int(model(torch.tensor([tokens]))[0, -1].argmax())]
        if tokens[-1] == BYTES.codec.end_token:
            break
    return tokens


def assert_same_model(ours: Llama, directory: Path, prompts: Iterable[bytes]) -> None:
    theirs = loaded(directory)
    tokens = torch.randint(0, ours.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=0, atol=TOLERANCE)
    for prompt in prompts:
        assert greedy(theirs, list(prompt), 48) == own_greedy(ours, list(prompt), 48)[len(prompt) :]


def test_a_trained_model_leaves_by_the_command_and_computes_and_writes_the_same(trained: Path, tmp_path: Path) -> None:
    """Given the directory of a node, when it is exported, then transformers gives its logits and its greedy text."""
    out = tmp_path / "model"

    assert app(["export", str(trained), str(out)], result_action="return_value") == 0

    newest = read_newest(trained / "state")
    ours = load_llama(llama_shape(newest.run, newest.weights), newest.weights)
    assert_same_model(ours, out, [b"To be", b"\n", b"KING HENRY."])


def test_grouped_heads_and_a_head_of_its_own_leave_too_in_several_files(tmp_path: Path) -> None:
    made = source()

    export_llama(made, tmp_path / "model", ExportSettings(shard_bytes=30_000))

    names = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert len(names) > 2
    assert_same_model(build_llama(GROUPED, seed=1), tmp_path / "model", [b"a"])


def test_bfloat16_is_the_rounded_weights_in_half_the_bytes(tmp_path: Path) -> None:
    made = source()

    written = export_llama(made, tmp_path / "model", ExportSettings(dtype="bfloat16"))

    theirs = loaded(tmp_path / "model").state_dict()
    assert written == 2 * sum(tensor.numel() for tensor in made.weights.values())
    assert theirs.keys() == made.weights.keys()
    assert all(torch.equal(theirs[name], tensor.bfloat16()) for name, tensor in made.weights.items())


def test_the_tokenizer_of_bytes_gives_every_byte_its_number(trained: Path, tmp_path: Path) -> None:
    """Also to text that holds the characters which byte-level vocabularies are written with."""
    from transformers import AutoTokenizer

    app(["export", str(trained), str(tmp_path / "model")], result_action="return_value")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")

    assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode())
    assert tokenizer.decode(list(TEXT.encode())) == TEXT
    codec = HuggingFaceCodec.from_json(byte_tokenizer(), "bytes")
    assert (codec.encode(TEXT), codec.vocab_size) == (list(TEXT.encode()), 256)


def test_the_tokenizer_of_a_token_file_leaves_as_it_is(tmp_path: Path) -> None:
    """Given a run on a token file, when it is exported, then its tokenizer makes the tokens of the file."""
    from transformers import AutoTokenizer

    tokenizer = small_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text(4000 * "to be or not to be\n")
    header = write_tokens([tmp_path / "text.txt"], tokenizer, tmp_path / "corpus.tokens")
    data = {"data": "tokens", "data_digest": header.digest}
    train(tmp_path / "node", node={"data_path": str(tmp_path / "corpus.tokens")}, rounds=1, **data)
    out = tmp_path / "model"

    with pytest.raises(ConfigError, match=r"the tokenizer is not kept with the weights: .* or give --tokenizer"):
        app(["export", str(tmp_path / "node" / "state"), str(out)], result_action="return_value")
    for arguments in ([str(tmp_path / "node")], [str(tmp_path / "node" / "state"), "--tokenizer", str(tokenizer)]):
        app(["export", *arguments, str(out), "--force"], result_action="return_value")
        theirs = AutoTokenizer.from_pretrained(out)
        assert theirs("not to be")["input_ids"] == open_tokenizer(tokenizer).codec.encode("not to be")
        assert theirs.eos_token == "</s>"
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == theirs.eos_token_id


def small_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(["to be or not to be"], trainers.BpeTrainer(vocab_size=40, special_tokens=["</s>"]))
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_an_export_is_replaced_only_if_asked_and_nothing_else_ever(tmp_path: Path) -> None:
    out, other = tmp_path / "model", tmp_path / "other"
    export_llama(source(), out, ExportSettings(shard_bytes=30_000))
    with pytest.raises(ConfigError, match="is already there; --force replaces it"):
        export_llama(source(), out, ExportSettings())

    export_llama(source(), out, ExportSettings(force=True))

    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is there, and no exported model: name another directory"):
        export_llama(source(), other, ExportSettings(force=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


# --- writing and evaluating ---


def say(*arguments: str) -> int:
    result = app([*arguments], result_action="return_value")
    assert isinstance(result, int)
    return result


def test_an_exported_model_writes_and_scores_as_the_one_in_the_directory(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given an export, when both are asked for text and for bits per byte, then the answers are the same."""
    out = str(tmp_path / "model")
    assert say("export", str(trained), out) == 0
    capsys.readouterr()
    said, figures = [], []
    for directory in (str(trained / "state"), out):
        assert say("generate", directory, "To be", "--max-tokens", "60", "--seed", "3") == 0
        said.append(capsys.readouterr().out)
        assert say("eval", directory, "--json", "--batches", "3", "--batch-size", "4") == 0
        figures.append(json.loads(capsys.readouterr().out))

    assert said[0] == said[1]
    assert len(said[0]) > 30
    assert (figures[0].pop("round"), figures[0].pop("run")) == (3, "short")
    assert (figures[1].pop("round"), figures[1].pop("run")) == (None, None)
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    assert figures[0]["bytes"] == figures[0]["tokens"] == 3 * 4 * 16


def test_the_commands_of_the_readme_do_what_it_says(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "node"))
    commands = block("", "prime-async export node.toml").splitlines()
    capsys.readouterr()

    assert [say(*shlex.split(command)[1:]) for command in commands] == [0, 0, 0]

    assert "bits per byte" in capsys.readouterr().out
    assert loaded(Path("model")).dtype == torch.bfloat16


def test_what_is_drawn_is_drawn_from_what_transformers_draws_from() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    chance = torch.Generator().manual_seed(2)
    for top_k, top_p, temperature in ((5, 1.0, 0.7), (0, 0.9, 1.3), (20, 0.5, 1.0), (3, 0.95, 2.0)):
        logits = 3 * torch.randn(50, generator=chance)
        theirs = TemperatureLogitsWarper(temperature)(None, logits[None])
        theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
        theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs
        ours = probabilities(logits, Sampling(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p))
        torch.testing.assert_close(ours, torch.softmax(theirs[0], dim=0))


# --- what goes wrong ---


def test_what_stops_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    """Given an export, when its replacement fails after some of it is written, then the old one is as it was."""
    out = tmp_path / "model"
    export_llama(source(), out, ExportSettings())
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    class Interrupted(Tensor):
        def to(self, *_: Any, **__: Any) -> Tensor:
            raise KeyboardInterrupt

    weights = dict(source().weights)
    weights["model.norm.weight"] = weights["model.norm.weight"].as_subclass(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_llama(source(weights=weights), out, ExportSettings(force=True))

    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_where_nothing_can_be_written_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot be written: .*; name another directory"):
        export_llama(source(), tmp_path / "file" / "model", ExportSettings())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    small = LlamaConfig(vocab_size=100, width=8, layers=1, heads=2, kv_heads=2, ffn_width=8)
    with pytest.raises(ConfigError, match="the tokenizer has 256 tokens and the model 100"):
        export_llama(source(small), tmp_path / "model", ExportSettings())


def test_a_model_of_ones_own_does_not_leave_as_a_llama() -> None:
    with pytest.raises(ConfigError, match='model = "mine:model": a model of your own, not a Llama'):
        llama_shape(RunSpec(name="x", model="mine:model"), {})


def test_a_tokenizer_that_cannot_be_known_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"of data of your own is not known here: give --tokenizer, a tokenizer\.json"
    ):
        run_tokenizer(RunSpec(name="x", data="mine:data"), None)
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        open_tokenizer(tmp_path)
