"""``prime-async export``: the newest model of a node, in the format of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from prime_async.cli.inspect import node_directory
from prime_async.cli.logs import configure_logging
from prime_async.cli.options import Flag
from prime_async.errors import ConfigError
from prime_async.watch.words import size


def export(
    directory: Path,
    out: Path,
    /,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tokenizer: Annotated[Path | None, Parameter(negative="")] = None,
    shard_mb: Annotated[int, Parameter(negative="")] = 5000,
    force: Flag = False,
) -> int:
    """Write the newest model that a node has on disk as a Hugging Face Llama: config, safetensors and tokenizer.

    Of the newest snapshot, with all means that were committed since. Changes nothing in the node's directory, and may
    be called while the node runs.

    Parameters
    ----------
    directory
        The node's `node.directory`, its TOML file, or the folder that `node.toml` is in.
    out
        The directory to write. It must not be there, or be empty.
    dtype
        Of the weights. The run's are float32; bfloat16 takes half as much.
    tokenizer
        A token file or a tokenizer.json, if the directory does not lead to the tokenizer of the run.
    shard_mb
        Weights of more than so many million bytes are divided into several files.
    force
        Replace an export that is there.
    """
    from prime_async.huggingface import ExportSettings, Source, export_llama
    from prime_async.ledger import read_newest
    from prime_async.work.sizes import llama_shape
    from prime_async.work.tokenizer import run_tokenizer

    if shard_mb < 1:
        raise ConfigError([f"--shard-mb {shard_mb}: expected at least 1"])
    configure_logging("console", "warning")
    place, config = node_directory(directory)
    newest = read_newest(place, config)
    run = newest.run
    shape = llama_shape(run, newest.weights)
    text = run_tokenizer(run, config.node.data_path if config is not None else None, tokenizer)
    about = {"run": run.name, "run_id": newest.run_id.hex(), "round": str(newest.round)}
    source = Source(
        config=shape,
        weights=newest.weights,
        tokenizer=text,
        sequence_length=run.sequence_length,
        about={**about, "state_digest": newest.digest.hex()},
    )
    written = export_llama(source, out, ExportSettings(dtype=dtype, shard_bytes=shard_mb * 10**6, force=force))
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    parameters = sum(tensor.numel() for tensor in newest.weights.values())
    say(f"Wrote {out}: run {run.name} after {newest.round} rounds, state digest {newest.digest.hex()},")
    say(f"{parameters:,} parameters, {size(written)} in {dtype}.")
    return 0
