"""What a node promises and accepts, and that it says so only once it is on disk.

The rules, of one who votes (an acceptor, in the words of the synod protocol; see :mod:`prime_async.machines.ballot`):

* It takes part in no epoch below the one that it promised last. Accepting is promising, too.
* A view is accepted on top of the one before, which its digest names. Who lacks that, or gets another result from the
  change than the leader, asks for the view whole.
* That view n + 1 is proposed says that view n is decided. So says the leader (``HeartbeatAck``, ``ViewUpdate``).
* What is to be answered waits until the ballot with it is on disk. Every other node may rely on it from then on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from prime_async.machines.ballot import Ballot, apply_change, view_digest
from prime_async.machines.vocabulary import Effect, Send, StoreBallot
from prime_async.messages import Accepted, AskView, Prepare, Promise, Propose, View, ViewUpdate

MAX_EPOCH_STEP = 2**20
"""A node misses fewer elections than that. A higher epoch is a lie, and would use the numbers up."""


@dataclass(slots=True)
class Acceptor:
    """See the module's rules. ``ballot`` is what is on disk, or on its way there."""

    me: str
    ballot: Ballot
    seq: int = 0
    durable: tuple[int, int] = (0, 0)  # epoch and number of the newest accepted view that is on disk
    waiting: deque[tuple[int, tuple[int, int], list[Send]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.durable = (self.ballot.accepted, self.ballot.number)

    # --- the disk -----------------------------------------------------------------------------------------------

    def store(self, ballot: Ballot, out: list[Effect], answers: Sequence[Send] = ()) -> None:
        """From now on this is the ballot; ``answers`` may be given when it is on disk."""
        if ballot == self.ballot:
            if self.waiting:
                self.waiting[-1][2].extend(answers)
            else:
                out += answers
            return
        self.seq += 1
        self.ballot = ballot
        self.waiting.append((self.seq, (ballot.accepted, ballot.number), list(answers)))
        out.append(StoreBallot(seq=self.seq, ballot=ballot))

    def on_stored(self, seq: int) -> list[Send]:
        """What may be answered now."""
        answers: list[Send] = []
        while self.waiting and self.waiting[0][0] <= seq:
            _, self.durable, given = self.waiting.popleft()
            answers += given
        return answers

    def rename(self, incarnation: int, out: list[Effect]) -> None:
        """The node goes by another incarnation from now on."""
        self.store(self.ballot.known_as(incarnation), out)

    # --- promises -----------------------------------------------------------------------------------------------

    def promise(self, peer: str, prepare: Prepare, promise: Promise, out: list[Effect]) -> None:
        """Take part in nothing below ``prepare.epoch``, and hand over what was accepted.

        ``promise`` has this node's ``member`` and ``incarnations``; the rest is filled in here.
        """
        ballot = self.ballot
        newer = (ballot.number, ballot.accepted) > (prepare.number, prepare.accepted_epoch)
        decided = ballot.decided_view
        answer = replace(
            promise,
            epoch=prepare.epoch,
            decided=decided.number if decided else 0,
            number=ballot.number,
            accepted_epoch=ballot.accepted,
            view=ballot.view if newer else None,
            before=ballot.before if newer and not ballot.decided else None,
        )
        promised = replace(ballot, promised=prepare.epoch, promised_to=peer)
        self.store(promised, out, [Send(peer=peer, message=answer)])

    def is_credible(self, epoch: int) -> bool:
        """Whether there can be such an epoch."""
        return epoch <= self.ballot.promised + MAX_EPOCH_STEP

    def takes_part_in(self, epoch: int, leader: str) -> bool:
        """Whether a leader of this epoch is to be followed: no two lead the same one."""
        ballot = self.ballot
        if not self.is_credible(epoch):
            return False
        return epoch > ballot.promised or (epoch == ballot.promised and ballot.promised_to in ("", leader))

    # --- views --------------------------------------------------------------------------------------------------

    def on_propose(self, peer: str, propose: Propose, out: list[Effect]) -> None:
        """Accept what a leader that is to be followed proposes, or ask for it whole."""
        ballot = self.ballot
        for held in (ballot.view, ballot.before):
            if held is not None and held.number == propose.number and view_digest(held) == propose.digest:
                self._accept(peer, propose.epoch, held, out)
                return
        base = ballot.view if ballot.number == propose.number - 1 else ballot.decided_view
        if propose.change is not None and base is not None and base.number == propose.number - 1:
            try:
                view = apply_change(base, propose.change)
            except ValueError:
                view = None
            if view is not None and view_digest(view) == propose.digest:
                self._accept(peer, propose.epoch, view, out)
                return
        out.append(Send(peer=peer, message=AskView(number=propose.number)))

    def on_view(self, peer: str, update: ViewUpdate, out: list[Effect]) -> None:
        """A view came whole from a leader that is to be followed."""
        view, ballot = update.view, self.ballot
        if update.decided:
            self.learn(peer, update.epoch, view, out)
        elif any(held is not None and view_digest(held) == view.previous for held in (ballot.view, ballot.before)):
            self._accept(peer, update.epoch, view, out)
        elif view.number > ballot.number:
            out.append(Send(peer=peer, message=AskView(number=view.number - 1)))

    def learn(self, peer: str, epoch: int, view: View, out: list[Effect]) -> None:
        """``view`` is decided."""
        ballot, known = self.ballot, self.ballot.decided_view
        if ballot.number > view.number or (known is not None and known.number >= view.number):
            return  # a later one was proposed, which said so already
        promised, to = (epoch, peer) if epoch > ballot.promised else (ballot.promised, ballot.promised_to)
        accepted = max(epoch, ballot.accepted)
        self.store(
            replace(ballot, promised=promised, promised_to=to, accepted=accepted, view=view, before=None, decided=True),
            out,
        )

    def decide(self, epoch: int, number: int, out: list[Effect]) -> bool:
        """The leader of ``epoch`` says that its view ``number`` is decided. Whether that is the view held here."""
        ballot = self.ballot
        known = ballot.decided_view
        if known is not None and known.number >= number:
            return True
        if ballot.number != number or ballot.accepted != epoch:
            return False
        self.store(replace(ballot, decided=True, before=None), out)
        return True

    def _accept(self, peer: str, epoch: int, view: View, out: list[Effect]) -> None:
        ballot = self.ballot
        promised = replace(ballot, promised=epoch, promised_to=peer)
        answers = self._answers(peer, epoch, view.number)
        if view.number < ballot.number:  # the one before ours, which is decided
            self.store(promised, out, answers)
        elif view.number == ballot.number and view == ballot.view:
            self.store(replace(promised, accepted=epoch), out, answers)
        else:
            held = ballot.view if ballot.number == view.number - 1 else ballot.decided_view
            new = replace(promised, accepted=epoch, view=view, before=held, decided=False)
            self.store(new, out, answers)

    def _answers(self, peer: str, epoch: int, number: int) -> list[Send]:
        return [Send(peer=peer, message=Accepted(epoch=epoch, number=number, incarnations=self.ballot.incarnations))]
