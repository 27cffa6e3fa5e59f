"""Every rule of fetching the run's outer state, by pure calls."""

from __future__ import annotations

from prime_async.machines.checkpoint import Checkpoint, CheckpointSettings
from prime_async.machines.facts import StateDiverged, StateFetched, StateFetchStarted
from prime_async.machines.vocabulary import (
    AskAgain,
    Begin,
    CancelFetches,
    ChunkImported,
    Effect,
    EndImport,
    Fetch,
    Fetched,
    FetchFailed,
    FetchFault,
    FetchState,
    Halt,
    Halted,
    ImportChunk,
    Imported,
    RunAt,
    StateAt,
    Tick,
    WakeAt,
)
from tests.machine_harness import facts, info, key, of, told

OURS, THEIRS, NEXT = b"o" * 32, b"t" * 32, b"n" * 32


def checkpoint(chunks: int = 3, window: int = 2) -> Checkpoint:
    node = Checkpoint(CheckpointSettings(chunk_count=chunks, window=window))
    node.handle(0.0, StateAt(round=4, digest=OURS))
    return node


def run_at(round: int = 7, digest: bytes = THEIRS, provider: str = "n0") -> RunAt:
    return RunAt(round=round, digest=digest, provider=provider)


def fetching(chunks: int = 3, window: int = 2) -> tuple[Checkpoint, list[Effect]]:
    node = checkpoint(chunks, window)
    node.handle(1.0, run_at())
    return node, node.handle(2.0, Halted())


def came(node: Checkpoint, chunk: int, round: int = 7) -> list[Effect]:
    return node.handle(3.0, Fetched(peer="n0", key=key("state", chunk, round=round), info=info(chunk)))


def imported(node: Checkpoint, chunk: int, round: int = 7) -> list[Effect]:
    return node.handle(3.1, ChunkImported(key=key("state", chunk, round=round)))


def failed(node: Checkpoint, chunk: int, fault: FetchFault = "gone", round: int = 7) -> list[Effect]:
    return node.handle(3.0, FetchFailed(peer="n0", key=key("state", chunk, round=round), fault=fault))


def asked(effects: list[Effect]) -> list[int]:
    return [f.key.chunk for f in of(Fetch, effects)]


def all_in_place(node: Checkpoint, round: int = 7) -> list[Effect]:
    out: list[Effect] = []
    for chunk in range(node.settings.chunk_count):
        came(node, chunk, round)
        out = imported(node, chunk, round)
    return out


def test_training_begins_if_our_state_is_the_runs() -> None:
    assert told(checkpoint().handle(1.0, run_at(4, OURS)), "training") == [Begin(round=4)]


def test_otherwise_training_is_halted_first() -> None:
    for other in (run_at(), run_at(4, THEIRS), run_at(5, OURS)):
        effects = checkpoint().handle(1.0, other)
        assert told(effects, "training") == [Halt()]
        assert not of(Fetch, effects)


def test_chunks_are_fetched_from_the_provider_a_few_at_a_time_and_in_order() -> None:
    node, effects = fetching()
    assert facts(StateFetchStarted, effects) == [StateFetchStarted(round=7, provider="n0")]
    assert asked(effects) == [0, 1]
    effects = came(node, 1)
    assert of(ImportChunk, effects) == [ImportChunk(peer="n0", key=key("state", 1, round=7))]
    assert asked(effects) == []
    assert asked(imported(node, 1)) == [2]


def test_a_state_that_came_whole_is_verified_and_told_to_everybody() -> None:
    node, _ = fetching()
    assert of(EndImport, all_in_place(node)) == [EndImport(round=7)]
    effects = node.handle(4.5, Imported(round=7, digest=THEIRS))
    at = StateAt(round=7, digest=THEIRS)
    assert told(effects, "exchange") == told(effects, "membership") == [at]
    assert told(effects, "training") == [Begin(round=7)]
    assert facts(StateFetched, effects) == [StateFetched(round=7, seconds=2.5)]
    assert told(node.handle(5.0, run_at()), "training") == [Begin(round=7)]


def test_a_state_with_another_digest_is_not_used_and_asked_for_anew() -> None:
    node, _ = fetching()
    all_in_place(node)
    effects = node.handle(4.0, Imported(round=7, digest=b"?" * 32))
    assert facts(StateDiverged, effects)
    assert told(effects, "membership") == [AskAgain()]
    assert not told(effects, "training")
    assert asked(node.handle(5.0, run_at())) == [0, 1]


def test_whatever_goes_wrong_ends_in_asking_where_the_run_is_now() -> None:
    faults: tuple[FetchFault, ...] = ("gone", "late", "unreachable", "invalid")
    for fault in faults:
        node, _ = fetching()
        effects = failed(node, 1, fault)
        assert told(effects, "membership") == [AskAgain()]
        assert of(CancelFetches, effects)
        assert [w.at for w in of(WakeAt, effects)] == [4.0]
        assert asked(node.handle(5.0, run_at(8, NEXT, "n2"))) == [0, 1]
        assert {f.peer for f in of(Fetch, failed(node, 9) + came(node, 0, 8) + imported(node, 0, 8))} == {"n2"}


def test_who_gets_nothing_twice_in_a_row_pauses_before_it_asks_again() -> None:
    """Defect: while its provider applied a round, a joiner asked the leader a hundred times a second."""
    node, _ = fetching()
    assert told(failed(node, 0), "membership") == [AskAgain()]
    node.handle(3.0, run_at())
    effects = failed(node, 0)
    assert not told(effects, "membership")
    assert of(WakeAt, effects) == [WakeAt(at=3.25)]
    assert told(node.handle(3.25, Tick()), "membership") == [AskAgain()]


def test_what_came_of_a_state_stays_when_another_provider_takes_over() -> None:
    node, _ = fetching(chunks=4)
    came(node, 0)
    imported(node, 0)
    failed(node, 1, "unreachable")
    effects = node.handle(5.0, run_at(provider="n2"))
    assert [(f.peer, f.key.chunk) for f in of(Fetch, effects)] == [("n2", 1), ("n2", 2)]


def test_what_came_of_a_state_is_fetched_again_if_its_digest_was_another_or_other_chunks_lie_over_it() -> None:
    wrong, _ = fetching()
    all_in_place(wrong)
    wrong.handle(4.0, Imported(round=7, digest=b"?" * 32))
    assert asked(wrong.handle(5.0, run_at(provider="n2"))) == [0, 1]
    overlaid, _ = fetching()
    came(overlaid, 0)
    imported(overlaid, 0)
    overlaid.handle(4.0, run_at(8, NEXT))
    came(overlaid, 0, 8)
    imported(overlaid, 0, 8)
    failed(overlaid, 1, "gone", 8)
    assert asked(overlaid.handle(5.0, run_at())) == [0, 1]


def test_a_repeated_answer_with_another_provider_does_not_give_up_what_is_on_its_way() -> None:
    """A leader that names another provider each time it is asked would keep us from ever getting a large chunk."""
    node, _ = fetching()
    assert node.handle(3.0, run_at(provider="n2")) == []


def test_a_state_that_was_given_up_while_it_was_put_together_has_no_outcome() -> None:
    """Defect: its digest was compared with that of the next one, which was fetched once more."""
    node, _ = fetching()
    all_in_place(node)
    node.handle(4.0, run_at(8, NEXT))
    all_in_place(node, round=8)
    assert node.handle(5.0, Imported(round=7, digest=THEIRS)) == []
    assert told(node.handle(6.0, Imported(round=8, digest=NEXT)), "training") == [Begin(round=8)]


def test_fetches_are_abandoned_if_our_own_state_turns_out_to_be_the_runs() -> None:
    node, _ = fetching()
    effects = node.handle(3.0, run_at(4, OURS))
    assert of(CancelFetches, effects)
    assert told(effects, "training") == [Begin(round=4)]


def test_it_asks_until_it_is_answered() -> None:
    node, _ = fetching()
    failed(node, 1)
    assert told(node.handle(4.0, Tick()), "membership") == [AskAgain()]
    assert told(node.handle(5.0, Tick()), "membership") == [AskAgain()]
    node.handle(5.1, run_at(8))
    assert node.handle(6.0, Tick()) == []


def test_a_repeated_answer_changes_nothing() -> None:
    node, _ = fetching()
    assert node.handle(3.0, run_at()) == []


def test_a_run_that_moved_on_is_fetched_from_the_beginning() -> None:
    node, _ = fetching()
    effects = node.handle(3.0, run_at(8, NEXT))
    assert of(CancelFetches, effects)
    assert [f.key.round for f in of(Fetch, effects)] == [8, 8]
    assert came(node, 0, round=7) == []  # of the round that was given up
    assert imported(node, 0, round=7) == []


def test_a_run_that_is_at_our_round_after_all_needs_no_fetch() -> None:
    """The node may have applied the round meanwhile."""
    node = checkpoint()
    node.handle(1.0, run_at())
    node.handle(1.5, StateAt(round=7, digest=THEIRS))
    node.handle(1.6, run_at(8, NEXT))
    node.handle(1.7, StateAt(round=8, digest=NEXT))
    assert told(node.handle(2.0, run_at(9, NEXT)), "training") == [Halt()]
    assert told(node.handle(2.1, run_at(8, NEXT)), "training") == [Begin(round=8)]
    assert node.handle(2.2, Halted()) == []  # too late to matter


def test_a_state_that_is_half_replaced_is_not_ours_any_more() -> None:
    """Defect: a late welcome with the round that this node had been at began the training on a mixture."""
    node, _ = fetching()
    came(node, 0)
    effects = node.handle(4.0, run_at(4, OURS))
    assert not told(effects, "training")
    assert [f.key.round for f in of(Fetch, effects)] == [4, 4]


def test_an_exchange_that_cannot_follow_makes_it_ask() -> None:
    node = checkpoint()
    assert told(node.handle(1.0, FetchState()), "membership") == [AskAgain()]
    assert told(node.handle(1.1, FetchState()), "membership") == []  # it is asking
    assert told(node.handle(1.2, run_at(4, OURS)), "training") == [Begin(round=4)]


def test_a_state_without_chunks_is_whole_at_once() -> None:
    node, effects = fetching(chunks=0)
    assert of(EndImport, effects) == [EndImport(round=7)]
    assert told(node.handle(3.0, Imported(round=7, digest=THEIRS)), "training") == [Begin(round=7)]
