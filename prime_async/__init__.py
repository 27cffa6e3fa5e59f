"""Train one language model on computers that belong to many people, over ordinary internet links.

``prime_async.open_node(config)`` runs a node inside a trio program; the command ``prime-async`` does the same.
``prime_async.open_exchange(config, elements)`` averages tensors among friends, and nothing else;
``prime_async.open_membership(config)`` agrees with others on who is there; ``prime_async.open_checkpoint(config)`` gets
files from many of them at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prime_async.errors import PrimeAsyncError

if TYPE_CHECKING:
    from prime_async.config.load import load_config, parse_config
    from prime_async.config.schema import Config
    from prime_async.node import (
        Change,
        Friends,
        Group,
        Node,
        Shelf,
        open_checkpoint,
        open_exchange,
        open_membership,
        open_node,
    )

__all__ = [
    "Change",
    "Config",
    "Friends",
    "Group",
    "Node",
    "PrimeAsyncError",
    "Shelf",
    "load_config",
    "open_checkpoint",
    "open_exchange",
    "open_membership",
    "open_node",
    "parse_config",
]

_HOMES = {
    "Change": "prime_async.node",
    "Config": "prime_async.config.schema",
    "Friends": "prime_async.node",
    "Group": "prime_async.node",
    "Node": "prime_async.node",
    "Shelf": "prime_async.node",
    "load_config": "prime_async.config.load",
    "open_checkpoint": "prime_async.node",
    "open_exchange": "prime_async.node",
    "open_membership": "prime_async.node",
    "open_node": "prime_async.node",
    "parse_config": "prime_async.config.load",
}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: torch takes a second, and the configuration does not need it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
