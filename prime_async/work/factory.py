"""From settings to objects: the model, the corpus and the trainer that ``[run]`` and ``[node]`` name."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn

from prime_async.config.schema import NodeSettings, RunSpec
from prime_async.errors import ConfigError
from prime_async.work.corpus import Corpus, TokenCorpus, open_shakespeare
from prime_async.work.device import Device, set_threads
from prime_async.work.inner import InnerTrainer
from prime_async.work.llama import build_llama, empty_llama
from prime_async.work.sizes import run_size
from prime_async.work.tokens import TokenFile


def build_model(run: RunSpec, vocab_size: int) -> nn.Module:
    """The model of ``[run] model``, on the host, with fresh weights that depend on the run spec alone.

    Of a run that begins with weights from elsewhere (``run.initial_digest``) they are zeros: the right ones come from
    the node's directory, or from a member.

    "package.module:factory" names a callable ``(run, vocab_size) -> torch.nn.Module`` whose forward takes tokens
    ``(B, T)`` int64 to logits ``(B, T, V)``, with fp32 parameters. All nodes must get the same initial weights from
    it: let them depend on ``run.seed`` and nothing else.

    Raises :class:`~prime_async.errors.ConfigError`; what the factory itself raises comes through.
    """
    if ":" not in run.model:
        size = run_size(run, vocab_size)
        return empty_llama(size) if run.initial_digest else build_llama(size, run.seed)
    model = load_callable("model", run.model)(run, vocab_size)
    if not isinstance(model, nn.Module):
        raise _wrong_return("model", run.model, model, "a torch.nn.Module")
    return model


def model_vocabulary(run: RunSpec, node: NodeSettings, corpus: Corpus | None = None) -> int:
    """How many tokens the model knows: ``run.vocab_size``, or as many as the data have.

    ``corpus`` is that data, if it is open already; else it is opened only where the setting does not say.
    Raises :class:`~prime_async.errors.ConfigError` if the data have more tokens than the setting says.
    """
    if run.vocab_size and corpus is None:
        return run.vocab_size
    there = (corpus or open_corpus(run, node)).vocab_size
    if 0 < run.vocab_size < there:
        raise ConfigError([f"run.vocab_size: expected at least {there}, which the data have, got {run.vocab_size}"])
    return run.vocab_size or there


def open_corpus(run: RunSpec, node: NodeSettings) -> Corpus:
    """The data of ``[run] data``.

    "package.module:factory" names a callable ``(run, node) -> Corpus``.

    Raises :class:`~prime_async.errors.ConfigError`, and :class:`~prime_async.errors.DataError` for a file that is
    not what it should be; what the factory itself raises comes through.
    """
    if run.data == "shakespeare":
        return open_shakespeare(run.seed)
    if run.data == "tokens":
        return _open_tokens(run, node)
    if ":" not in run.data:
        raise ConfigError([f'[run] data = "{run.data}": not "shakespeare", "tokens" or "package.module:factory"'])
    corpus = load_callable("data", run.data)(run, node)
    if not isinstance(corpus, Corpus):
        raise _wrong_return("data", run.data, corpus, "a prime_async.work.corpus.Corpus")
    return corpus


def open_inner_trainer(run: RunSpec, node: NodeSettings, stream: int, corpus: Corpus | None = None) -> InnerTrainer:
    """The trainer of a node, whose batches are those of ``stream``. Sets torch's threads for the whole process.

    ``corpus``: in place of the one of the settings.
    """
    set_threads(node.threads)
    device = Device.open(node.device, node.precision)
    corpus = corpus or open_corpus(run, node)
    model = build_model(run, model_vocabulary(run, node, corpus))
    return InnerTrainer(model, corpus, run, device, stream, node.micro_batch_size, compiled=node.compile)


def load_callable(setting: str, value: str) -> Callable[..., object]:
    """What ``[run] setting = "package.module:name"`` names; ``name`` may have dots.

    Raises :class:`~prime_async.errors.ConfigError`, which names the setting and what is wrong with it.
    """
    where = f'[run] {setting} = "{value}"'
    module_name, _, attribute = value.partition(":")
    if not module_name or not attribute:
        raise ConfigError([f'{where}: not of the form "package.module:factory"'])
    found: object = _import(where, module_name)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ConfigError([f'{where}: module "{module_name}" has no "{attribute}"'])
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError([f"{where}: is a {type(found).__name__}, which cannot be called"])
    return found


def _import(where: str, name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError([f'{where}: importing it failed: it needs "{error.name}", which is not here']) from error
        raise ConfigError(
            [f'{where}: there is no module "{error.name}"; install it, or put its directory on PYTHONPATH']
        ) from error
    except Exception as error:  # whatever the user's module raises
        raise ConfigError([f"{where}: importing it failed: {type(error).__name__}: {error}"]) from error


def _open_tokens(run: RunSpec, node: NodeSettings) -> TokenCorpus:
    if node.data_path is None:
        raise ConfigError(['[run] data = "tokens": set [node] data_path to a file made by `prime-async data`'])
    file = TokenFile.open(node.data_path)
    if run.data_digest not in ("", file.header.digest):
        raise ConfigError(
            [
                f"[node] data_path = {node.data_path}: its digest is {file.header.digest}, "
                f"the run's data_digest is {run.data_digest}: get the file that the run trains on"
            ]
        )
    return TokenCorpus(file.tokens, file.text, run.seed)


def _wrong_return(setting: str, value: str, got: object, wanted: str) -> ConfigError:
    return ConfigError([f'[run] {setting} = "{value}": returned a {type(got).__name__}, not {wanted}'])
