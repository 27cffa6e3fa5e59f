"""A Llama in the files that Hugging Face transformers reads and writes: config, weights, tokenizer.

transformers itself is not needed for it.
"""

from __future__ import annotations

from prime_async.huggingface.export import ExportSettings, Source, export_llama

__all__ = ["ExportSettings", "Source", "export_llama"]
