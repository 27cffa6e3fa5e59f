"""A node process, whole: :func:`open_node`; and the average of a tensor by itself: :func:`open_exchange`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prime_async.node.changes import Change
    from prime_async.node.checkpoint import Shelf, open_checkpoint
    from prime_async.node.exchange import Friends, open_exchange
    from prime_async.node.membership import Group, open_membership
    from prime_async.node.node import Node, open_node

__all__ = [
    "Change",
    "Friends",
    "Group",
    "Node",
    "Shelf",
    "open_checkpoint",
    "open_exchange",
    "open_membership",
    "open_node",
]

_HOMES = {
    "Change": "prime_async.node.changes",
    "Friends": "prime_async.node.exchange",
    "Group": "prime_async.node.membership",
    "Node": "prime_async.node.node",
    "Shelf": "prime_async.node.checkpoint",
    "open_checkpoint": "prime_async.node.checkpoint",
    "open_exchange": "prime_async.node.exchange",
    "open_membership": "prime_async.node.membership",
    "open_node": "prime_async.node.node",
}


def __getattr__(name: str) -> object:
    """Import the node, and torch with it, when it is asked for: the commands that need neither start at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
