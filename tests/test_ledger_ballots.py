"""The ballot on disk: replaced whole or not at all, also on a disk that is full."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from prime_async.errors import ConfigError, StorageError
from prime_async.ledger import BALLOT_FILE, RESERVE_FILE, BallotFile, DiskFullError
from prime_async.ledger.ballots import RESERVE_BYTES
from prime_async.machines.ballot import Ballot
from tests.faulty_files import FaultyFiles, crashes, failure, failures, losses

RUN, OTHER = b"r" * 32, b"o" * 32


# --- the ballot ---

DIRECTORY = Path("/node")
OLD, NEW = Ballot(incarnations=(1,), promised=3), Ballot(incarnations=(1, 2), promised=7, promised_to="b")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def ballots(disk: FaultyFiles, clock: Clock | None = None) -> BallotFile:
    return BallotFile(DIRECTORY, RUN, disk, clock or Clock())


@pytest.mark.parametrize("before", [None, OLD])
def test_a_crash_leaves_the_ballot_before_or_the_new_one(before: Ballot | None) -> None:
    disk = FaultyFiles()
    if before:
        ballots(disk).save(before)
    for found, how in crashes(disk, lambda cut: ballots(cut).save(NEW)):
        assert ballots(found).load() in (before, NEW), how
        ballots(found).save(NEW)
        assert ballots(found).load() == NEW, how
    ballots(disk).save(NEW)
    for found, how in losses(disk):
        assert ballots(found).load() == NEW, how


def test_what_a_crash_left_of_a_longer_ballot_does_not_hurt() -> None:
    disk = FaultyFiles()
    disk.set_content(DIRECTORY / f"ballot.partial-{os.getpid()}", bytes(10_000))
    ballots(disk).save(NEW)
    assert ballots(disk).load() == NEW


def test_a_flipped_bit_never_makes_another_ballot() -> None:
    disk = FaultyFiles()
    ballots(disk).save(NEW)
    disk.remove(DIRECTORY / RESERVE_FILE)
    whole = disk.content(DIRECTORY / BALLOT_FILE)
    for bit in range(8 * len(whole)):
        damaged = disk.copy()
        damaged.flip(DIRECTORY / BALLOT_FILE, bit)
        try:
            found = ballots(damaged).load()
        except (StorageError, ConfigError) as error:
            assert re.search(r"(?i)move (it|the file) away", str(error))  # noqa: PT017 - it need not be raised
        else:
            assert found == NEW  # the bit was in the name of a field that says nothing
    for size in range(len(whole)):
        disk.set_content(DIRECTORY / BALLOT_FILE, whole[:size])
        with pytest.raises(StorageError, match="damaged"):
            ballots(disk).load()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_leaves_the_ballot_before_or_takes_the_new_one(error: int) -> None:
    disk = FaultyFiles()
    ballots(disk).save(OLD)
    for failing, how in failures(disk, lambda d: ballots(d).save(NEW), error):
        caught = failure(failing, lambda d: ballots(d).save(NEW))
        if caught:
            assert "/node/ballot.cbor: the ballot could not be written: " in str(caught), how
        assert (caught is None) or error == errno.EIO, how  # for room there is the reserve
        assert ballots(failing).load() in ((OLD, NEW) if caught else (NEW,)), how


def test_on_a_full_disk_ballots_are_stored_in_the_room_of_the_reserve() -> None:
    disk, clock = FaultyFiles(), Clock()
    file = ballots(disk, clock)
    file.save(OLD)
    assert len(disk.content(DIRECTORY / RESERVE_FILE)) == RESERVE_BYTES
    disk.capacity = RESERVE_BYTES + len(disk.content(DIRECTORY / BALLOT_FILE))
    with capture_logs() as logs:
        file.save(NEW)
        file.save(OLD)
        file.save(NEW)
    assert [log["event"] for log in logs] == ["disk_full_ballot_uses_reserve"]
    assert ballots(disk).load() == NEW
    assert disk.names() == {BALLOT_FILE}


def test_the_reserve_is_made_again_when_there_is_room_and_tried_once_a_minute() -> None:
    disk, clock = FaultyFiles(), Clock()
    file = ballots(disk, clock)
    file.save(OLD)
    disk.capacity = RESERVE_BYTES + len(disk.content(DIRECTORY / BALLOT_FILE))
    file.save(NEW)
    clock.now_s = 59.0
    with capture_logs() as logs:
        file.save(OLD)
    assert logs == []
    clock.now_s = 60.0
    disk.capacity = RESERVE_BYTES
    with capture_logs() as logs:
        file.save(NEW)
        file.save(OLD)
    assert [log["event"] for log in logs] == ["ballot_reserve_not_made"]
    assert disk.names() == {BALLOT_FILE}
    clock.now_s, disk.capacity = 120.0, None
    file.save(NEW)
    assert disk.names() == {BALLOT_FILE, RESERVE_FILE}


def test_a_disk_too_small_for_a_reserve_is_enough_for_ballots() -> None:
    disk = FaultyFiles()
    disk.capacity = 10_000
    file = ballots(disk)
    file.save(OLD)
    file.save(NEW)
    assert file.load() == NEW
    assert disk.names() == {BALLOT_FILE}
    disk.capacity = len(disk.content(DIRECTORY / BALLOT_FILE))
    with pytest.raises(DiskFullError, match="make room"):
        file.save(OLD)
    assert file.load() == NEW


def test_a_reserve_that_was_cut_off_is_made_whole() -> None:
    disk = FaultyFiles()
    ballots(disk).save(OLD)
    disk.set_content(DIRECTORY / RESERVE_FILE, b"short")
    ballots(disk).save(NEW)
    assert len(disk.content(DIRECTORY / RESERVE_FILE)) == RESERVE_BYTES
