"""``prime-async generate``: what a model writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from prime_async.cli.logs import configure_logging


def generate(
    directory: Path,
    prompt: str = "",
    /,
    *,
    max_tokens: Annotated[int, Parameter(negative="")] = 200,
    temperature: Annotated[float, Parameter(negative="")] = 0.8,
    top_k: Annotated[int, Parameter(negative="")] = 0,
    top_p: Annotated[float, Parameter(negative="")] = 1.0,
    seed: Annotated[int, Parameter(negative="")] = 0,
    tokenizer: Annotated[Path | None, Parameter(negative="")] = None,
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
) -> int:
    """Let a model write on after a prompt, on stdout, as the text comes.

    It stops at the end of a text, if the model says so. The prompt is not repeated.

    Parameters
    ----------
    directory
        A node's `node.directory`, its TOML file, or the folder that `node.toml` is in: the newest model that is there;
        or a directory that `prime-async export` made, or another Llama that `transformers` saved.
    prompt
        What the text begins with. Without: the beginning of a line.
    max_tokens
        So many tokens at most.
    temperature
        Lower is more predictable; 0 takes the likeliest token each time.
    top_k
        Draw from the so many likeliest tokens alone; 0: from all.
    top_p
        Draw from the fewest likeliest tokens that together have this probability; 1: from all.
    seed
        Of what is drawn.
    tokenizer
        A token file or a tokenizer.json, if the directory does not lead to the tokenizer of the run.
    device
        "auto", "cpu", "cuda" or "cuda:N".
    precision
        What is computed with; auto: bfloat16 where the device has it.
    """
    from prime_async.cli.model import load_model
    from prime_async.work.device import Device, set_threads
    from prime_async.work.generate import Sampling
    from prime_async.work.generate import generate as write

    configure_logging("console", "warning")
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    where = Device.open(device, precision)
    set_threads(0)
    loaded = load_model(directory)
    text = loaded.tokenizer(tokenizer).codec
    ends = loaded.ends | ({text.end_token} if text.end_token is not None else set())
    model = loaded.model.to(where.torch_device)
    for piece in write(model, text, prompt, sampling, ends=ends, device=where):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
