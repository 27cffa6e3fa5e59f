"""How a member becomes the leader of a new epoch.

The rules:

* First it asks whether it would be promised (``PreVote``), so that a node that was cut off does not raise the epoch of
  those that hear their leader (as in section 9.6 of D. Ongaro's thesis on Raft, 2014). With the support of a quorum it
  promises a new epoch to itself and asks for promises (``Prepare``).
* Every promise hands over what its sender has accepted. With the promises of a quorum of the newest view's voters, and,
  if it is not known to be decided, also of the voters of the one before, nothing can be decided any more that the
  candidate does not know: it leads, and what it knows to be newest is proposed again.
* It waits a moment longer for those that have not answered, since the first view of the new epoch is without them:
  who died together with the leader is not waited for a second time. The lost leader itself is not waited for.
* A candidate whose epoch is outvoted tries a higher one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from prime_async.machines.ballot import Ballot, entitled, is_quorum
from prime_async.machines.vocabulary import Effect, Send
from prime_async.messages import Prepare, PreVote, Promise, Support, View


@dataclass(slots=True)
class Candidate:
    """See the module's rules. ``preparing``: it has had the support of a quorum, and asks for promises."""

    me: str
    ballot: Ballot  # ours, when we began
    epoch: int
    lost: str  # the leader that we do not hear
    began_at: float
    supporters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    promises: dict[str, Promise] = field(default_factory=dict)
    preparing: bool = False

    @property
    def electorate(self) -> tuple[str, ...]:
        """Who is asked: all members of the newest view, and of the one before if that may be the newest."""
        views = [v for v in (self.newest()[0], self.ballot.view, self.ballot.before) if v is not None]
        return tuple(dict.fromkeys(m.id for v in views for m in v.members))

    def ask(self, out: list[Effect]) -> None:
        """Ask those that have not answered, this node too."""
        ballot = self.ballot
        for peer in self.electorate:
            if self.preparing and peer not in self.promises:
                prepare = Prepare(epoch=self.epoch, number=ballot.number, accepted_epoch=ballot.accepted)
                out.append(Send(peer=peer, message=prepare))
            elif not self.preparing and peer not in self.supporters:
                out.append(Send(peer=peer, message=PreVote(epoch=self.epoch, view=ballot.number)))

    def on_support(self, now: float, peer: str, support: Support, out: list[Effect]) -> None:
        if self.preparing or support.epoch != self.epoch:
            return
        self.supporters[peer] = support.incarnations
        if decides(self.ballot.view, self.ballot.before, self.ballot.decided, self.supporters):
            self.preparing, self.began_at = True, now
            self.ask(out)

    def on_promise(self, peer: str, promise: Promise, out: list[Effect]) -> None:
        if not self.preparing or promise.epoch != self.epoch or peer not in self.electorate:
            return
        known = self.newest()[0]
        self.promises[peer] = promise
        if self.newest()[0] != known:
            self.ask(out)  # those of a newer view

    def newest(self) -> tuple[View, View | None, bool]:
        """The newest view that a promise, or we, accepted; the one before it; whether it is known to be decided."""
        best = (self.ballot.number, self.ballot.accepted)
        view, before = self.ballot.view, self.ballot.before
        decided = {p.decided for p in self.promises.values()}
        for _, promise in sorted(self.promises.items()):
            number = (promise.number, promise.accepted_epoch)
            if number > best and promise.view is not None:
                best, view, before = number, promise.view, promise.before
        assert view is not None
        known = self.ballot.decided_view
        decided.add(known.number if known else 0)
        return view, before, max(decided) >= view.number

    def won(self, now: float, patience_s: float) -> bool:
        """Whether this node leads now."""
        view, before, decided = self.newest()
        granted = {peer: p.incarnations for peer, p in self.promises.items()}
        if not decides(view, before, decided, granted):
            return False
        missing = [m.id for m in view.members if m.id not in self.promises and m.id != self.lost]
        return not missing or now >= self.began_at + patience_s


def decides(view: View | None, before: View | None, decided: bool, granted: Mapping[str, Collection[int]]) -> bool:
    """Whether nothing can be decided behind the back of those who ``granted``, as these incarnations."""
    views = [view] if decided else [view, before]
    for each in views:
        if each is None:
            return False
        voters = {peer for peer, incarnations in granted.items() if entitled(each, peer, incarnations)}
        if not is_quorum(each, voters):
            return False
    return True
