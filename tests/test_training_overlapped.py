"""Every rule of a node that goes on with its inner steps while a contribution is exchanged, by pure calls."""

from __future__ import annotations

import pytest

from prime_async.machines.facts import NonFiniteProgress, RoundFinished
from prime_async.machines.training import Training, TrainingSettings
from prime_async.machines.vocabulary import (
    Apply,
    Begin,
    Captured,
    ContributionFixed,
    ContributionTaken,
    Encode,
    Encoded,
    Evaluate,
    Evaluated,
    GiveUp,
    Halt,
    Halted,
    Leave,
    Merge,
    Merged,
    Restore,
    Restored,
    RunSteps,
    Save,
    StateAt,
    StopSteps,
    TakeBack,
)
from prime_async.messages import FIRST_CHAIN
from tests.machine_harness import facts, of, told
from tests.training_harness import DIGEST, applied, done, give, means, seen


def stepping(rounds: int = 0, evaluate_every: int = 0, fragments: int = 1) -> Training:
    settings = TrainingSettings(
        me="n1", inner_steps=10, rounds=rounds, evaluate_every=evaluate_every, overlaps=True, fragments=fragments
    )
    node = Training(settings)
    give(node, StateAt(round=0, digest=DIGEST, chain=FIRST_CHAIN), seen(), Begin(round=0), Evaluated(loss=5.0))
    assert node.phase == "stepping"
    return node


def offered(rounds: int = 0, round: int = 0) -> Training:
    """It has contributed, and steps towards the next contribution."""
    node = stepping(rounds)
    give(node, done(), Captured(round=round), Encoded(round=round, finite=True))
    return node


# --- a round --------------------------------------------------------------------------------------------------------


def test_inner_steps_go_on_as_soon_as_the_local_weights_are_noted() -> None:
    node = stepping()
    assert of(Encode, give(node, done())) == [Encode(round=0, beside=True)]
    assert node.phase == "capturing"
    assert of(RunSteps, give(node, Captured(round=0))) == [RunSteps(round=0, steps=10)]
    effects = give(node, Encoded(round=0, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=0, weight=100)]
    assert (node.phase, node.exchange) == ("stepping", "offered")


def test_the_outer_step_is_taken_beside_the_inner_steps_and_the_local_weights_move_between_two_of_them() -> None:
    node = offered()
    assert give(node, means()) == [Apply(round=0, position=1, beside=True)]
    effects = give(node, applied())
    for actor in ("checkpoint", "exchange", "membership"):
        assert told(effects, actor) == [StateAt(round=1, digest=DIGEST, chain=FIRST_CHAIN)]
    assert of(StopSteps, effects) == [StopSteps()]
    assert not facts(RoundFinished, effects)
    assert of(Merge, give(node, done(steps=3, tokens=30))) == [Merge(round=0)]
    effects = give(node, Merged(round=0))
    [fact] = facts(RoundFinished, effects)
    assert (fact.round, fact.tokens, fact.training_s) == (0, 100, 4.0)
    assert of(RunSteps, effects) == [RunSteps(round=1, steps=7)]
    effects = give(node, done(steps=7, tokens=70), Captured(round=1), Encoded(round=1, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=1, weight=100)]


def test_it_waits_if_it_has_a_contribution_again_before_the_last_round_is_over() -> None:
    node = offered()
    effects = give(node, done())
    assert not of(Encode, effects)
    assert (node.phase, node.exchange) == ("idle", "offered")
    assert give(node, seen()) == []
    assert of(Merge, give(node, means(), applied())) == [Merge(round=0)]
    effects = give(node, Merged(round=0))
    assert of(Encode, effects) == [Encode(round=1, beside=True)]
    effects = give(node, Captured(round=1), Encoded(round=1, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=1, weight=100)]


def test_means_that_come_before_the_contribution_is_encoded_wait_for_it() -> None:
    node = stepping()
    assert not of(Apply, give(node, done(), Captured(round=0), means(position=-1)))
    assert of(Apply, give(node, Encoded(round=0, finite=True))) == [Apply(round=0, position=-1, beside=True)]


def test_means_that_come_while_it_measures_wait_for_that() -> None:
    node = stepping(evaluate_every=1)
    give(node, done(), Captured(round=0), Encoded(round=0, finite=True), means(), applied(), done(steps=1))
    assert of(Evaluate, give(node, Merged(round=0))) == [Evaluate(round=1)]
    assert give(node, means(round=1)) == []
    effects = give(node, Evaluated(loss=4.0))
    assert of(Apply, effects) == [Apply(round=1, position=1, beside=True)]
    assert of(RunSteps, effects)


def test_a_slow_node_goes_on_stepping_while_the_means_of_others_are_applied() -> None:
    node = stepping()
    assert give(node, means(position=-1)) == [Apply(round=0, position=-1, beside=True)]
    assert of(StopSteps, give(node, applied()))
    effects = give(node, done(steps=6, tokens=60), Merged(round=0))
    assert [fact.tokens for fact in facts(RoundFinished, effects)] == [0]
    assert of(RunSteps, effects) == [RunSteps(round=1, steps=4)]
    effects = give(node, done(steps=4, tokens=40), Captured(round=1), Encoded(round=1, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=1, weight=100)]


def test_progress_that_was_not_counted_is_contributed_again_with_what_came_after_it() -> None:
    node = offered()
    give(node, means(position=-1), applied())
    give(node, done(steps=3, tokens=30))
    effects = give(node, Merged(round=0))
    assert of(Encode, effects) == [Encode(round=1, beside=True)]
    effects = give(node, Captured(round=1), Encoded(round=1, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=1, weight=130)]


# --- fragments ------------------------------------------------------------------------------------------------------


def rounds_of(node: Training, count: int, counted: int = -1) -> list[int]:
    """The weights that it contributes with; the contribution to the round ``counted`` is in no mean."""
    weights = []
    for round in range(count):
        effects = give(node, done(), Captured(round=round), Encoded(round=round, finite=True))
        weights += [e.weight for e in told(effects, "exchange") if isinstance(e, ContributionFixed)]
        position = -1 if round == counted else 1
        give(node, means(round, position), applied(round + 1), done(steps=0, tokens=0), Merged(round=round))
    return weights


def test_the_weight_of_a_fragment_is_what_was_learned_since_it_was_last_in_a_mean() -> None:
    assert rounds_of(stepping(fragments=3), 7) == [100, 200, 300, 300, 300, 300, 300]


# --- NaN and infinity -----------------------------------------------------------------------------------------------


def test_progress_that_is_not_finite_is_given_up_with_the_steps_that_came_after_it() -> None:
    node = stepping()
    give(node, done(), Captured(round=0))
    effects = give(node, Encoded(round=0, finite=False))
    assert facts(NonFiniteProgress, effects)
    assert of(StopSteps, effects)
    assert not of(Restore, effects)
    assert of(Restore, give(node, done(steps=2, tokens=20))) == [Restore()]
    assert of(RunSteps, give(node, Restored())) == [RunSteps(round=0, steps=10)]
    effects = give(node, done(tokens=7), Captured(round=0), Encoded(round=0, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=0, weight=7)]


# --- leaving, and the end of the run --------------------------------------------------------------------------------


def test_after_the_last_contribution_of_the_run_it_does_no_more_steps() -> None:
    node = stepping(rounds=1)
    effects = give(node, done(), Captured(round=0), Encoded(round=0, finite=True))
    assert not of(RunSteps, effects)
    effects = give(node, means(), applied())
    assert of(Merge, effects)
    assert of(Evaluate, give(node, Merged(round=0))) == [Evaluate(round=1)]
    assert of(Save, give(node, Evaluated(loss=1.0)))


def test_told_to_leave_while_it_makes_a_contribution_it_makes_it_and_waits_for_the_round() -> None:
    node = stepping()
    assert give(node, Leave()) == []
    effects = give(node, done(), Captured(round=0), Encoded(round=0, finite=True))
    assert not of(RunSteps, effects)
    give(node, means(), applied())
    assert of(Save, give(node, Merged(round=0)))


def test_told_to_leave_while_it_waits_for_a_round_it_does_no_more_steps() -> None:
    node = offered()
    assert give(node, Leave()) == [StopSteps()]
    assert not of(Save, give(node, done(steps=2)))
    give(node, means(), applied())
    assert of(Save, give(node, Merged(round=0)))


def test_told_to_leave_with_another_contribution_complete_it_leaves_after_that() -> None:
    node = offered()
    give(node, done(), Leave(), means(), applied())
    assert of(Encode, give(node, Merged(round=0))) == [Encode(round=1, beside=True)]
    give(node, Captured(round=1), Encoded(round=1, finite=True), means(1), applied(2))
    assert of(Save, give(node, Merged(round=1)))


@pytest.mark.parametrize("while_in", ["encoding", "applying"])
def test_told_to_leave_at_once_it_does_not_touch_what_others_work_on(while_in: str) -> None:
    node = stepping()
    give(node, done(), Captured(round=0))
    if while_in == "applying":
        give(node, Encoded(round=0, finite=True), means())
    assert node.exchange == while_in
    effects = give(node, Leave(at_once=True), done(steps=1))
    assert not of(Save, effects)
    effects = give(node, Encoded(round=0, finite=True) if while_in == "encoding" else applied())
    if while_in == "applying":
        assert of(Merge, effects)
        effects = give(node, Merged(round=0))
    assert of(Save, effects)


# --- halting --------------------------------------------------------------------------------------------------------


def test_told_to_halt_it_answers_when_both_tracks_are_at_rest() -> None:
    node = stepping()
    give(node, done(), Captured(round=0), Halt())
    assert not told(give(node, done(steps=2, tokens=20)), "checkpoint")
    assert told(give(node, Encoded(round=0, finite=True)), "checkpoint") == [Halted()]
    assert give(node, seen(), means()) == []


def test_told_to_halt_it_first_moves_the_local_weights_as_the_outer_ones_were_moved() -> None:
    node = offered()
    give(node, means(), Halt(), done(steps=2, tokens=20))
    effects = give(node, applied())
    assert of(Merge, effects)
    assert told(give(node, Merged(round=0)), "checkpoint")[-1] == Halted()


def test_what_others_took_of_a_round_whose_commit_was_missed_is_given_up_and_what_came_after_stays() -> None:
    node = offered()
    give(node, ContributionTaken(round=0), Halt(), done(steps=4, tokens=40))
    assert give(node, Begin(round=5)) == [GiveUp(round=0)]
    assert give(node, Restored()) == [RunSteps(round=5, steps=6)]
    effects = give(node, done(steps=6, tokens=60), Captured(round=5), Encoded(round=5, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=5, weight=100)]


def test_what_nobody_took_is_contributed_again_with_what_came_after_it() -> None:
    node = offered()
    give(node, Halt(), done(steps=4, tokens=40))
    assert give(node, Begin(round=5)) == [Encode(round=5, beside=True)]
    effects = give(node, Captured(round=5), Encoded(round=5, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=5, weight=140)]


def test_a_contribution_to_the_round_that_is_open_still_stays_as_it_is() -> None:
    node = offered()
    give(node, Halt(), done(steps=4, tokens=40))
    assert give(node, Begin(round=0)) == [RunSteps(round=0, steps=6)]
    assert of(Apply, give(node, means())) == [Apply(round=0, position=1, beside=True)]


# --- eager ----------------------------------------------------------------------------------------------------------


def eager() -> Training:
    """It has contributed, and steps on from an estimate."""
    node = Training(TrainingSettings(me="n1", inner_steps=10, overlaps=True, eager=True))
    give(node, StateAt(round=0, digest=DIGEST, chain=FIRST_CHAIN), seen(), Begin(round=0), Evaluated(loss=5.0))
    assert of(Encode, give(node, done())) == [Encode(round=0, beside=True, eager=True)]
    give(node, Captured(round=0), Encoded(round=0, finite=True))
    return node


def test_an_eager_node_goes_on_from_an_estimate_and_is_told_its_weight_with_the_means() -> None:
    node = eager()
    assert node.phase == "stepping"
    assert of(Apply, give(node, means())) == [Apply(round=0, position=1, beside=True, weight=100)]


def test_an_eager_node_takes_back_a_contribution_that_nobody_took() -> None:
    node = eager()
    give(node, Halt(), done(steps=4, tokens=40))
    assert give(node, Begin(round=5)) == [TakeBack(round=0)]
    effects = give(node, Restored())
    assert of(Encode, effects) == [Encode(round=5, beside=True, eager=True)]
    effects = give(node, Captured(round=5), Encoded(round=5, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=5, weight=140)]


def test_an_eager_node_gives_up_a_contribution_that_others_took() -> None:
    node = eager()
    give(node, ContributionTaken(round=0), Halt(), done(steps=4, tokens=40))
    assert give(node, Begin(round=5)) == [GiveUp(round=0)]
    assert give(node, Restored()) == [RunSteps(round=5, steps=6)]


# --- synchronous rounds ---------------------------------------------------------------------------------------------


def warming(sync_rounds: int = 1, *, overlaps: bool = True, eager: bool = False) -> Training:
    """It does the inner step of round 0."""
    settings = TrainingSettings(me="n1", inner_steps=10, overlaps=overlaps, eager=eager, sync_rounds=sync_rounds)
    node = Training(settings)
    give(node, StateAt(round=0, digest=DIGEST, chain=FIRST_CHAIN), seen(), Begin(round=0))
    assert of(RunSteps, give(node, Evaluated(loss=5.0))) == [RunSteps(round=0, steps=1)]
    return node


@pytest.mark.parametrize(("overlaps", "eager"), [(False, False), (True, False), (True, True)])
def test_a_synchronous_round_is_one_step_and_nothing_goes_on_until_its_means_are_applied(
    overlaps: bool, eager: bool
) -> None:
    node = warming(2, overlaps=overlaps, eager=eager)
    for round in range(2):
        assert of(Encode, give(node, done(steps=1, tokens=10))) == [Encode(round=round)]
        effects = give(node, Encoded(round=round, finite=True))
        assert told(effects, "exchange") == [ContributionFixed(round=round, weight=10)]
        assert (node.phase, of(RunSteps, effects)) == ("idle", [])
        assert give(node, means(round)) == [Apply(round=round, position=1)]
        effects = give(node, applied(round + 1))
        assert facts(RoundFinished, effects)
        assert of(RunSteps, effects) == [RunSteps(round=round + 1, steps=10 if round else 1)]
    assert of(Encode, give(node, done())) == [Encode(round=2, beside=overlaps, eager=eager)]
    if overlaps:
        assert of(RunSteps, give(node, Captured(round=2))) == [RunSteps(round=2, steps=10)]


@pytest.mark.parametrize("sync_rounds", [1, 2])
def test_who_misses_a_synchronous_round_contributes_its_step_to_the_next_at_once(sync_rounds: int) -> None:
    """Whether that is a usual one or not."""
    node = warming(sync_rounds)
    assert of(StopSteps, give(node, means(position=-1))) == [StopSteps()]
    assert of(Apply, give(node, done(steps=1, tokens=10))) == [Apply(round=0, position=-1)]
    assert of(Encode, give(node, applied())) == [Encode(round=1, beside=sync_rounds == 1)]


@pytest.mark.parametrize("eager", [False, True])
def test_a_contribution_to_a_synchronous_round_that_others_took_is_given_up_with_the_local_weights(eager: bool) -> None:
    """There is no note of what it was: as in mode blocking."""
    node = warming(eager=eager)
    give(node, done(steps=1), Encoded(round=0, finite=True), ContributionTaken(round=0), Halt())
    assert give(node, Begin(round=5)) == [Restore()]
    assert give(node, Restored()) == [RunSteps(round=5, steps=10)]


@pytest.mark.parametrize("eager", [False, True])
def test_a_contribution_to_a_synchronous_round_that_nobody_took_counts_in_a_later_one(eager: bool) -> None:
    node = warming(eager=eager)
    give(node, done(steps=1), Encoded(round=0, finite=True), Halt())
    assert of(Encode, give(node, Begin(round=5))) == [Encode(round=5, beside=True, eager=eager)]
    effects = give(node, Captured(round=5), Encoded(round=5, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=5, weight=100)]
