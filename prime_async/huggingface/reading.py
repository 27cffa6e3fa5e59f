"""A Llama out of the files that ``transformers`` writes: the shape, fp32 weights, the tokenizer.

Nothing in those files is run: weights are read from safetensors alone, and a shape is a few numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from prime_async.errors import ConfigError, DataError
from prime_async.huggingface.export import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, WEIGHTS_FILE
from prime_async.work.inner import Span
from prime_async.work.llama import Llama, LlamaConfig
from prime_async.work.text import read_whole

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
IGNORED: Final = ("rotary_emb.inv_freq",)
"""Endings of names that old files have, and that follow from the shape."""


class HuggingFaceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is used of config.json, with the defaults of transformers' ``LlamaConfig``; the rest is ignored."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_id: int | list[int] | None = None


class _Generation(msgspec.Struct, frozen=True, kw_only=True):
    eos_token_id: int | list[int] | None = None


class _Index(msgspec.Struct, frozen=True, kw_only=True):
    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """A directory that holds a Llama. ``ends``: the tokens with which a text ends; ``positions``: of the longest."""

    directory: Path
    config: LlamaConfig
    ends: frozenset[int]
    positions: int


def is_pretrained(directory: Path) -> bool:
    """Whether it is of this format, as far as its name for the shape says."""
    return (directory / CONFIG_FILE).is_file()


def open_pretrained(directory: Path) -> Pretrained:
    """Read the shape in ``directory``, and no weights yet.

    Raises :class:`ConfigError`, which lists all that is in the way, if it is not of a model that we have.
    """
    path = directory / CONFIG_FILE
    found = _json(path, HuggingFaceConfig)
    problems = [f"{path}: {text}" for text in _problems(found)]
    if problems:
        raise ConfigError(problems)
    config = LlamaConfig(
        vocab_size=found.vocab_size,
        width=found.hidden_size,
        layers=found.num_hidden_layers,
        heads=found.num_attention_heads,
        kv_heads=found.num_key_value_heads or found.num_attention_heads,
        ffn_width=found.intermediate_size,
        rope_theta=_theta(found),
        tied_embeddings=found.tie_word_embeddings,
        norm_eps=found.rms_norm_eps,
    )
    generation = directory / GENERATION_FILE
    ends = _json(generation, _Generation).eos_token_id if generation.is_file() else None
    return Pretrained(
        directory=directory,
        config=config,
        ends=_tokens(found.eos_token_id) | _tokens(ends),
        positions=found.max_position_embeddings,
    )


def read_weights(pretrained: Pretrained) -> tuple[Tensor, list[Span]]:
    """All weights, (n,) fp32 on the host, in the order of the parameters' sorted names, and where each lies.

    One tensor at a time, so that there is no second copy. Raises :class:`DataError` if they are not those of the shape.
    """
    spans = llama_spans(pretrained.config)
    theta = torch.empty(spans[-1].stop)
    missing = {span.name: span for span in spans}
    for name, tensor in _tensors(pretrained.directory):
        if name.endswith(IGNORED) or (name == "lm_head.weight" and pretrained.config.tied_embeddings):
            continue
        span = missing.pop(name, None)
        _check(pretrained.directory, name, tensor, span)
        assert span is not None
        theta[span.start : span.stop].view(span.shape).copy_(tensor)
    if missing:
        raise DataError(f"{pretrained.directory}: {_some(sorted(missing))} missing: the files are not whole")
    return theta, spans


def llama_spans(config: LlamaConfig) -> list[Span]:
    """Where each parameter lies in the vector of all, sorted by name. Takes no memory."""
    with torch.device("meta"):
        model = Llama(config)
    spans: list[Span] = []
    start = 0
    for name, parameter in sorted(model.named_parameters()):
        spans.append(Span(name, start, start + parameter.numel(), tuple(parameter.shape)))
        start = spans[-1].stop
    return spans


def views(theta: Tensor, spans: Sequence[Span]) -> dict[str, Tensor]:
    """The parameters in ``theta`` ``(n,)`` by name; no copies."""
    return {span.name: theta[span.start : span.stop].view(span.shape) for span in spans}


def _problems(found: HuggingFaceConfig) -> Iterator[str]:
    """Why it is none of our Llamas."""
    if found.model_type != "llama":
        yield f'model_type is "{found.model_type}": only "llama" can be taken over'
    if found.hidden_act != "silu":
        yield f'hidden_act is "{found.hidden_act}": expected "silu"'
    if found.attention_bias or found.mlp_bias:
        yield "attention_bias or mlp_bias is true: expected matrices without biases"
    numbers = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    wrong = [name for name in numbers if getattr(found, name) < 1]
    yield from (f"{name} is {getattr(found, name)}: expected at least 1" for name in wrong)
    if not wrong and found.head_dim not in (None, found.hidden_size // found.num_attention_heads):
        yield f"head_dim is {found.head_dim}: expected hidden_size / num_attention_heads"
    kind = _rope(found).get("rope_type", _rope(found).get("type", "default"))
    if kind != "default":
        yield f'rope_scaling is of type "{kind}": expected none'


def _rope(found: HuggingFaceConfig) -> Mapping[str, Any]:
    """That of transformers 5, or of 4."""
    return found.rope_parameters or found.rope_scaling or {}


def _theta(found: HuggingFaceConfig) -> float:
    return float(_rope(found).get("rope_theta", found.rope_theta or 10_000.0))


def _tokens(ids: int | list[int] | None) -> frozenset[int]:
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    for path in _files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: cannot be read as safetensors: {error}; get the file again") from error


def _files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    index = directory / INDEX_FILE
    if not index.is_file():
        raise DataError(
            f"{directory}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}: save the model as safetensors "
            "(files of another format can run code when they are read)"
        )
    names = sorted(set(_json(index, _Index).weight_map.values()))
    if any(Path(name).name != name for name in names):
        raise DataError(f"{index}: names a file in another directory: get the file again")
    return [directory / name for name in names]


def _check(directory: Path, name: str, tensor: Tensor, span: Span | None) -> None:
    if span is None:
        raise DataError(f"{directory}: {name} is no parameter of the model that {CONFIG_FILE} tells of, or there twice")
    if tuple(tensor.shape) != span.shape:
        raise DataError(f"{directory}: {name} has shape {tuple(tensor.shape)}, {CONFIG_FILE} says {span.shape}")
    if tensor.dtype not in FLOATS:
        raise DataError(f"{directory}: {name} is {tensor.dtype}: expected one of float32, bfloat16, float16")
    if not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        raise DataError(f"{directory}: {name} has NaN or infinity in it: take another checkpoint")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


def _json(path: Path, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(read_whole(path), type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DataError(f"{path}: not of the form that transformers writes: {error}") from error
