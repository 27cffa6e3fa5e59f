"""Every decision of a node, as pure machines: ``handle(now, event) -> effects``.

No event loop, no tensors, no sockets, no clock, no chance. :mod:`prime_async.actors` performs the effects.
"""
