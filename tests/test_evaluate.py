"""Bits per byte: of the held-out part, of the newest weights, and of the bytes that its tokens really are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prime_async.cli import app
from prime_async.errors import ConfigError
from prime_async.work.corpus import ByteCodec, TokenCorpus, open_shakespeare, shakespeare
from prime_async.work.device import Device
from prime_async.work.evaluate import Amount, evaluate
from prime_async.work.llama import LlamaConfig, build_llama
from prime_async.work.tokenizer import shakespeare_in
from prime_async.work.tokens import HuggingFaceCodec, write_tokens
from tests.trained_node import train

CPU = Device.open("cpu")
TINY = LlamaConfig(vocab_size=300, width=16, layers=1, heads=2, kv_heads=1, ffn_width=16, init_std=0.3)
SAMPLE = "to be or not to be, né ☃🙂 that is the question\n"


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["</s>"], initial_alphabet=alphabet)
    made.train_from_iterator([SAMPLE], trainer)
    made.add_tokens(["<né>"])
    return made


def sentence_pieces() -> Tokenizer:
    """As Llama 2's: words begin with a mark, and what is unknown is written in bytes."""
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    pieces += [("▁to", -1.0), ("▁be", -1.0), ("▁", -3.0), *((letter, -4.0) for letter in "abcdeinoqrstuh,")]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def codec(made: Tokenizer) -> HuggingFaceCodec:
    return HuggingFaceCodec.from_json(made.to_str().encode(), "test")


BYTE_LEVEL, SENTENCE_PIECES = codec(byte_level()), codec(sentence_pieces())


@given(text=st.text(max_size=30), cut=st.integers(0, 40))
def test_the_bytes_of_byte_level_tokens_add_up_wherever_they_are_cut(text: str, cut: int) -> None:
    tokens = [0, *BYTE_LEVEL.encode(f"{text}<né>")]
    cut = min(cut, len(tokens) - 1)
    parts = BYTE_LEVEL.text_bytes(tokens[: cut + 1]) + BYTE_LEVEL.text_bytes(tokens[cut:])
    assert parts == BYTE_LEVEL.text_bytes(tokens) == len(f"{text}<né>".encode())


def test_the_bytes_of_other_tokens_are_those_of_their_text() -> None:
    tokens = SENTENCE_PIECES.encode("to be " + SAMPLE)
    assert SENTENCE_PIECES.text_bytes(tokens) == len(("to be " + SAMPLE).encode()) - len("to")


def test_what_ends_a_document_is_no_text() -> None:
    end = BYTE_LEVEL.end_token
    assert end is not None
    assert BYTE_LEVEL.text_bytes([*BYTE_LEVEL.encode("xab"), end, *BYTE_LEVEL.encode("cd"), end]) == 4
    assert ByteCodec().text_bytes(list(b"xab\0cd\0")) == 4


def test_the_loss_is_that_of_every_token_by_itself() -> None:
    """Given a corpus of two kinds of tokens, when it is evaluated, then sums by hand give the same."""
    model = build_llama(TINY, seed=3)
    tokens = np.array(BYTE_LEVEL.encode(40 * SAMPLE), dtype=np.uint16)
    corpus = TokenCorpus(tokens, BYTE_LEVEL, 0)

    found = evaluate(model, corpus, CPU, Amount(batches=None, batch_size=3, sequence_length=7))

    nats, count, size = 0.0, 0, 0
    for inputs, targets in corpus.heldout(1, 7):
        with torch.no_grad():
            chances = torch.log_softmax(model(inputs)[0], dim=1)
        nats -= float(chances[range(7), targets[0]].sum())
        count += 7
        size += BYTE_LEVEL.text_bytes([int(inputs[0, 0]), *targets[0].tolist()])
    assert (found.tokens, found.text_bytes) == (count, size)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert count < size  # else the test would not tell tokens from bytes


def test_the_bundled_text_is_the_same_in_any_tokens() -> None:
    inputs, targets = next(shakespeare_in(ByteCodec()).heldout(4, 32))
    expected_inputs, expected_targets = next(open_shakespeare(0).heldout(4, 32))
    assert torch.equal(inputs, expected_inputs)
    assert torch.equal(targets, expected_targets)
    assert len(shakespeare()) > 5_000_000


def test_the_command_gives_the_loss_that_the_run_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given a run on a token file, when its directory is evaluated, then the loss is the last one that it logged."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(2000 * SAMPLE)
    write_tokens([tmp_path / "text.txt"], tmp_path / "tokenizer.json", tmp_path / "corpus.tokens")
    reported = train(tmp_path / "node", node={"data_path": str(tmp_path / "corpus.tokens")}, rounds=1, data="tokens")
    capsys.readouterr()
    for place in (["node"], ["node/state", "--data", str(tmp_path / "corpus.tokens")]):
        assert app(["eval", str(tmp_path / place[0]), *place[1:], "--json"], result_action="return_value") == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["nats_per_token"] == pytest.approx(reported, rel=1e-6)
        bytes_per_token = figures["bytes"] / figures["tokens"]
        assert figures["bits_per_byte"] == pytest.approx(reported / math.log(2) / bytes_per_token, rel=1e-6)
        assert bytes_per_token == pytest.approx(len(SAMPLE.encode()) / len(BYTE_LEVEL.encode(SAMPLE)), rel=0.02)

    with pytest.raises(ConfigError, match=r"name the node's TOML file, whose data_path leads to them, or give --data"):
        app(["eval", str(tmp_path / "node" / "state")], result_action="return_value")
    with pytest.raises(ConfigError, match="--batches -1: expected 0 or more"):
        app(["eval", str(tmp_path / "node"), "--batches", "-1"], result_action="return_value")


def test_code_of_ones_own_is_run_only_if_the_own_file_names_it(tmp_path: Path) -> None:
    """Given a directory whose run names code, when it is named without the TOML file, then the code is not run."""
    train(tmp_path / "node", model="tests.own_model:build", rounds=1)
    for command in (["generate"], ["eval"]):
        with pytest.raises(ConfigError, match="code of your own is run only if your TOML file says so"):
            app([*command, str(tmp_path / "node" / "state")], result_action="return_value")
        assert app([*command, str(tmp_path / "node")], result_action="return_value") == 0


def test_data_with_tokens_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(2000 * SAMPLE)
    write_tokens([tmp_path / "text.txt"], tmp_path / "tokenizer.json", tmp_path / "corpus.tokens")
    train(tmp_path / "node", rounds=1)
    with pytest.raises(ConfigError, match="--data: has 291 tokens, the model knows 256"):
        app(["eval", str(tmp_path / "node"), "--data", str(tmp_path / "corpus.tokens")], result_action="return_value")
