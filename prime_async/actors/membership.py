"""The membership actor: control messages and connections."""

from __future__ import annotations

from collections.abc import Callable

import trio

from prime_async.machines.ballot import Ballot
from prime_async.machines.vocabulary import (
    BallotStored,
    ConnectMembers,
    Dial,
    Effect,
    Event,
    Fail,
    Finish,
    KeyToLetIn,
    LetIn,
    Send,
    StoreBallot,
)
from prime_async.messages import View
from prime_async.transport.base import Transport


class MembershipActor:
    """Performs the effects of a membership machine.

    ``admit`` is told the ids of a view's members: who is in it may connect to this node. ``let_in`` puts a key on the
    list of those that may, in a worker thread, and returns why not if it does not. ``store`` puts a ballot on
    disk, in a worker thread; of several that wait, the newest alone is written, and answers for all.
    """

    def __init__(
        self,
        transport: Transport,
        nursery: trio.Nursery,
        post: Callable[[Event], None],
        *,
        store: Callable[[Ballot], None],
        admit: Callable[[frozenset[str]], None],
        let_in: Callable[[KeyToLetIn], str],
        fail: Callable[[Fail], None],
        finish: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._nursery = nursery
        self._post = post
        self._store = store
        self._unstored: StoreBallot | None = None
        self._storing = False
        self._admit = admit
        self._let_in = let_in
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
            case KeyToLetIn():
                self._nursery.start_soon(self._let_in_key, effect)
            case StoreBallot():
                self._unstored = effect
                if not self._storing:
                    self._storing = True
                    self._nursery.start_soon(self._store_newest)
            case Fail():
                self._fail(effect)
            case Finish():
                self._finish()
            case _:
                raise TypeError(f"membership does not perform {type(effect).__name__}")

    async def _let_in_key(self, asked: KeyToLetIn) -> None:
        refusal = await trio.to_thread.run_sync(self._let_in, asked)
        event = LetIn(peer=asked.peer, key=asked.key, name=asked.name, invited=asked.invited, refusal=refusal)
        self._post(event)

    async def _store_newest(self) -> None:
        while (effect := self._unstored) is not None:
            self._unstored = None
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._store, effect.ballot)
            self._post(BallotStored(seq=effect.seq))
        self._storing = False

    def _connect(self, view: View, contacts: tuple[str, ...]) -> None:
        others = [m for m in view.members if m.id != self._transport.id]
        self._admit(frozenset(m.id for m in others))
        for peer in sorted(self._dialled - {m.id for m in others} - set(contacts)):
            self._transport.hang_up(peer)
            self._dialled.discard(peer)
        for member in others:
            self._dialled.add(member.id)
            self._transport.dial(member.id, member.control, member.bulk)
