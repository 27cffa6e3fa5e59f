"""Where two logs of one run part: of two nodes, and of one node in two recordings; and what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from prime_async.cli.replay import replay as replay_command
from prime_async.comparison import compare, landmarks
from prime_async.errors import ConfigError, LocalError, ReplayMismatchError
from prime_async.log import LogRecord, MessageLog, effects_digest, read_log, replay
from prime_async.machines.vocabulary import Applied, Effect, StepsDone, ViewChanged, WakeAt
from prime_async.messages import encode
from prime_async.testing import Simulation, SimulationSettings


def simulate(directory: Path, seed: int, *, corrupt: bool = False) -> Path:
    """The logs of three nodes, of which one crashed and came back; ``corrupt``: the state of n2 went wrong."""
    directory.mkdir()
    simulation = Simulation(3, seed, SimulationSettings(rounds=6))
    simulation.record_to(directory)
    simulation.run_for(12.0)
    if corrupt:
        simulation.corrupt("n2")
    simulation.crash("n1")
    simulation.run_for(4.0)
    simulation.start("n1")
    simulation.run_for(30.0)
    return directory


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("runs") / "logs", 3)


def altered(log: MessageLog, index: int, **changes: object) -> MessageLog:
    records = list(log.records)
    records[index] = replace(records[index], **changes)
    return MessageLog(log.header, tuple(records), 0)


def written(log: MessageLog, path: Path) -> Path:
    path.write_bytes(b"".join(encode(item) for item in (log.header, *log.records)))
    return path


def later(log: MessageLog, by_s: float) -> MessageLog:
    """The same calls on a clock that shows another time, with the effects that they then have."""
    machines = log.header.machines.build()
    records: list[LogRecord] = []
    for record in log.records:
        effects = machines[record.actor].handle(record.now + by_s, record.event)
        records.append(replace(record, now=record.now + by_s, effects=effects_digest(effects)))
    return MessageLog(log.header, tuple(records), 0)


# --- two nodes ------------------------------------------------------------------------------------------------------


def test_two_nodes_of_a_sound_run_agree_on_all_that_both_have(logs: Path) -> None:
    found = compare(read_log(logs / "n0.log"), read_log(logs / "n2.log"))

    assert not found.part
    assert found.rows == ()
    assert "6 commits" in found.verdict
    assert len([n for n in landmarks(read_log(logs / "n0.log")) if n.kind == "plan"]) >= 4


def test_a_process_that_was_started_again_is_compared_from_where_it_came_back(logs: Path) -> None:
    found = compare(read_log(logs / "n0.log"), read_log(logs / "n1-2.log"))

    assert not found.part
    assert "only A has" in found.verdict


def test_nodes_part_where_the_outer_state_of_one_went_wrong(tmp_path: Path) -> None:
    """Given a node whose state changed behind its back, then the first state after that is the place."""
    directory = simulate(tmp_path / "wrong", 3, corrupt=True)

    found = compare(read_log(directory / "n0.log"), read_log(directory / "n2.log"))

    assert found.part
    (place,) = (row for row in found.rows if not row.equal)
    assert place.what.startswith("the outer state after ")
    assert place.first != place.second
    assert f"They part at {place.what}" in found.verdict
    assert [row.equal for row in found.rows[:3]] == [True, True, True]


def test_nodes_part_at_a_view_and_only_what_differs_of_it_is_shown(logs: Path) -> None:
    ours, theirs = read_log(logs / "n0.log"), read_log(logs / "n2.log")
    index = [i for i, r in enumerate(theirs.records) if isinstance(r.event, ViewChanged)][9]
    event = theirs.records[index].event
    assert isinstance(event, ViewChanged)
    wrong = altered(theirs, index, event=replace(event, view=replace(event.view, epoch=9)))

    found = compare(ours, wrong)

    place = next(row for row in found.rows if not row.equal)
    assert place.what.startswith(f"view {event.view.number} of lineage")
    assert (place.first, place.second) == ("epoch: 1", "epoch: 9")


def test_logs_of_two_runs_are_refused(logs: Path) -> None:
    log = read_log(logs / "n0.log")
    machines = log.header.machines
    other = replace(log.header, machines=replace(machines, membership=replace(machines.membership, run_id=b"\1" * 32)))

    with pytest.raises(LocalError, match="of two runs, 00000000 and 01010101: give two logs of one run"):
        compare(log, MessageLog(other, log.records, 0))


# --- two recordings of one node -------------------------------------------------------------------------------------


def test_a_machine_that_one_recording_alone_has_is_named(logs: Path) -> None:
    """Given a log, and it without its training, then the comparison says so; without it in both, nothing."""
    log = read_log(logs / "n0.log")
    header = replace(log.header, machines=replace(log.header.machines, training=None))
    without = MessageLog(header, tuple(r for r in log.records if r.actor != "training"), 0)

    assert "different settings: training: there in one of them alone" in compare(log, without).what
    assert "settings" not in compare(without, without).what


def test_a_seed_that_is_run_twice_gives_recordings_that_do_not_part(logs: Path, tmp_path: Path) -> None:
    again = simulate(tmp_path / "again", 3)

    for name in ("n0", "n1", "n1-2", "n2"):
        found = compare(read_log(logs / f"{name}.log"), read_log(again / f"{name}.log"))
        assert not found.part
        assert f"{len(read_log(logs / f'{name}.log').records)} calls are equal." in found.verdict


def test_another_clock_is_no_difference(logs: Path) -> None:
    log = read_log(logs / "n1-2.log")
    moved = later(log, 64.0)
    assert [r.effects for r in moved.records] != [r.effects for r in log.records]

    assert not compare(log, moved).part


def test_the_order_in_which_machines_were_called_is_no_difference(logs: Path) -> None:
    log = read_log(logs / "n0.log")
    by_machine = MessageLog(log.header, tuple(sorted(log.records, key=lambda r: r.actor)), 0)

    assert not compare(log, by_machine).part


def test_recordings_part_at_the_first_call_that_was_given_something_else(logs: Path) -> None:
    log = read_log(logs / "n0.log")
    index = [i for i, r in enumerate(log.records) if isinstance(r.event, StepsDone)][2]
    record = log.records[index]
    assert isinstance(record.event, StepsDone)

    found = compare(log, altered(log, index, event=replace(record.event, tokens=7)))

    assert found.part
    assert found.verdict == (
        f"They part at number {record.seq} of training (event {index} of A, {index} of B): "
        "the two were given different things."
    )
    place = next(row for row in found.rows if not row.equal)
    assert place.what == f"training {record.seq}"
    assert ("40 tokens" in place.first, " 7 tokens" in place.second) == (True, True)


def test_recordings_part_where_one_program_answered_otherwise(logs: Path) -> None:
    """Given a log of a program that answered otherwise, which does not replay, then the place is found all the same."""
    log = read_log(logs / "n0.log")
    index = next(i for i, r in enumerate(log.records) if isinstance(r.event, Applied) and i > 100)

    found = compare(log, altered(log, index, effects=bytes(16)))

    assert f"event {index} of A" in found.verdict
    assert found.verdict.endswith("the two answer differently.")
    place = next(row for row in found.rows if not row.equal)
    assert "which this program does not answer" in place.second


def test_a_recording_that_ends_early_does_not_part_and_is_said_to_be_shorter(logs: Path) -> None:
    log = read_log(logs / "n0.log")

    found = compare(log, MessageLog(log.header, log.records[:100], 0))

    assert not found.part
    assert "calls in A and" in found.verdict


# --- a replay that fails says what was expected ---------------------------------------------------------------------


def many_effects(log: MessageLog) -> tuple[int, tuple[Effect, ...]]:
    """An event that has several effects which differ, and they."""
    step = next(s for s in replay(log) if 3 <= len(s.effects) <= 5 and isinstance(s.effects[-1], WakeAt))
    return step.index, step.effects


def test_a_mismatch_says_what_was_given_expected_and_answered(logs: Path) -> None:
    log = read_log(logs / "n0.log")
    index, effects = many_effects(log)
    cases = {
        "expected: nothing\n": effects_digest(()),
        f"expected: effects with digest {bytes(16).hex()}": bytes(16),
        "expected: in this order: sets its clock": effects_digest((effects[-1], *effects[:-1])),
    }
    for expected, digest in cases.items():
        with pytest.raises(ReplayMismatchError) as caught:
            list(replay(altered(log, index, effects=digest)))
        assert caught.value.index == index
        assert expected in str(caught.value)
        assert "\n  given:    " in str(caught.value)
        assert "\n  actual:   " in str(caught.value)

    with pytest.raises(ReplayMismatchError) as caught:
        list(replay(altered(log, index, effects=effects_digest(effects[:-1]))))
    expected = str(caught.value).split("expected: ")[1].split("\n")[0]
    assert "sets its clock" not in expected
    assert str(caught.value).endswith(expected + "; " + str(caught.value).split("; ")[-1])


# --- the command ----------------------------------------------------------------------------------------------------


def test_show_prints_a_line_for_each_event_in_words(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = read_log(logs / "n0.log")
    assert replay_command(logs / "n0.log", show=True) == 0

    *lines, summary = capsys.readouterr().out.splitlines()[:-4]  # a line for each machine follows
    assert len(lines) == len(log.records)
    assert [int(line.split()[0]) for line in lines] == list(range(len(lines)))
    assert all(" -> " in line for line in lines)
    assert any("n2 says: I am ready for round" in line for line in lines)
    assert f"{len(lines)} events" in summary


def test_from_until_and_actor_choose_what_is_shown(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = read_log(logs / "n0.log")
    wanted = [i for i, r in enumerate(log.records[:61]) if r.actor == "exchange" and i >= 20]

    assert replay_command(logs / "n0.log", show=True, from_=20, until=60, actor="exchange") == 0

    said = capsys.readouterr().out
    assert [int(line.split()[0]) for line in said.splitlines() if " -> " in line] == wanted
    assert f"61 of {len(log.records)} events" in said


def test_a_log_that_is_wrong_after_until_replays_up_to_there(logs: Path, tmp_path: Path) -> None:
    path = written(altered(read_log(logs / "n0.log"), 50, effects=bytes(16)), tmp_path / "wrong.log")

    assert replay_command(path, until=49) == 0
    with pytest.raises(ReplayMismatchError, match="event 50"):
        replay_command(path, until=50)


def test_until_before_from_is_refused(logs: Path) -> None:
    with pytest.raises(ConfigError, match="--until 3 is before --from 5"):
        replay_command(logs / "n0.log", from_=5, until=3)


def test_against_prints_the_place_side_by_side(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    log = read_log(logs / "n0.log")
    index = [i for i, r in enumerate(log.records) if isinstance(r.event, StepsDone)][2]
    record = log.records[index]
    assert isinstance(record.event, StepsDone)
    other = written(altered(log, index, event=replace(record.event, tokens=7)), tmp_path / "other.log")

    assert replay_command(logs / "n0.log", against=other) == 1

    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if f"training {record.seq} " in line)
    assert " ! " in line
    assert "40 tokens" in line.split("│")[3]
    assert " 7 tokens" in line.split("│")[4]
    assert replay_command(logs / "n0.log", against=logs / "n2.log") == 0
