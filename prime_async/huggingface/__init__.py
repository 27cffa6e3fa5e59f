"""A Llama in the files that Hugging Face transformers reads and writes: config, weights, tokenizer.

transformers itself is not needed for it.
"""

from __future__ import annotations

from prime_async.huggingface.export import ExportSettings, Source, export_llama
from prime_async.huggingface.reading import Pretrained, is_pretrained, open_pretrained, read_weights, views

__all__ = [
    "ExportSettings",
    "Pretrained",
    "Source",
    "export_llama",
    "is_pretrained",
    "open_pretrained",
    "read_weights",
    "views",
]
