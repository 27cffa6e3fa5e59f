"""Weights to a directory that ``transformers`` loads with ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    config.json, generation_config.json             the shape, and the end token
    model.safetensors                               the weights, under the names that transformers gives them
    model-00001-of-00002.safetensors, ...           the same in several files, if they are large, and
    model.safetensors.index.json                    which is where
    tokenizer.json, tokenizer_config.json           the tokenizer

It is written beside its place, and gets its name when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, TypeAlias

import torch
from torch import Tensor

from prime_async.errors import ConfigError, StorageError
from prime_async.ledger.tensors import Entry, encode_header
from prime_async.work.codec import as_bytes
from prime_async.work.llama import LlamaConfig
from prime_async.work.tokenizer import TOKENIZER_FILE, Tokenizer

DType: TypeAlias = Literal["float32", "bfloat16"]
CONFIG_FILE: Final = "config.json"
GENERATION_FILE: Final = "generation_config.json"
WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
SHARD_BYTES: Final = 5_000_000_000
"""What the library makes of it, too: a file that most disks and mirrors take."""
_DTYPES: Final = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What leaves: a Llama of this shape. ``weights``: fp32 on the host, by name. ``about``: said in the files."""

    config: LlamaConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer
    sequence_length: int
    about: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """How it is written. ``force``: an export that has the name already is replaced."""

    dtype: DType = "float32"
    shard_bytes: int = SHARD_BYTES
    force: bool = False


def export_llama(source: Source, out: Path, settings: ExportSettings) -> int:
    """Write ``source`` to the directory ``out``. Returns the bytes of all weights.

    Needs the memory of the largest tensor beside the weights. Raises :class:`ConfigError` if ``out`` is there and may
    not be replaced, or the tokenizer has more tokens than the model, and :class:`StorageError` if it cannot be written:
    then, and if it is interrupted, what was there before is still there, and nothing else.
    """
    _check(source, out, settings)
    partial = _partial_directory(out)
    try:
        size = _write_weights(source, partial, settings)
        _write_json(partial / CONFIG_FILE, model_config(source.config, source, settings.dtype))
        ends = {"bos_token_id": None, "eos_token_id": source.tokenizer.codec.end_token}
        _write_json(partial / GENERATION_FILE, ends)
        _write_json(partial / "tokenizer_config.json", _tokenizer_config(source.tokenizer))
        with _new_file(partial / TOKENIZER_FILE) as file:
            file.write(source.tokenizer.json)
        _put_in_place(partial, out)
    except OSError as error:
        raise StorageError(
            f"{out}: cannot be written: {error.strerror or error}; make room, or name another"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return size


def model_config(config: LlamaConfig, source: Source, dtype: DType) -> dict[str, Any]:
    """The content of config.json, for transformers 4 (``rope_theta``) and 5 (``rope_parameters``)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": source.sequence_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": source.tokenizer.codec.end_token,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _check(source: Source, out: Path, settings: ExportSettings) -> None:
    tokens, there = source.tokenizer.codec.vocab_size, source.config.vocab_size
    if tokens > there:
        raise ConfigError([f"the tokenizer has {tokens} tokens and the model {there}: give the tokenizer of the run"])
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / CONFIG_FILE).is_file():
        raise ConfigError([f"{out}: is there, and no exported model: name another directory"])
    if not settings.force:
        raise ConfigError([f"{out}: is already there; --force replaces it, or name another directory"])


def _partial_directory(out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        partial.chmod(0o755)  # mkdtemp's is for secrets
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror or error}; name another directory") from error
    return partial


def _put_in_place(partial: Path, out: Path) -> None:
    """An older export goes aside first, since a directory cannot replace one that is not empty."""
    _sync(partial)
    aside = partial.with_suffix(".old")
    if out.exists():
        out.replace(aside)
    try:
        partial.replace(out)
    except OSError:
        if aside.exists():
            aside.replace(out)
        raise
    _sync(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _write_weights(source: Source, directory: Path, settings: ExportSettings) -> int:
    dtype, name = _DTYPES[settings.dtype]
    entries = [Entry(key, name, tuple(tensor.shape)) for key, tensor in source.weights.items()]
    shards = list(_shards(entries, settings.shard_bytes))
    names = _shard_names(len(shards))
    about = {"format": "pt", **source.about}
    for file_name, shard in zip(names, shards, strict=True):
        with _new_file(directory / file_name) as file:
            _write_shard(file, shard, source.weights, dtype, about)
    total = sum(entry.nbytes for entry in entries)
    if len(shards) > 1:
        places = {entry.name: file_name for file_name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(directory / INDEX_FILE, index)
    return total


def _write_shard(
    file: BinaryIO, shard: Sequence[Entry], weights: Mapping[str, Tensor], dtype: torch.dtype, about: Mapping[str, str]
) -> None:
    file.write(encode_header(shard, about))
    for entry in shard:
        file.write(as_bytes(weights[entry.name].to(dtype).contiguous().flatten().view(torch.uint8)))


def _shards(entries: Iterable[Entry], shard_bytes: int) -> Iterable[list[Entry]]:
    """In their order, as many together as fit; at least one."""
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.nbytes
    if shard:
        yield shard


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS_FILE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return config | ({"eos_token": tokenizer.end_text} if tokenizer.end_text is not None else {})


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    with _new_file(path) as file:
        file.write(json.dumps(tree, indent=2).encode() + b"\n")


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """On disk when the block is left."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """So that the names, too, survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
