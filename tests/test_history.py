"""What is shown of a run, folded from facts: by pure calls."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from prime_async.machines.facts import (
    CatchingUp,
    CaughtUp,
    ChunksReassigned,
    ContributorLeftOut,
    CutOff,
    Fact,
    HeldOutLoss,
    InnerStepDone,
    MemberJoined,
    MemberLeft,
    RemoteCopyFailed,
    SlowWake,
    SnapshotWritten,
    ViewAdopted,
)
from prime_async.watch.history import CURVES, KEPT_EVENTS, KEPT_GONE, KEPT_ROUNDS, History
from prime_async.watch.journal import FIGURES_EVERY_S, Journal
from prime_async.watch.series import MAX_POINTS, Series
from prime_async.watch.words import listed, seconds, size
from tests.watch_harness import STORY, lost, redone, seen


def fed(*facts: Fact, history: History | None = None) -> History:
    """One second after the other."""
    history = history or History("1", "node-1")
    for at, fact in enumerate(facts, 1000):
        history.add(fact, float(at))
    return history


def texts(history: History) -> list[str]:
    return [e["text"] for e in history.whole()["events"]]


# --- in words -------------------------------------------------------------------------------------------------------


def test_a_loss_and_what_was_done_about_it_are_one_line() -> None:
    given = ChunksReassigned(round=41, epoch=1, attempt=1, chunks=12, lost=("node-3",), owners=("node-1", "node-2"))
    history = fed(seen("1", "2", "3", round=41), lost("3"), given, redone("node-3"))
    assert texts(history) == [
        "node-3 lost in round 41, after 10.0 s of silence; its 12 chunks were done again by node-1 and node-2 in 0.4 s"
    ]
    delta = history.take_delta()
    assert delta is not None
    assert {e["text"] for e in delta["events"]} == {texts(history)[0], ""}  # the line between is taken back


def test_the_chunks_of_several_are_a_line_of_their_own() -> None:
    history = fed(seen("1", round=41), lost("2"), lost("3"), redone("node-2", "node-3", chunks=1))
    assert texts(history)[-1] == (
        "1 chunk of node-2 and node-3 in round 41 was done again by node-1 and node-2 in 0.4 s"
    )


def test_the_chunks_of_another_round_do_not_change_the_line_of_a_loss() -> None:
    history = fed(seen("1", "3", round=41), lost("3"), redone("node-3", round=44))
    assert len(texts(history)) == 2
    assert "chunk" not in texts(history)[0]


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        (MemberJoined(peer="5", name="node-5", view=4), "node-5 joined in round 3"),
        (MemberLeft(peer="2", name="node-2", view=4), "node-2 left in round 3"),
        (SnapshotWritten(round=3), "node-1 wrote a checkpoint after round 3"),
        (CatchingUp(run_round=9, fetched_bytes=3 << 20, missing_bytes=5 << 20, seconds=10.0),
         "node-1 catches up to round 9: 3.0 MiB fetched in 10.0 s, 5.0 MiB to go"),
        (CaughtUp(round=3, fetched_bytes=3 << 20, seconds=1.25),
         "node-1 caught up to round 3: 3.0 MiB fetched in 1.2 s"),
        (CutOff(seconds=12.0, heard=1, voters=3, advice="wait"),
         "node-1 is cut off for 12.0 s: it hears 1 of 3 that vote, and keeps its work"),
        (ContributorLeftOut(round=3, chunk=7, peer="2", reason="not finite"),
         "node-2 left out of some chunks of round 3: not finite"),
    ],
)  # fmt: skip
def test_what_happened_is_said_in_words(fact: Fact, text: str) -> None:
    assert texts(fed(seen("1", "2"), fact)) == [text]


def test_what_would_repeat_itself_is_one_line_that_is_renewed() -> None:
    left_out = [ContributorLeftOut(round=3, chunk=c, peer="2", reason="late") for c in range(5)]
    history = fed(seen("1", "2"), SnapshotWritten(round=1), *left_out, SnapshotWritten(round=2))
    assert texts(history) == [
        "node-1 wrote a checkpoint after round 2",
        "node-2 left out of some chunks of round 3: late",
    ]


def test_the_page_may_be_public_so_errors_with_paths_and_addresses_stay_in_the_log() -> None:
    assert "secret" not in texts(fed(RemoteCopyFailed(round=3, text="s3://secret:key@host/bucket")))[0]


def test_a_moment_of_a_busy_machine_is_no_news() -> None:
    assert texts(fed(SlowWake(seconds=0.8), SlowWake(seconds=30.0))) == ["node-1 was not run for 30.0 s"]


def test_another_leader_is_told_once_there_was_one() -> None:
    views = [ViewAdopted(epoch=e, view=e, leader=n, members=("a", "b"), active=2) for e, n in ((1, "a"), (2, "b"))]
    assert texts(fed(*views)) == ["b leads the run now"]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ((), ""), (("a",), "a"), (("a", "b"), "a and b"), (("a", "b", "c"), "a, b and c"),
        (tuple("abcdef"), "a, b, c and 3 others"),
    ],
)  # fmt: skip
def test_names_are_listed_as_one_writes(names: tuple[str, ...], text: str) -> None:
    assert listed(names) == text


def test_sizes_and_times_have_units() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 << 30)] == ["0 B", "1023 B", "1.0 KiB", "3.0 GiB"]
    assert [seconds(s) for s in (0.42, 59.0, 61.0, 7320.0)] == ["0.4 s", "59.0 s", "1 min 1 s", "2 h 2 min"]


# --- members --------------------------------------------------------------------------------------------------------


def test_what_an_earlier_start_did_counts() -> None:
    history = fed(seen("1", tokens=1000), seen("1", incarnation=2, tokens=0), seen("1", incarnation=2, tokens=50))
    assert history.totals()["tokens"] == 1050
    assert history.totals()["training_share"] == pytest.approx(0.9)


def test_one_that_was_lost_stays_in_the_table_and_is_no_part_of_the_speed() -> None:
    history = fed(seen("1", "2", tokens=500), lost("2"), seen("1", tokens=500))
    [_, row] = history.table()
    assert (row["name"], row["state"], row["tokens"], row["active"]) == ("node-2", "lost", 500, False)
    assert history.totals()["tokens_per_s"] == 100
    assert history.whole()["speed"]["2"][-1][1] == 0


def test_one_that_is_in_the_view_no_more_and_of_which_nothing_was_heard_has_left() -> None:
    history = fed(seen("1", "2"), seen("1"))
    assert {m["name"]: m["state"] for m in history.table()} == {"node-1": "training", "node-2": "left"}


def test_one_that_comes_back_is_there_again() -> None:
    history = fed(seen("1", "2"), lost("2"), seen("1", "2", incarnation=2))
    assert [m["gone"] for m in history.table()] == ["", ""]


def test_a_page_of_a_large_run_says_nothing_of_the_others() -> None:
    history = fed(seen("1", "2", total=3), seen("3", first=2, total=3))
    assert [m["gone"] for m in history.table()] == ["", "", ""]
    assert history.totals()["members"] == 3


def test_a_witness_has_no_curves() -> None:
    assert set(fed(seen("1", "w")).whole()["loss"]) == {"1"}


# --- rounds and losses ----------------------------------------------------------------------------------------------


def test_the_times_of_a_round_are_kept_by_member_and_once() -> None:
    history = fed(seen("1", "2", rounds=(1, 2)), seen("1", "2", rounds=(2, 3)))
    rounds = history.whole()["rounds"]
    assert [(r["round"], sorted(r["members"])) for r in rounds] == [(n, ["1", "2"]) for n in (1, 2, 3)]
    assert rounds[0]["members"]["1"] == {
        "round": 1, "training_ms": 900, "waiting_ms": 50, "exchange_ms": 40, "other_ms": 10, "tokens": 100
    }  # fmt: skip


def test_the_held_out_loss_of_a_round_is_the_first_that_is_told_and_never_one_of_the_past() -> None:
    told = [HeldOutLoss(round=r, loss=x) for r, x in ((0, 5.5), (4, 3.0), (4, 3.1), (2, 4.0), (6, math.nan), (8, 2.5))]
    history = fed(*told)
    assert [(h["round"], h["loss"]) for h in history.whole()["heldout"]] == [(0, 5.5), (4, 3.0), (8, 2.5)]
    assert (history.totals()["heldout_loss"], history.totals()["first_heldout_loss"]) == (2.5, 5.5)


def test_it_says_whether_it_hears_a_leader() -> None:
    history = fed(seen("1"))
    assert history.totals()["connected"]
    history.add(CutOff(seconds=1.0, heard=1, voters=3, advice=""), 2000.0)
    assert not history.totals()["connected"]


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_everything_is_bounded() -> None:
    history = fed(*(seen("1", rounds=(r,)) for r in range(3 * KEPT_ROUNDS)))
    ids = [f"m{i}" for i in range(KEPT_GONE + 2 * CURVES)]
    facts: list[Fact] = [seen(*ids), *map(lost, ids)]
    for at, fact in enumerate(facts, 5000):
        history.add(fact, float(at))
    for number in range(2 * KEPT_EVENTS):
        history.add(MemberJoined(peer=f"x{number}", name=f"x{number}", view=number), 9000.0)
    history.add(seen("1"), 9001.0)
    whole = history.whole()
    assert len(whole["rounds"]) == KEPT_ROUNDS
    assert len(whole["events"]) == KEPT_EVENTS
    assert len(whole["members"]) == KEPT_GONE + 1
    assert len(whole["speed"]) <= CURVES


def test_a_curve_that_grows_gets_coarser_and_keeps_its_shape() -> None:
    series = Series()
    for second in range(20 * MAX_POINTS):
        series.add(1000.0 + second, float(second))
    assert MAX_POINTS / 2 < len(series.points) <= MAX_POINTS
    assert all(abs(p.value - (p.at - 1000.0)) <= series.width_s for p in series.points)


def test_two_curves_do_not_share_their_points() -> None:
    first, second = Series(), Series()
    first.add(1.0, 1.0)
    assert second.points == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_not_drawn(value: float) -> None:
    series = Series()
    series.add(1.0, value)
    assert series.points == []


# --- changes --------------------------------------------------------------------------------------------------------


def test_the_changes_make_of_an_older_whole_the_newer_one() -> None:
    history = fed(seen("1", "2"))
    before = json.loads(json.dumps(history.whole()))
    history.take_delta()
    assert history.take_delta() is None
    news: list[Fact] = [seen("1", "2", tokens=2000, rounds=(4,)), lost("2"), HeldOutLoss(round=4, loss=2.0)]
    for at, fact in enumerate(news, 3000):
        history.add(fact, float(at))
    delta = history.take_delta()
    assert delta is not None
    after = json.loads(json.dumps(history.whole()))
    members = {m["id"]: m for m in before["members"]} | {m["id"]: m for m in delta["members"]}
    assert members == {m["id"]: m for m in after["members"]}
    assert before["events"] + delta["events"] == after["events"]
    assert before["heldout"] + delta["heldout"] == after["heldout"]
    assert delta["totals"] == after["totals"]
    assert [r["round"] for r in delta["rounds"]] == [4]
    assert [[at, value] for id, at, value in delta["loss"] if id == "1"] == after["loss"]["1"][-1:]


# --- the file -------------------------------------------------------------------------------------------------------


def journal(path: Path, max_bytes: int = 1 << 20) -> Journal:
    made = Journal(path, History("1", "node-1"), max_bytes)
    made.load()
    return made


def told(path: Path, facts: list[Fact], start: float = 1000.0) -> Journal:
    made = journal(path)
    for at, fact in enumerate(facts):
        made.add(fact, start + at)
    return made


def test_the_history_is_there_again_after_a_restart(tmp_path: Path) -> None:
    before = told(tmp_path / "history.jsonl", STORY).history
    for _ in range(2):  # from the facts, and from the state that they were written anew as
        after = journal(tmp_path / "history.jsonl").history
        assert after.state == before.state
        assert not after.connected


def test_a_torn_or_damaged_line_costs_that_line(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    before = told(path, STORY).history
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:1], b"\x00\xff garbage\n", *lines[1:], b'{"at": 12.5, "fact": {"ty']))
    made = journal(path)
    assert made.history.state == before.state
    made.add(MemberJoined(peer="9", name="node-9", view=9), 2000.0)
    assert texts(journal(path).history)[-1].startswith("node-9 joined")


def test_figures_alone_are_written_every_few_seconds_and_inner_steps_never(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    made = told(path, [seen("1")])
    size_before = path.stat().st_size
    made.add(InnerStepDone(round=0, step=1, loss=math.nan, tokens=1, seconds=1.0), 1001.0)
    made.add(seen("1"), 1002.0)
    assert path.stat().st_size == size_before
    made.add(seen("1"), 1001.0 + FIGURES_EVERY_S)
    assert path.stat().st_size > size_before


def test_the_file_is_written_anew_when_it_is_long(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    made = journal(path, max_bytes=20_000)
    for number in range(1000):
        made.add(SnapshotWritten(round=number), 1000.0 + number)
    assert path.stat().st_size < 22_000
    assert texts(journal(path).history) == ["node-1 wrote a checkpoint after round 999"]


def test_a_disk_that_does_not_take_it_ends_the_file_and_not_the_history(tmp_path: Path) -> None:
    made = Journal(tmp_path / "nowhere" / "history.jsonl", History("1", "node-1"))
    made.add(SnapshotWritten(round=1), 1000.0)
    made.add(SnapshotWritten(round=2), 1001.0)
    assert texts(made.history) == ["node-1 wrote a checkpoint after round 2"]
