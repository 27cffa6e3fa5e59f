"""Events, effects and messages in words: nothing is left out, and what a sentence needs is in it."""

from __future__ import annotations

from typing import get_args

import pytest
from msgspec import Struct

from prime_async.log import read_log
from prime_async.machines.facts import MemberSeen, MembersSeen, RoundCommitted
from prime_async.machines.vocabulary import (
    Effect,
    Encode,
    Event,
    Fetch,
    Heard,
    Offended,
    Reached,
    Reduced,
    Report,
    Send,
    Tell,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import (
    ChunkInfo,
    ChunkKey,
    Departed,
    Figures,
    Heartbeat,
    Member,
    Message,
    Plan,
    Roster,
    RosterEntry,
    Turn,
    View,
    bitmap,
)
from prime_async.words import EFFECTS, EVENTS, MESSAGES, Words
from tests.protocols_harness import V1

KEY = ChunkKey(kind="mean", round=4, chunk=2, epoch=1, attempt=0)
INFO = ChunkInfo(digest=bytes(32))


def member(id: str, name: str) -> Member:
    return Member(id=id, name=name, incarnation=1, control="c", bulk="b", active=True, voter=True)


VIEW = View(
    lineage=bytes(32), epoch=1, number=3, previous=bytes(32), leader="a" * 64,
    members=(member("a" * 64, "anna"), member("b" * 64, "ben")),
)  # fmt: skip


def test_what_is_shown_of_members_is_short() -> None:
    figures = Figures(phase="training", tokens=4096)
    entry = RosterEntry(position=3, round=1, inner_steps=2, silent_ms=0, figures=figures)
    unheard = RosterEntry(position=4, round=0, inner_steps=0, silent_ms=0)
    gone = Departed(id="n9", name="nine", view=2, silent_ms=0)
    said = Words().of(Roster(view=2, first=0, entries=(entry, unheard), departed=(gone,)))
    assert said.endswith("do: 3 [training, 4096 tokens], 4 [not known]; gone are nine")
    seen = MemberSeen(
        id="n1",
        name="one",
        incarnation=1,
        leads=True,
        active=True,
        witness=False,
        round=1,
        inner_steps=1,
        silent_s=0.0,
        figures=figures,
    )
    fact = MembersSeen(epoch=1, view=2, first=0, total=1, members=(seen,))
    assert "members one" in Words().of(Report(fact=fact))


@pytest.mark.parametrize(
    ("table", "union"), [(EVENTS, Event), (EFFECTS, Effect), (MESSAGES, Message)], ids=["events", "effects", "messages"]
)
def test_everything_has_a_sentence(table: dict[type[Struct], str], union: object) -> None:
    assert set(table) == set(get_args(union))


def test_every_event_and_message_of_the_golden_log_can_be_said_in_one_line() -> None:
    words = Words()
    log = read_log(V1 / "vectors" / "every-event.cborseq")
    said = {type(record.event): words.of(record.event) for record in log.records}

    assert set(said) == set(EVENTS)
    assert [text for text in said.values() if not text or "\n" in text or set("{}[]<>") & set(text)] == []


def test_every_sentence_names_fields_that_there_are() -> None:
    for table in (EVENTS, EFFECTS, MESSAGES):
        for kind, sentence in table.items():
            named = {field.split("}")[0] for field in sentence.split("{")[1:]}
            assert named <= set(kind.__struct_fields__), kind


def test_nodes_are_called_by_their_names_once_a_view_told_them() -> None:
    words = Words()
    event = Heard(peer="b" * 64, message=Heartbeat(incarnation=1, epoch=1, view=3, round=2, state_digest=b"\xab" * 32))
    assert words.of(event) == "bbbbbbbb says: alive in epoch 1, view 3, after 2 rounds with abababab"

    words.learn(ViewChanged(view=VIEW))

    assert words.of(event).startswith("ben says: alive")
    assert words.of(ViewChanged(view=VIEW)) == "decided is view 3 of epoch 1 (*anna, ben)"


def test_what_is_optional_is_said_where_it_holds() -> None:
    words = Words()
    assert words.of(Reached(peer="n1", reachable=True)) == "n1 can be dialled"
    assert words.of(Reached(peer="n1", reachable=False)) == "n1 cannot be dialled"
    assert words.of(Reduced(key=KEY, info=INFO)) == "mean/4/2/(1, 0) is made"
    assert words.of(Reduced(key=KEY, info=INFO, left_out=("n1", "n2"))) == "mean/4/2/(1, 0) is made, without n1, n2"
    assert words.of(Encode(round=0)) == "encodes its contribution to round 0"
    assert words.of(Encode(round=0, beside=True)).endswith("to round 0 beside the next inner steps")
    offence = Offended(peer="n1", plane="bulk", reason="{bad} [bytes]", times=3, shut_out=True)
    assert words.of(offence) == "n1 broke the protocol on the bulk plane (time 3): {bad} [bytes]; it is shut out"


def test_a_plan_says_who_contributes_and_whose_chunks_went_to_others() -> None:
    turns = (Turn(epoch=1, attempt=0), Turn(epoch=1, attempt=1, lost=bitmap([1])))
    plan = Plan(round=7, epoch=1, attempt=1, view=3, contributors=bitmap([0, 2]), weights=(40, 50), turns=turns)

    assert Words().of(plan) == (
        "round 7, (1, 1), over view 3: contributors are 0, 2, with weights 40, 50, by (1, 0), by (1, 1) without 1"
    )


def test_effects_are_said_in_order_and_what_several_machines_are_told_is_said_once() -> None:
    event = ViewChanged(view=VIEW)
    effects: list[Effect] = [
        Fetch(peer="n1", key=KEY, timeout_s=60.0),
        Tell(actor="exchange", event=event),
        Tell(actor="training", event=event),
        Report(fact=RoundCommitted(round=4, attempt=0)),
        WakeAt(at=12.5),
    ]

    said = Words().of_all(effects, now=12.0)

    assert said == (
        "fetches mean/4/2/(1, 0) from n1; tells exchange, training: decided is view 3 of epoch 1 (*anna, ben); "
        "reports round committed (round 4, attempt 0); sets its clock to 0.500 s from now"
    )
    assert Words().of_all([], now=0.0) == "nothing"


def test_a_long_list_is_said_by_its_length_and_ends() -> None:
    many = Send(peer="n1", message=Plan(
        round=0, epoch=1, attempt=0, view=1, contributors=bitmap(list(range(40))), weights=tuple(range(1, 41)),
        turns=(Turn(epoch=1, attempt=0),),
    ))  # fmt: skip

    assert "contributors are 40 members, from 0 to 39, with weights 40 of them, from 1 to 40" in Words().of(many)
