"""What a program is told of the members of its group: one change after the other, however slowly it reads."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from prime_async.messages import Member, View


@dataclass(frozen=True, slots=True)
class Change:
    """The ``view`` that counts now, and what it differs in from the one that was told before.

    ``joined``: members that are new in it; ``left``: those that are not in it any more, dead or gone by their own will,
    as they were. Who was started again is in both.
    """

    view: View
    joined: tuple[Member, ...]
    left: tuple[Member, ...]


class Changes:
    """Iterate over it with ``async for``: first comes the view as it is, with all of its members as ``joined``.

    A reader that does not keep up is told several changes as one: nothing is kept for it but the view that it was told
    last. It ends when the node has left its group.
    """

    def __init__(self, view: View) -> None:
        self.closed = False
        self._view = view
        self._told: View | None = None
        self._something = trio.Event()

    def see(self, view: View) -> None:
        """This view counts now."""
        self._view = view
        self._something.set()

    def take(self) -> Change | None:
        """The next change, if there is one. ``closed`` says whether there may be more."""
        view, told = self._view, self._told
        if told is not None and _essence(view) == _essence(told):
            self._something = trio.Event()  # what comes from here on is not missed, whenever ``wait`` is called
            return None
        self._told = view
        before = {(m.id, m.incarnation): m for m in told.members} if told is not None else {}
        now = {(m.id, m.incarnation): m for m in view.members}
        joined = tuple(m for key, m in now.items() if key not in before)
        return Change(view, joined, tuple(m for key, m in before.items() if key not in now))

    async def wait(self) -> None:
        """After ``take`` gave nothing: until there may be something to take, or no more will come."""
        if not self.closed:
            await self._something.wait()

    def close(self) -> None:
        self.closed = True
        self._something.set()

    def __aiter__(self) -> Changes:
        return self

    async def __anext__(self) -> Change:
        await trio.lowlevel.checkpoint()
        while (change := self.take()) is None:
            if self.closed:
                raise StopAsyncIteration
            await self.wait()
        return change


def _essence(view: View) -> tuple[object, ...]:
    """Whose difference is a change to a program: who is in it, in which order, and who leads since when."""
    return view.lineage, view.epoch, view.leader, tuple((m.id, m.incarnation) for m in view.members)
