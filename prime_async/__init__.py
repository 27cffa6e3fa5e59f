"""Train one language model on computers that belong to many people, over ordinary internet links.

``prime_async.open_node(config)`` runs a node inside a trio program; the command ``prime-async`` does the same.
``prime_async.open_exchange(config, elements)`` averages tensors among friends, and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prime_async.errors import PrimeAsyncError

if TYPE_CHECKING:
    from prime_async.config.load import load_config, parse_config
    from prime_async.config.schema import Config
    from prime_async.node import Friends, Node, open_exchange, open_node

__all__ = [
    "Config",
    "Friends",
    "Node",
    "PrimeAsyncError",
    "load_config",
    "open_exchange",
    "open_node",
    "parse_config",
]

_HOMES = {
    "Config": "prime_async.config.schema",
    "Friends": "prime_async.node",
    "Node": "prime_async.node",
    "load_config": "prime_async.config.load",
    "open_exchange": "prime_async.node",
    "open_node": "prime_async.node",
    "parse_config": "prime_async.config.load",
}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: torch takes a second, and the configuration does not need it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
