"""A model from disk, for the commands that use one: of a node's directory, or in the files of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from prime_async.cli.inspect import node_directory
from prime_async.config.schema import Config, RunSpec
from prime_async.errors import ConfigError
from prime_async.huggingface import is_pretrained, open_pretrained, read_weights, views
from prime_async.ledger import Newest, read_newest
from prime_async.work.factory import build_model, model_vocabulary
from prime_async.work.llama import load_llama
from prime_async.work.sizes import llama_shape
from prime_async.work.tokenizer import Tokenizer, open_tokenizer, run_tokenizer

POSITIONS = 1024
"""Of a model that can take more than so many tokens no more are used, unless they are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model on the host, in fp32. ``run``: whose it is, after ``round`` rounds; None if it came from elsewhere.

    ``config``: of the node, if that was named. ``ends``: the tokens with which a text ends.
    """

    path: Path
    model: nn.Module
    sequence_length: int
    ends: frozenset[int]
    run: RunSpec | None = None
    round: int | None = None
    config: Config | None = None

    def tokenizer(self, given: Path | None) -> Tokenizer:
        """Its own, or the one in the file ``given``. Raises :class:`ConfigError` if it is not to be found."""
        if self.run is None:
            return open_tokenizer(given or self.path)
        return run_tokenizer(self.run, self.config.node.data_path if self.config is not None else None, given)


def load_model(path: Path) -> Loaded:
    """The model at ``path``: what ``inspect`` takes, or a directory that ``export`` made or ``transformers`` saved.

    Raises as :func:`read_newest` and :func:`open_pretrained`.
    """
    if is_pretrained(path):
        found = open_pretrained(path)
        model = load_llama(found.config, views(*read_weights(found)))
        return Loaded(path=path, model=model, sequence_length=min(found.positions, POSITIONS), ends=found.ends)
    directory, config = node_directory(path)
    newest = read_newest(directory, config)
    return Loaded(
        path=path,
        model=_model(newest, config),
        sequence_length=newest.run.sequence_length,
        ends=frozenset(),
        run=newest.run,
        round=newest.round,
        config=config,
    )


def _model(newest: Newest, config: Config | None) -> nn.Module:
    """Code of the user's own is run only if their own TOML file names it."""
    if ":" not in newest.run.model:
        return load_llama(llama_shape(newest.run, newest.weights), newest.weights)
    if config is None:
        raise ConfigError(
            [
                f'[run] model = "{newest.run.model}": code of your own is run only if your TOML file says so: name '
                "that instead of the directory"
            ]
        )
    model = build_model(newest.run, model_vocabulary(newest.run, config.node))
    for name, parameter in model.named_parameters():
        parameter.data = newest.weights[name]
    return model
