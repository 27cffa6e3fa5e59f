"""The properties can fail: one rule of a machine is broken at a time, and the property that is to catch it does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import pytest
from blake3 import blake3
from msgspec.structs import replace

from prime_async.machines import coordinator as coordinator_module
from prime_async.machines import election as election_module
from prime_async.machines import leadership as leadership_module
from prime_async.machines import membership as membership_module
from prime_async.machines.acceptor import Acceptor
from prime_async.machines.attempt import Attempt, Means, Number
from prime_async.machines.ballot import Ballot
from prime_async.machines.catchup import manifest_key
from prime_async.machines.checkpoint import Checkpoint
from prime_async.machines.coordinator import Coordinator
from prime_async.machines.exchange import Exchange
from prime_async.machines.fetches import Fetches
from prime_async.machines.membership import Membership
from prime_async.machines.records import Records
from prime_async.machines.reducing import Reducing
from prime_async.machines.training import Training
from prime_async.machines.vocabulary import (
    Apply,
    CancelFetch,
    CommitReady,
    Effect,
    Event,
    ManifestRead,
    MeansCommitted,
    Reduce,
    Send,
    Settle,
    StoreBallot,
    TakeBack,
    Tell,
)
from prime_async.messages import FIRST_CHAIN, ChunkInfo, ChunkKey, Commit, Ready, Turn, View, bitmap, next_chain
from prime_async.testing import SimNode, SimulationSettings
from prime_async.testing import properties_of_rounds as rounds
from prime_async.testing import properties_of_views as views
from prime_async.testing.ledger import SimLedger
from prime_async.testing.properties import BrokenPropertyError, Properties
from prime_async.testing.schedules import Chaos, run_schedule
from prime_async.testing.store import BrokenModelError
from tests.exploration_kinds import run_kind
from tests.lies import LIES, false_bytes, false_manifest, false_record
from tests.simulation_harness import ALL_MEANS, KEEPS, TIMEOUT_S, points, reach, steady

Run = Callable[[], object]


def is_caught_by(name: str, *runs: Run) -> None:
    """One of the runs breaks this property, before any other one."""
    with pytest.raises(BrokenPropertyError, match=f"^{name}"):
        for run in runs:
            run()


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at this property, which would be broken first."""
    require = Properties._require

    def _require(self: Properties, holds: bool, property: str, what: Callable[[], str]) -> None:  # pickled by name
        require(self, holds or property == name, property, what)

    monkeypatch.setattr(Properties, "_require", _require)


def crashes(victims: tuple[str, ...] = ("n3",), every: int = 6, nodes: int = 4, seconds: float = 30.0) -> list[Run]:
    """The victims crash at many points of a round."""

    def run(data: bytes, victim: str) -> None:
        chaos = Chaos.restored(data)
        chaos.simulation.crash(victim)
        chaos.simulation.run_for(seconds)

    return [
        lambda data=data, victim=victim: run(data, victim)  # type: ignore[misc]
        for _, data in points(steady(nodes), every=every)
        for victim in victims
    ]


def answers_on_the_way() -> list[Run]:
    """An owner is cut off until others make its chunks; then what it had sent arrives, at all moments around that."""

    def run(data: bytes, seconds: float) -> None:
        chaos = Chaos.restored(data)
        for other in ("n0", "n1", "n2"):
            chaos.simulation.cut("n3", other, both_ways=True)
        chaos.simulation.run_for(seconds)
        chaos.simulation.heal()
        chaos.simulation.run_for(3.0)

    return [
        lambda data=data, tenths=tenths: run(data, TIMEOUT_S - 0.5 + tenths / 10)  # type: ignore[misc]
        for _, data in points(steady(4), every=10)
        for tenths in range(30)
    ]


def two_candidates() -> list[Run]:
    """The first in the order is heard of late, and never by the second: both ask for promises at the same time."""

    def run(seconds: float) -> None:
        chaos = steady(5)
        simulation = chaos.simulation
        view = chaos.properties.newest
        assert view is not None
        leader, first, second, *rest = (m.id for m in view.members)
        simulation.crash(leader)
        for other in (second, *rest):
            simulation.cut(first, other, both_ways=True)
        simulation.run_for(seconds)
        simulation.heal()
        simulation.cut(first, second, both_ways=True)
        simulation.run_for(20.0)

    return [lambda k=k: run(TIMEOUT_S - 1 + k / 20) for k in range(60)]  # type: ignore[misc]


def schedules(count: int = 150) -> list[Run]:
    return [lambda seed=seed: run_schedule(seed) for seed in range(count)]  # type: ignore[misc]


def kinds(kind: str, count: int = 60) -> list[Run]:
    return [lambda seed=seed: run_kind(kind, seed) for seed in range(count)]  # type: ignore[misc]


# --- the means of a round -------------------------------------------------------------------------------------------


def test_skipping_the_ask_before_a_mean_is_made_again_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reducing, "own", lambda self, chunk: self.to_open.append(chunk))
    is_caught_by(rounds.NEVER_REMADE, *crashes(("n1", "n2", "n3"), every=2))


def test_counting_a_mean_of_a_lower_number_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def any_number(self: Means, numbers: Mapping[int, Number]) -> bytes | None:
        best = {c: self.best(c, n) for c, n in numbers.items()}
        if any(n is None for n in best.values()):
            return None
        return blake3(b"".join(self.held[c][n].digest for c, n in sorted(best.items()) if n is not None)).digest()

    monkeypatch.setattr(Means, "digest", any_number)
    without(rounds.ON_DISK, monkeypatch)
    is_caught_by(rounds.HONEST, *crashes(("n1", "n2", "n3"), every=2))


def test_taking_late_bytes_after_an_answer_to_an_ask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The get of a mean from its lost owner goes on: its answer was on the way."""
    cancel = Fetches.cancel

    def lazy(self: Fetches, now: float, peer: str, key: ChunkKey, out: list[Effect]) -> None:
        cancel(self, now, peer, key, out)
        out[:] = [e for e in out if not (isinstance(e, CancelFetch) and e.key.kind == "mean")]

    monkeypatch.setattr(Fetches, "cancel", lazy)
    is_caught_by(rounds.REFUSED, *answers_on_the_way())


def test_making_all_chunks_again_when_one_owner_is_lost_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    replan = Coordinator._replan

    def thorough(self: Coordinator, out: list[Effect]) -> None:
        attempt = self.attempt
        assert attempt is not None
        assert self.view is not None
        all_of_it = bitmap([i for i, m in enumerate(attempt.view.members) if m.id != self.me])
        turn = Turn(epoch=self.view.epoch, attempt=self.next_attempt, lost=all_of_it)
        replan(self, out)
        if self.attempt is not None:
            plan = replace(self.attempt.plan, turns=(*attempt.plan.turns, turn))
            out[:] = [e for e in out if not isinstance(e, Send)]
            self._open(type(attempt).of(plan, attempt.view, self.fragments.chunks(plan.round)), out)

    monkeypatch.setattr(Coordinator, "_replan", thorough)
    monkeypatch.setattr(Reducing, "own", lambda self, chunk: self.to_open.append(chunk))
    is_caught_by(f"({rounds.UNTOUCHED}|{rounds.NEVER_REMADE})", *crashes(every=2))


def test_counting_a_member_twice_in_a_mean_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce = Reducing._reduce_if_all_here

    def doubled(self: Reducing, now: float, chunk: int, out: list[Effect]) -> None:
        before = len(out)
        reduce(self, now, chunk, out)
        for i in range(before, len(out)):
            made = out[i]
            if isinstance(made, Reduce):
                names, weights = made.contributors, made.weights
                out[i] = replace(made, contributors=(*names, names[0]), weights=(*weights, weights[0]))

    monkeypatch.setattr(Reducing, "_reduce_if_all_here", doubled)
    is_caught_by(rounds.COUNTED_ONCE, *schedules(5))


# --- commits --------------------------------------------------------------------------------------------------------


def test_applying_before_the_commit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    say_have = Exchange._say_have

    def eager(self: Exchange, now: float, out: list[Effect]) -> None:
        say_have(self, now, out)
        attempt = self.chunks.attempt
        if attempt is None or self.chunks.plan_digest is None or self.hand_over.done:
            return
        self.hand_over.done = True
        exceptions = tuple(attempt.key(c) for c, n in attempt.numbers.items() if n != attempt.number)
        epoch, number = attempt.number
        commit = Commit(
            round=attempt.round,
            epoch=epoch,
            attempt=number,
            state=self.hand_over.state,
            digest=bytes(32),
            chain=bytes(32),
            view=attempt.view.number,
        )
        settle = Settle(
            round=attempt.round,
            epoch=epoch,
            attempt=number,
            commit=commit,
            previous=self.hand_over.chain,
            exceptions=exceptions,
        )
        out.append(settle)
        place = attempt.members.index(self.settings.me) if self.settings.me in attempt.weights else -1
        committed = MeansCommitted(round=attempt.round, position=place, chain=commit.chain)
        out.append(Tell(actor="training", event=committed))

    monkeypatch.setattr(Exchange, "_say_have", eager)
    is_caught_by(rounds.ONLY_COMMITTED, *schedules(5))


def test_committing_what_no_quorum_holds_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def rash(self: Coordinator, attempt: Attempt) -> Commit | None:
        for have in self.haves.values():
            chain = self.view.commit.chain if self.view and self.view.commit else FIRST_CHAIN
            return Commit(
                round=attempt.round,
                epoch=attempt.plan.epoch,
                attempt=attempt.plan.attempt,
                state=have.state,
                digest=have.digest,
                chain=next_chain(chain, have.state, have.digest),
                view=attempt.plan.view,
            )
        return None

    monkeypatch.setattr(Coordinator, "_commit", rash)
    without(rounds.SAFE, monkeypatch)
    is_caught_by(rounds.QUORUM_HOLDS, *schedules(50), *kinds("five of twelve", 5))


def test_a_chain_that_does_not_follow_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "next_chain", lambda _chain, _state, digest: digest)
    is_caught_by(rounds.ONE_COMMIT, *schedules(20))


# --- the ledger ----------------------------------------------------------------------------------------------------


def hasty_have(self: Exchange, now: float, out: list[Effect]) -> None:
    """As if what is to be put on disk were there at once."""
    if self.chunks.attempt is not None and self.chunks.plan_digest is not None:
        self.stored = self.chunks.attempt.number
    ADVANCE(self, now, out)


ADVANCE = Exchange._advance


def test_saying_have_before_the_means_are_on_disk_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exchange, "_advance", hasty_have)
    without(rounds.SAFE, monkeypatch)
    is_caught_by(rounds.ON_DISK, *schedules(5))


def test_a_commit_of_means_that_crashes_could_lose_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if nobody looked at who says what."""
    monkeypatch.setattr(Exchange, "_advance", hasty_have)
    without(rounds.ON_DISK, monkeypatch)
    is_caught_by(rounds.SAFE, *schedules(40))


def joins_among_liars(kind: str, false: Callable[[Chaos, ChunkInfo], ChunkInfo], settings: SimulationSettings) -> Run:
    """Whatever the joiner asks for of this kind is false; of means, those of the rounds before the last."""

    def run() -> None:
        chaos = steady(4, settings=settings)
        reach(chaos, 13, 80)

        def lies(_server: SimNode, key: ChunkKey, info: ChunkInfo) -> ChunkInfo:
            if kind == "state" and key.kind == "manifest":
                return false_manifest(chaos, info)
            if key.kind != kind or (kind == "mean" and key.round > 11):
                return info
            return false(chaos, info)

        chaos.simulation.store.lies = lies
        chaos.simulation.start("n4")
        chaos.simulation.run_for(30.0)

    return run


def test_believing_a_record_that_the_chain_does_not_name_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Records, "_fits", lambda _self, _record, _round, _chain: True)
    is_caught_by(rounds.ONLY_COMMITTED, joins_among_liars("record", false_record, ALL_MEANS))


def test_taking_a_mean_that_is_not_the_one_of_its_record_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimLedger, "is_right", lambda _self, _info, _expected: True)
    with pytest.raises(BrokenModelError, match="without its means"):
        joins_among_liars("mean", false_bytes, ALL_MEANS)()


def test_believing_a_manifest_that_the_chain_does_not_name_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(self: Checkpoint, _now: float, read: ManifestRead, out: list[Effect]) -> None:
        self.download.done(manifest_key(read.round))
        self.catch_up.on_manifest(read, out)

    monkeypatch.setattr(Checkpoint, "_on_manifest", trusting)
    is_caught_by(rounds.IN_THE_CHAIN, joins_among_liars("state", false_bytes, KEEPS))


def test_where_all_lie_and_nobody_is_believed_nothing_is_broken() -> None:
    for kind, false, settings in LIES:
        joins_among_liars(kind, false, settings)()


# --- progress -------------------------------------------------------------------------------------------------------


def told_position(training: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Training.handle

    def other(self: Training, now: float, event: Event) -> list[Effect]:
        effects = handle(self, now, event)
        return [replace(e, position=training(e.position)) if isinstance(e, Apply) else e for e in effects]

    monkeypatch.setattr(Training, "handle", other)


def test_keeping_progress_that_is_counted_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    told_position(lambda _position: -1, monkeypatch)
    is_caught_by(rounds.COUNTED_ONCE, *schedules(5))


def test_giving_up_progress_that_is_not_counted_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    told_position(lambda position: max(position, 0), monkeypatch)
    is_caught_by(f"({rounds.NOT_LOST}|{rounds.COUNTED_ONCE})", *schedules(40))


@pytest.mark.parametrize("mode", ["overlapped", "streaming", "eager"])
def test_contributing_again_what_a_missed_commit_counted_is_caught(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    def keep(self: Training, round: int, out: list[Effect]) -> None:
        self.phase = "restoring"
        self.account.take_back()
        out.append(TakeBack(round=round))

    monkeypatch.setattr(Training, "_give_up", keep)
    is_caught_by(rounds.COUNTED_ONCE, *(lambda seed=seed: run_schedule(seed, mode) for seed in range(60)))


# --- views ----------------------------------------------------------------------------------------------------------


def test_deciding_a_view_without_a_majority_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leadership_module, "is_quorum", lambda _view, _ids: True)
    is_caught_by(views.QUORUM_STORED, *schedules(40))


def test_leading_without_the_promises_of_a_majority_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def lenient(
        _view: View | None, _before: View | None, _decided: bool, granted: Mapping[str, Collection[int]]
    ) -> bool:
        return bool(granted)

    monkeypatch.setattr(election_module, "decides", lenient)
    is_caught_by(f"({views.ONE_LEADER}|{views.VIEWS_AGREE}|{views.QUORUM_STORED})", *kinds("islands"), *schedules())


def test_forgetting_a_promise_over_a_restart_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Membership.__post_init__

    def forgetful(self: Membership) -> None:
        begin(self)
        self.acceptor.ballot = replace(self.acceptor.ballot, promised=0, promised_to="")

    monkeypatch.setattr(Membership, "__post_init__", forgetful)
    is_caught_by(views.PROMISE_KEPT, *schedules())


def test_answering_before_it_is_on_disk_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(self: Acceptor, ballot: Ballot, out: list[Effect], answers: Sequence[Send] = ()) -> None:
        self.seq += 1
        self.ballot = ballot
        out.append(StoreBallot(seq=self.seq, ballot=ballot))
        out += answers

    monkeypatch.setattr(Acceptor, "store", hasty)
    is_caught_by(f"({views.PROMISE_KEPT}|{views.QUORUM_STORED})", *schedules(5))


def test_promising_one_epoch_to_two_candidates_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    promise = Membership._on_prepare

    def generous(self: Membership, now: float, peer: str, prepare: object, out: list[Effect]) -> None:
        ballot = self.acceptor.ballot
        self.acceptor.ballot = replace(ballot, promised=max(0, ballot.promised - 1))
        promise(self, now, peer, prepare, out)  # type: ignore[arg-type]
        if self.acceptor.ballot.promised < ballot.promised:
            self.acceptor.ballot = ballot

    monkeypatch.setattr(Membership, "_on_prepare", generous)
    is_caught_by(f"({views.ONE_PROMISE}|{views.ONE_LEADER})", *two_candidates())


# --- going on -------------------------------------------------------------------------------------------------------


def test_a_run_that_hangs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that does not repeat its plan: whoever misses it is waited for until the limit."""
    on_ready = Coordinator.on_ready

    def deaf(self: Coordinator, now: float, peer: str, ready: Ready, out: list[Effect]) -> None:
        if self.attempt is None:
            on_ready(self, now, peer, ready, out)

    monkeypatch.setattr(Coordinator, "on_ready", deaf)
    with pytest.raises(AssertionError, match="not within"):
        for run in schedules(60):
            run()


def test_a_leader_that_does_not_hear_what_cannot_be_used_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect: the owners of such contributions asked for them for ever."""
    monkeypatch.setattr(Coordinator, "on_unusable", lambda *_: None)
    with pytest.raises(AssertionError, match="not within"):
        for run in schedules(60):
            run()


def test_a_leader_that_commits_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Membership.handle

    def forgetful(self: Membership, now: float, event: Event) -> list[Effect]:
        return [] if isinstance(event, CommitReady) else handle(self, now, event)

    monkeypatch.setattr(membership_module.Membership, "handle", forgetful)
    with pytest.raises(AssertionError, match="not within"):
        run_schedule(1)


def test_without_a_broken_rule_the_same_runs_break_nothing() -> None:
    late = answers_on_the_way()[::25]
    for run in (*crashes(every=20), *kinds("islands", 5), *late, *two_candidates()[::3]):
        run()
