"""The machine of a group that shares files: whom it asks for which chunk, and what becomes of what comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest

from prime_async.machines.catchup import manifest_key, state_key
from prime_async.machines.facts import FileFetched, FileNowhere, LedgerTrouble
from prime_async.machines.providers import MAX_PLACING
from prime_async.machines.sharing import NOWHERE_AFTER, Sharing, SharingSettings
from prime_async.machines.vocabulary import (
    CancelFetch,
    ChunkStored,
    Effect,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    FetchFile,
    FinishSnapshot,
    Heard,
    LeaveFile,
    LedgerAt,
    LedgerFailed,
    ManifestRead,
    OpenSnapshot,
    ReadManifest,
    RunAt,
    SnapshotOpened,
    SnapshotStored,
    StepsDone,
    StoreChunk,
    Tick,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import AskLedger, ChunkInfo, ChunkKey, Holdings, file_number
from tests.machine_harness import facts, full_member, of, sent, view

FILE, OTHER = b"f" * 32, b"o" * 32
NUMBER = file_number(FILE)
INFO = ChunkInfo(digest=bytes(32))


def sharing(*peers: str, window: int = 2) -> Sharing:
    machine = Sharing(SharingSettings(me="me", window=window))
    see(machine, *peers)
    return machine


def see(machine: Sharing, *peers: str) -> list[Effect]:
    """These are the members, beside ourselves."""
    shown = view(5, *(full_member(p) for p in peers), full_member("me"), leader="me")
    return machine.handle(0.0, ViewChanged(view=shown))


def have(machine: Sharing, *peers: str, now: float = 0.0, files: Iterable[bytes] = (FILE,)) -> list[Effect]:
    holdings = Holdings(round=0, means_from=0, snapshots=tuple(sorted(map(file_number, files))))
    return [e for peer in peers for e in machine.handle(now, Heard(peer=peer, message=holdings))]


def came(machine: Sharing, peer: str, key: ChunkKey, now: float = 0.0) -> list[Effect]:
    return machine.handle(now, Fetched(peer=peer, key=key, info=INFO, size=100))


def opened(chunks: int, *peers: str, window: int = 2) -> tuple[Sharing, list[Fetch]]:
    """A machine that has the manifest, lacks all chunks, and has begun to fetch them."""
    machine = sharing(*peers, window=window)
    machine.handle(0.0, FetchFile(digest=FILE))
    [first] = of(Fetch, have(machine, *peers))
    came(machine, first.peer, first.key)
    machine.handle(0.0, read(first.peer))
    return machine, of(Fetch, machine.handle(0.0, SnapshotOpened(round=NUMBER, missing=tuple(range(chunks)))))


def read(peer: str, digest: bytes = FILE) -> ManifestRead:
    return ManifestRead(peer=peer, round=file_number(digest), digest=digest, commit=None, differing=())


def store_all(machine: Sharing, fetches: list[Fetch], now: float = 0.0) -> list[Effect]:
    """All that is asked for comes, and is stored, until nothing is asked for any more."""
    effects: list[Effect] = []
    waiting = list(fetches)
    while waiting:
        fetch = waiting.pop(0)
        new = came(machine, fetch.peer, fetch.key, now)
        if of(StoreChunk, new):
            new += machine.handle(now, ChunkStored(key=fetch.key))
        effects += new
        cancelled = {(c.peer, c.key) for c in of(CancelFetch, new)}
        waiting = [f for f in waiting + of(Fetch, new) if (f.peer, f.key) not in cancelled]
    return effects


def test_a_file_comes_from_all_that_have_it_and_is_finished_when_nothing_is_missing() -> None:
    """Given three members of which two have the file, when it is wanted, then both give of it, and it is finished."""
    machine, fetches = opened(8, "n1", "n2")
    have(machine, "n1", files=[FILE, OTHER])

    assert Counter(f.peer for f in fetches) == {"n1": 2, "n2": 2}
    assert {f.key.kind for f in fetches} == {"state"}
    effects = store_all(machine, fetches)

    assert [f.round for f in of(FinishSnapshot, effects)] == [NUMBER]
    assert {f.key.chunk for f in of(StoreChunk, effects)} == set(range(8))
    [fact] = facts(FileFetched, machine.handle(2.0, SnapshotStored(round=NUMBER)))
    assert (fact.digest, fact.fetched_bytes, fact.providers, fact.seconds) == (FILE.hex(), 800, 2, 2.0)


def test_who_does_not_have_the_file_is_not_asked_for_it() -> None:
    machine = sharing("n1", "n2")

    asked = machine.handle(0.0, FetchFile(digest=FILE))
    assert sent(asked, AskLedger) == [("n1", AskLedger()), ("n2", AskLedger())]
    assert of(Fetch, asked) == of(Fetch, have(machine, "n1", files=[OTHER])) == []

    [fetch] = of(Fetch, have(machine, "n2"))
    assert (fetch.peer, fetch.key) == ("n2", manifest_key(NUMBER))


def test_chunks_that_are_here_already_are_not_fetched() -> None:
    machine = sharing("n1")
    machine.handle(0.0, FetchFile(digest=FILE))
    have(machine, "n1")
    assert of(ReadManifest, came(machine, "n1", manifest_key(NUMBER)))
    assert of(OpenSnapshot, machine.handle(0.0, read("n1")))

    fetches = of(Fetch, machine.handle(0.0, SnapshotOpened(round=NUMBER, missing=(3,))))

    assert [f.key for f in fetches] == [state_key(NUMBER, 3)]


def test_a_file_that_is_all_here_is_finished_at_once() -> None:
    machine = sharing("n1")
    machine.handle(0.0, FetchFile(digest=FILE))
    have(machine, "n1")
    came(machine, "n1", manifest_key(NUMBER))
    machine.handle(0.0, read("n1"))

    assert of(FinishSnapshot, machine.handle(0.0, SnapshotOpened(round=NUMBER, missing=())))


def test_what_a_dead_member_was_asked_for_is_asked_of_another() -> None:
    """Given two that give, when one is not in the view any more, then the other is asked for what it still owed."""
    machine, fetches = opened(4, "n1", "n2")
    owed = {f.key for f in fetches if f.peer == "n1"}

    effects = see(machine, "n2")
    assert {c.key for c in of(CancelFetch, effects)} == owed
    effects = store_all(machine, [f for f in fetches if f.peer == "n2"])

    assert {f.key for f in of(Fetch, effects)} == owed
    assert {f.peer for f in of(Fetch, effects)} == {"n2"}
    assert of(FinishSnapshot, effects)


def test_a_wrong_chunk_is_asked_of_another_and_its_sender_of_nothing_more() -> None:
    machine, fetches = opened(6, "n1", "n2")
    [bad, *_] = [f for f in fetches if f.peer == "n1"]
    assert of(StoreChunk, came(machine, "n1", bad.key))

    effects = machine.handle(0.0, FetchFailed(peer="n1", key=bad.key, fault="invalid"))
    effects += store_all(machine, [*of(Fetch, effects), *(f for f in fetches if f.peer == "n2")])

    assert bad.key in {f.key for f in of(Fetch, effects)}
    assert "n1" not in {f.peer for f in of(Fetch, effects)}


def test_a_manifest_that_is_not_the_files_is_asked_of_another() -> None:
    machine = sharing("n1", "n2")
    machine.handle(0.0, FetchFile(digest=FILE))
    have(machine, "n1", "n2")
    came(machine, "n1", manifest_key(NUMBER))

    effects = machine.handle(0.0, FetchFailed(peer="n1", key=manifest_key(NUMBER), fault="invalid"))

    assert [(f.peer, f.key) for f in of(Fetch, effects)] == [("n2", manifest_key(NUMBER))]


def test_that_nobody_has_a_file_is_said_once_and_it_is_waited_for() -> None:
    machine = sharing("n1")
    machine.handle(0.0, FetchFile(digest=FILE))

    said: list[Effect] = []
    for second in range(1, 3 * NOWHERE_AFTER):
        said += machine.handle(float(second), Tick())
    assert facts(FileNowhere, said) == [FileNowhere(digest=FILE.hex(), members=1, seconds=float(NOWHERE_AFTER - 1))]
    assert len(sent(said, AskLedger)) == 3 * NOWHERE_AFTER - 1

    assert of(Fetch, have(machine, "n1", now=40.0))


def test_a_file_that_is_left_is_forgotten_with_all_that_is_under_way() -> None:
    """Given two files that come, when one is left, then its gets are abandoned, and the other goes on."""
    machine, fetches = opened(4, "n1", "n2")
    machine.handle(0.0, FetchFile(digest=OTHER))
    have(machine, "n1", "n2", files=[FILE, OTHER])

    effects = machine.handle(0.0, LeaveFile(digest=FILE))

    assert {(c.peer, c.key) for c in of(CancelFetch, effects)} == {(f.peer, f.key) for f in fetches}
    assert [f.key for f in of(Fetch, effects)] == [manifest_key(file_number(OTHER))]
    key = fetches[0].key
    late: list[Event] = [
        ChunkStored(key=key),
        SnapshotStored(round=NUMBER),
        SnapshotOpened(round=NUMBER, missing=(1,)),
        read("n1"),
    ]
    for event in (*late, FetchFailed(peer="n1", key=key, fault="late"), LeaveFile(digest=FILE)):
        assert [e for e in machine.handle(0.0, event) if not isinstance(e, WakeAt)] == []
    assert came(machine, "n1", key) == []


def test_a_disk_that_fails_ends_the_file_and_no_other() -> None:
    machine, fetches = opened(4, "n1")
    machine.handle(0.0, FetchFile(digest=OTHER))

    effects = machine.handle(
        0.0, LedgerFailed(of="store_chunk", round=NUMBER, damaged=False, text="no space left on device")
    )

    assert facts(LedgerTrouble, effects) == [LedgerTrouble(round=0, damaged=False, text="no space left on device")]
    assert len(of(CancelFetch, effects)) == len(fetches)
    assert of(Fetch, have(machine, "n1", files=[OTHER]))


def test_no_more_is_asked_for_than_the_disk_keeps_up_with() -> None:
    """Given a disk that stores nothing, then chunks are asked for up to a bound, and on when one is stored."""
    machine, fetches = opened(100, "n1", window=4)
    waiting, stored = list(fetches), list[ChunkKey]()
    while waiting:
        fetch = waiting.pop(0)
        stored.append(fetch.key)
        waiting += of(Fetch, came(machine, fetch.peer, fetch.key))
    assert MAX_PLACING <= len(stored) < MAX_PLACING + 4

    for key in stored[:8]:
        waiting += of(Fetch, machine.handle(0.0, ChunkStored(key=key)))
    assert waiting


@pytest.mark.parametrize("peer", ["n1", "stranger"])
def test_members_are_told_what_is_here_and_strangers_are_not(peer: str) -> None:
    machine = sharing("n1")
    numbers = tuple(sorted((NUMBER, file_number(OTHER))))
    machine.handle(0.0, LedgerAt(snapshots=numbers))

    told = sent(machine.handle(0.0, Heard(peer=peer, message=AskLedger())), Holdings)

    assert told == ([("n1", Holdings(round=0, means_from=0, snapshots=numbers))] if peer == "n1" else [])


def test_what_is_of_runs_alone_is_no_concern_of_it() -> None:
    machine = sharing("n1")
    assert machine.handle(0.0, RunAt(round=0, digest=bytes(32))) == []
    with pytest.raises(TypeError, match="no use for StepsDone"):
        machine.handle(0.0, StepsDone(steps=1, tokens=1, seconds=1.0))


@pytest.mark.parametrize(
    ("digest", "number"),
    [
        (bytes(32), 1),
        (b"\x01" + bytes(31), 1),
        (b"\x02" + bytes(31), 1),
        (b"\x04" + bytes(31), 2),
        (b"\xff" * 32, 2**63 - 1),
    ],
)
def test_the_number_of_a_file_fits_a_key_and_is_never_zero(digest: bytes, number: int) -> None:
    assert file_number(digest) == number
