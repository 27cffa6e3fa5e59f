"""A node process, whole: :func:`open_node`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prime_async.node.node import Node, open_node

__all__ = ["Node", "open_node"]


def __getattr__(name: str) -> object:
    """Import the node, and torch with it, when it is asked for: the commands that need neither start at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("prime_async.node.node"), name)
