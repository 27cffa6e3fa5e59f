"""Every rule of when a node trains, contributes, takes the outer step, and stops, by pure calls."""

from __future__ import annotations

import pytest

from prime_async.config.schema import MAX_ROUND_STEPS
from prime_async.machines.facts import (
    ContributionReady,
    EvaluationStarted,
    HeldOutLoss,
    NonFiniteProgress,
    RoundFinished,
    StateSaved,
)
from prime_async.machines.training import MAX_NON_FINITE, MAX_STEPS, Training, TrainingSettings
from prime_async.machines.vocabulary import (
    Apply,
    AskAgain,
    Begin,
    ContributionFixed,
    ContributionTaken,
    Encode,
    Encoded,
    Evaluate,
    Evaluated,
    EvaluationStopped,
    Event,
    Fail,
    Halt,
    Halted,
    Leave,
    Progress,
    Rejected,
    Report,
    Restore,
    Restored,
    RunSteps,
    Save,
    Saved,
    StateAt,
    StopEvaluation,
    StopSteps,
    Tick,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import FIRST_CHAIN, MAX_TOKENS
from tests.machine_harness import facts, member, of, told, view
from tests.training_harness import DIGEST, applied, done, give, means, seen


def training(rounds: int = 0, evaluate_every: int = 0, min_members: int = 1, seconds: float = 0.0) -> Training:
    settings = TrainingSettings(
        me="n1",
        inner_steps=0 if seconds else 10,
        seconds=seconds,
        rounds=rounds,
        evaluate_every=evaluate_every,
        min_members=min_members,
    )
    node = Training(settings)
    node.handle(0.0, StateAt(round=0, digest=DIGEST, chain=FIRST_CHAIN))
    return node


def stepping(rounds: int = 0, evaluate_every: int = 0, min_members: int = 1, seconds: float = 0.0) -> Training:
    node = training(rounds, evaluate_every, min_members, seconds)
    give(node, seen(others=min_members), Begin(round=0), Evaluated(loss=5.0))
    assert node.phase == "stepping"
    return node


def exchanging(rounds: int = 0, min_members: int = 1) -> Training:
    node = stepping(rounds, min_members=min_members)
    give(node, done(), Encoded(round=0, finite=True))
    assert (node.phase, node.exchange) == ("idle", "offered")
    return node


# --- a round --------------------------------------------------------------------------------------------------------


def test_a_loaded_state_is_told_to_the_other_machines() -> None:
    effects = training().handle(0.0, StateAt(round=3, digest=DIGEST, chain=FIRST_CHAIN))
    for actor in ("checkpoint", "exchange", "membership"):
        assert told(effects, actor) == [StateAt(round=3, digest=DIGEST, chain=FIRST_CHAIN)]


def test_a_node_trains_when_its_state_is_the_runs_and_it_is_active() -> None:
    node = training()
    assert give(node, seen(active=False), Begin(round=0)) == []
    assert give(node, seen()) == [Report(fact=EvaluationStarted(round=0)), Evaluate(round=0)]
    effects = give(node, Evaluated(loss=5.0))
    assert facts(HeldOutLoss, effects) == [HeldOutLoss(round=0, loss=5.0)]
    assert of(RunSteps, effects) == [RunSteps(round=0, steps=10)]


def test_an_active_node_whose_state_is_not_the_runs_does_nothing() -> None:
    assert give(training(), seen(), seen()) == []


def test_inner_steps_then_the_contribution_then_the_means_then_the_outer_step() -> None:
    node = stepping()
    effects = give(node, done())
    assert told(effects, "membership") == [Progress(inner_steps=10)]
    assert of(Encode, effects) == [Encode(round=0)]
    effects = give(node, Encoded(round=0, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=0, weight=100)]
    assert facts(ContributionReady, effects) == [ContributionReady(round=0, tokens=100)]
    assert give(node, means()) == [Apply(round=0, position=1)]
    effects = give(node, applied())
    for actor in ("checkpoint", "exchange", "membership"):
        assert told(effects, actor) == [StateAt(round=1, digest=DIGEST, chain=FIRST_CHAIN)]
    [fact] = facts(RoundFinished, effects)
    assert (fact.round, fact.tokens, fact.training_s) == (0, 100, 2.0)
    assert of(RunSteps, effects) == [RunSteps(round=1, steps=10)]


def test_a_contribution_of_nothing_weighs_one() -> None:
    node = stepping()
    effects = give(node, done(steps=0, tokens=0), Encoded(round=0, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=0, weight=1)]


@pytest.mark.parametrize("while_in", ["evaluating", "stepping", "encoding", "restoring"])
def test_nothing_else_touches_the_tensors_meanwhile(while_in: str) -> None:
    node = training()
    give(node, seen(), Begin(round=0))
    if while_in != "evaluating":
        give(node, Evaluated(loss=5.0))
    if while_in in ("encoding", "restoring"):
        give(node, done())
    if while_in == "restoring":
        give(node, Encoded(round=0, finite=False))
    assert while_in in (node.phase, node.exchange)
    effects = give(node, means(), seen(), Begin(round=0), Leave())
    assert effects == {"stepping": [StopSteps()], "evaluating": [StopEvaluation()]}.get(while_in, [])


@pytest.mark.parametrize("outcome", [[done()], [done(), Encoded(round=0, finite=True)]])
def test_means_that_come_early_are_applied_as_soon_as_the_tensors_are_free(outcome: list[Event]) -> None:
    node = stepping()
    if len(outcome) == 2:
        give(node, outcome[0])
    give(node, means(position=-1))
    assert of(Apply, give(node, outcome[-1])) == [Apply(round=0, position=-1)]


def test_a_node_that_is_not_active_applies_committed_means() -> None:
    node = training()
    give(node, seen(active=False), Begin(round=0))
    assert of(Apply, give(node, means(position=-1)))
    assert not of(RunSteps, give(node, applied()))


def test_tokens_of_progress_that_was_not_counted_add_up() -> None:
    """Defect: they were forgotten with the round, and the progress weighed too little in the next one."""
    node = stepping()
    give(node, means(position=-1), done(steps=6, tokens=100), applied())
    effects = give(node, done(steps=4, tokens=40), Encoded(round=1, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=1, weight=140)]
    give(node, means(round=1), applied(2))
    effects = give(node, done(tokens=40), Encoded(round=2, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=2, weight=40)]


def test_stale_means_are_dropped() -> None:
    node = stepping()
    give(node, done(), Encoded(round=0, finite=True), means(), applied())
    assert node.round == 1
    assert give(node, means(round=0)) == []
    assert of(Encode, give(node, done())) == [Encode(round=1)]  # and do not make it spin


# --- slow nodes -----------------------------------------------------------------------------------------------------


def test_a_node_that_is_still_stepping_when_the_round_is_committed_stops_applies_and_does_the_rest() -> None:
    node = stepping()
    assert give(node, means(position=-1)) == [StopSteps()]
    assert give(node, means(position=-1)) == []
    effects = give(node, done(steps=3, tokens=30))
    assert of(Apply, effects) == [Apply(round=0, position=-1)]
    assert not of(Encode, effects)
    effects = give(node, applied())
    assert [fact.tokens for fact in facts(RoundFinished, effects)] == [0]
    assert of(RunSteps, effects) == [RunSteps(round=1, steps=7)]


def test_steps_carry_over_as_many_rounds_as_it_takes() -> None:
    node = stepping()
    for round in range(3):
        give(node, means(round, position=-1), done(steps=3, tokens=30))
        assert of(RunSteps, give(node, applied(round + 1))) == [RunSteps(round=round + 1, steps=7 - 3 * round)]
    effects = give(node, done(steps=1, tokens=10), Encoded(round=3, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=3, weight=100)]
    effects = give(node, means(3, position=2), applied(4))
    assert [fact.tokens for fact in facts(RoundFinished, effects)] == [100]
    assert of(RunSteps, effects) == [RunSteps(round=4, steps=10)]


def test_a_node_that_had_done_all_its_steps_contributes_at_once() -> None:
    too_late = stepping()
    give(too_late, means(position=-1), done())
    missed = exchanging()
    give(missed, means(position=-1))
    for node in (too_late, missed):
        effects = give(node, applied())
        assert of(Encode, effects) == [Encode(round=1)]
        assert not of(RunSteps, effects)
        assert told(give(node, Encoded(round=1, finite=True)), "exchange") == [ContributionFixed(round=1, weight=100)]


def test_progress_that_is_not_finite_takes_what_was_carried_over_with_it() -> None:
    node = stepping()
    give(node, means(position=-1), done(steps=3, tokens=30), applied())
    give(node, done(steps=7, tokens=70), Encoded(round=1, finite=False))
    assert of(RunSteps, give(node, Restored())) == [RunSteps(round=1, steps=10)]


def test_a_slow_node_that_was_told_to_leave_does_not_begin_another_round() -> None:
    node = stepping(rounds=7)
    give(node, Leave(), means(position=-1), done(steps=3))
    assert of(Save, give(node, applied()))


def test_means_of_a_round_to_come_wait_for_it() -> None:
    node = stepping()
    assert give(node, means(round=5)) == []
    give(node, Halt(), done(steps=2))
    assert give(node, Begin(round=5)) == [Apply(round=5, position=1)]


# --- rounds that end with the clock ---------------------------------------------------------------------------------


def test_a_round_of_seconds_ends_with_the_step_that_is_under_way_then() -> None:
    node = training(seconds=5.0)
    give(node, seen(), Begin(round=0))
    effects = node.handle(10.0, Evaluated(loss=5.0))
    assert of(RunSteps, effects) == [RunSteps(round=0, steps=MAX_STEPS)]
    assert of(WakeAt, effects) == [WakeAt(at=15.0)]
    assert node.handle(15.0, Tick()) == [StopSteps()]
    assert of(Encode, node.handle(15.2, done(steps=1))) == [Encode(round=0)]


def test_a_tick_that_comes_too_early_is_wished_for_again_and_one_that_comes_too_late_is_harmless() -> None:
    node = stepping(seconds=5.0)
    at = node.steps_until
    assert node.handle(at - 1.0, Tick()) == [WakeAt(at=at)]
    node.handle(at, Tick())
    assert node.handle(at, Tick()) == []
    node.handle(at + 1.0, done())
    assert node.exchange == "encoding"
    assert node.handle(at + 2.0, Tick()) == []
    assert stepping().handle(1e6, Tick()) == []  # a round of steps has no clock


def test_a_slow_node_in_a_round_of_seconds_does_the_seconds_that_are_left() -> None:
    node = stepping(seconds=5.0)
    give(node, means(position=-1), done(steps=40))  # took 2 seconds
    effects = node.handle(20.0, applied())
    assert of(RunSteps, effects) == [RunSteps(round=1, steps=MAX_STEPS - 40)]
    assert of(WakeAt, effects) == [WakeAt(at=23.0)]
    node.handle(23.0, Tick())
    effects = give(node, done(steps=60), Encoded(round=1, finite=True), means(1), applied(2))
    assert of(WakeAt, effects) == [WakeAt(at=9.0)]  # counted: five seconds again, from second 4.0 on


def test_seconds_that_end_while_the_node_stops_for_the_means_are_a_contribution() -> None:
    node = stepping(seconds=5.0)
    node.handle(2.0, means(position=-1))
    assert node.handle(node.steps_until, Tick()) == []
    give(node, done(steps=3))
    assert of(Encode, give(node, applied())) == [Encode(round=1)]


def test_steps_that_come_to_an_end_before_the_clock_are_a_contribution() -> None:
    assert of(Encode, give(stepping(seconds=5.0), done(steps=MAX_STEPS))) == [Encode(round=0)]
    assert MAX_STEPS == MAX_ROUND_STEPS


def test_a_contribution_weighs_no_more_than_the_protocol_can_say() -> None:
    node = stepping(seconds=5.0)
    effects = give(node, done(tokens=MAX_TOKENS + 1), Encoded(round=0, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=0, weight=MAX_TOKENS)]


# --- witnesses ------------------------------------------------------------------------------------------------------


def witness(rounds: int = 0) -> Training:
    node = Training(TrainingSettings(me="n1", inner_steps=10, rounds=rounds, witness=True))
    node.handle(0.0, StateAt(round=0, digest=DIGEST, chain=FIRST_CHAIN))
    assert give(node, seen(), Begin(round=0)) == []
    return node


def test_a_witness_applies_what_is_committed_and_does_nothing_else() -> None:
    node = witness()
    assert give(node, means(position=-1)) == [Apply(round=0, position=-1)]
    effects = give(node, applied())
    for actor in ("checkpoint", "exchange", "membership"):
        assert told(effects, actor) == [StateAt(round=1, digest=DIGEST, chain=FIRST_CHAIN)]
    assert not of(RunSteps, effects)
    assert not of(Evaluate, effects)


def test_a_witness_leaves_when_it_is_told_to_and_when_the_run_is_over() -> None:
    assert give(witness(), Leave()) == [Save()]
    ending = witness(rounds=1)
    assert of(Save, give(ending, means(position=-1), applied()))
    applying = witness()
    assert give(applying, means(position=-1), Leave()) == [Apply(round=0, position=-1)]
    assert of(Save, give(applying, applied()))


def test_witnesses_do_not_count_as_members_that_train() -> None:
    node = training(min_members=2)
    crowd = [member("w", witness=True), member("n1")]
    assert give(node, ViewChanged(view=view(2, *crowd)), Begin(round=0)) == []
    assert of(Evaluate, give(node, ViewChanged(view=view(3, *crowd, member("n2")))))


# --- NaN and infinity -----------------------------------------------------------------------------------------------


def test_progress_that_is_not_finite_is_given_up_and_begun_again() -> None:
    node = stepping()
    effects = give(node, done(), Encoded(round=0, finite=False))
    assert facts(NonFiniteProgress, effects) == [NonFiniteProgress(round=0, times=1)]
    assert of(Restore, effects)
    assert not told(effects, "exchange")
    assert of(RunSteps, give(node, Restored())) == [RunSteps(round=0, steps=10)]
    effects = give(node, done(tokens=7), Encoded(round=0, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=0, weight=7)]


def test_the_third_time_in_a_row_the_node_fails_and_says_what_to_change() -> None:
    node = stepping()
    for _ in range(MAX_NON_FINITE - 1):
        assert not of(Fail, give(node, done(), Encoded(round=0, finite=False), Restored()))
    [fail] = of(Fail, give(node, done(), Encoded(round=0, finite=False)))
    assert fail.kind == "non_finite"
    assert "learning_rate" in fail.text
    assert give(node, done(), means(), seen()) == []


def test_a_contribution_that_is_rejected_is_given_up_and_made_anew_from_the_outer_weights() -> None:
    node = stepping()
    give(node, done(tokens=5), Encoded(round=0, finite=True))
    assert of(Restore, give(node, Rejected(times=1)))
    assert of(RunSteps, give(node, Restored())) == [RunSteps(round=0, steps=10)]
    assert of(Encode, give(node, done(tokens=7))) == [Encode(round=0, rejected=1)]
    effects = give(node, Encoded(round=0, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=0, weight=7, rejected=1)]
    assert of(Apply, give(node, means())) == [Apply(round=0, position=1, rejected=1)]


def test_what_is_encoded_while_an_earlier_contribution_is_rejected_is_given_up_too() -> None:
    node = stepping()
    give(node, done())
    assert not of(Restore, give(node, Rejected(times=1)))
    effects = give(node, Encoded(round=0, finite=True))
    assert of(Restore, effects)
    assert not told(effects, "exchange")


def test_means_that_count_what_was_rejected_are_applied_before_it_is_given_up() -> None:
    """They were committed: what they count was not given up in time."""
    node = stepping()
    give(node, done(), Encoded(round=0, finite=True))
    node.phase = "evaluating"
    assert not of(Apply, give(node, means(), Rejected(times=1)))
    effects = give(node, Evaluated(loss=1.0))
    assert of(Apply, effects) == [Apply(round=0, position=1)]
    assert not of(Restore, effects)
    assert of(Restore, give(node, applied(1)))


def test_a_finite_round_starts_the_count_again() -> None:
    node = stepping()
    for round in range(5):
        give(node, done(), Encoded(round=round, finite=False), Restored())
        give(node, done(), Encoded(round=round, finite=True), means(round), applied(round + 1))
    assert node.phase == "stepping"


# --- evaluation -----------------------------------------------------------------------------------------------------


def run_rounds(node: Training, count: int) -> list[int]:
    """The rounds before which it evaluated."""
    evaluated: list[int] = []
    for round in range(count):
        effects = give(node, done(), Encoded(round=round, finite=True), means(round), applied(round + 1))
        for wish in of(Evaluate, effects):
            evaluated.append(wish.round)
            give(node, Evaluated(loss=1.0))
    return evaluated


def test_it_evaluates_every_so_many_rounds_and_before_it_saves() -> None:
    assert run_rounds(stepping(evaluate_every=2), 5) == [2, 4]
    assert run_rounds(stepping(evaluate_every=0), 5) == []
    assert run_rounds(stepping(rounds=3), 3) == [3]


# --- leaving --------------------------------------------------------------------------------------------------------


def test_the_last_round_done_it_evaluates_saves_and_leaves() -> None:
    node = exchanging(rounds=1)
    effects = give(node, means(), applied())
    assert of(Evaluate, effects)
    assert of(Save, give(node, Evaluated(loss=1.0)))
    effects = give(node, Saved(path="/state"))
    assert facts(StateSaved, effects) == [StateSaved(round=1, path="/state")]
    assert told(effects, "membership") == [Leave()]
    assert give(node, seen(), Begin(round=0), Halt()) == []


def test_told_to_leave_it_finishes_the_round() -> None:
    node = stepping()
    assert give(node, Leave()) == []
    assert of(Encode, give(node, done()))
    give(node, Encoded(round=0, finite=True))
    give(node, means())
    effects = give(node, applied())
    assert not of(Evaluate, effects)
    assert of(Save, effects)


@pytest.mark.parametrize("at_once", [False, True])
def test_told_to_leave_it_does_not_wait_for_an_evaluation(at_once: bool) -> None:
    """Nor does it begin another one; also one at the end of the run is stopped."""
    first = training()
    give(first, seen(), Begin(round=0))
    last = exchanging(rounds=1)
    give(last, means(), applied())
    for node in (first, last):
        assert give(node, Leave(at_once=at_once)) == [StopEvaluation()]
        assert give(node, Leave(at_once=at_once)) == []
        effects = give(node, EvaluationStopped())
        assert of(Save, effects)
        assert not of(Evaluate, effects)


def test_an_evaluation_that_was_done_when_it_was_told_to_stop_counts() -> None:
    node = training()
    give(node, seen(), Begin(round=0), Leave())
    effects = give(node, Evaluated(loss=5.0))
    assert facts(HeldOutLoss, effects) == [HeldOutLoss(round=0, loss=5.0)]
    assert of(Save, effects)


def test_told_to_halt_it_stops_an_evaluation_and_begins_it_again_when_it_goes_on() -> None:
    node = training()
    give(node, seen(), Begin(round=0))
    assert give(node, Halt()) == [StopEvaluation()]
    assert told(give(node, EvaluationStopped()), "checkpoint") == [Halted()]
    assert of(Evaluate, give(node, Begin(round=7))) == [Evaluate(round=7)]
    assert of(RunSteps, give(node, Evaluated(loss=1.0))) == [RunSteps(round=7, steps=10)]


def test_told_to_leave_at_once_it_stops_after_the_step_that_is_under_way() -> None:
    node = stepping()
    assert of(StopSteps, give(node, Leave(at_once=True)))
    assert not of(StopSteps, give(node, Leave(at_once=True)))
    effects = give(node, done(steps=3))
    assert of(Save, effects)
    assert not of(Encode, effects)


def test_told_to_leave_at_once_while_the_round_is_exchanged_it_does_not_wait() -> None:
    assert of(Save, give(exchanging(), Leave(at_once=True)))


def test_told_to_leave_it_does_not_wait_for_a_round_that_cannot_close() -> None:
    told_first = exchanging(min_members=2)
    assert give(told_first, Leave()) == []
    assert of(Save, give(told_first, seen(others=0)))
    told_later = exchanging(min_members=2)
    assert give(told_later, seen(others=0)) == []
    assert of(Save, give(told_later, Leave()))


def test_a_node_that_has_nothing_to_do_leaves_at_once() -> None:
    assert give(training(), Leave()) == [Save()]
    node = training()
    give(node, seen(active=False), Begin(round=0))
    assert of(Save, give(node, Leave()))


def test_a_state_that_was_not_saved_is_not_reported() -> None:
    node = training()
    give(node, Leave())
    effects = give(node, Saved(path=""))
    assert not facts(StateSaved, effects)
    assert told(effects, "membership") == [Leave()]


# --- halting --------------------------------------------------------------------------------------------------------


def test_told_to_halt_it_answers_when_the_tensors_are_at_rest() -> None:
    node = stepping()
    assert give(node, Halt()) == [StopSteps()]
    effects = give(node, done(steps=4))
    assert told(effects, "checkpoint") == [Halted()]
    assert not of(Encode, effects)
    assert give(node, seen(), means()) == []


def test_told_to_halt_while_it_rests_it_answers_at_once() -> None:
    for node in (training(), exchanging()):
        assert told(give(node, Halt()), "checkpoint") == [Halted()]


def test_what_others_took_of_a_round_whose_commit_was_missed_is_given_up() -> None:
    """Defect: it may have been counted there, and was contributed again."""
    node = exchanging()
    give(node, ContributionTaken(round=0), Halt())
    assert give(node, Begin(round=5)) == [Restore()]
    assert give(node, Restored()) == [RunSteps(round=5, steps=10)]


def test_what_nobody_took_is_in_no_mean_and_is_contributed_again() -> None:
    """Defect: it was given up, too: of the work that a minority lost in schedules, nine tenths had counted nowhere."""
    node = exchanging()
    give(node, Halt())
    assert give(node, Begin(round=5)) == [Encode(round=5)]
    effects = give(node, Encoded(round=5, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=5, weight=100)]
    give(node, ContributionTaken(round=0), Halt())  # of the round before
    assert give(node, Begin(round=6)) == [Encode(round=6)]


def test_a_node_that_fell_behind_keeps_its_steps_and_tokens_and_does_the_rest() -> None:
    node = stepping()
    give(node, Halt(), done(steps=7, tokens=70))
    assert give(node, Begin(round=5)) == [RunSteps(round=5, steps=3)]
    effects = give(node, done(steps=3, tokens=30), Encoded(round=5, finite=True))
    assert told(effects, "exchange") == [ContributionFixed(round=5, weight=100)]


def test_a_node_that_had_contributed_and_was_halted_lets_its_contribution_be() -> None:
    """Defect: it trained on, and served other bytes under the name of the contribution that peers might hold."""
    node = exchanging()
    give(node, Halt())
    assert give(node, Begin(round=0), seen()) == []
    assert give(node, means()) == [Apply(round=0, position=1)]


def test_means_handed_over_just_before_a_halt_are_applied_only_if_they_are_still_the_rounds() -> None:
    for round, expected in ((0, [Apply(round=0, position=1)]), (5, [])):
        node = stepping()
        give(node, Halt(), means(), done(steps=2))
        effects = give(node, Begin(round=round))
        assert of(Apply, effects) == expected


def test_told_to_begin_before_it_could_halt_it_does_not_halt() -> None:
    """Defect: it halted all the same, nobody waited for that, and it never began again: the whole run hung."""
    node = stepping()
    give(node, Halt(), Begin(round=0))
    effects = give(node, done(steps=4, tokens=40))
    assert not told(effects, "checkpoint")
    assert of(RunSteps, effects) == [RunSteps(round=0, steps=6)]


def test_a_node_that_leaves_while_it_halts_saves_before_anybody_touches_the_tensors() -> None:
    """Defect: it said that it was halted and was not seen to leave until the state was fetched."""
    node = stepping()
    give(node, Halt(), Leave(at_once=True))
    effects = give(node, done(steps=4))
    assert of(Save, effects)
    assert not told(effects, "checkpoint")


def test_an_event_that_means_nothing_to_it_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="AskAgain"):
        training().handle(0.0, AskAgain())
