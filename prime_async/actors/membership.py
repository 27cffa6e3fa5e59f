"""The membership actor: control messages and connections."""

from __future__ import annotations

from collections.abc import Callable

from prime_async.machines.vocabulary import ConnectMembers, Dial, Effect, Fail, Finish, Send
from prime_async.messages import View
from prime_async.transport.base import Transport


class MembershipActor:
    """Performs the effects of a membership machine.

    ``admit`` is told the ids of a view's members: who is in it may connect to this node.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        admit: Callable[[frozenset[str]], None],
        fail: Callable[[Fail], None],
        finish: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._admit = admit
        self._fail = fail
        self._finish = finish
        self._dialled: set[str] = set()

    def perform(self, effect: Effect) -> None:
        match effect:
            case Send(peer=peer, message=message):
                self._transport.send(peer, message)
            case Dial(peer=peer, control=control):
                if peer not in self._dialled:
                    self._dialled.add(peer)
                    self._transport.dial(peer, control, "")
            case ConnectMembers(view=view, contacts=contacts):
                self._connect(view, contacts)
            case Fail():
                self._fail(effect)
            case Finish():
                self._finish()
            case _:
                raise TypeError(f"membership does not perform {type(effect).__name__}")

    def _connect(self, view: View, contacts: tuple[str, ...]) -> None:
        others = [m for m in view.members if m.id != self._transport.id]
        self._admit(frozenset(m.id for m in others))
        for peer in sorted(self._dialled - {m.id for m in others} - set(contacts)):
            self._transport.hang_up(peer)
            self._dialled.discard(peer)
        for member in others:
            self._dialled.add(member.id)
            self._transport.dial(member.id, member.control, member.bulk)
