"""Every rule of the membership machine, by pure calls. Two machines talk through the messages that they send."""

from __future__ import annotations

from prime_async.machines.facts import (
    Founded,
    HelloRefused,
    Joined,
    KeyDenied,
    LeaderSilent,
    MemberJoined,
    MemberLeft,
    MemberLost,
    PeerDropped,
    RunEnding,
    SlowWake,
    StateDiverged,
    StillAsking,
    ViewAdopted,
)
from prime_async.machines.leadership import ContactPoint, MembershipSettings
from prime_async.machines.membership import MAX_GOODBYES, PATIENCE, Membership, setting_differences
from prime_async.machines.vocabulary import (
    AskAgain,
    ConnectMembers,
    Dial,
    DoorClosed,
    Effect,
    Fail,
    Finish,
    Heard,
    Leave,
    Offended,
    Progress,
    RunAt,
    StateAt,
    Tick,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import (
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Message,
    Redirect,
    Refuse,
    ViewUpdate,
    Welcome,
)
from tests.machine_harness import facts, member, of, sent, told, view

RUN_ID = bytes(32)
D0, D1, BAD = b"0" * 32, b"1" * 32, b"x" * 32
TIMEOUT_S = 10.0
N0 = ContactPoint(id="n0", control="sim://n0")


def machine(id: str = "n1", contacts: tuple[ContactPoint, ...] = (N0,), min_members: int = 1) -> Membership:
    settings = MembershipSettings(
        me=member(id, active=False),
        run_id=RUN_ID,
        settings={"seed": "1"},
        contacts=contacts,
        min_members=min_members,
        failure_timeout_s=TIMEOUT_S,
    )
    return Membership(settings)


def founder(min_members: int = 1) -> Membership:
    leader = machine("n0", contacts=(), min_members=min_members)
    leader.handle(0.0, StateAt(round=0, digest=D0))
    return leader


def asking(id: str = "n1", contacts: tuple[ContactPoint, ...] = (N0,)) -> Membership:
    node = machine(id, contacts)
    node.handle(0.0, StateAt(round=0, digest=D0))
    return node


def hello(id: str, incarnation: int = 1, protocol: int = 1, run_id: bytes = RUN_ID, seed: str = "1") -> Hello:
    asker = member(id, active=False, incarnation=incarnation)
    return Hello(protocol=protocol, run_id=run_id, settings={"seed": seed}, member=asker)


def beat(incarnation: int = 1, view: int = 99, round: int = 0, digest: bytes = D0, epoch: int = 1) -> Heartbeat:
    return Heartbeat(incarnation=incarnation, epoch=epoch, view=view, round=round, state_digest=digest)


def welcome(*others: str, number: int = 2, round: int = 0, incarnation: int = 1, epoch: int = 1) -> Welcome:
    members = [member("n0"), member("n1", active=False, incarnation=incarnation), *(member(o) for o in others)]
    return Welcome(view=view(number, *members, epoch=epoch), round=round, state_digest=D0)


def hears(node: Membership, now: float, peer: str, message: Message) -> list[Effect]:
    return node.handle(now, Heard(peer=peer, message=message))


def leader_with(*ids: str, min_members: int = 1) -> Membership:
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


# --- founding and joining -------------------------------------------------------------------------------------------


def test_a_node_without_contacts_founds_the_run_and_leads_it() -> None:
    leader = machine("n0", contacts=())
    effects = leader.handle(0.0, StateAt(round=3, digest=D0))
    assert facts(Founded, effects)
    assert leader.role == "leader"
    assert active(leader) == ["n0"]
    assert told(effects, "checkpoint") == [RunAt(round=3, digest=D0, provider="n0")]


def test_a_founder_that_starts_again_has_a_higher_epoch() -> None:
    first, second = founder(), machine("n0", contacts=())
    second.incarnation = 1000
    second.handle(0.0, StateAt(round=0, digest=D0))
    assert first.view is not None
    assert second.view is not None
    assert (second.view.epoch, second.view.number) > (first.view.epoch, 10**6)


def test_a_node_asks_until_it_is_answered_and_says_so() -> None:
    node = machine()
    effects = node.handle(0.0, StateAt(round=0, digest=D0))
    assert [(p, m.member.id) for p, m in sent(effects, Hello)] == [("n0", "n1")]
    assert of(Dial, effects) == [Dial(peer="n0", control="sim://n0")]
    effects = node.handle(1.0, Tick())
    assert len(sent(effects, Hello)) == 1
    assert not facts(StillAsking, effects)
    for second in range(2, 10):
        node.handle(float(second), Tick())
    assert facts(StillAsking, node.handle(10.0, Tick())) == [StillAsking(contacts=("sim://n0",), seconds=10.0)]


def test_a_node_that_never_was_a_member_asks_for_ever() -> None:
    node = asking()
    for second in range(1, 1000):
        assert not of(Fail, node.handle(float(second), Tick()))
    assert node.role == "asking"


def test_a_hello_heard_twice_gives_one_member_and_two_welcomes() -> None:
    leader = founder()
    first = hears(leader, 1.0, "n1", hello("n1"))
    second = hears(leader, 1.0, "n1", hello("n1"))
    assert len(facts(MemberJoined, first)) == 1
    assert not facts(MemberJoined, second)
    assert [m.view for _, m in sent(first + second, Welcome)] == [leader.view, leader.view]
    assert ids(leader) == ["n0", "n1"]
    assert active(leader) == ["n0"]


def test_a_newcomer_cannot_say_that_it_is_active_or_how_much_it_weighs() -> None:
    leader = founder()
    boast = Hello(protocol=1, run_id=RUN_ID, settings={"seed": "1"}, member=member("n1", active=True, weight=99))
    hears(leader, 1.0, "n1", boast)
    assert leader.view is not None
    assert leader.view.member("n1") == member("n1", active=False, weight=1)


def test_a_hello_of_another_run_is_refused_with_what_differs() -> None:
    leader = founder()
    effects = hears(leader, 1.0, "n1", hello("n1", run_id=b"z" * 32, seed="2"))
    [(peer, refusal)] = sent(effects, Refuse)
    assert (peer, refusal.reason) == ("n1", "other_run")
    assert refusal.differences == ("seed: 1 in the run, 2 at the node that asks",)
    assert facts(HelloRefused, effects)
    assert ids(leader) == ["n0"]


def test_settings_that_one_side_does_not_have_differ() -> None:
    assert setting_differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == (
        "a: 1 in the run, not set at the node that asks",
        "c: not set in the run, 3 at the node that asks",
    )


def test_a_hello_of_another_protocol_is_refused_also_by_a_member_that_does_not_lead() -> None:
    for node in (founder(), joined()):
        effects = hears(node, 1.0, "n9", hello("n9", protocol=2))
        assert [m.reason for _, m in sent(effects, Refuse)] == ["other_protocol"]


def test_a_hello_for_somebody_else_is_refused() -> None:
    effects = hears(founder(), 1.0, "n1", hello("n2"))
    assert [m.reason for _, m in sent(effects, Refuse)] == ["key_not_allowed"]


def test_a_copy_of_the_leaders_key_is_told_so_and_changes_nothing() -> None:
    """Defect: the leader took a node with its own key for a member, and its next heartbeat raised KeyError."""
    leader = leader_with("n1")
    before = leader.view
    effects = hears(leader, 1.0, "n0", hello("n0", incarnation=7))
    assert [(p, m.reason) for p, m in sent(effects, Refuse)] == [("n0", "key_not_allowed")]
    assert hears(leader, 1.0, "n0", beat()) == []
    assert hears(leader, 1.0, "n0", Goodbye(incarnation=1)) == []
    assert leader.view == before


def test_a_member_that_does_not_lead_says_who_does() -> None:
    effects = hears(joined(), 1.0, "n2", hello("n2"))
    assert sent(effects, Redirect) == [("n2", Redirect(leader="n0", control="sim://n0"))]


def test_a_redirected_node_asks_the_leader_at_once_and_once() -> None:
    node = asking(contacts=(ContactPoint(id="n5", control="sim://n5"),))
    effects = hears(node, 0.2, "n5", Redirect(leader="n0", control="sim://n0"))
    assert [p for p, _ in sent(effects, Hello)] == ["n0"]
    assert of(Dial, effects) == [Dial(peer="n0", control="sim://n0")]
    assert not sent(hears(node, 0.3, "n5", Redirect(leader="n0", control="sim://n0")), Hello)
    assert [p for p, _ in sent(node.handle(1.1, Tick()), Hello)] == ["n5", "n0"]
    hears(node, 1.2, "n0", welcome())
    assert node.role == "member"


def test_members_that_name_different_leaders_do_not_make_a_node_echo() -> None:
    """Defect: every change of mind asked all contacts, each of which answered with the next change of mind."""
    node = asking(contacts=(ContactPoint(id="n5", control="sim://n5"), ContactPoint(id="n6", control="sim://n6")))
    for i in range(10):
        leader = f"n{7 + i % 2}"
        effects = hears(node, 0.2, f"n{5 + i % 2}", Redirect(leader=leader, control=f"sim://{leader}"))
        assert [p for p, _ in sent(effects, Hello)] == [leader]


def test_nobody_who_was_not_asked_can_redirect_welcome_or_refuse() -> None:
    node = asking()
    assert not sent(hears(node, 0.2, "n9", Redirect(leader="n8", control="sim://n8")), Hello)
    hears(node, 0.2, "n9", Welcome(view=view(9, member("n9"), member("n1"), leader="n9"), round=0, state_digest=D0))
    hears(node, 0.2, "n9", Refuse(reason="other_run", text=""))
    assert node.role == "asking"


def test_a_welcome_takes_a_node_into_the_run_and_a_repeated_one_does_no_harm() -> None:
    node = asking()
    effects = hears(node, 0.1, "n0", welcome(round=4))
    assert facts(Joined, effects) == [Joined(leader="n0", view=2, round=4)]
    assert told(effects, "checkpoint") == [RunAt(round=4, digest=D0, provider="n0")]
    assert [p for p, _ in sent(effects, Heartbeat)] == ["n0"]
    assert of(ConnectMembers, effects)
    again = hears(node, 0.2, "n0", welcome(round=4))
    assert not facts(Joined, again)
    assert not facts(ViewAdopted, again)


def test_a_welcome_of_an_earlier_incarnation_is_ignored() -> None:
    node = asking()
    assert hears(node, 0.1, "n0", welcome(incarnation=0)) == []


def test_a_refused_node_ends_with_the_reason() -> None:
    node = asking()
    refusal = Refuse(reason="other_run", text="copy it", differences=("seed: 1, 2",))
    assert of(Fail, hears(node, 0.1, "n0", refusal)) == [
        Fail(kind="refused", text="copy it", reason="other_run", differences=("seed: 1, 2",))
    ]
    assert node.handle(5.0, Tick()) == []


def test_closed_doors_end_a_node_when_every_contact_has_closed_its_own() -> None:
    node = asking(contacts=(N0, ContactPoint(id="n5", control="sim://n5")))
    first = node.handle(0.1, DoorClosed(peer="n0", address="sim://n0"))
    assert facts(KeyDenied, first) == [KeyDenied(peer="n0", address="sim://n0")]
    assert not facts(KeyDenied, node.handle(0.2, DoorClosed(peer="n0", address="sim://n0")))
    [fail] = of(Fail, node.handle(0.3, DoorClosed(peer="n5", address="sim://n5")))
    assert (fail.kind, fail.reason) == ("refused", "key_not_allowed")


def test_a_node_does_not_go_back_to_a_leader_that_lost_the_state() -> None:
    """Defect: the leader crashed, started again from nothing, and every member gave up its rounds for round 0."""
    node = joined()
    node.handle(1.0, StateAt(round=5, digest=D1))
    hears(node, 2.0, "n0", Refuse(reason="not_a_member", text=""))
    effects = hears(node, 2.1, "n0", welcome(round=0, incarnation=2, epoch=2))
    [fail] = of(Fail, effects)
    assert fail.kind == "leader_lost"
    assert "after 5 rounds" in fail.text
    assert not told(effects, "checkpoint")


def test_a_leader_that_started_again_with_the_state_is_followed() -> None:
    """Defect: its views have low numbers, and were taken for older ones."""
    node = joined()
    hears(node, 1.0, "n0", ViewUpdate(view=view(17, member("n0"), member("n1"))))
    hears(node, 2.0, "n0", Refuse(reason="not_a_member", text=""))
    effects = hears(node, 2.1, "n0", welcome(number=2, incarnation=2, epoch=2))
    assert node.role == "member"
    assert [e.view.number for e in told(effects, "exchange") if isinstance(e, ViewChanged)] == [2]


def test_the_leader_that_has_not_applied_yet_may_welcome_with_the_round_before() -> None:
    node = joined()
    node.handle(1.0, StateAt(round=1, digest=D1))
    hears(node, 2.0, "n0", Refuse(reason="not_a_member", text=""))
    effects = hears(node, 2.1, "n0", welcome(round=0, incarnation=2))
    assert not of(Fail, effects)
    assert node.role == "member"


# --- becoming active ------------------------------------------------------------------------------------------------


def test_a_member_that_has_the_state_becomes_active_at_the_next_round() -> None:
    leader = leader_with("n1")
    hears(leader, 1.0, "n1", beat())
    assert active(leader) == ["n0"]
    leader.handle(2.0, StateAt(round=1, digest=D1))
    assert active(leader) == ["n0", "n1"]


def test_a_member_without_the_state_is_not_waited_for() -> None:
    leader = leader_with("n1", "n2", "n3")
    hears(leader, 1.0, "n1", beat(digest=BAD))
    hears(leader, 1.0, "n2", beat(round=7))
    leader.handle(2.0, StateAt(round=1, digest=D1))
    assert active(leader) == ["n0"]


def test_who_has_the_state_of_two_rounds_ago_is_not_activated() -> None:
    leader = leader_with("n1")
    hears(leader, 1.0, "n1", beat())
    leader.states.advance(1, D1)
    leader.handle(2.0, StateAt(round=2, digest=D1))
    assert active(leader) == ["n0"]


def test_a_member_is_active_at_once_while_there_are_too_few() -> None:
    leader = leader_with("n1", "n2", min_members=2)
    hears(leader, 1.0, "n1", beat())
    assert active(leader) == ["n0", "n1"]
    hears(leader, 1.0, "n2", beat())
    assert active(leader) == ["n0", "n1"]


# --- heartbeats, silence, removal -----------------------------------------------------------------------------------


def test_a_member_says_that_it_lives_every_second_and_after_every_outer_step() -> None:
    node = joined()
    node.handle(0.5, Progress(inner_steps=12))
    [(peer, sign)] = sent(node.handle(1.1, Tick()), Heartbeat)
    assert (peer, sign.inner_steps, sign.round) == ("n0", 12, 0)
    [(_, sign)] = sent(node.handle(1.2, StateAt(round=1, digest=D1)), Heartbeat)
    assert (sign.round, sign.state_digest) == (1, D1)


def test_the_leader_answers_a_heartbeat_and_repairs_an_older_view() -> None:
    leader = leader_with("n1", "n2")
    assert leader.view is not None
    assert sent(hears(leader, 1.0, "n1", beat(view=leader.view.number)), ViewUpdate) == []
    effects = hears(leader, 1.0, "n1", beat(view=2))
    assert sent(effects, ViewUpdate) == [("n1", ViewUpdate(view=leader.view))]
    assert sent(effects, HeartbeatAck) == [("n1", HeartbeatAck(epoch=1, view=leader.view.number))]


def ticks(node: Membership, start_s: int, end_s: int) -> list[Effect]:
    return [effect for second in range(start_s, end_s) for effect in node.handle(float(second), Tick())]


def test_a_silent_member_is_removed_after_the_timeout_and_not_before() -> None:
    leader = leader_with("n1", "n2")
    ticks(leader, 1, 10)
    hears(leader, 9.0, "n2", beat())
    leader.handle(TIMEOUT_S, Tick())
    assert ids(leader) == ["n0", "n1", "n2"]
    effects = leader.handle(TIMEOUT_S + 0.001, Tick())
    assert ids(leader) == ["n0", "n2"]
    assert facts(MemberLost, effects) == [MemberLost(peer="n1", name="n1", silent_s=10.001, view=4)]
    assert [p for p, _ in sent(effects, ViewUpdate)] == ["n2"]


def test_the_leader_wakes_when_the_longest_silence_ends() -> None:
    leader = founder()
    ticks(leader, 1, 10)
    effects = hears(leader, 9.5, "n1", hello("n1"))
    wakes = [w.at for w in of(WakeAt, effects + ticks(leader, 10, 20))]
    assert wakes[-1] == 9.5 + TIMEOUT_S + 0.001


def test_a_leader_that_wakes_late_forgives_the_time_it_lost() -> None:
    leader = leader_with("n1")
    ticks(leader, 1, 5)
    effects = leader.handle(100.0, Tick())
    assert facts(SlowWake, effects) == [SlowWake(seconds=95.0)]
    assert ids(leader) == ["n0", "n1"]
    ticks(leader, 101, 106)
    assert ids(leader) == ["n0", "n1"]
    ticks(leader, 106, 109)
    assert ids(leader) == ["n0"]


def test_a_member_that_wakes_late_does_not_blame_its_leader() -> None:
    node = joined()
    node.handle(1.1, Tick())
    effects = node.handle(60.0, Tick())
    assert facts(SlowWake, effects)
    assert not facts(LeaderSilent, effects)
    assert node.role == "member"


def test_a_new_incarnation_replaces_the_earlier_one_and_is_not_active() -> None:
    leader = leader_with("n1", "n2")
    for id in ("n1", "n2"):
        hears(leader, 1.0, id, beat())
    leader.handle(2.0, StateAt(round=1, digest=D1))
    assert active(leader) == ["n0", "n1", "n2"]
    hears(leader, 3.0, "n1", hello("n1", incarnation=2))
    assert ids(leader) == ["n0", "n2", "n1"]
    assert active(leader) == ["n0", "n2"]


def test_what_an_earlier_incarnation_says_is_ignored() -> None:
    leader = leader_with("n1")
    hears(leader, 1.0, "n1", hello("n1", incarnation=5))
    before = leader.view
    assert not sent(hears(leader, 2.0, "n1", hello("n1", incarnation=1)), Welcome)
    assert not sent(hears(leader, 2.0, "n1", beat(incarnation=1)), HeartbeatAck)
    assert not sent(hears(leader, 2.0, "n1", Goodbye(incarnation=1)), ViewUpdate)
    assert leader.view == before


def test_who_is_not_in_the_view_is_told_to_ask() -> None:
    leader = leader_with("n1")
    for peer, incarnation in (("n9", 1), ("n1", 2)):
        effects = hears(leader, 1.0, peer, beat(incarnation=incarnation))
        assert [m.reason for _, m in sent(effects, Refuse)] == ["not_a_member"]


def test_a_removed_member_asks_again_as_a_new_incarnation() -> None:
    for message in (Refuse(reason="not_a_member", text=""), ViewUpdate(view=view(3, member("n0")))):
        node = joined()
        effects = hears(node, 2.0, "n0", message)
        assert node.role == "asking"
        [(_, question)] = sent(effects, Hello)
        assert question.member.incarnation == 2


def test_a_view_with_an_earlier_incarnation_of_us_says_that_we_were_removed() -> None:
    node = joined()
    effects = hears(node, 2.0, "n0", ViewUpdate(view=view(3, member("n0"), member("n1", incarnation=0))))
    assert [m.member.incarnation for _, m in sent(effects, Hello)] == [2]


def test_a_refusal_from_somebody_who_does_not_lead_is_ignored() -> None:
    node = joined()
    assert hears(node, 2.0, "n5", Refuse(reason="diverged", text="")) == []
    assert node.role == "member"


def test_views_older_than_ours_are_ignored() -> None:
    node = joined()
    hears(node, 1.0, "n0", ViewUpdate(view=view(5, member("n0"), member("n1"))))
    effects = hears(node, 2.0, "n0", ViewUpdate(view=view(4, member("n0"), member("n1"), member("n2"))))
    assert not told(effects, "exchange")
    assert ids(node) == ["n0", "n1"]


def test_a_view_from_somebody_who_does_not_lead_is_ignored() -> None:
    node = joined()
    for peer, leader in (("n5", "n5"), ("n5", "n0"), ("n0", "n5")):
        assert hears(node, 1.0, peer, ViewUpdate(view=view(9, member("n1"), member("n5"), leader=leader))) == []
    assert ids(node) == ["n0", "n1"]


def test_a_member_whose_state_differs_for_the_same_round_is_removed_as_diverged() -> None:
    leader = leader_with("n1", min_members=2)
    hears(leader, 1.0, "n1", beat())
    effects = hears(leader, 2.0, "n1", beat(digest=BAD))
    assert facts(StateDiverged, effects) == [StateDiverged(peer="n1", round=0, ours=D0.hex(), theirs=BAD.hex())]
    assert [m.reason for _, m in sent(effects, Refuse)] == ["diverged"]
    assert ids(leader) == ["n0"]


def test_a_diverged_member_asks_again_and_learns_where_the_run_is() -> None:
    node = joined()
    effects = hears(node, 2.0, "n0", Refuse(reason="diverged", text=""))
    assert [m.member.incarnation for _, m in sent(effects, Hello)] == [2]
    effects = hears(node, 2.1, "n0", welcome(incarnation=2, number=4))
    assert told(effects, "checkpoint") == [RunAt(round=0, digest=D0, provider="n0")]


def test_a_member_that_is_a_round_ahead_of_its_leader_is_not_judged() -> None:
    leader = leader_with("n1", min_members=2)
    hears(leader, 1.0, "n1", beat())
    hears(leader, 2.0, "n1", beat(round=1, digest=D1))
    assert ids(leader) == ["n0", "n1"]


def test_a_peer_that_is_shut_out_is_removed() -> None:
    leader = leader_with("n1")
    effects = leader.handle(1.0, Offended(peer="n1", plane="bulk", reason="r", times=1, shut_out=False))
    assert facts(PeerDropped, effects)
    assert ids(leader) == ["n0", "n1"]
    leader.handle(1.0, Offended(peer="n1", plane="bulk", reason="r", times=3, shut_out=True))
    assert ids(leader) == ["n0"]


# --- a silent leader ------------------------------------------------------------------------------------------------


def test_a_member_that_lost_its_leader_asks_anew_and_gives_up_after_four_timeouts() -> None:
    node = joined()
    for second in range(1, 11):
        node.handle(second + 0.1, Tick())
    assert node.role == "member"
    effects = node.handle(10.2, Tick())
    assert [f.leader for f in facts(LeaderSilent, effects)] == ["n0"]
    assert [m.member.incarnation for _, m in sent(effects, Hello)] == [2]
    now = 11.2
    while not (fails := of(Fail, node.handle(now, Tick()))):
        now += 1.0
    assert fails[0].kind == "leader_lost"
    assert 10.2 + (PATIENCE - 1) * TIMEOUT_S <= now < 10.2 + (PATIENCE - 1) * TIMEOUT_S + 1.1


def test_a_leader_that_is_heard_again_takes_its_member_back() -> None:
    node = joined()
    for second in range(1, 15):
        node.handle(float(second), Tick())
    assert node.role == "asking"
    hears(node, 15.0, "n0", welcome(incarnation=2))
    assert node.role == "member"


def test_an_answer_to_a_heartbeat_is_a_sign_of_life() -> None:
    node = joined()
    for second in range(1, 30):
        node.handle(float(second), Tick())
        hears(node, second + 0.1, "n0", HeartbeatAck(epoch=1, view=2))
    assert node.role == "member"


# --- leaving --------------------------------------------------------------------------------------------------------


def test_a_leaving_member_repeats_its_goodbye_until_it_sees_a_view_without_it() -> None:
    node = joined()
    assert len(sent(node.handle(1.0, Leave()), Goodbye)) == 1
    assert len(sent(node.handle(1.5, Tick()), Goodbye)) == 1
    assert not of(Finish, hears(node, 1.6, "n0", ViewUpdate(view=view(3, member("n0"), member("n1")))))
    assert of(Finish, hears(node, 1.7, "n0", ViewUpdate(view=view(4, member("n0")))))
    assert node.role == "gone"


def test_a_leaving_member_goes_after_three_goodbyes_without_an_answer() -> None:
    node = joined()
    goodbyes = sent(node.handle(1.0, Leave()), Goodbye)
    now = 1.5
    while not of(Finish, effects := node.handle(now, Tick())):
        goodbyes += sent(effects, Goodbye)
        now += 0.5
    assert len(goodbyes) == MAX_GOODBYES
    assert now == 2.5


def test_a_leaving_member_does_not_ask_to_be_taken_in_again() -> None:
    """Defect: a state fetch that was under way asked anew, and the node became a member once more."""
    node = joined()
    node.handle(1.0, Leave())
    assert not sent(node.handle(1.1, AskAgain()), Hello)


def test_the_leader_answers_a_goodbye_also_the_second_time() -> None:
    leader = leader_with("n1")
    first = hears(leader, 1.0, "n1", Goodbye(incarnation=1))
    assert facts(MemberLeft, first)
    for effects in (first, hears(leader, 1.5, "n1", Goodbye(incarnation=1))):
        assert [(p, m.view) for p, m in sent(effects, ViewUpdate)] == [("n1", leader.view)]
    assert ids(leader) == ["n0"]


def test_a_node_that_never_joined_leaves_at_once() -> None:
    assert of(Finish, asking().handle(1.0, Leave()))


def test_a_leaving_leader_goes_last() -> None:
    leader = leader_with("n1", "n2")
    hears(leader, 1.0, "n1", beat())
    leader.states.advance(1, D1)
    hears(leader, 2.0, "n1", beat(round=1, digest=D1))
    effects = leader.handle(2.0, Leave())
    assert [p for p, _ in sent(effects, Goodbye)] == ["n1"]  # n2 does not have the last round
    assert not of(Finish, effects)
    hears(leader, 3.0, "n1", Goodbye(incarnation=1))
    effects = hears(leader, 3.0, "n2", beat(round=1, digest=D1))
    assert [p for p, _ in sent(effects, Goodbye)] == ["n2"]
    assert of(Finish, hears(leader, 4.0, "n2", Goodbye(incarnation=1)))


def test_a_leaving_leader_does_not_wait_for_a_silent_member_for_ever() -> None:
    leader = leader_with("n1")
    leader.handle(1.0, Leave())
    assert of(Finish, ticks(leader, 2, 12))


def test_a_leader_that_is_alone_leaves_at_once() -> None:
    assert of(Finish, founder().handle(1.0, Leave()))


def test_nobody_joins_a_run_that_ends() -> None:
    leader = leader_with("n1")
    leader.handle(1.0, Leave())
    member_of_it = joined()
    hears(member_of_it, 1.0, "n0", Goodbye(incarnation=1))
    for node in (leader, member_of_it):
        assert [m.reason for _, m in sent(hears(node, 1.1, "n5", hello("n5")), Refuse)] == ["leader_left"]


def test_a_leader_that_says_goodbye_ends_the_run_for_its_members() -> None:
    node = joined()
    effects = hears(node, 1.0, "n0", Goodbye(incarnation=1, text="the end"))
    assert facts(RunEnding, effects) == [RunEnding(text="the end")]
    assert told(effects, "training") == [Leave(at_once=True)]
    assert not facts(RunEnding, hears(node, 1.1, "n0", Goodbye(incarnation=1, text="the end")))
    for second in range(2, 40):
        node.handle(float(second), Tick())
    assert node.role == "member"  # it is on its way out, and judges nobody


def test_a_goodbye_of_somebody_else_ends_nothing() -> None:
    assert hears(joined(), 1.0, "n5", Goodbye(incarnation=1)) == []
