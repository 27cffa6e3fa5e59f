"""Records of committed rounds: what the chain proves of them, in whatever order they come, and who lied."""

from __future__ import annotations

import random

import pytest
from blake3 import blake3
from msgspec.structs import replace

from prime_async.machines.fragments import Fragments
from prime_async.machines.records import Records
from prime_async.messages import FIRST_CHAIN, Commit, Included, Record, next_chain

CHUNKS = 3


def history(rounds: int, name: str = "", *, after: Record | None = None) -> list[Record]:
    """Records that follow ``after``, or the first."""
    chain, made = (after.commit.chain, [after]) if after else (FIRST_CHAIN, [])
    first = after.commit.round + 1 if after else 0
    for round in range(first, rounds):
        means = b"".join(blake3(f"mean {name} {round} {c}".encode()).digest() for c in range(CHUNKS))
        state, digest = blake3(f"state {name} {round}".encode()).digest(), blake3(means).digest()
        commit = Commit(
            round=round, epoch=1, attempt=0, state=state, digest=digest, chain=next_chain(chain, state, digest), view=1
        )
        runs = (Included(chunks=CHUNKS, contributors=b"\x01", total_weight=5),)
        made.append(Record(commit=commit, previous=chain, means=means, included=runs))
        chain = commit.chain
    return made


RUN = history(12)
OTHER = history(12, "other")


def aimed(round: int = 11) -> Records:
    records = Records(Fragments(CHUNKS))
    records.aim(RUN[round].commit)
    return records


def test_the_newest_record_must_be_of_the_newest_commit() -> None:
    records = aimed()
    assert records.take("liar", replace(OTHER[11])) == ["liar"]
    assert records.linked(11) is None
    assert records.take("n2", RUN[11]) == []
    assert records.linked(11) == RUN[11]
    assert records.bottom == 11


def test_records_prove_each_other_downwards_in_whatever_order_they_come() -> None:
    for seed in range(20):
        records, order = aimed(), RUN.copy()
        random.Random(seed).shuffle(order)
        for record in order:
            assert records.take("n1", record) == []
        assert records.bottom == 0
        assert [records.linked(r) for r in range(12)] == RUN


def test_a_record_that_cannot_be_judged_yet_waits_and_counts_as_come() -> None:
    records = aimed()
    assert records.take("n1", RUN[9]) == []
    assert records.has(9)
    assert records.linked(9) is None
    records.take("n1", RUN[11])
    assert records.take("n2", RUN[10]) == []
    assert records.linked(9) == RUN[9]


def test_who_sent_a_record_that_turns_out_not_to_fit_is_named_when_that_shows() -> None:
    records = aimed()
    assert records.take("liar", OTHER[9]) == []
    assert records.take("n1", RUN[11]) == []
    assert records.take("n2", RUN[10]) == ["liar"]
    assert not records.has(9), "so that another is asked"
    assert records.take("n2", RUN[9]) == []
    assert records.bottom == 9


def forged(what: str) -> Record:
    """The record of round 10 with one thing another."""
    true = RUN[10]
    match what:
        case "means":
            return replace(true, means=OTHER[10].means)
        case "means and their digest":
            digest = blake3(OTHER[10].means).digest()
            return replace(true, means=OTHER[10].means, commit=replace(true.commit, digest=digest))
        case "previous":
            return replace(true, previous=OTHER[9].commit.chain)
        case "state":
            return replace(true, commit=replace(true.commit, state=bytes(32)))
        case "round":
            return replace(true, commit=replace(true.commit, round=9))
        case "too few chunks":
            return replace(true, included=(replace(true.included[0], chunks=CHUNKS - 1),))
        case "one digest too many":
            return replace(true, means=true.means + bytes(32))
        case _:
            return OTHER[10]


@pytest.mark.parametrize(
    "what",
    [
        "means",
        "means and their digest",
        "previous",
        "state",
        "round",
        "too few chunks",
        "one digest too many",
        "another history",
    ],
)
def test_nothing_in_a_record_can_be_another(what: str) -> None:
    records = aimed()
    records.take("n1", RUN[11])
    if what == "round":  # it is looked at as what it says that it is
        records.take("n1", RUN[10])
    assert records.take("liar", forged(what)) == ["liar"]
    assert records.take("n1", RUN[10]) == []
    assert records.take("n1", RUN[9]) == []
    assert records.bottom == 9


def test_a_record_that_is_known_is_not_replaced() -> None:
    records = aimed()
    records.take("n1", RUN[11])
    assert records.take("liar", OTHER[11]) == []
    assert records.linked(11) == RUN[11]


def test_when_the_run_goes_on_what_is_known_stays_so() -> None:
    records = aimed(5)
    for record in RUN[2:6]:
        records.take("n1", record)
    assert records.bottom == 2
    records.aim(RUN[7].commit)
    assert records.linked(3) == RUN[3]
    assert records.bottom == 8
    records.take("n1", RUN[7])
    assert records.bottom == 7
    records.take("n1", RUN[6])
    assert records.bottom == 2


def test_the_chain_before_a_round_is_known_as_far_down_as_the_records_are() -> None:
    records = aimed()
    assert records.chain_before(12) == RUN[11].commit.chain
    assert records.chain_before(11) is None
    records.take("n1", RUN[11])
    assert records.chain_before(11) == RUN[10].commit.chain
    records.take("n1", RUN[10])
    assert records.chain_before(10) == RUN[9].commit.chain


def test_a_commit_that_was_the_newest_proves_what_is_below_without_its_record() -> None:
    records = aimed(5)
    records.aim(RUN[6].commit)
    records.take("n1", RUN[6])
    assert records.chain_before(6) == RUN[5].commit.chain


def test_the_commits_of_another_history_replace_what_is_known() -> None:
    """As when the run was carried on from an earlier state."""
    records = aimed(5)
    for record in RUN[:6]:
        records.take("n1", record)
    other = history(9, "new", after=RUN[3])  # rounds 0 to 3 are of both
    records.aim(other[-1].commit)
    for record in other[::-1]:
        assert records.take("n2", record) == []
    assert [records.linked(r) for r in range(3, 9)] == other
    assert records.linked(2) is None, "what was below the old ones is looked for anew"
    assert records.bottom == 3


def test_an_older_commit_begins_anew() -> None:
    records = aimed(5)
    for record in RUN[:6]:
        records.take("n1", record)
    records.aim(OTHER[4].commit)
    assert records.linked(3) is None
    assert records.take("n1", OTHER[4]) == []
    assert records.linked(4) == OTHER[4]


def test_with_fragments_a_record_has_as_many_means_as_its_round_has_chunks() -> None:
    """The records of this history have all chunks."""
    for fragments in range(1, CHUNKS + 1):
        records = Records(Fragments(CHUNKS, fragments))
        records.aim(RUN[11].commit)
        assert records.take("n1", RUN[11]) == ([] if fragments == 1 else ["n1"])
