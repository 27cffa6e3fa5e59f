"""prime-async in an asyncio program: the same entry points as in a trio program, with the same behaviour.

trio runs as a guest of asyncio's loop, in the same thread; see :mod:`prime_async.guest.side`. Tested with asyncio's own
loop on Linux; uvloop and Windows are not tested.
"""

from prime_async.guest.checkpoint import GuestShelf, open_checkpoint
from prime_async.guest.exchange import GuestFriends, open_exchange
from prime_async.guest.membership import GuestGroup, open_membership
from prime_async.guest.node import GuestNode, open_node
from prime_async.guest.participant import GuestEvents
from prime_async.guest.stream import GuestStream

__all__ = [
    "GuestEvents",
    "GuestFriends",
    "GuestGroup",
    "GuestNode",
    "GuestShelf",
    "GuestStream",
    "open_checkpoint",
    "open_exchange",
    "open_membership",
    "open_node",
]
