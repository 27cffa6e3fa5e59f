"""Which of the peers that we dial can be reached.

* A peer is told of as reachable once, when every connection that was asked for stands.
* It is told of as not reachable once, when its connections have not stood for some seconds, ``unreachable_s``, since
  they were dialled or lost. What is lost and made again in less time is nobody's concern.
* A peer that is dialled at other addresses, or for bulk as well, is judged anew, and told of again.
* What the receiver has no room for is told later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio

UNREACHABLE_S: Final = 5.0
"""Half of the default failure timeout; time for two attempts to connect."""

Tell: TypeAlias = Callable[[str, bool], bool]
"""Takes (peer, whether it is reachable), and says whether there was room for it."""


@dataclass(slots=True, eq=False)
class _Judged:
    up: bool = False
    lost: bool = False  # down for so long that nobody waits any more
    told: bool | None = None
    pending: trio.CancelScope | None = None


class Reach:
    """The peers that one node dials. Its tasks run in ``nursery``, one for each peer whose state is not told yet."""

    def __init__(self, nursery: trio.Nursery, tell: Tell, unreachable_s: float) -> None:
        self._nursery = nursery
        self._tell = tell
        self._unreachable_s = unreachable_s
        self._peers: dict[str, _Judged] = {}

    def dialled(self, peer: str) -> None:
        """New connections to ``peer`` are being made."""
        self.hung_up(peer)
        judged = self._peers[peer] = _Judged()
        self._wait(peer, judged)

    def hung_up(self, peer: str) -> None:
        """``peer`` is not dialled any more, and nothing is told of it."""
        judged = self._peers.pop(peer, None)
        if judged is not None:
            self._settle(judged)

    def changed(self, peer: str, up: bool) -> None:
        """Whether all connections to ``peer`` stand, as of now."""
        judged = self._peers.get(peer)
        if judged is None or judged.up == up:
            return
        judged.up = up
        self._settle(judged)
        if up:
            judged.lost = False
            self._say(peer, judged)
        else:
            self._wait(peer, judged)

    def is_lost(self, peer: str) -> bool:
        """Whether ``peer`` was dialled and has not been reachable for ``unreachable_s``."""
        judged = self._peers.get(peer)
        return judged is not None and judged.lost

    def _say(self, peer: str, judged: _Judged) -> None:
        if judged.told != judged.up and self._tell(peer, judged.up):
            judged.told = judged.up
        if judged.told != judged.up:
            self._wait(peer, judged)

    def _wait(self, peer: str, judged: _Judged) -> None:
        judged.pending = trio.CancelScope()
        self._nursery.start_soon(self._judge, peer, judged, judged.pending)

    def _settle(self, judged: _Judged) -> None:
        if judged.pending is not None:
            judged.pending.cancel()
            judged.pending = None

    async def _judge(self, peer: str, judged: _Judged, pending: trio.CancelScope) -> None:
        with pending:
            await trio.sleep(self._unreachable_s)
            judged.pending = None
            judged.lost = not judged.up
            self._say(peer, judged)
