"""Membership machines for tests: alone, with a disk that is done at once; or several on one clock and a bad network."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Collection, Iterable

from prime_async.machines.ballot import Ballot
from prime_async.machines.facts import Fact
from prime_async.machines.leadership import ContactPoint, MembershipSettings
from prime_async.machines.membership import Membership
from prime_async.machines.vocabulary import (
    BallotStored,
    ConnectMembers,
    Effect,
    Event,
    Fail,
    Finish,
    Heard,
    Reached,
    Report,
    RunAt,
    Send,
    StateAt,
    StoreBallot,
    Tell,
    Tick,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import (
    FIRST_CHAIN,
    Accepted,
    Heartbeat,
    Hello,
    Member,
    Message,
    PreVote,
    Promise,
    Support,
    View,
    ViewUpdate,
    Welcome,
    decode,
    encode,
)
from tests.machine_harness import full_member, member, sent, told, view

RUN_ID = bytes(32)
D0, D1, D2, BAD = b"0" * 32, b"1" * 32, b"2" * 32, b"x" * 32
TIMEOUT_S = 10.0
N0 = ContactPoint(id="n0", control="sim://n0")

# --- one machine ----------------------------------------------------------------------------------------------------


def machine(
    id: str = "n1",
    contacts: tuple[ContactPoint, ...] = (N0,),
    *,
    min_members: int = 1,
    ballot: Ballot | None = None,
    incarnation: int = 1,
    rounds: bool = True,
) -> Membership:
    settings = MembershipSettings(
        me=member(id, active=False, incarnation=incarnation),
        run_id=RUN_ID,
        settings={"seed": "1"},
        contacts=contacts,
        min_members=min_members,
        failure_timeout_s=TIMEOUT_S,
        rounds=rounds,
        ballot=ballot,
    )
    return Membership(settings)


def give(node: Membership, now: float, event: Event) -> list[Effect]:
    """The effects of ``event``; what is to be stored is on disk at once, and what follows from that is in them."""
    effects = node.handle(now, event)
    for effect in effects:  # grows
        if isinstance(effect, StoreBallot):
            effects += node.handle(now, BallotStored(seq=effect.seq))
    return effects


def hears(node: Membership, now: float, peer: str, message: Message) -> list[Effect]:
    return give(node, now, Heard(peer=peer, message=message))


def ticks(node: Membership, start_s: int, end_s: int) -> list[Effect]:
    return [effect for second in range(start_s, end_s) for effect in give(node, float(second), Tick())]


def founder(min_members: int = 1) -> Membership:
    leader = machine("n0", contacts=(), min_members=min_members)
    give(leader, 0.0, StateAt(round=0, digest=D0, chain=FIRST_CHAIN))
    return leader


def asking(id: str = "n1", contacts: tuple[ContactPoint, ...] = (N0,)) -> Membership:
    node = machine(id, contacts)
    give(node, 0.0, StateAt(round=0, digest=D0, chain=FIRST_CHAIN))
    return node


def hello(
    id: str,
    incarnation: int = 1,
    protocol: int = 1,
    run_id: bytes = RUN_ID,
    seed: str = "1",
    lineage: bytes = b"",
    view: int = 0,
) -> Hello:
    asker = member(id, active=False, incarnation=incarnation)
    return Hello(protocol=protocol, run_id=run_id, settings={"seed": seed}, member=asker, lineage=lineage, view=view)


def beat(incarnation: int = 1, view: int = 99, round: int = 0, digest: bytes = D0, epoch: int = 1) -> Heartbeat:
    return Heartbeat(incarnation=incarnation, epoch=epoch, view=view, round=round, state_digest=digest)


def welcome(number: int = 2, round: int = 0, incarnation: int = 1, epoch: int = 1) -> Welcome:
    members = [full_member("n0"), member("n1", active=False, incarnation=incarnation)]
    shown = view(number, *members, epoch=epoch)
    return Welcome(epoch=epoch, view=shown, round=round, state_digest=D0)


def shows(number: int, *members: Member, epoch: int = 1, leader: str = "n0", decided: bool = True) -> ViewUpdate:
    return ViewUpdate(epoch=epoch, decided=decided, view=view(number, *members, epoch=epoch, leader=leader))


def leader_with(*ids: str, min_members: int = 1) -> Membership:
    """A founder, who alone has a vote, and others that joined."""
    leader = founder(min_members)
    for id in ids:
        hears(leader, 0.0, id, hello(id))
    return leader


def joined() -> Membership:
    node = asking()
    hears(node, 0.1, "n0", welcome())
    return node


def ids(node: Membership) -> list[str]:
    assert node.view is not None
    return [m.id for m in node.view.members]


def active(node: Membership) -> list[str]:
    assert node.view is not None
    return [m.id for m in node.view.active]


def voters(node: Membership) -> list[str]:
    assert node.view is not None
    return [m.id for m in node.view.voters]


# --- machines that have a ballot ------------------------------------------------------------------------------------


def stored(at: View, *, before: View | None = None, decided: bool = True, epoch: int = 1) -> Ballot:
    """The ballot of a node, in its first incarnation, that accepted ``at`` from the leader of ``epoch``."""
    return Ballot(
        incarnations=(1,),
        promised=epoch,
        promised_to=at.leader,
        accepted=epoch,
        view=at,
        before=before,
        decided=decided,
    )


def full_view(number: int, *members: str, leader: str = "n0") -> View:
    return view(number, *(full_member(id) for id in members), leader=leader)


def restarted(id: str, ballot: Ballot, *, incarnation: int = 2) -> Membership:
    """It has its ballot, and has lost its leader, at 0 s."""
    node = machine(id, () if id == "n0" else (N0,), ballot=ballot, incarnation=incarnation)
    give(node, 0.0, StateAt(round=0, digest=D0, chain=FIRST_CHAIN))
    return node


def promise(ballot: Ballot, epoch: int, id: str, *, whole: bool = False) -> Promise:
    """What ``id`` with ``ballot`` promises; ``whole``: with its views, since the candidate lacks them."""
    decided = ballot.decided_view
    return Promise(
        epoch=epoch,
        decided=decided.number if decided else 0,
        number=ballot.number,
        accepted_epoch=ballot.accepted,
        member=member(id, active=False, reachable=True),
        incarnations=(1,),
        view=ballot.view if whole else None,
        before=ballot.before if whole and not ballot.decided else None,
    )


def elect(node: Membership, now: float, *supporters: str) -> list[Effect]:
    """``node`` stands at ``now``; ``supporters``, who have the same ballot, promise."""
    ballot = node.acceptor.ballot
    effects = give(node, now, Tick())
    [epoch] = {m.epoch for _, m in sent(effects, PreVote)}
    for peer in supporters:
        effects += hears(node, now, peer, Support(epoch=epoch, incarnations=(1,)))
    for peer in supporters:
        effects += hears(node, now, peer, promise(ballot, epoch, peer))
    return effects


def accepts(node: Membership, now: float, *peers: str) -> list[Effect]:
    """``peers`` have stored what the leader ``node`` proposes."""
    effects: list[Effect] = []
    for peer in peers:
        leads = node.leadership
        if leads is None or leads.proposal is None:
            break
        done = Accepted(epoch=leads.epoch, number=leads.proposal.number, incarnations=(1,))
        effects += hears(node, now, peer, done)
    return effects


def leading(*others: str) -> Membership:
    """n0 leads epoch 2 of a view in which all have a vote, number 6, at 0 s; nothing is under way."""
    node = restarted("n0", stored(full_view(5, "n0", *others)), incarnation=1)
    elect(node, 0.0, *others)
    accepts(node, 0.0, *others)
    assert node.role == "leader"
    assert node.view is not None
    assert node.view.number == 6
    return node


# --- many machines --------------------------------------------------------------------------------------------------


class Cluster:
    """Membership machines, their disks, and a network that delays, loses and cuts; all chances come from ``seed``.

    Fails as soon as two nodes go by different views of the same number. ``has_rounds``: as its machines are told.
    """

    def __init__(self, count: int, seed: int = 0, loss: float = 0.0, *, has_rounds: bool = True) -> None:
        self.now = 0.0
        self.chance = random.Random(seed)
        self.loss = loss
        self.has_rounds = has_rounds
        self.round = 0
        self.nodes: dict[str, Membership] = {}
        self.starts: dict[str, int] = {}
        self.up: set[str] = set()
        self.left: set[str] = set()
        self.failed: list[Fail] = []
        self.disks: dict[str, Ballot] = {}
        self.cut: set[tuple[str, str]] = set()
        self.asleep: dict[str, list[tuple[int, Event]]] = {}
        self.decided: dict[tuple[bytes, int], View] = {}
        self.facts: list[tuple[str, Fact]] = []
        self._wishes: dict[str, int] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        for i in range(count):
            self.start(f"n{i}")
            self.run(0.5)  # they join in this order, unless messages are lost

    # what happens to nodes

    def start(self, id: str) -> None:
        """Start a node, with what its disk holds; if that is nothing, it fetches the outer state when it may."""
        self.starts[id] = self.starts.get(id, 0) + 1
        others = {"n0", *self.nodes} - {id}
        contacts = tuple(ContactPoint(id=other, control=f"sim://{other}") for other in sorted(others))
        incarnation = 1000 * self.starts[id]
        self.nodes[id] = machine(
            id,
            () if id == "n0" else contacts,
            ballot=self.disks.get(id),
            incarnation=incarnation,
            rounds=self.has_rounds,
        )
        self.up.add(id)
        self.left.discard(id)
        self.asleep.pop(id, None)
        self._later(self.chance.uniform(0.0, 0.1), id, self._state(self.round if id in self.disks else 0))

    def crash(self, id: str) -> None:
        self.up.discard(id)
        self.starts[id] += 1

    def sleep(self, id: str) -> None:
        self.asleep[id] = []

    def wake(self, id: str) -> None:
        for start, event in self.asleep.pop(id):
            self._give(id, start, event)

    def split(self, group: Collection[str]) -> None:
        self.cut = {(a, b) for a in group for b in self.nodes if b not in group}

    def heal(self) -> None:
        self.cut = set()

    def tell(self, id: str, event: Event) -> None:
        self._give(id, self.starts[id], event)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            self.now, _, act = heapq.heappop(self._due)
            act()
        self.now = end

    def rounds(self, seconds: float) -> None:
        """Run; a round ends every 2.5 s, for all that were members."""
        end = self.now + seconds
        while self.now < end:
            self.run(min(2.5, end - self.now))
            self.round += 1
            for id in sorted(self.up & self.disks.keys()):
                self.tell(id, self._state(self.round))

    # what is seen of them

    @property
    def leaders(self) -> list[str]:
        return sorted(id for id in self.up if self.nodes[id].role == "leader")

    def healthy(self) -> bool:
        """All that are up take part, in one view."""
        nodes = [self.nodes[id] for id in sorted(self.up)]
        for node in nodes:
            mine = node.view.member(node.settings.me.id) if node.view else None
            if node.role not in ("member", "leader") or mine is None or not mine.active:
                return False
            if mine.incarnation != node.incarnation:
                return False
        return len({(v.lineage, v.number) for n in nodes if (v := n.view) is not None}) == 1

    def seen(self, kind: type[Fact]) -> list[tuple[str, Fact]]:
        return [(id, fact) for id, fact in self.facts if isinstance(fact, kind)]

    # how it works

    def _state(self, round: int) -> StateAt:
        return StateAt(round=round, digest=round.to_bytes(32), chain=FIRST_CHAIN)

    def _at(self, seconds: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._due, (self.now + seconds, self._count, act))

    def _later(self, seconds: float, id: str, event: Event) -> None:
        start = self.starts[id]
        self._at(seconds, lambda: self._give(id, start, event))

    def _give(self, id: str, start: int, event: Event) -> None:
        if id not in self.up or self.starts[id] != start:
            return
        if id in self.asleep:
            self.asleep[id].append((start, event))
            return
        for effect in self.nodes[id].handle(self.now, event):
            self._perform(id, effect)

    def _perform(self, id: str, effect: Effect) -> None:
        match effect:
            case WakeAt(at=at):
                self._wishes[id] = wish = self._wishes.get(id, 0) + 1
                start = self.starts[id]
                self._at(max(0.0, at - self.now), lambda: self._tick(id, start, wish))
            case Send(peer=peer, message=message):
                if self.chance.random() >= self.loss:
                    data = encode(message)
                    self._at(self.chance.uniform(0.01, 0.1), lambda: self._arrive(id, peer, data))
            case StoreBallot(seq=seq, ballot=ballot):
                start = self.starts[id]
                self._at(self.chance.uniform(0.001, 0.02), lambda: self._store(id, start, seq, ballot))
            case ConnectMembers(view=shown):
                for each in shown.members:
                    if each.id != id:
                        self._later(0.02, id, Reached(peer=each.id, reachable=True))
            case Tell(event=ViewChanged(view=shown)):
                known = self.decided.setdefault((shown.lineage, shown.number), shown)
                assert known == shown, f"two views of number {shown.number}: {known} and {shown}"
            case Tell(event=RunAt(round=round)) if round > self.nodes[id].states.round:
                self._later(0.05, id, self._state(round))
            case Report(fact=fact):
                self.facts.append((id, fact))
            case Finish():
                self.up.discard(id)
                self.left.add(id)
            case Fail():
                self.up.discard(id)
                self.failed.append(effect)

    def _tick(self, id: str, start: int, wish: int) -> None:
        if self._wishes[id] == wish:
            self._give(id, start, Tick())

    def _arrive(self, sender: str, id: str, data: bytes) -> None:
        if id in self.up and (sender, id) not in self.cut and (id, sender) not in self.cut:
            self._give(id, self.starts[id], Heard(peer=sender, message=decode(data, Message)))

    def _store(self, id: str, start: int, seq: int, ballot: Ballot) -> None:
        if id in self.up and self.starts[id] == start:
            self.disks[id] = ballot
            self._give(id, start, BallotStored(seq=seq))


def cluster(count: int, *, seed: int = 0, loss: float = 0.0) -> Cluster:
    """All have a vote: they have completed a round together."""
    nodes = Cluster(count, seed, loss)
    nodes.rounds(15.0)
    return nodes


def runs_at(effects: Iterable[Effect]) -> list[RunAt]:
    """What checkpoint is told of where the run is."""
    return [event for event in told(effects, "checkpoint") if isinstance(event, RunAt)]
