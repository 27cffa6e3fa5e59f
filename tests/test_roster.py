"""How the members do, as far as a member that shows it to people comes to know it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from prime_async.machines.facts import MemberJoined, MemberLeft, MemberLost, MembersSeen
from prime_async.machines.membership import Membership
from prime_async.machines.roster import WATCHED_HEARTBEATS, Audience, Known
from prime_async.machines.vocabulary import Measured, StateAt, Tick
from prime_async.messages import (
    FIRST_CHAIN,
    MAX_DEPARTED,
    MAX_ROSTER_ENTRIES,
    AskRoster,
    Departed,
    Figures,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Roster,
    RosterEntry,
    RoundTimes,
    encode,
)
from tests.machine_harness import facts, full_member, member, sent, view
from tests.membership_harness import D0, TIMEOUT_S, beat, give, hears, hello, leader_with, machine, shows, welcome

FIGURES = Figures(phase="training", tokens=4096, tokens_per_s=512, loss_micronats=2_500_000)


def watching(id: str = "n1") -> Membership:
    """A member in view 2, with the leader n0."""
    plain = machine(id)
    node = Membership(replace(plain.settings, watches=True))
    give(node, 0.0, StateAt(round=0, digest=D0, chain=FIRST_CHAIN))
    hears(node, 0.1, "n0", welcome())
    assert node.role == "member"
    return node


def entry(position: int = 0, round: int = 3, figures: Figures | None = FIGURES) -> RosterEntry:
    return RosterEntry(position=position, round=round, inner_steps=12, silent_ms=250, figures=figures)


# --- who says what, and when ----------------------------------------------------------------------------------------


def test_a_member_says_how_it_does_only_while_the_leader_says_that_somebody_watches() -> None:
    node = machine()
    give(node, 0.0, StateAt(round=0, digest=D0, chain=FIRST_CHAIN))
    hears(node, 0.1, "n0", welcome())
    give(node, 0.2, Measured(figures=FIGURES))
    [(_, unasked)] = sent(give(node, 1.3, Tick()), Heartbeat)
    hears(node, 1.4, "n0", HeartbeatAck(epoch=1, view=2, watched=True))
    [(_, asked)] = sent(give(node, 2.5, Tick()), Heartbeat)
    hears(node, 2.6, "n0", HeartbeatAck(epoch=1, view=2))
    [(_, no_more)] = sent(give(node, 3.7, Tick()), Heartbeat)
    assert [b.figures for b in (unasked, asked, no_more)] == [None, FIGURES, None]


def test_the_leader_says_so_for_a_few_heartbeats_after_it_was_asked() -> None:
    leader = leader_with("n1", "n2")
    [(_, before)] = sent(hears(leader, 1.0, "n1", beat(view=3)), HeartbeatAck)
    hears(leader, 1.1, "n2", AskRoster())
    [(_, during)] = sent(hears(leader, 1.1 + WATCHED_HEARTBEATS, "n1", beat(view=3)), HeartbeatAck)
    [(_, after)] = sent(hears(leader, 1.2 + WATCHED_HEARTBEATS, "n1", beat(view=3)), HeartbeatAck)
    assert [ack.watched for ack in (before, during, after)] == [False, True, False]


def test_the_leader_gives_what_it_heard_last_and_nothing_of_whom_it_has_not_heard() -> None:
    leader = leader_with("n1", "n2")
    hears(leader, 1.0, "n1", replace(beat(view=3), inner_steps=12, figures=FIGURES))
    [(peer, roster)] = sent(hears(leader, 1.25, "n2", AskRoster(first=1)), Roster)
    assert (peer, roster.view, roster.first) == ("n2", 3, 1)
    assert roster.entries == (RosterEntry(position=1, round=0, inner_steps=12, silent_ms=250, figures=FIGURES),)


def test_who_is_no_member_is_told_nothing() -> None:
    assert not sent(hears(leader_with("n1"), 1.0, "n9", AskRoster()), Roster)


def test_the_leader_speaks_of_itself_too() -> None:
    """given a leader that measured itself; when somebody asks; then the first entry is its own"""
    leader = leader_with("n1")
    give(leader, 0.5, Measured(figures=FIGURES))
    [(_, roster)] = sent(hears(leader, 1.0, "n1", AskRoster()), Roster)
    assert roster.entries[0] == RosterEntry(position=0, round=0, inner_steps=0, silent_ms=0, figures=FIGURES)


def test_a_heartbeat_without_figures_keeps_those_before() -> None:
    leader = leader_with("n1")
    hears(leader, 1.0, "n1", replace(beat(view=2), figures=FIGURES))
    hears(leader, 2.0, "n1", beat(view=2))
    [(_, roster)] = sent(hears(leader, 2.0, "n1", AskRoster(first=1)), Roster)
    assert roster.entries[0].figures == FIGURES


# --- one that watches -----------------------------------------------------------------------------------------------


def test_one_that_watches_asks_with_each_heartbeat_and_reports_the_answer() -> None:
    node = watching()
    assert sent(give(node, 1.2, Tick()), AskRoster) == [("n0", AskRoster(first=0))]
    effects = hears(node, 1.3, "n0", Roster(view=2, first=0, entries=(entry(),)))
    [seen] = facts(MembersSeen, effects)
    assert (seen.view, seen.first, seen.total) == (2, 0, 2)
    assert [(m.id, m.leads, m.round, m.silent_s, m.figures) for m in seen.members] == [
        ("n0", True, 3, 0.25, FIGURES),
        ("n1", False, 0, 0.0, None),
    ]


def test_one_that_does_not_watch_neither_asks_nor_reports() -> None:
    node = machine()
    give(node, 0.0, StateAt(round=0, digest=D0, chain=FIRST_CHAIN))
    hears(node, 0.1, "n0", welcome())
    assert not sent(give(node, 1.2, Tick()), AskRoster)
    assert not facts(MembersSeen, hears(node, 1.3, "n0", Roster(view=2, first=0, entries=(entry(),))))


@pytest.mark.parametrize(
    ("peer", "roster"),
    [("n5", Roster(view=2, first=0, entries=(entry(),))), ("n0", Roster(view=9, first=0, entries=(entry(),)))],
    ids=["not from the leader", "of a view that is not here"],
)
def test_other_rosters_are_passed_over(peer: str, roster: Roster) -> None:
    assert not facts(MembersSeen, hears(watching(), 1.3, peer, roster))


def test_a_large_view_is_shown_page_by_page_and_then_from_the_beginning() -> None:
    node, count = watching(), 2 * MAX_ROSTER_ENTRIES + 3
    others = [full_member(f"m{i}") for i in range(count - 2)]
    hears(node, 0.5, "n0", shows(3, full_member("n0"), member("n1"), *others))
    asked = []
    for second in range(1, 5):
        [(_, ask)] = sent(give(node, second + 0.6, Tick()), AskRoster)
        asked.append(ask.first)
        hears(node, second + 0.7, "n0", Roster(view=3, first=ask.first, entries=(entry(ask.first),)))
        hears(node, second + 0.7, "n0", HeartbeatAck(epoch=1, view=3))
    assert asked == [0, 64, 128, 0]


def test_an_entry_beyond_the_view_is_passed_over() -> None:
    entries = (entry(1), entry(2**40))
    [seen] = facts(MembersSeen, hears(watching(), 1.0, "n0", Roster(view=2, first=0, entries=entries)))
    assert [(m.id, m.round) for m in seen.members] == [("n0", 0), ("n1", 3)]


def test_a_page_beyond_the_view_is_empty_and_the_next_is_the_first() -> None:
    node = watching()
    [seen] = facts(MembersSeen, hears(node, 1.0, "n0", Roster(view=2, first=2**40, entries=(entry(),))))
    assert (seen.members, seen.total) == ((), 2)
    assert sent(give(node, 1.2, Tick()), AskRoster) == [("n0", AskRoster(first=0))]


def test_who_comes_is_told_where_one_watches() -> None:
    node = watching()
    effects = hears(node, 1.0, "n0", shows(3, full_member("n0"), member("n1"), member("n7")))
    assert facts(MemberJoined, effects) == [MemberJoined(peer="n7", name="n7", view=3)]
    again = hears(node, 2.0, "n0", shows(4, full_member("n0"), member("n1"), member("n7", incarnation=2)))
    assert facts(MemberJoined, again) == [MemberJoined(peer="n7", name="n7", view=4)]


def test_who_went_is_told_once_and_not_what_was_before_our_time() -> None:
    node = watching()
    gone = (
        Departed(id="n7", name="seven", view=2, silent_ms=10_000),
        Departed(id="n8", name="eight", view=3, silent_ms=10_012),
        Departed(id="n9", name="nine", view=4, silent_ms=0),
    )
    effects = hears(node, 1.0, "n0", Roster(view=2, first=0, entries=(), departed=gone))
    assert facts(MemberLost, effects) == [MemberLost(peer="n8", name="eight", silent_s=10.012, view=3)]
    assert facts(MemberLeft, effects) == [MemberLeft(peer="n9", name="nine", view=4)]
    effects = hears(node, 2.0, "n0", Roster(view=2, first=0, entries=(), departed=gone))
    assert not facts(MemberLost, effects) + facts(MemberLeft, effects)


def test_a_leader_that_watches_reports_each_heartbeat_what_it_knows_itself() -> None:
    plain = machine("n0", contacts=())
    leader = Membership(replace(plain.settings, watches=True))
    give(leader, 0.0, StateAt(round=0, digest=D0, chain=FIRST_CHAIN))
    hears(leader, 0.0, "n1", hello("n1"))
    give(leader, 0.1, Measured(figures=FIGURES))
    [(_, ack)] = sent(hears(leader, 0.5, "n1", beat(view=2)), HeartbeatAck)
    assert ack.watched
    seen = [facts(MembersSeen, give(leader, at, Tick())) for at in (1.0, 1.5, 2.0)]
    assert [len(s) for s in seen] == [1, 0, 1]
    [fact] = seen[0]
    assert [(m.id, m.leads, m.figures) for m in fact.members] == [("n0", True, FIGURES), ("n1", False, None)]


# --- the leader's list of who went ----------------------------------------------------------------------------------


def test_the_leader_tells_who_was_lost_and_who_said_goodbye() -> None:
    leader = leader_with("n1", "n2", "n3")
    for second in range(1, int(TIMEOUT_S) + 2):  # n3 is silent
        give(leader, float(second), Tick())
        hears(leader, float(second), "n1", beat(view=99))
        hears(leader, float(second), "n2", beat(view=99))
    hears(leader, TIMEOUT_S + 1.5, "n2", Goodbye(incarnation=1))
    [(_, roster)] = sent(hears(leader, TIMEOUT_S + 2, "n1", AskRoster()), Roster)
    assert [(d.id, d.silent_ms) for d in roster.departed] == [("n3", 11_000), ("n2", 0)]


def test_the_list_is_bounded() -> None:
    audience = Audience(1.0, always=False)
    for number in range(3 * MAX_DEPARTED):
        audience.note_departure(member(f"m{number}"), number, 0.0)
    departed = audience.roster(view(1), 0, {}).departed
    assert [d.view for d in departed] == list(range(2 * MAX_DEPARTED, 3 * MAX_DEPARTED))


def test_a_page_stays_far_below_the_limit_of_a_message_and_figures_below_half_a_kilobyte() -> None:
    times = RoundTimes(round=41, training_ms=600_000, waiting_ms=900, exchange_ms=2_100, other_ms=80, tokens=2**23)
    figures = replace(FIGURES, tokens=2**40, sent_bytes=2**40, received_bytes=2**40, rounds=(times,) * 3)
    assert len(encode(figures)) < 512
    known = {f"m{i}": Known(41, 12_345, 0.2, figures) for i in range(MAX_ROSTER_ENTRIES)}
    members = [full_member(f"m{i}") for i in range(2 * MAX_ROSTER_ENTRIES)]
    assert len(encode(Audience(1.0, always=True).roster(view(1, *members), 0, known))) < 2**16


def test_nobody_watches_a_new_leader_before_it_is_asked() -> None:
    assert not Audience(1.0, always=False).watches(0.0)
