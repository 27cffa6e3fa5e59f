"""Where both planes of a node put what its peers said and did, and where broken rules are counted.

* A control message becomes a :class:`Received`; one that is not valid becomes a :class:`Violation`.
* A peer with ``max_violations`` violations is shut out: nothing of it is heard again while this transport is open.
* Nothing here waits. When the channel of notices is full, a notice is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
import trio

from prime_async.errors import LocalError, ProtocolError
from prime_async.messages import MAX_CONTROL_BYTES, Message, decode, encode
from prime_async.transport.base import Denied, Notice, Reachable, Received, Traffic, Violation

MAX_NOTICES: Final = 4096
MAX_OFFENDERS: Final = 4096
UNKNOWN: Final = "unknown"
"""Who is blamed for what nobody signed, and, in the clear, once too many different names broke rules."""

log = structlog.get_logger(__name__)


class Inbox:
    """The notices of one node, its counters, and its list of offenders."""

    def __init__(self, max_violations: int, on_shut_out: Callable[[str], None]) -> None:
        self.traffic = Traffic()
        # Full: the notice is dropped and counted, see _notify.
        self._notices, self.notices = trio.open_memory_channel[Notice](MAX_NOTICES)
        self._max_violations = max_violations
        self._on_shut_out = on_shut_out

    def received(self, peer: str, frames: Sequence[memoryview]) -> None:
        """A control message of ``peer``. An empty one is what a connection opens with, and says nothing."""
        self.traffic.control_received += sum(f.nbytes for f in frames)
        if self.is_shut_out(peer) or is_announcement(frames):
            return
        try:
            if len(frames) != 1:
                raise ProtocolError(f"a control message of {len(frames)} frames instead of 1")
            message = decode_frame(frames[0], Message, MAX_CONTROL_BYTES)
        except ProtocolError as error:
            self.violated(peer, "control", str(error))
        else:
            self._notify(Received(peer, message))

    def violated(self, peer: str, plane: str, reason: str) -> None:
        """``peer`` broke the protocol."""
        counts = self.traffic.violations
        if peer not in counts and len(counts) >= MAX_OFFENDERS:
            peer = UNKNOWN
        counts[peer] = counts.get(peer, 0) + 1
        if peer == UNKNOWN and counts[peer] > self._max_violations:
            return  # counted; but nobody fills the log of a node with bytes that anybody can send
        shut_out = self.is_shut_out(peer)
        log.warning("peer_broke_protocol", peer=peer, plane=plane, reason=reason, count=counts[peer], shut_out=shut_out)
        self._notify(Violation(peer, plane, reason, counts[peer], shut_out))
        if shut_out:
            self._on_shut_out(peer)

    def denied(self, peer: str, address: str) -> None:
        """``peer`` refused our key."""
        log.warning("peer_denied_our_key", peer=peer, address=address)
        self._notify(Denied(peer, address))

    def reachable(self, peer: str, reachable: bool) -> bool:
        """Whether ``peer`` can be dialled. False: there was no room to tell it."""
        return self._notify(Reachable(peer, reachable))

    def is_shut_out(self, peer: str) -> bool:
        # "unknown" is not one peer: those it stands for are not heard in any case.
        return peer != UNKNOWN and self.traffic.violations.get(peer, 0) >= self._max_violations

    def _notify(self, notice: Notice) -> bool:
        try:
            self._notices.send_nowait(notice)
        except trio.WouldBlock:
            if isinstance(notice, Received):
                self.traffic.control_dropped += 1
            return False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the receiver, or this, is closed: the node is on its way out, and sockets are read to their end
        return True

    def close(self) -> None:
        """No more notices: who waits for one learns that the transport is closed."""
        self._notices.close()


def encode_control(message: Message) -> bytes:
    """The bytes of a control message. Raises :class:`LocalError` for one that its receiver would call a violation."""
    data = encode(message)
    if len(data) > MAX_CONTROL_BYTES:
        raise LocalError(
            f"{type(message).__name__} takes {len(data)} bytes, and a control message at most {MAX_CONTROL_BYTES}: "
            "send less in one message"
        )
    return data


def is_announcement(frames: Sequence[memoryview]) -> bool:
    """Whether this is the one empty frame with which a connection opens, so that the other side learns the route."""
    return len(frames) == 1 and frames[0].nbytes == 0


def decode_frame(frame: memoryview, kind: Any, limit: int) -> Any:
    """:func:`prime_async.messages.decode`, without a copy of what is too large anyway."""
    if frame.nbytes > limit:
        raise ProtocolError(f"{frame.nbytes} bytes where at most {limit} are allowed")
    return decode(bytes(frame), kind, limit=limit)
