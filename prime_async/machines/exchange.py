"""A member's part of a round: fetch and reduce the chunks it owns, fetch the means of the others.

The rules:

* From ``ContributionFixed`` until the round is committed this node's contribution does not change. ``Ready`` goes to
  the leader until its plan comes; with weight 0 while there is no contribution, so that a node that missed a message
  learns of a plan or a commit, and can follow. It is repeated until this node holds all means: the answer is the
  newest plan.
* Under a plan, each owner fetches the chunks it owns from every contributor, a few chunks at a time and in chunk
  order, and reduces a chunk when all are there. At the same time every member fetches the other means, each from its
  owner, who answers when it has made it. The two have windows of their own: a mean that is waited for must not hold
  up the contribution that it is made of.
* A contributor that leaves the view, says that its bytes are gone, does not serve them in time, or serves invalid ones,
  is left out of the chunks that are still open. Each mean's header says who is in it.
* An owner that cannot be reached for a moment is asked again: a member that does not have the mean either would let us
  wait for it. A mean that its owner does not give is asked of the others in turn, and once it is committed, of the
  leader first. If the leader says that it is gone, the run has moved on, and this node fetches the outer state.
* A plan with a higher (epoch, attempt) replaces the one before it: all fetches are abandoned and begin again.
* Means are served under the plan's numbers, and say by their positions in the plan's view who is in them. So who has a
  contribution and hears of a commit without its plan waits for the plan, which the leader repeats with the commit:
  otherwise it could not tell whether its progress is counted. Who has none follows at once.
* ``Have`` goes to the leader until its commit comes. Only committed means are handed to the training. Who holds other
  means than the committed ones fetches those from the leader; if they still differ, or the chain does not fit, it
  fetches the outer state.

May be lost: every message. Never believed: a plan or commit that does not come from the leader of the view.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from blake3 import blake3
from msgspec import Struct

from prime_async.machines.attempt import Attempt
from prime_async.machines.coordinator import Answer, Coordinator, next_chain
from prime_async.machines.facts import ContributorLeftOut, RoundCommitted, RoundIgnored, RoundPlanned, StateDiverged
from prime_async.machines.owners import chunk_owners
from prime_async.machines.vocabulary import (
    CancelFetches,
    ContributionFixed,
    Effect,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    FetchState,
    Forget,
    Heard,
    MeansCommitted,
    Reduce,
    Reduced,
    Report,
    Send,
    StateAt,
    Tell,
    Tick,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import Behind, ChunkKey, Commit, Have, Message, Plan, Ready, View, ViewUpdate, positions

VIEWS_KEPT = 8


class ExchangeSettings(Struct, frozen=True, kw_only=True):
    """What an exchange machine is made with. Windows count gets under way: chunks reduced, means per source."""

    me: str
    chunk_count: int
    min_members: int = 1
    chunk_window: int = 4
    mean_window: int = 4
    fetch_timeout_s: float = 60.0
    repeat_s: float = 1.0
    retry_s: float = 0.5


@dataclass(slots=True)
class Exchange:
    """See the module's rules."""

    settings: ExchangeSettings
    view: View | None = None
    views: dict[tuple[int, int], View] = field(default_factory=dict)
    round: int | None = None
    weight: int | None = None  # of our contribution to the round, once it is fixed
    attempt: Attempt | None = None
    commit: Commit | None = None
    handed_over: bool = False
    chain: bytes | None = None  # unknown until the first commit that this node sees
    under_way: set[tuple[str, ChunkKey]] = field(default_factory=set)
    again: list[tuple[float, str, ChunkKey]] = field(default_factory=list)  # fetches to try again, and when
    repeat_at: float | None = None
    wake_at: float | None = None
    coordinator: Coordinator = field(init=False)

    def __post_init__(self) -> None:
        s = self.settings
        self.coordinator = Coordinator(me=s.me, chunk_count=s.chunk_count, min_members=s.min_members)

    # --- the one way in -----------------------------------------------------------------------------------------

    def handle(self, now: float, event: Event) -> list[Effect]:
        out: list[Effect] = []
        match event:
            case ViewChanged(view=view):
                self._on_view(now, view, out)
            case StateAt(round=round):
                self._on_state(now, round, out)
            case ContributionFixed(round=round, weight=weight):
                if round == self.round:
                    self.weight = weight
                    self._say_ready(now, out)
            case Heard(peer=peer, message=message):
                if peer != self.settings.me:  # nobody but a copy of our key says that
                    self._on_message(now, peer, message, out)
            case Fetched():
                self._on_fetched(now, event, out)
            case FetchFailed():
                self._on_fetch_failed(now, event, out)
            case Reduced():
                self._on_reduced(now, event, out)
            case Tick():
                self._on_tick(now, out)
            case _:
                raise TypeError(f"exchange has no use for {type(event).__name__}")
        out += [Report(fact=fact) for fact in self.coordinator.take_facts()]
        self._schedule(out)
        return out

    def _on_view(self, now: float, view: View, out: list[Effect]) -> None:
        new_leader = self.view is None or self.view.leader != view.leader
        self.view = view
        self._keep_view(view)
        self._leave_out_the_gone(out)
        self._deliver(now, self.coordinator.on_view(view), out)
        if new_leader:
            self._repeat(now, out)

    def _keep_view(self, view: View) -> None:
        self.views[view.epoch, view.number] = view
        if len(self.views) > VIEWS_KEPT:
            newest = self.view.number if self.view else 0
            del self.views[max(self.views, key=lambda v: abs(v[1] - newest))]

    def _on_state(self, now: float, round: int, out: list[Effect]) -> None:
        if self.round == round:
            return
        if not (self.handed_over and self.round is not None and round == self.round + 1):
            self.chain = None  # the state came from a member, past commits that we did not see
        self.round, self.weight, self.attempt, self.commit, self.handed_over = round, None, None, None, False
        self._abandon(out)
        out.append(Forget(means_before=round - 1, contributions_before=round))
        self._deliver(now, self.coordinator.on_state(round), out)
        self.repeat_at = now + self.settings.repeat_s

    # --- to and from the leader ---------------------------------------------------------------------------------

    def _deliver(self, now: float, answers: list[Answer], out: list[Effect]) -> None:
        for peers, message in answers:
            out += [Send(peer=p, message=message) for p in peers if p != self.settings.me]
            if self.settings.me in peers:
                self._on_message(now, self.settings.me, message, out)

    def _to_leader(self, now: float, message: Ready | Have, out: list[Effect]) -> None:
        if self.view is None:
            return
        if self.view.leader == self.settings.me:
            self._on_message(now, self.settings.me, message, out)
        else:
            out.append(Send(peer=self.view.leader, message=message))

    def _on_message(self, now: float, peer: str, message: Message, out: list[Effect]) -> None:
        from_leader = self._is_leader(peer)
        match message:
            case Ready():
                self._deliver(now, self.coordinator.on_ready(peer, message), out)
            case Have():
                self._deliver(now, self.coordinator.on_have(peer, message), out)
            case ViewUpdate(view=view) if from_leader:
                self._keep_view(view)  # it may be older than ours: a plan refers to it
            case Plan() if from_leader:
                self._on_plan(peer, message, out)
            case Commit() if from_leader:
                self._on_commit(message, out)
            case Behind(round=round) if from_leader and self.round is not None and round > self.round:
                out.append(Tell(actor="checkpoint", event=FetchState()))
            case _:
                pass  # late, or from one who does not lead

    def _is_leader(self, peer: str) -> bool:
        return self.view is not None and peer == self.view.leader

    def _say_ready(self, now: float, out: list[Effect]) -> None:
        assert self.round is not None
        self.repeat_at = now + self.settings.repeat_s
        self._to_leader(now, Ready(round=self.round, weight=self.weight or 0), out)

    def _say_have(self, now: float, out: list[Effect]) -> None:
        attempt = self.attempt
        if attempt is None or attempt.digest is None:
            return
        self.repeat_at = now + self.settings.repeat_s
        have = Have(round=attempt.round, epoch=attempt.epoch, attempt=attempt.attempt, digest=attempt.digest)
        self._to_leader(now, have, out)

    def _repeat(self, now: float, out: list[Effect]) -> None:
        """Say again what the leader may not have heard."""
        if self.round is None or self.commit is not None:
            return
        self.repeat_at = now + self.settings.repeat_s
        if self.attempt is not None and self.attempt.digest is not None:
            self._say_have(now, out)
        else:
            self._say_ready(now, out)

    # --- a plan -------------------------------------------------------------------------------------------------

    def _on_plan(self, peer: str, plan: Plan, out: list[Effect]) -> None:
        newer = self.attempt is None or (plan.epoch, plan.attempt) > self.attempt.number
        if plan.round != self.round or self.commit is not None or not newer:
            return
        view = self.views.get((plan.epoch, plan.view))
        if view is None:
            return  # the view is on its way, and the plan will be repeated
        who = positions(plan.contributors)
        if len(who) != len(plan.weights) or not who or who[-1] >= len(view.members) or not view.active:
            out.append(Report(fact=RoundIgnored(peer=peer, round=plan.round, reason="the plan does not fit its view")))
            return
        self._abandon(out)
        weights = {view.members[i].id: w for i, w in zip(who, plan.weights, strict=True)}
        attempt = self._new_attempt(plan.round, plan.epoch, plan.attempt, view, weights)
        me = self.settings.me
        attempt.to_open.extend(c for c, owner in enumerate(attempt.owners) if owner == me)
        for chunk, owner in enumerate(attempt.owners):
            if owner != me:
                attempt.means_wanted.setdefault(owner, deque()).append(chunk)
        owned = len(attempt.to_open)
        fact = RoundPlanned(
            round=plan.round, epoch=plan.epoch, attempt=plan.attempt, contributors=len(who), chunks_owned=owned
        )
        out.append(Report(fact=fact))
        self._pump(out)

    def _new_attempt(self, round: int, epoch: int, attempt: int, view: View, weights: dict[str, int]) -> Attempt:
        self.attempt = Attempt(
            round=round,
            epoch=epoch,
            attempt=attempt,
            members=tuple(m.id for m in view.members),
            incarnations={m.id: m.incarnation for m in view.members},
            owners=chunk_owners(view, self.settings.chunk_count) if view.active else (),
            weights=weights,
        )
        return self.attempt

    def _abandon(self, out: list[Effect]) -> None:
        out.append(CancelFetches())
        self.under_way.clear()
        self.again.clear()

    def _fetch(self, peer: str, key: ChunkKey, out: list[Effect]) -> None:
        self.under_way.add((peer, key))
        out.append(Fetch(peer=peer, key=key, timeout_s=self.settings.fetch_timeout_s))

    def _pump(self, out: list[Effect]) -> None:
        """Begin as much as the windows allow."""
        attempt = self.attempt
        if attempt is None:
            return
        while attempt.to_open and len(attempt.awaited) + len(attempt.reducing) < self.settings.chunk_window:
            self._open_chunk(attempt, attempt.to_open.popleft(), out)
        for source, chunks in attempt.means_wanted.items():
            while chunks and attempt.under_way.get(source, 0) < self.settings.mean_window:
                attempt.under_way[source] = attempt.under_way.get(source, 0) + 1
                self._fetch(source, attempt.key(chunks.popleft()), out)

    def _open_chunk(self, attempt: Attempt, chunk: int, out: list[Effect]) -> None:
        here = attempt.still_here(self.view)
        attempt.left_out[chunk] = set()
        attempt.awaited[chunk] = {p for p in attempt.weights if p != self.settings.me}
        key = ChunkKey(kind="contribution", round=attempt.round, chunk=chunk)
        for peer in attempt.weights:
            if peer == self.settings.me:
                if self.weight is None:  # it was an earlier start of this node that was ready
                    self._leave_out(attempt, chunk, peer, "left the run", out)
            elif peer in here:
                self._fetch(peer, key, out)
            else:
                self._leave_out(attempt, chunk, peer, "left the run", out)
        self._reduce_if_all_here(attempt, chunk, out)

    def _leave_out(self, attempt: Attempt, chunk: int, peer: str, reason: str, out: list[Effect]) -> None:
        attempt.awaited[chunk].discard(peer)
        attempt.left_out[chunk].add(peer)
        fact = ContributorLeftOut(round=attempt.round, chunk=chunk, peer=peer, reason=reason)
        out.append(Report(fact=fact))

    def _leave_out_the_gone(self, out: list[Effect]) -> None:
        attempt = self.attempt
        if attempt is None:
            return
        here = attempt.still_here(self.view)
        for chunk in sorted(attempt.awaited):
            for peer in sorted(attempt.awaited[chunk] - here):
                self._leave_out(attempt, chunk, peer, "left the run", out)
            self._reduce_if_all_here(attempt, chunk, out)
        self._pump(out)

    def _reduce_if_all_here(self, attempt: Attempt, chunk: int, out: list[Effect]) -> None:
        if chunk not in attempt.awaited or attempt.awaited[chunk]:
            return
        del attempt.awaited[chunk]
        attempt.reducing.add(chunk)
        in_it = {p: w for p, w in attempt.weights.items() if p not in attempt.left_out[chunk]}
        out.append(
            Reduce(
                key=attempt.key(chunk),
                contributors=tuple(in_it),
                weights=tuple(in_it.values()),
                members=attempt.members,
            )
        )

    # --- chunks -------------------------------------------------------------------------------------------------

    def _on_fetched(self, now: float, event: Fetched, out: list[Effect]) -> None:
        attempt, key = self.attempt, event.key
        if attempt is None or (event.peer, key) not in self.under_way:
            return
        self.under_way.discard((event.peer, key))
        if key.kind == "contribution":
            if key.chunk in attempt.awaited:
                attempt.awaited[key.chunk].discard(event.peer)
                self._reduce_if_all_here(attempt, key.chunk, out)
        else:
            attempt.under_way[event.peer] -= 1
            attempt.digests[key.chunk] = event.info.digest
            self._if_complete(now, out)
        self._pump(out)

    def _on_fetch_failed(self, now: float, event: FetchFailed, out: list[Effect]) -> None:
        attempt, key = self.attempt, event.key
        if attempt is None or (event.peer, key) not in self.under_way:
            return
        self.under_way.discard((event.peer, key))
        if key.kind == "mean" and event.fault == "gone" and self._is_leader(event.peer):
            self._start_over(out)
            return
        if key.kind == "mean":
            attempt.under_way[event.peer] -= 1
            self.again.append((now + self.settings.retry_s, self._source_after(event), key))
        elif event.fault == "unreachable":
            self.again.append((now + self.settings.retry_s, event.peer, key))
        elif key.chunk in attempt.awaited and event.peer in attempt.awaited[key.chunk]:
            self._leave_out(attempt, key.chunk, event.peer, event.fault, out)
            self._reduce_if_all_here(attempt, key.chunk, out)
        self._pump(out)

    def _source_after(self, failed: FetchFailed) -> str:
        """Who to ask for a mean that did not come."""
        assert self.view is not None
        tried, leader = failed.peer, self.view.leader
        members = [m.id for m in self.view.members if m.id != self.settings.me]
        if not members or (failed.fault == "unreachable" and tried in members and self.commit is None):
            return tried
        if self.commit is not None and leader in members and tried != leader:
            return leader
        return members[(members.index(tried) + 1) % len(members)] if tried in members else members[0]

    def _on_reduced(self, now: float, event: Reduced, out: list[Effect]) -> None:
        attempt, key = self.attempt, event.key
        if attempt is None or (key.round, key.epoch, key.attempt) != (attempt.round, *attempt.number):
            return
        attempt.reducing.discard(key.chunk)
        attempt.digests[key.chunk] = event.info.digest
        for peer in event.left_out:
            fact = ContributorLeftOut(round=key.round, chunk=key.chunk, peer=peer, reason="its bytes are not valid")
            out.append(Report(fact=fact))
        self._if_complete(now, out)
        self._pump(out)

    def _if_complete(self, now: float, out: list[Effect]) -> None:
        attempt = self.attempt
        if attempt is None or attempt.digest is not None or len(attempt.digests) < self.settings.chunk_count:
            return
        ordered = b"".join(attempt.digests[c] for c in range(self.settings.chunk_count))
        attempt.digest = blake3(ordered).digest()
        if self.commit is None:
            self._say_have(now, out)
        else:
            self._hand_over(out)

    # --- a commit -----------------------------------------------------------------------------------------------

    def _on_commit(self, commit: Commit, out: list[Effect]) -> None:
        if commit.round != self.round or self.commit is not None:
            return
        if self._planned(commit) is None and self.weight is not None:
            return  # we are to repeat what we said, and the plan will come with the commit
        self.commit = commit
        if self.chain is not None and next_chain(self.chain, commit.digest) != commit.chain:
            self._diverged(commit, out)
            self._start_over(out)
            return
        attempt = self._planned(commit)
        if attempt is None or attempt.awaited or attempt.to_open:  # what we own was made before, and is forgotten here
            attempt = self._follow(commit, out)
        self._pump(out)
        if attempt.digest is not None:
            self._hand_over(out)

    def _planned(self, commit: Commit) -> Attempt | None:
        """The attempt that was committed, if this node knows its plan."""
        attempt = self.attempt
        return attempt if attempt is not None and attempt.number == (commit.epoch, commit.attempt) else None

    def _follow(self, commit: Commit, out: list[Effect]) -> Attempt:
        """Fetch all committed means from the leader first. Who is in them is known if their plan is."""
        assert self.view is not None
        self._abandon(out)
        planned = self._planned(commit)
        attempt = self._new_attempt(commit.round, commit.epoch, commit.attempt, self.view, {})
        if planned is not None:
            attempt.members, attempt.weights = planned.members, planned.weights
        attempt.following = True
        attempt.means_wanted[self.view.leader] = deque(range(self.settings.chunk_count))
        return attempt

    def _hand_over(self, out: list[Effect]) -> None:
        assert self.attempt is not None
        assert self.commit is not None
        if self.handed_over:
            return
        commit = self.commit
        if self.attempt.digest != commit.digest:
            self._diverged(commit, out)
            if not self.attempt.following:
                self._follow(commit, out)
                self._pump(out)
            else:
                self._start_over(out)
            return
        self.handed_over, self.chain = True, commit.chain
        out.append(Report(fact=RoundCommitted(round=commit.round, attempt=commit.attempt)))
        members, me = self.attempt.members, self.settings.me
        position = members.index(me) if me in self.attempt.weights and self.weight is not None else -1
        means = MeansCommitted(round=commit.round, epoch=commit.epoch, attempt=commit.attempt, position=position)
        out.append(Tell(actor="training", event=means))

    def _diverged(self, commit: Commit, out: list[Effect]) -> None:
        ours = self.attempt.digest if self.attempt and self.attempt.digest else b""
        leader = self.view.leader if self.view else ""
        fact = StateDiverged(peer=leader, round=commit.round, ours=ours.hex(), theirs=commit.digest.hex())
        out.append(Report(fact=fact))

    def _start_over(self, out: list[Effect]) -> None:
        """Nothing here can be trusted to be the run's: ask for its state, and for this round, anew."""
        self._abandon(out)
        self.attempt, self.commit, self.chain = None, None, None
        out.append(Tell(actor="checkpoint", event=FetchState()))

    # --- time ---------------------------------------------------------------------------------------------------

    def _on_tick(self, now: float, out: list[Effect]) -> None:
        self.wake_at = None
        due = [item for item in self.again if item[0] <= now]
        self.again = [item for item in self.again if item[0] > now]
        for _, peer, key in due:
            if key.kind == "mean" and self.attempt is not None:
                self.attempt.under_way[peer] = self.attempt.under_way.get(peer, 0) + 1
            elif self.attempt is None or peer not in self.attempt.awaited.get(key.chunk, ()):
                continue  # it was left out meanwhile
            self._fetch(peer, key, out)
        if self.repeat_at is not None and now >= self.repeat_at:
            self._repeat(now, out)
            self.repeat_at = now + self.settings.repeat_s

    def _schedule(self, out: list[Effect]) -> None:
        times = [item[0] for item in self.again]
        if self.repeat_at is not None and self.round is not None:
            times.append(self.repeat_at)
        at = min(times, default=None)
        if at is not None and at != self.wake_at:
            self.wake_at = at
            out.append(WakeAt(at=at))
