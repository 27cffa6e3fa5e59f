"""What a node has promised and accepted: the part of it that must survive a crash.

One agreement is reached after another: view number n + 1 is decided once it is stored, under one epoch, by a quorum of
the voters of view number n (the synod protocol of L. Lamport, "The Part-Time Parliament", 1998; its section on
reconfiguration with a window of one). A node answers only after what it answers is on disk.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

from blake3 import blake3
from msgspec import Struct
from msgspec.structs import replace

from prime_async.messages import Change, Commit, Member, View, bitmap, encode, positions

INCARNATIONS_KEPT = 16


class Ballot(Struct, frozen=True, kw_only=True):
    """The stored part of a node's membership.

    ``promised``: it takes part in no lower epoch; ``promised_to`` has its promise. ``view`` was accepted under
    ``accepted``, and is known to be decided if ``decided``. ``before`` is the view before it, which is decided.
    ``incarnations``: under which this node can have been listed as a voter; the newest last.
    """

    incarnations: tuple[int, ...]
    promised: int = 0
    promised_to: str = ""
    accepted: int = 0
    view: View | None = None
    before: View | None = None
    decided: bool = False

    @property
    def number(self) -> int:
        return self.view.number if self.view else 0

    @property
    def decided_view(self) -> View | None:
        """The newest view that is known to be decided."""
        return self.view if self.decided else self.before

    def known_as(self, incarnation: int) -> Ballot:
        """The same, of a node that is now in this incarnation too."""
        if incarnation in self.incarnations:
            return self
        return replace(self, incarnations=(*self.incarnations, incarnation)[-INCARNATIONS_KEPT:])


@lru_cache(maxsize=16)
def view_digest(view: View) -> bytes:
    """BLAKE3 of the view's encoding."""
    return blake3(encode(view)).digest()


def entitled(view: View, node: str, incarnations: Collection[int]) -> bool:
    """Whether ``view`` counts ``node``, known as ``incarnations``, as a voter."""
    member = view.member(node)
    return member is not None and member.voter and member.incarnation in incarnations


def is_quorum(view: View, ids: Collection[str]) -> bool:
    """Whether ``ids`` decide what comes after ``view``: a majority of its voters, or half of them with its leader."""
    voters = [m.id for m in view.voters]
    agreed = sum(v in ids for v in voters)
    return 2 * agreed > len(voters) or (2 * agreed == len(voters) > 0 and view.leader in voters and view.leader in ids)


def apply_change(view: View, change: Change) -> View:
    """The view after ``view``. Raises ``ValueError`` if the change does not fit it."""
    gone = set(positions(change.gone))
    if gone and max(gone) >= len(view.members):
        raise ValueError("the change removes members that are not in the view")
    new = {m.id: m for m in change.members}
    kept = [new.pop(m.id, m) for i, m in enumerate(view.members) if i not in gone]
    return View(
        lineage=view.lineage,
        epoch=change.epoch,
        number=view.number + 1,
        previous=view_digest(view),
        leader=change.leader,
        members=(*kept, *(m for m in change.members if m.id in new)),
        commit=change.commit or view.commit,
    )


def change_between(view: View, members: tuple[Member, ...], epoch: int, leader: str, commit: Commit | None) -> Change:
    """What makes ``members`` of those of ``view``: some of them, in their order, then the new ones."""
    place = {m.id: i for i, m in enumerate(view.members)}
    kept: dict[int, Member] = {}
    last = -1
    for member in members:
        at = place.get(member.id, -1)
        if at <= last:
            break
        kept[at] = member
        last = at
    gone = [i for i in range(len(view.members)) if i not in kept]
    changed = tuple(m for i, m in kept.items() if m != view.members[i])
    return Change(
        epoch=epoch, leader=leader, gone=bitmap(gone), members=(*changed, *members[len(kept) :]), commit=commit
    )


def new_lineage(ballot: Ballot, node: str, tip: Commit | None) -> Ballot:
    """What ``node`` begins with when it goes on alone from the outer state that ``tip`` led to, ``None``: the first.

    Raises ``ValueError`` if the ballot has no view.
    """
    old = ballot.view
    if old is None:
        raise ValueError("a node that was never a member has no lineage to go on from")
    mine, epoch, incarnation = old.member(node), ballot.promised + 1, max(ballot.incarnations)
    me = mine or Member(id=node, name=node[:8], incarnation=incarnation, control="", bulk="")
    view = View(
        lineage=blake3(old.lineage + view_digest(old) + f"{node}/{incarnation}".encode()).digest(),
        epoch=epoch,
        number=old.number + 1,
        previous=view_digest(old),
        leader=node,
        members=(replace(me, incarnation=incarnation, active=False, voter=True, reachable=True),),
        commit=tip,
    )
    return replace(ballot, promised=epoch, promised_to=node, accepted=epoch, view=view, before=None, decided=True)
