"""What must hold of contributions, means and commits, whatever happens."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice, product

from blake3 import blake3

from prime_async.machines.attempt import SETTLED, Number, mean_key, number_of
from prime_async.machines.ballot import is_quorum
from prime_async.machines.owners import Assignment, assign
from prime_async.machines.vocabulary import (
    ActorName,
    AdoptMean,
    Advance,
    Apply,
    Effect,
    Event,
    Heard,
    LoadSnapshot,
    Reduce,
    Reduced,
    Send,
)
from prime_async.messages import (
    FIRST_CHAIN,
    ChunkInfo,
    ChunkKey,
    Commit,
    Have,
    Held,
    Member,
    Plan,
    View,
    next_chain,
    positions,
)
from prime_async.testing.host import Disk, SimNode
from prime_async.testing.ledger import restore
from prime_async.testing.properties_of_views import Require, ViewProperties
from prime_async.testing.simulation import STARTS_APART, Simulation
from prime_async.testing.trace import text_of
from prime_async.testing.work import Contribution

SAME_BYTES = "no two nodes apply different bytes for a chunk of a round"
ONLY_COMMITTED = "only committed means are applied"
QUORUM_HOLDS = "only what a quorum holds is committed"
ONE_COMMIT = "commits form one chain"
NEVER_REMADE = "a mean that a quorum holds is not made again"
ONE_NAME = "a key never names two different bytes"
REFUSED = "after an answer to an ask no mean of a lower number is taken"
HONEST = "a member has what it says that it has"
ON_DISK = "what a member says that it has is on its disk"
SAFE = "the means of a commit are on the disks of a quorum, or, as those are full, with every active voter"
IN_THE_CHAIN = "only a snapshot that the chain names is loaded"
COUNTED_ONCE = "a contribution is counted at most once"
NOT_LOST = "progress that was not counted is kept"
UNTOUCHED = "chunks of an owner that is here are not made again"

MAX_COMBINATIONS = 4096

Process = tuple[str, int]
"""A node's name, and the incarnation with which its process began."""


def _no_holders() -> dict[bytes, set[Process]]:
    return defaultdict(set)


class RoundProperties:
    """Watches the exchange and the training of all nodes."""

    def __init__(self, simulation: Simulation, views: ViewProperties, require: Require) -> None:
        self.simulation = simulation
        self.views = views
        self.require = require
        self.commits: dict[int, Commit] = {}
        self.seen_view = 0  # chosen views are looked at for their commits, up to this one
        self.bytes: dict[ChunkKey, bytes] = {}
        self.looked_at: set[tuple[int, bytes]] = set()  # view number and digest of a commit
        self.applied: dict[ChunkKey, bytes] = {}
        self.means: dict[bytes, tuple[bytes, ...]] = {}  # digest of a round's means -> those of the chunks
        self.held: dict[tuple[int, int], dict[bytes, set[Process]]] = defaultdict(_no_holders)
        self.first_number: dict[tuple[int, int, bytes], Number] = {}
        self.made: dict[tuple[int, int], dict[ChunkKey, tuple[SimNode, Reduce]]] = defaultdict(dict)
        self.refused: dict[tuple[Process, int], dict[int, Number]] = defaultdict(dict)
        self.plans: dict[tuple[int, Number], Plan] = {}
        self.rounds_view: dict[tuple[int, Number], int] = {}  # round, number of a turn -> number of the round's view
        self.adopted: dict[ChunkKey, ChunkKey] = {}  # by the effects that are looked at, and not performed yet
        self.used: dict[tuple[str, int, int], int] = {}  # process and chunk -> its steps are counted up to here

    # --- events -------------------------------------------------------------------------------------------------

    def on_effects(self, node: SimNode, _actor: ActorName, event: Event, effects: list[Effect]) -> None:
        if isinstance(event, Heard) and isinstance(event.message, Plan):
            self._on_plan(event.message)
        elif isinstance(event, Reduced):
            self._on_reduced(event)
        self.adopted.clear()
        for effect in effects:
            match effect:
                case AdoptMean(found=found, key=key):
                    self.adopted[key] = found
                case Send(message=Plan() as plan):
                    self._on_plan(plan)
                case Send(message=Have() as have):
                    self._on_have(node, have)
                case Send(message=Held() as answer):
                    self._on_held(node, answer)
                case Reduce():
                    self._on_reduce(node, effect)
                case Apply():
                    self._on_apply(node, effect)
                case Advance(round=round):
                    self._on_advance(node, round)
                case LoadSnapshot(round=round):
                    self._on_load(node, round)

    def on_chosen(self) -> None:
        """New views may have been chosen: each has the commit of the one before, or the next."""
        newest = self.views.newest
        while newest is not None and self.seen_view < newest.number:
            self.seen_view += 1
            commit = self.views.chosen[self.seen_view].commit
            if commit is not None:
                if commit.round not in self.commits:
                    self._is_safe(commit)
                self._on_commit(commit)

    def _on_commit(self, commit: Commit) -> None:
        known = self.commits.get(commit.round)
        newest = max(self.commits, default=None)
        if known is None:
            before = self.commits.get(commit.round - 1)
            self.require(
                newest in (None, commit.round - 1), ONE_COMMIT, lambda: f"{commit} comes after that of round {newest}"
            )
            if before is not None or commit.round == 0:
                chain = before.chain if before is not None else FIRST_CHAIN
                fits = next_chain(chain, commit.state, commit.digest) == commit.chain
                self.require(fits, ONE_COMMIT, lambda: f"{commit} does not follow {before}")
            self.commits[commit.round] = commit
            self._count(commit)
        else:
            self.require(
                known == commit, ONE_COMMIT, lambda: f"two commits of a round: {text_of(known)}, {text_of(commit)}"
            )
            self.require(newest == commit.round, ONE_COMMIT, lambda: f"after round {newest} comes {commit}")

    def _count(self, commit: Commit) -> None:
        """The steps of each contribution in the means are counted now, and have not been before."""
        for mean in self.means.get(commit.digest, ()):
            for part in self.simulation.store.parts.get(mean, ()):
                made = self.simulation.work.contributions[part]
                self._count_steps(commit, made)

    def _count_steps(self, commit: Commit, made: Contribution) -> None:
        process = (made.node, made.incarnation, made.chunk)
        used = self.used.get(process, 0)
        self.require(
            made.first >= used or made.first == made.end,
            COUNTED_ONCE,
            lambda: f"round {commit.round} counts {made}, and steps before {used} were counted in an earlier round",
        )
        self.used[process] = max(used, made.end)

    # --- chunks -------------------------------------------------------------------------------------------------

    def on_put(self, node: SimNode, key: ChunkKey, info: ChunkInfo) -> None:
        """A node holds a chunk from now on."""
        if key.kind != "mean":
            return
        known = self.bytes.setdefault(key, info.digest)
        self.require(known == info.digest, ONE_NAME, lambda: f"{node.id} holds other bytes as {key}")
        process = (node.id, node.start)
        number = number_of(key)
        self.held[key.round, key.chunk][info.digest].add(process)
        self.first_number.setdefault((key.round, key.chunk, info.digest), number)
        floor = self.refused.get((process, key.round), {}).get(key.chunk, SETTLED)
        if number != SETTLED and number < floor:
            looks_for_it = self._owner_now(key) == node.id
            self.require(looks_for_it, REFUSED, lambda: f"{node.id} takes {key} after an answer to {floor}")

    def _owner_now(self, key: ChunkKey) -> str:
        """Of the chunk, under the newest plan of the round."""
        plan = self.plans[key.round, max(number for round, number in self.plans if round == key.round)]
        view = self.views.chosen[plan.view]
        return self._assigned(view, plan)[key.chunk].owner

    def _assigned(self, view: View, plan: Plan) -> dict[int, Assignment]:
        """By chunk of the round."""
        chunks = self.simulation.settings.chunks(plan.round)
        return dict(zip(chunks, assign(view, len(chunks), plan.turns), strict=True))

    def _on_plan(self, plan: Plan) -> None:
        self.plans[plan.round, (plan.epoch, plan.attempt)] = plan
        for turn in plan.turns:
            self.rounds_view[plan.round, (turn.epoch, turn.attempt)] = plan.view

    def _on_held(self, node: SimNode, answer: Held) -> None:
        """From now on it takes means of the plan's numbers only; a chunk's owner may still look for an older one."""
        plan = self.plans.get((answer.round, (answer.epoch, answer.attempt)))
        view = self.views.chosen.get(plan.view) if plan is not None else None
        if plan is None or view is None:
            return
        floors = self.refused[(node.id, node.start), answer.round]
        for chunk, at in self._assigned(view, plan).items():
            if at.owner != node.id:
                floors[chunk] = max(floors.get(chunk, SETTLED), (at.epoch, at.attempt))

    def _on_reduce(self, node: SimNode, effect: Reduce) -> None:
        names, key = effect.contributors, effect.key
        self.require(len(set(names)) == len(names), COUNTED_ONCE, lambda: f"{key} has a name twice: {names}")
        made = self.made[key.round, key.chunk]
        self.require(key not in made, UNTOUCHED, lambda: f"{node.id} makes {key}, as {made[key][0].id} did before")
        view = self.views.newest
        if view is None:
            return
        for earlier, (owner, as_made) in made.items():
            same_round = self._same_making(as_made, effect)
            lost = not self._is_here(view, owner, earlier)
            self.require(
                lost or not same_round or number_of(earlier) > number_of(key),
                UNTOUCHED,
                lambda: f"{node.id} makes {key}, and {owner.id}, which made {earlier}, is in {text_of(view)}",  # noqa: B023
            )
        self._not_held(node, effect, view)
        made[key] = (node, effect)

    def _on_reduced(self, event: Reduced) -> None:
        """Of contributions that are all left out no mean was made."""
        if event.info.total_weight == 0:
            self.made[event.key.round, event.key.chunk].pop(event.key, None)

    def _not_held(self, node: SimNode, effect: Reduce, view: View) -> None:
        """Nobody makes again what a quorum of those who vote now holds, and is there to say so."""
        key = effect.key
        before = self.made[key.round, key.chunk]
        if not all(self._same_making(as_made, effect) for _, as_made in before.values()):
            return  # the round was planned afresh
        for digest, holders in self.held[key.round, key.chunk].items():
            if self.first_number[key.round, key.chunk, digest] < number_of(key):  # or a later plan was slept through
                here = sorted(p[0] for p in holders if self._runs(p) and self._is_voter(view, p))
                text = f"{node.id} makes {key}, and {here} hold one, a quorum of"
                self.require(not is_quorum(view, here), NEVER_REMADE, lambda: f"{text} {text_of(view)}")  # noqa: B023

    def _same_making(self, a: Reduce, b: Reduce) -> bool:
        """Whether both means are of plans over the same view of the round; which a node alone tells to nobody."""
        views = [self.rounds_view.get((r.key.round, number_of(r.key))) for r in (a, b)]
        offers = [{peer: key.attempt for peer, key in r.inputs.items()} for r in (a, b)]
        same = all(offers[0][peer] == offers[1][peer] for peer in offers[0].keys() & offers[1].keys())
        return a.members == b.members and same and (None in views or views[0] == views[1])

    def _runs(self, process: Process) -> bool:
        node = self.simulation.nodes[process[0]]
        return node.running and node.start == process[1]

    @staticmethod
    def _is_of(member: Member | None, process: Process) -> bool:
        return member is not None and process[1] <= member.incarnation < process[1] + STARTS_APART

    def _is_voter(self, view: View, process: Process) -> bool:
        member = view.member(process[0])
        return member is not None and member.voter and self._is_of(member, process)

    def _is_here(self, view: View, node: SimNode, made: ChunkKey) -> bool:
        """Whether the owner that made this mean is still the member that the plan was made with."""
        planned = self.views.chosen.get(self.rounds_view.get((made.round, number_of(made)), 0))
        before, now = planned.member(node.id) if planned else None, view.member(node.id)
        return node.running and before is not None and now is not None and before.incarnation == now.incarnation

    # --- commits ------------------------------------------------------------------------------------------------

    def _on_have(self, node: SimNode, have: Have) -> None:
        """It holds means of exactly the numbers of its plan."""
        plan = self.plans.get((have.round, (have.epoch, have.attempt)))
        view = self.views.chosen.get(plan.view) if plan is not None else None
        if plan is None or view is None:
            return
        digests = []
        for chunk, at in self._assigned(view, plan).items():
            key = mean_key(have.round, chunk, (at.epoch, at.attempt))
            held = node.chunks.get(self.adopted.get(key, key))
            if held is None:
                self.require(False, HONEST, lambda: f"{node.id} says {text_of(have)}, and lacks {key}")  # noqa: B023
                return
            digests.append(held.digest)
        right = blake3(b"".join(digests)).digest() == have.digest
        self.require(right, HONEST, lambda: f"{node.id} says {text_of(have)}, and the means of its plan are others")
        self.means[have.digest] = tuple(digests)
        if have.safe and have.round not in self.commits:  # else it is said for its measurements
            safe = self._is_on_disk(node.disk, have.round, tuple(digests))
            self.require(safe, ON_DISK, lambda: f"{node.id} says {text_of(have)}, and could lose that by a crash")

    def _is_on_disk(self, disk: Disk, round: int, digests: tuple[bytes, ...]) -> bool:
        """The means, or what comes after them. What was damaged was there."""
        means = disk.means.get(round)
        return (means is not None and tuple(means.digests) == digests) or restore(disk)[0][0] > round

    def _is_safe(self, commit: Commit) -> None:
        """A view with a commit is chosen: whatever crashes now, its means are there."""
        base = self.views.chosen.get(self.seen_view - 1)
        chunks = self.means.get(commit.digest)
        if base is None or chunks is None:
            return
        disks = {v.id: self.simulation.disks[v.id] for v in base.voters}
        safe = [id for id, d in disks.items() if d.wiped or d.faults or self._is_on_disk(d, commit.round, chunks)]
        everybody = any(d.was_full for d in disks.values()) and all(
            self._held_by(voter, commit.round, chunk, digest)
            for voter in base.voters
            if voter.active
            for chunk, digest in zip(self.simulation.settings.chunks(commit.round), chunks, strict=True)
        )
        self.require(
            everybody or is_quorum(base, safe),
            SAFE,
            lambda: f"{text_of(commit)} is on those of {safe}, after {text_of(base)}",
        )

    def on_accepted(self, node: SimNode, view: View) -> None:
        """A view is accepted. If it brings a commit, a quorum of those who decide on it must hold the means."""
        commit, base = view.commit, self.views.chosen.get(view.number - 1)
        if commit is None or base is None or commit == base.commit or (view.number, commit.digest) in self.looked_at:
            return
        self.looked_at.add((view.number, commit.digest))
        means = dict(zip(self.simulation.settings.chunks(commit.round), self._means_of(commit), strict=False))
        holders = [
            voter.id for voter in base.voters if all(self._held_by(voter, commit.round, c, d) for c, d in means.items())
        ]
        self.require(
            bool(means) and is_quorum(base, holders),
            QUORUM_HOLDS,
            lambda: f"{node.id} accepts {text_of(commit)}, which {holders} hold; it comes after {text_of(base)}",
        )

    def _held_by(self, voter: Member, round: int, chunk: int, digest: bytes) -> bool:
        """It held it, if it has crashed since."""
        return any(p[0] == voter.id and self._is_of(voter, p) for p in self.held[round, chunk][digest])

    def _means_of(self, commit: Commit) -> tuple[bytes, ...]:
        """In the order of the round's chunks; () if nobody has them."""
        return self.means.get(commit.digest) or self._find(commit)

    def _find(self, commit: Commit) -> tuple[bytes, ...]:
        """The chunks of the means of this common digest, which some node holds."""
        chunks = self.simulation.settings.chunks(commit.round)
        for node in self.simulation.nodes.values():
            found: dict[int, dict[bytes, None]] = {chunk: {} for chunk in chunks}
            for key, info in node.chunks.items():
                if key.kind == "mean" and key.round == commit.round:
                    found[key.chunk][info.digest] = None
            for digests in islice(product(*found.values()), MAX_COMBINATIONS):
                if blake3(b"".join(digests)).digest() == commit.digest:
                    self.means[commit.digest] = digests
                    return digests
        return ()

    # --- the outer step -----------------------------------------------------------------------------------------

    def _on_apply(self, node: SimNode, effect: Apply) -> None:
        infos = []
        chunks = self.simulation.settings.chunks(effect.round)
        for chunk in chunks:
            key = mean_key(effect.round, chunk, SETTLED)
            info = node.chunks.get(key)
            if info is None:
                self.require(False, ONLY_COMMITTED, lambda: f"{node.id} applies {key} without having it")  # noqa: B023
                return
            same = self.applied.setdefault(key, info.digest) == info.digest
            self.require(same, SAME_BYTES, lambda: f"{node.id} applies other bytes as {key}")  # noqa: B023
            infos.append(info)
        commit = self.commits.get(effect.round)
        digest = blake3(b"".join(i.digest for i in infos)).digest()
        self.require(
            commit is not None and commit.digest == digest,
            ONLY_COMMITTED,
            lambda: f"{node.id} applies {digest.hex()[:8]} for round {effect.round}; committed is {text_of(commit)}",
        )
        for chunk, info in zip(chunks, infos, strict=True):
            self._used_up_if_counted(node, effect, chunk, info)

    def _on_advance(self, node: SimNode, round: int) -> None:
        """The same of means that are taken from the disk."""
        means, commit = node.disk.means[round], self.commits.get(round)
        digest = blake3(b"".join(means.digests)).digest()
        self.require(
            commit is not None and commit.digest == digest and means.commit == commit and not means.missing,
            ONLY_COMMITTED,
            lambda: f"{node.id} applies {digest.hex()[:8]} for round {round}; committed is {text_of(commit)}",
        )
        for chunk, info in means.infos.items():
            key = mean_key(round, chunk, SETTLED)
            same = self.applied.setdefault(key, info.digest) == info.digest
            self.require(same, SAME_BYTES, lambda: f"{node.id} applies other bytes as {key}")  # noqa: B023

    def _on_load(self, node: SimNode, round: int) -> None:
        """What the newest commit leads to is known from the commits after it alone."""
        commit, digest = self.commits.get(round), node.disk.snapshots[round].digest
        self.require(
            commit is None or commit.state == digest,
            IN_THE_CHAIN,
            lambda: f"{node.id} loads {digest.hex()[:8]} as the state after {round} rounds; it is {text_of(commit)}",
        )

    def _used_up_if_counted(self, node: SimNode, effect: Apply, chunk: int, info: ChunkInfo) -> None:
        key = ChunkKey(kind="contribution", round=effect.round, chunk=chunk, attempt=effect.rejected)
        own = node.chunks.get(key)
        in_it = own is not None and own.digest in self.simulation.store.parts.get(info.digest, ())
        used_up = effect.position >= 0 and effect.position in positions(info.contributors)
        if in_it:
            self.require(used_up, COUNTED_ONCE, lambda: f"{node.id} keeps what round {effect.round}, {chunk} counts")
        else:
            self.require(not used_up, NOT_LOST, lambda: f"{node.id} gives up what round {effect.round}, {chunk} lacks")
