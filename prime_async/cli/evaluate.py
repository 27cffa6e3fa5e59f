"""``prime-async eval``: how well a model knows text that it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from prime_async.cli.logs import configure_logging
from prime_async.cli.options import Json
from prime_async.errors import ConfigError

if TYPE_CHECKING:
    from prime_async.cli.model import Loaded
    from prime_async.work.corpus import Corpus
    from prime_async.work.evaluate import HeldOut

BATCH_SIZE = 16


def evaluate(
    directory: Path,
    /,
    *,
    data: Annotated[Path | None, Parameter(negative="")] = None,
    batches: Annotated[int, Parameter(negative="")] = 32,
    batch_size: Annotated[int, Parameter(negative="")] = 0,
    sequence_length: Annotated[int, Parameter(negative="")] = 0,
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    json_: Json = False,
) -> int:
    """Say how many bits a model needs for each byte of held-out text, and how many nats for each token.

    The text is the held-out part of the data that the run trains on, or of another token file. Bits per byte can be
    compared between models with other tokenizers; nats per token cannot.

    Parameters
    ----------
    directory
        A node's `node.directory`, its TOML file, or the folder that `node.toml` is in: the newest model that is there;
        or a directory that `prime-async export` made, or another Llama that `transformers` saved.
    data
        A token file. Without: that of the run; for a directory of Hugging Face's format the bundled text.
    batches
        So many batches; 0: all that is held out.
    batch_size
        Sequences in each; 0: as many as in training.
    sequence_length
        Tokens in each; 0: as many as in training, or as the model takes, up to 1024.
    device
        "auto", "cpu", "cuda" or "cuda:N".
    precision
        What is computed with; auto: bfloat16 where the device has it.
    """
    from prime_async.cli.model import load_model
    from prime_async.work.device import Device, set_threads
    from prime_async.work.evaluate import Amount
    from prime_async.work.evaluate import evaluate as measure
    from prime_async.work.llama import Llama

    _check(batches=batches, batch_size=batch_size, sequence_length=sequence_length)
    configure_logging("console", "warning")
    where = Device.open(device, precision)
    set_threads(0)
    loaded = load_model(directory)
    corpus = _corpus(loaded, data)
    known = loaded.model.config.vocab_size if isinstance(loaded.model, Llama) else corpus.vocab_size
    if corpus.vocab_size > known:
        raise ConfigError([f"--data: has {corpus.vocab_size} tokens, the model knows {known}: give data of its own"])
    size = batch_size or (loaded.run.inner.batch_size if loaded.run is not None else BATCH_SIZE)
    length = sequence_length or loaded.sequence_length
    amount = Amount(batches=batches or None, batch_size=size, sequence_length=length)
    found = measure(loaded.model.to(where.torch_device), corpus, where, amount)
    Console(stderr=json_, soft_wrap=True, highlight=False, markup=False).print(_text(loaded, found))
    if json_:
        print(json.dumps(_figures(loaded, found)))
    return 0


def _check(**counts: int) -> None:
    wrong = [f"--{name.replace('_', '-')} {count}: expected 0 or more" for name, count in counts.items() if count < 0]
    if wrong:
        raise ConfigError(wrong)


def _corpus(loaded: Loaded, data: Path | None) -> Corpus:
    """What to read. Raises :class:`ConfigError` if it is not known."""
    from prime_async.config.schema import NodeSettings
    from prime_async.work.corpus import TokenCorpus
    from prime_async.work.factory import open_corpus
    from prime_async.work.tokenizer import shakespeare_in
    from prime_async.work.tokens import TokenFile

    if data is not None:
        file = TokenFile.open(data)
        return TokenCorpus(file.tokens, file.text, seed=0)
    if loaded.run is None:
        return shakespeare_in(loaded.tokenizer(None).codec)
    if ":" in loaded.run.data and loaded.config is None:
        raise ConfigError(
            [
                f'[run] data = "{loaded.run.data}": code of your own is run only if your TOML file says so: name that '
                "instead of the directory, or give --data, a token file"
            ]
        )
    if loaded.run.data == "tokens" and loaded.config is None:
        raise ConfigError(
            ['[run] data = "tokens": name the node\'s TOML file, whose data_path leads to them, or give --data']
        )
    return open_corpus(loaded.run, loaded.config.node if loaded.config is not None else NodeSettings())


def _text(loaded: Loaded, found: HeldOut) -> str:
    whose = f"run {loaded.run.name} after {loaded.round} rounds" if loaded.run is not None else str(loaded.path)
    bits = "" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f} bits per byte, "
    of = "" if found.text_bytes is None else f", {found.text_bytes:,} bytes of text"
    return f"{whose}: {bits}{found.nats_per_token:.4f} nats per token ({found.tokens:,} tokens{of})"


def _figures(loaded: Loaded, found: HeldOut) -> dict[str, Any]:
    return {
        "run": loaded.run.name if loaded.run is not None else None,
        "round": loaded.round,
        "bits_per_byte": found.bits_per_byte,
        "nats_per_token": found.nats_per_token,
        "tokens": found.tokens,
        "bytes": found.text_bytes,
    }
