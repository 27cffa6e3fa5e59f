"""Corpora and token files: what a node reads, what it never reads, and what a damaged file is told."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prime_async.errors import DataError, StorageError
from prime_async.work.corpus import ByteCodec, Corpus, Split, TokenCorpus, draw, open_shakespeare
from prime_async.work.text import PIECE_CHARACTERS
from prime_async.work.tokens import MAGIC, PAGE_BYTES, TokenFile, write_tokens

GOLDEN_DRAW = ["0x103dabdb9c8189f7", "0xb51f0817b713b2fb"]
U64 = st.integers(0, 2**64 - 1)


class Wide:
    """A tokenizer of numbers: a corpus of 0, 1, 2, ... shows where a batch was read."""

    vocab_size = 2**31
    end_token = None

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def counting(count: int, seed: int = 0) -> TokenCorpus:
    return TokenCorpus(np.arange(count, dtype=np.uint32), Wide(), seed)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shakespeare() -> TokenCorpus:
    return open_shakespeare(seed=0)


# Batches


def test_the_corpora_keep_the_protocol(shakespeare: TokenCorpus) -> None:
    assert isinstance(shakespeare, Corpus)


@settings(deadline=None)
@given(seed=st.integers(0, 2**63 - 1), stream=U64, step=U64)
def test_a_batch_is_a_pure_function_of_seed_stream_and_step(seed: int, stream: int, step: int) -> None:
    corpus, twin = counting(5000, seed), counting(5000, seed)
    twin.batch(stream ^ 1, step, 2, 10)  # what was read before does not matter
    for got, again in zip(corpus.batch(stream, step, 4, 16), twin.batch(stream, step, 4, 16), strict=True):
        assert got.shape == (4, 16)
        assert got.dtype == torch.int64
        assert torch.equal(got, again)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), U64, U64), min_size=2, max_size=2, unique=True))
def test_no_two_of_seed_stream_and_step_draw_alike(both: list[tuple[int, int, int]]) -> None:
    (one, other) = (draw(*triple, 4) for triple in both)
    assert not np.array_equal(one, other)


@settings(deadline=None)
@given(seed=st.integers(0, 2**63 - 1), stream=U64, step=U64)
def test_a_smaller_batch_is_the_beginning_of_a_larger_one(seed: int, stream: int, step: int) -> None:
    corpus = counting(5000, seed)
    assert torch.equal(corpus.batch(stream, step, 8, 16)[0][:3], corpus.batch(stream, step, 3, 16)[0])


def test_words_drawn_are_philox_of_the_random123_paper() -> None:
    """Golden values, so that no version of numpy moves a run's data unseen."""
    assert [hex(word) for word in draw(1, 2, 3, 2)] == GOLDEN_DRAW


def test_streams_read_different_sequences(shakespeare: TokenCorpus) -> None:
    batches = [shakespeare.batch(stream, step, 16, 64)[0] for stream in range(8) for step in range(4)]
    rows = {bytes(row.to(torch.uint8).numpy()) for batch in batches for row in batch}
    assert len(rows) == 8 * 4 * 16


@settings(deadline=None)
@given(
    count=st.integers(60, 3 * 2**18),
    length=st.integers(1, 200),
    seed=st.integers(0, 2**63 - 1),
    stream=U64,
    step=U64,
)
def test_training_never_reads_what_is_held_out(count: int, length: int, seed: int, stream: int, step: int) -> None:
    corpus = counting(count, seed)
    assume(corpus.split.training_starts(length + 1) and len(corpus.split.held_out_starts(length + 1)))
    inputs, targets = corpus.batch(stream, step, 4, length)
    assert torch.equal(targets, inputs + 1)
    split = corpus.split
    end = split.stretches * split.stretch
    read = torch.cat((inputs.flatten(), targets.flatten()))
    assert int(read.max()) < end
    assert int((read % split.stretch).max()) < split.stretch - split.held_out
    for inputs, targets in islice(corpus.heldout(3, length), 3):
        held = torch.cat((inputs.flatten(), targets.flatten()))
        assert int(held.max()) < end
        assert int((held % split.stretch).min()) >= split.stretch - split.held_out


@pytest.mark.parametrize("count", [100, 2**18, 5_057_280, 10**9, 10**12])
def test_first_and_last_training_places_lie_within_the_training_part(count: int) -> None:
    split = Split(count)
    window = 5
    places = split.training_starts(window)
    first, last = split.training_start(np.array([0, places - 1], dtype=np.int64), window)
    assert first == 0
    assert last + window == (split.stretches - 1) * split.stretch + split.stretch - split.held_out
    assert 0 < split.stretches * split.held_out <= 2**22


def test_held_out_batches_are_always_the_same_and_cover_each_token_once() -> None:
    corpus = counting(3 * 2**18)
    batches = list(corpus.heldout(7, 50))
    assert all(
        torch.equal(a[0], b[0]) for a, b in zip(batches, counting(3 * 2**18, seed=9).heldout(7, 50), strict=True)
    )
    assert {len(inputs) for inputs, _ in batches[:-1]} == {7}
    targets = torch.cat([targets.flatten() for _, targets in batches]).tolist()
    assert len(set(targets)) == len(targets)
    assert len(targets) > 0.95 * 3 * corpus.split.held_out


def test_a_few_held_out_batches_already_come_from_all_over_the_text() -> None:
    corpus = counting(5_057_280)
    inputs, _ = next(corpus.heldout(19, 64))
    assert (inputs[:, 0] // corpus.split.stretch).tolist() == list(range(19))


@pytest.mark.parametrize("count", [0, 1, 30])
def test_a_corpus_that_is_too_small_says_so(count: int) -> None:
    with pytest.raises(DataError, match=f"the corpus has {count} tokens: too few for one training sequence of 40"):
        counting(count).batch(0, 0, 1, 40)
    with pytest.raises(DataError, match="too few for one held-out sequence"):
        next(counting(count).heldout(1, 40))


def test_a_token_outside_the_vocabulary_is_found() -> None:
    corpus = TokenCorpus(np.full(1000, 300, dtype=np.uint16), ByteCodec(), 0)
    with pytest.raises(DataError, match="holds token 300, but its vocabulary has 256"):
        corpus.batch(0, 0, 1, 8)


# The bundled text


def test_the_bundled_text_is_what_its_provenance_says(shakespeare: TokenCorpus) -> None:
    split = shakespeare.split
    assert (split.count, split.stretches, split.stretch) == (5_057_280, 19, 266_172)
    assert split.stretches * split.held_out == 19 * 13_308
    inputs, targets = shakespeare.batch(0, 0, 2, 64)
    assert (shakespeare.decode(inputs[0].tolist()) or "")[1:] == (shakespeare.decode(targets[0].tolist()) or "")[:-1]
    assert int(inputs.max()) < 128


def test_the_bundled_text_carries_no_licence_but_shakespeare(shakespeare: TokenCorpus) -> None:
    text = bytes(shakespeare._tokens).lower()
    assert b"to be, or not to be,--that is the question" in text
    for word in (b"gutenberg", b"copyright", b"trademark", b"http", b"www."):
        assert word not in text


def test_a_damaged_bundled_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prime_async.work.corpus.SHAKESPEARE_DIGEST", "0" * 64)
    with pytest.raises(DataError, match="install prime-async again"):
        open_shakespeare(0)


@settings(deadline=None)
@given(st.text())
def test_bytes_stand_for_any_text(text: str) -> None:
    assert ByteCodec().decode(ByteCodec().encode(text)) == text


# Token files


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(["the cat sat on the mat and the hat", "naïve cats sat"] * 20, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_text_of_every_kind_comes_back(tmp_path: Path, tokenizer: Path) -> None:
    documents = ["the cat\r\nsat ☃", "on the mat\n", "naïve", "the hat"]
    (tmp_path / "a.txt").write_bytes(documents[0].encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(documents[1].encode()))
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": documents[2], "id": 1}) + "\n\n")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": documents[3]}).encode()))
    inputs = [tmp_path / name for name in ("a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.gz")]

    for chosen, end in ((None, "\0"), (tokenizer, "<|endoftext|>")):
        header = write_tokens(inputs, chosen, tmp_path / "out.tokens")
        file = TokenFile.open(tmp_path / "out.tokens")
        file.verify()
        assert file.header == header
        assert header.documents == 4
        assert header.count == len(file.tokens)
        assert file.text.decode(file.tokens.tolist()) == "".join(document + end for document in documents)
    assert header.count < len("".join(documents).encode())  # pairs were merged
    assert file.text.decode(file.text.encode("the naïve cat ☃")) == "the naïve cat ☃"


def test_a_token_file_serves_batches_without_its_tokenizer_file(tmp_path: Path, tokenizer: Path) -> None:
    text, moved = tmp_path / "a.txt", tmp_path / "moved.json"
    text.write_text("the cat sat on the mat. " * 500)
    moved.write_bytes(tokenizer.read_bytes())
    write_tokens([text], moved, tmp_path / "out.tokens")
    moved.unlink()

    file = TokenFile.open(tmp_path / "out.tokens")
    corpus = TokenCorpus(file.tokens, file.text, seed=0)

    assert isinstance(file.tokens, np.memmap)
    assert corpus.vocab_size == Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    assert "the cat sat" in (corpus.decode(corpus.batch(0, 0, 1, 30)[0][0].tolist()) or "")


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(70_000)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "w69999"}\n{"text": "w5"}')
    header = write_tokens([tmp_path / "a.jsonl"], tmp_path / "t.json", tmp_path / "out")
    assert (header.token_bytes, header.vocab_size) == (4, 70_000)
    assert TokenFile.open(tmp_path / "out").tokens.tolist() == [69_999, 5]  # it has no end token


def test_a_long_document_is_read_in_pieces_and_ends_once(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(200_000)) + "x" * (PIECE_CHARACTERS + 5)
    (tmp_path / "a.txt").write_text(text)
    progress: list[int] = []
    header = write_tokens([tmp_path / "a.txt"], None, tmp_path / "out", progress.append)
    assert header.documents == 1
    assert progress == sorted(progress)
    assert len(progress) >= 3
    assert progress[-1] == header.count == len(text) + 1
    assert bytes(TokenFile.open(tmp_path / "out").tokens.astype(np.uint8)) == text.encode() + b"\0"


def test_the_same_inputs_make_the_same_file(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    first, second = (write_tokens([tmp_path / "a.txt"], tokenizer, tmp_path / name) for name in ("one", "two"))
    assert first.digest == second.digest
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.fixture
def made(tmp_path: Path, tokenizer: Path) -> Path:
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 100)
    write_tokens([tmp_path / "a.txt"], tokenizer, tmp_path / "good.tokens")
    return tmp_path / "good.tokens"


def put(at: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda whole: whole[:at] + data + whole[at + len(data) :]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda whole: whole[:-1], "truncated"),
        (lambda whole: whole[: PAGE_BYTES + 10], "truncated"),
        (lambda whole: whole[:PAGE_BYTES], "truncated"),
        (lambda whole: whole[:100], "header is damaged"),
        (lambda whole: whole + b"x", "longer than it says"),
        (lambda whole: whole[:0], "not a token file"),
        (put(0, b"\0" * 16), "not a token file"),
        (put(8, b"\x02"), "version 2 of the format, this program reads 1"),
        (put(20, b"!"), "header is damaged"),
        (lambda whole: whole.replace(b'"token_bytes":2', b'"token_bytes":3'), "makes no sense"),
        (lambda whole: whole[:-5] + b"?" + whole[-4:], "tokenizer in it is damaged"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(made: Path, damage: Callable[[bytes], bytes], complaint: str) -> None:
    made.write_bytes(damage(made.read_bytes()))
    with pytest.raises(DataError, match=complaint) as caught:
        TokenFile.open(made)
    assert str(made) in str(caught.value)


def test_a_flipped_bit_in_the_tokens_is_found_by_reading_all(made: Path) -> None:
    whole = made.read_bytes()
    made.write_bytes(put(PAGE_BYTES + 7, bytes([whole[PAGE_BYTES + 7] ^ 1]))(whole))
    file = TokenFile.open(made)
    with pytest.raises(DataError, match="damaged"):
        file.verify()


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tokens: cannot be read: No such file"):
        TokenFile.open(tmp_path / "none.tokens")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_whatever_stops_the_writing_leaves_the_old_file_and_no_half(tmp_path: Path, stop: type[BaseException]) -> None:
    (tmp_path / "a.txt").write_text("x" * 3 * PIECE_CHARACTERS)
    (tmp_path / "out").write_bytes(b"old")

    def interrupt(tokens: int) -> None:
        if tokens > PIECE_CHARACTERS:
            raise stop

    with pytest.raises(stop):
        write_tokens([tmp_path / "a.txt"], None, tmp_path / "out", interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]
    assert (tmp_path / "out").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"ok \xff\xfe", "not UTF-8"),
        ("a.txt", b"", "hold no text"),
        ("a.parquet", b"x", r"not \.txt, \.jsonl"),
        ("a.gz", b"x", r"not \.txt, \.jsonl"),
        ("a.txt.gz", b"plain", "not gzip"),
        ("a.txt.gz", gzip.compress(b"hello" * 1000, mtime=0)[:-10], "damaged"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b'{"content": "x"}', 'line 1: not an object with a string under "text"'),
        ("a.jsonl", b"[1]", "line 1: not an object"),
    ],
)
def test_a_bad_input_is_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        write_tokens([tmp_path / name], None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_missing_input_and_a_wrong_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        write_tokens([tmp_path / "none.txt"], None, tmp_path / "out")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt: not a tokenizer"):
        write_tokens([tmp_path / "a.txt"], tmp_path / "a.txt", tmp_path / "out")


def test_an_output_that_cannot_be_written_is_the_environments_fault(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        write_tokens([tmp_path / "a.txt"], None, tmp_path / "absent" / "out")


def test_the_header_can_be_read_without_this_program(made: Path) -> None:
    page = made.read_bytes()[:PAGE_BYTES]
    assert page.startswith(MAGIC)
    size = int.from_bytes(page[12:16], "little")
    assert json.loads(page[16 : 16 + size])["token_bytes"] == 2
    assert not any(page[16 + size :])
