"""What must hold of views, epochs and promises, whatever happens.

The truth is read from the disks: a view is *chosen* once a quorum of the voters of the view before it has it on disk,
accepted under one epoch. What machines believe is held against that.
"""

from __future__ import annotations

from collections.abc import Callable

from prime_async.machines.ballot import Ballot, is_quorum
from prime_async.machines.vocabulary import ActorName, Effect, Event, Send, Tell, ViewChanged
from prime_async.messages import Accepted, HeartbeatAck, Message, Plan, Promise, Propose, View, Welcome
from prime_async.testing.host import SimNode
from prime_async.testing.trace import text_of

ONE_LEADER = "one leader per epoch"
VIEWS_AGREE = "decided views agree by number"
IN_ORDER = "views are adopted in order"
QUORUM_STORED = "a decided view is stored by a quorum of the view before"
PROMISE_KEPT = "no promise is lost"
ONE_PROMISE = "a node promises an epoch to one candidate"

Require = Callable[[bool, str, Callable[[], str]], None]
"""Whether it holds, the name of the property, and what is wrong."""


class ViewProperties:
    """``chosen``: by number. ``newest`` is the last of them."""

    def __init__(self, require: Require) -> None:
        self.require = require
        self.chosen: dict[int, View] = {}
        self.newest: View | None = None
        self.leaders: dict[int, str] = {}  # epoch -> its leader
        self.accepted: dict[tuple[int, int], View] = {}  # number, epoch -> the view
        self.holders: dict[tuple[int, int], set[str]] = {}  # number, epoch -> voters that have it on disk
        self.last: dict[tuple[str, int], Ballot] = {}  # node, how often it was wiped -> what is on its disk
        self.promised: dict[tuple[str, int, int], str] = {}  # node, wiped, epoch -> to whom
        self.adopted: dict[tuple[str, int], int] = {}  # process -> number of the last view that it adopted
        self.wrote: set[tuple[str, int, int, int]] = set()  # node, wiped, number, epoch: was on its disk

    # --- what nodes do ------------------------------------------------------------------------------------------

    def on_effects(self, node: SimNode, _actor: ActorName, _event: Event, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._on_send(node, effect.peer, effect.message)
            elif isinstance(effect, Tell) and isinstance(effect.event, ViewChanged) and effect.actor == "exchange":
                self._on_adopted(node, effect.event.view)

    def _on_send(self, node: SimNode, peer: str, message: Message) -> None:
        match message:
            case Propose(epoch=epoch) | HeartbeatAck(epoch=epoch) | Welcome(epoch=epoch) | Plan(epoch=epoch):
                self._leads(node.id, epoch)
            case Promise(epoch=epoch):
                self._check_promise(node, peer, epoch)
            case Accepted(epoch=epoch, number=number):
                known = (node.id, node.disk.wiped, number, epoch) in self.wrote or number in self.chosen
                self.require(known, PROMISE_KEPT, lambda: f"{node.id} says {message}, and has it not on disk")

    def _leads(self, node: str, epoch: int) -> None:
        leader = self.leaders.setdefault(epoch, node)
        self.require(leader == node, ONE_LEADER, lambda: f"{leader} and {node} both lead epoch {epoch}")

    def _check_promise(self, node: SimNode, peer: str, epoch: int) -> None:
        ballot = node.disk.ballot
        safe = ballot is not None and (
            ballot.promised > epoch or (ballot.promised == epoch and ballot.promised_to == peer)
        )
        self.require(
            safe, PROMISE_KEPT, lambda: f"{node.id} promises {epoch} to {peer}; on its disk is {text_of(ballot)}"
        )

    def _on_adopted(self, node: SimNode, view: View) -> None:
        self._is_chosen(node, view)
        last = self.adopted.get((node.id, node.start), 0)
        self.adopted[node.id, node.start] = view.number
        self.require(last <= view.number, IN_ORDER, lambda: f"{node.id} goes from view {last} to {view.number}")

    def _is_chosen(self, node: SimNode, view: View) -> None:
        if view.number == 1:
            self._choose(view)  # its founder is alone, and needs nobody
        chosen = self.chosen.get(view.number)
        if chosen is None:
            self.require(
                False, QUORUM_STORED, lambda: f"{node.id} takes view {view.number} for decided: {text_of(view)}"
            )
        self.require(
            chosen == view, VIEWS_AGREE, lambda: f"{node.id} has {text_of(view)} where {text_of(chosen)} was decided"
        )

    # --- what disks hold ----------------------------------------------------------------------------------------

    def on_disk(self, node: SimNode, ballot: Ballot) -> None:
        disk = (node.id, node.disk.wiped)
        before = self.last.get(disk)
        if before is not None and before != ballot:
            self._keeps_promises(node, before, ballot)
        self.last[disk] = ballot
        if ballot.promised_to:
            to = self.promised.setdefault((*disk, ballot.promised), ballot.promised_to)
            self.require(
                to == ballot.promised_to,
                ONE_PROMISE,
                lambda: f"{node.id} promised epoch {ballot.promised} to {to}, now to {ballot.promised_to}",
            )
        if ballot.view is not None:
            self._on_stored(node, ballot, ballot.view)

    def _keeps_promises(self, node: SimNode, before: Ballot, ballot: Ballot) -> None:
        def what() -> str:
            return f"{node.id} goes from {text_of(before)} to {text_of(ballot)}"

        self.require(ballot.promised >= before.promised, PROMISE_KEPT, what)
        self.require(ballot.number >= before.number, PROMISE_KEPT, what)
        newly = (ballot.number, ballot.accepted) != (before.number, before.accepted)
        if newly and not ballot.decided:
            self.require(ballot.accepted >= before.promised, PROMISE_KEPT, what)
        if ballot.number == before.number and ballot.view != before.view:
            self.require(not before.decided and ballot.accepted > before.accepted, PROMISE_KEPT, what)

    def _on_stored(self, node: SimNode, ballot: Ballot, view: View) -> None:
        number, epoch = view.number, ballot.accepted
        if ballot.decided and number > 1:
            self._is_chosen(node, view)
        if ballot.before is not None:
            self._is_chosen(node, ballot.before)
        self.wrote.add((node.id, node.disk.wiped, number, epoch))
        if ballot.decided and number in self.chosen:
            return
        same = self.accepted.setdefault((number, epoch), view)
        self.require(
            same == view,
            VIEWS_AGREE,
            lambda: f"two views {number} are accepted in epoch {epoch}: {same}, {text_of(view)}",
        )
        base = self.chosen.get(number - 1)
        if base is None:
            self.require(
                number == 1, QUORUM_STORED, lambda: f"{node.id} has view {number} on disk, {number - 1} is not"
            )
            self._choose(view)
            return
        voter = base.member(node.id)
        if voter is not None and voter.voter and voter.incarnation in ballot.incarnations:
            holders = self.holders.setdefault((number, epoch), set())
            holders.add(node.id)
            if is_quorum(base, holders):
                self._choose(view)

    def _choose(self, view: View) -> None:
        chosen = self.chosen.setdefault(view.number, view)
        self.require(chosen == view, VIEWS_AGREE, lambda: f"both were stored by a quorum: {chosen}, {text_of(view)}")
        if self.newest is None or view.number > self.newest.number:
            self.newest = view
