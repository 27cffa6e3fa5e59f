"""``prime-async import``: found a run that begins with the weights of an existing model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from prime_async.cli.init import configuration, refuse_to_overwrite, write_node
from prime_async.config.schema import Config, RunSpec
from prime_async.config.spec import flatten, run_id
from prime_async.errors import ConfigError

if TYPE_CHECKING:
    from prime_async.work.llama import LlamaConfig
    from prime_async.work.witness import OuterWorkload


def import_(
    pretrained: Path,
    directory: Path = Path(),
    /,
    *,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
) -> int:
    """Found a run that begins with an existing Llama: write node.toml, a key, and the weights as its first state.

    The settings name the shape of the model and the digest of its weights, so all nodes begin with the same ones: who
    joins fetches them from a member.

    Parameters
    ----------
    pretrained
        A directory with config.json and safetensors, as `transformers` saves a Llama.
    directory
        Where to write; made if it is not there. Nothing that is there is overwritten.
    set_
        A setting other than its default, as TOML: run.name="mine" or node.data_path="corpus.tokens". Can be repeated.
    """
    from prime_async.huggingface import open_pretrained, read_weights
    from prime_async.ledger import Ledger
    from prime_async.ledger.ledger import in_threads
    from prime_async.work.sizes import BYTES
    from prime_async.work.witness import outer_workload

    found = open_pretrained(pretrained)
    config = configuration((), set_, run=_shape(found.config))
    _check(config, found.config)
    refuse_to_overwrite(directory)
    place = directory / config.node.directory
    _refuse_a_ledger(place)
    workload = outer_workload(config.run, *read_weights(found))
    config = _with_digest(config, workload)
    run = config.run
    job = Ledger(place, run_id(run), flatten(run), workload, run.exchange.chunk_elements).begin_snapshot(None)
    in_threads(job.before_change, range(workload.chunk_count))
    job.finish()
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    say(f"The run begins with the {workload.elements:,} parameters of {pretrained}, in {place}.")
    if run.data == "shakespeare" and found.config.vocab_size > BYTES:
        say(
            f"It trains on data of other tokens than this model's own. For those, `prime-async data TEXT --tokenizer "
            f"{pretrained / 'tokenizer.json'}`, and then import anew with the settings that it prints, each as --set."
        )
    write_node(directory, config)
    return 0


def _shape(config: LlamaConfig) -> dict[str, Any]:
    """The settings of a run of such a model."""
    return {
        "model": "llama",
        "vocab_size": config.vocab_size,
        "llama": {
            "width": config.width,
            "layers": config.layers,
            "heads": config.heads,
            "kv_heads": config.kv_heads,
            "ffn_width": config.ffn_width,
            "rope_theta": config.rope_theta,
            "norm_eps": config.norm_eps,
            "tied_embeddings": config.tied_embeddings,
        },
    }


def _check(config: Config, found: LlamaConfig) -> None:
    """What is set must not make it another model."""
    from prime_async.work.sizes import run_size

    run = config.run
    if run.model != "llama" or run_size(run, run.vocab_size) != found or run.initial_digest:
        raise ConfigError(
            ["--set: run.model, run.llama, run.vocab_size and run.initial_digest follow from the model: leave them out"]
        )


def _refuse_a_ledger(place: Path) -> None:
    from prime_async.ledger import inspect_directory

    if not inspect_directory(place, verify=False).is_empty:
        raise ConfigError([f"{place}: holds the state of a run already: choose another node.directory"])


def _with_digest(config: Config, workload: OuterWorkload) -> Config:
    digest = workload.state_digest().hex()
    run = RunSpec.model_validate({**config.run.model_dump(), "initial_digest": digest})
    return config.model_copy(update={"run": run})
