"""``prime-async data``: text to a token file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from prime_async.errors import ConfigError


def data(
    *inputs: Path,
    tokenizer: Annotated[Path | None, Parameter(negative="")] = None,
    out: Path = Path("corpus.tokens"),
) -> int:
    """Make a memory-mapped token file of text files, for `data = "tokens"`.

    Parameters
    ----------
    inputs
        Text (.txt), JSON lines with a "text" key (.jsonl), or either compressed (.gz).
    tokenizer
        A Hugging Face tokenizer file (tokenizer.json). Without it, every byte is a token.
    out
        The token file to write.
    """
    from prime_async.work.tokens import write_tokens

    if not inputs:
        raise ConfigError(["prime-async data: name at least one text file, for example `prime-async data book.txt`"])
    header = write_tokens(inputs, tokenizer, out)
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    say(f"Wrote {out}: {header.count} tokens of {header.documents} documents, vocabulary {header.vocab_size}.")
    say("In node.toml, the same on all nodes:\n")
    say(f'  [run]\n  data = "tokens"\n  data_digest = "{header.digest}"\n\n  [node]\n  data_path = "{out}"')
    return 0
