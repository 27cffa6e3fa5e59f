"""The means of the rounds on disk, and their commits: what was there, what was to be there, or less."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from pycddl import Schema

from prime_async.errors import LocalError, ProtocolError, StorageError
from prime_async.ledger import DamagedError, DiskFullError, Files, MeansFiles, StoredMeans, included
from prime_async.ledger.means_format import SLOTS_START, Contents, MeansHeader, Settled, Slots, encode_means_header
from prime_async.messages import ChunkInfo, Commit, Included, Record, decode, next_chain
from tests.faulty_files import FaultyFiles, crashes, failure, failures, losses

RUN, OTHER = b"r" * 32, b"o" * 32
SIZES = (4, 9, 3)
DIRECTORY = Path("/node")
ROUND = 3
PREVIOUS = b"p" * 32
SLOTS = 28
"""Bytes of all slots: each has four more than its payload."""
HEADER = encode_means_header(MeansHeader(RUN, SLOTS))


class Attempt:
    """The means of an attempt, made from its number."""

    def __init__(self, number: int, who: tuple[bytes, bytes, bytes] = (b"\x07", b"\x07", b"\x03")) -> None:
        chance = random.Random(number)
        self.payloads = [chance.randbytes(size) for size in SIZES]
        self.infos = tuple(
            ChunkInfo(digest=blake3(data).digest(), contributors=bits, total_weight=10 * bits[0])
            for data, bits in zip(self.payloads, who, strict=True)
        )
        self.digests = b"".join(info.digest for info in self.infos)
        digest = blake3(self.digests).digest()
        self.commit = Commit(
            round=ROUND, epoch=1, attempt=number, state=b"s" * 32, digest=digest, view=2,
            chain=next_chain(PREVIOUS, b"s" * 32, digest),
        )  # fmt: skip
        self.record = Record(commit=self.commit, previous=PREVIOUS, means=self.digests, included=included(self.infos))
        self.closed = StoredMeans(self.infos, None, None)
        self.committed = StoredMeans(self.infos, self.commit, PREVIOUS)


FIRST, SECOND = Attempt(1), Attempt(2, (b"\x05", b"\x06", b"\x06"))  # its A is as long as that of the first


def means(files: Files, run: bytes = RUN) -> MeansFiles:
    return MeansFiles(DIRECTORY, run, SIZES, files)


def slot(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "little") + payload


def put(files: Files, attempt: Attempt) -> None:
    for chunk, payload in enumerate(attempt.payloads):
        means(files).put(ROUND, chunk, payload)


def close(files: Files, attempt: Attempt) -> None:
    put(files, attempt)
    means(files).close(ROUND, attempt.infos)


def commit(files: Files, attempt: Attempt) -> None:
    close(files, attempt)
    means(files).commit(ROUND, attempt.commit, PREVIOUS)


def fetch(files: Files, attempt: Attempt) -> None:
    """As a node does that was away: the record, the means that it lacks, and an end."""
    kept = means(files)
    kept.save_record(ROUND, attempt.record)
    for chunk in set(range(3)) - kept.present(ROUND, attempt.digests):
        kept.put(ROUND, chunk, attempt.payloads[chunk])
    kept.close(ROUND, attempt.infos)


def check(files: Files, allowed: list[StoredMeans | None], how: str) -> None:
    """The file says something allowed, and each chunk is what it says, or is known not to be."""
    kept = means(files)
    stored = kept.stored(ROUND)
    assert stored in allowed, how
    record = kept.record(ROUND)
    assert (record is None) == (stored is None or stored.commit is None), how
    if stored is None:
        return
    assert record in (None, FIRST.record, SECOND.record), how
    for chunk, info in enumerate(stored.infos):
        try:
            found = kept.read(ROUND, chunk)
        except DamagedError as error:
            assert error.chunk == chunk, how  # noqa: PT017 - it need not be raised
        else:
            assert found.info == info, how
            assert blake3(found.payload).digest() == info.digest, how


def readable(files: Files, attempt: Attempt) -> bool:
    return [bytes(means(files).read(ROUND, chunk).payload) for chunk in range(3)] == attempt.payloads


# --- what it does ---


def test_means_that_were_put_and_closed_are_read_with_what_is_known_of_them() -> None:
    disk = FaultyFiles()
    close(disk, FIRST)
    kept = means(disk)
    assert kept.stored(ROUND) == FIRST.closed
    assert [kept.read(ROUND, c).info for c in range(3)] == list(FIRST.infos)
    assert readable(disk, FIRST)
    assert kept.record(ROUND) is None
    assert kept.rounds() == [ROUND]
    assert kept.path(ROUND) == DIRECTORY / "means" / "000000000003.means"


def test_the_items_follow_the_slots_as_the_format_says() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    data = disk.content(means(disk).path(ROUND))
    said = b"prime-async means 1\n" + RUN + SLOTS.to_bytes(8, "little")
    assert data[:92] == said + blake3(said).digest() == HEADER
    assert data[92:120] == b"".join(map(slot, FIRST.payloads))
    items, at = [], 120
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        payload = data[at + 36 : at + 36 + length]
        assert data[at + 4 : at + 36] == blake3(payload).digest()
        items.append(payload)
        at += 36 + length
    runs = (
        Included(chunks=2, contributors=b"\x07", total_weight=70),
        Included(chunks=1, contributors=b"\x03", total_weight=30),
    )
    sizes = (Slots(chunks=1, size=8), Slots(chunks=1, size=13), Slots(chunks=1, size=7))
    contents = Contents(format=1, run_id=RUN, round=ROUND, slots=sizes, means=FIRST.digests, included=runs)
    assert decode(items[0], Contents) == contents
    settled = Settled(contents=blake3(items[0]).digest(), commit=FIRST.commit, previous=PREVIOUS)
    assert decode(items[1], Settled) == settled
    assert len(items) == 2


def test_the_items_are_those_of_the_protocol() -> None:
    v1 = Path(__file__).parent.parent / "protocols" / "v1"
    schema = Schema("\n".join((v1 / name).read_text() for name in ("ledger.cddl", "common.cddl")))
    disk = FaultyFiles()
    commit(disk, FIRST)
    data = disk.content(means(disk).path(ROUND))[SLOTS_START + SLOTS :]
    while data:
        end = 36 + int.from_bytes(data[:4], "little")
        schema.validate_cbor(data[36:end])
        data = data[end:]


def test_a_commit_is_kept_with_its_means_and_given_as_a_record() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    assert means(disk).stored(ROUND) == FIRST.committed
    assert means(disk).record(ROUND) == FIRST.record
    means(disk).close(ROUND, FIRST.infos)
    assert means(disk).stored(ROUND) == FIRST.committed


def test_another_commit_of_the_same_means_takes_the_place_of_the_first() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    for previous in (b"q" * 32, PREVIOUS):
        means(disk).commit(ROUND, SECOND.commit, previous)
        assert means(disk).stored(ROUND) == StoredMeans(FIRST.infos, SECOND.commit, previous)


def test_a_commit_without_means_is_our_own_fault() -> None:
    with pytest.raises(LocalError, match="close them before"):
        means(FaultyFiles()).commit(ROUND, FIRST.commit, PREVIOUS)


def test_a_mean_of_a_later_attempt_makes_its_chunk_damaged_until_they_are_closed() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    kept = means(disk)
    kept.put(ROUND, 1, SECOND.payloads[1])
    assert kept.stored(ROUND) == FIRST.committed
    with pytest.raises(DamagedError) as caught:
        kept.read(ROUND, 1)
    assert (caught.value.chunk, caught.value.path) == (1, kept.path(ROUND))
    size = len(disk.content(kept.path(ROUND)))
    close(disk, SECOND)
    assert kept.stored(ROUND) == SECOND.closed
    assert readable(disk, SECOND)
    assert len(disk.content(kept.path(ROUND))) < size  # the commit of the first is gone


def test_a_node_that_was_away_fetches_only_the_means_that_it_lacks() -> None:
    disk = FaultyFiles()
    close(disk, FIRST)
    kept = means(disk)
    kept.put(ROUND, 1, SECOND.payloads[1])
    kept.save_record(ROUND, FIRST.record)
    assert kept.stored(ROUND) == FIRST.committed
    assert kept.present(ROUND, FIRST.digests) == {0, 2}
    assert kept.present(ROUND, SECOND.digests) == {1}
    fetch(disk, FIRST)
    assert kept.stored(ROUND) == FIRST.committed
    assert readable(disk, FIRST)


def test_a_record_alone_says_what_to_fetch() -> None:
    disk = FaultyFiles()
    means(disk).save_record(ROUND, FIRST.record)
    assert means(disk).stored(ROUND) == FIRST.committed
    assert means(disk).present(ROUND, FIRST.digests) == set()
    with pytest.raises(DamagedError):
        means(disk).read(ROUND, 0)


def test_a_record_of_another_round_or_of_other_chunks_is_the_peers_fault() -> None:
    good = FIRST.record
    bad = [
        Record(commit=good.commit, previous=PREVIOUS, means=good.means[:-1], included=good.included),
        Record(commit=good.commit, previous=PREVIOUS, means=good.means, included=good.included[:1]),
    ]
    kept = means(FaultyFiles())
    for record in bad:
        with pytest.raises(ProtocolError):
            kept.save_record(ROUND, record)
    with pytest.raises(ProtocolError):
        kept.save_record(ROUND + 1, good)
    assert kept.rounds() == []


def test_what_does_not_fit_the_run_is_our_own_fault() -> None:
    kept = means(FaultyFiles())
    with pytest.raises(LocalError, match="5 bytes instead of at most 4"):
        kept.put(ROUND, 0, b"12345")
    with pytest.raises(LocalError, match="2 infos"):
        kept.close(ROUND, FIRST.infos[:2])
    with pytest.raises(LocalError, match="64 bytes of digests"):
        kept.present(ROUND, bytes(64))
    assert kept.rounds() == []


def test_a_mean_may_be_shorter_than_there_is_room_for_and_take_the_place_of_a_longer_one() -> None:
    disk = FaultyFiles()
    kept = MeansFiles(DIRECTORY, RUN, (20, 20, 20), disk)
    long = [bytes([chunk]) * 20 for chunk in range(3)]
    for payloads in (long, FIRST.payloads, [b"", b"1", b"22"], long):
        infos = [ChunkInfo(digest=blake3(p).digest(), contributors=b"\x01", total_weight=1) for p in payloads]
        for chunk, payload in enumerate(payloads):
            kept.put(ROUND, chunk, payload)
        kept.close(ROUND, infos)
        again = MeansFiles(DIRECTORY, RUN, (20, 20, 20), disk)
        assert again.present(ROUND, b"".join(i.digest for i in infos)) == {0, 1, 2}
        assert [bytes(again.read(ROUND, chunk).payload) for chunk in range(3)] == payloads


def test_the_room_that_short_means_leave_takes_no_space_on_disk(tmp_path: Path) -> None:
    kept = MeansFiles(tmp_path, RUN, [1 << 24] * 2)
    for chunk in range(2):
        kept.put(ROUND, chunk, b"short")
    kept.close(ROUND, [ChunkInfo(digest=blake3(b"short").digest(), contributors=b"\x01", total_weight=1)] * 2)
    status = kept.path(ROUND).stat()
    assert status.st_size > 2 << 24
    assert status.st_blocks * 512 < 1 << 20


def test_the_means_of_another_run_are_as_if_they_were_not_there() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    assert means(disk, OTHER).stored(ROUND) is None
    assert means(disk, OTHER).record(ROUND) is None


def test_the_means_of_another_model_are_as_if_they_were_not_there() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    for sizes in ((4, 3, 9), (4, 9, 4), (16,)):  # of as many bytes, of more, of fewer chunks
        other = MeansFiles(DIRECTORY, RUN, sizes, disk)
        assert other.stored(ROUND) is None
        with pytest.raises(DamagedError):
            other.read(ROUND, 0)


def test_who_writes_to_a_file_of_another_run_or_with_a_torn_header_begins_it_anew() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    path = means(disk).path(ROUND)
    torn = bytearray(disk.content(path))
    torn[30] ^= 1
    foreign = encode_means_header(MeansHeader(OTHER, SLOTS)) + disk.content(path)[SLOTS_START:]
    for content in (bytes(torn), foreign, HEADER[:50], b""):
        disk.set_content(path, content)
        means(disk).put(ROUND, 1, SECOND.payloads[1])
        assert disk.content(path) == HEADER + bytes(8) + slot(SECOND.payloads[1])
        disk.set_content(path, content)
        means(disk).save_record(ROUND, FIRST.record)
        assert means(disk).present(ROUND, FIRST.digests) == set()
        assert means(disk).stored(ROUND) == FIRST.committed


def test_several_threads_may_put_the_first_means_of_a_round(tmp_path: Path) -> None:
    sizes = [1000] * 64
    payloads = [random.Random(chunk).randbytes(1000) for chunk in range(64)]
    kept = MeansFiles(tmp_path, RUN, sizes)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda chunk: kept.put(ROUND, chunk, payloads[chunk]), range(64)))
    assert kept.present(ROUND, b"".join(blake3(data).digest() for data in payloads)) == set(range(64))


def test_a_file_under_the_name_of_another_round_is_as_if_it_were_not_there() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    kept = means(disk)
    assert kept.stored(ROUND)
    disk.set_content(kept.path(4), disk.content(kept.path(ROUND)))
    assert kept.stored(4) is None
    assert kept.present(4, FIRST.digests) == {0, 1, 2}


def test_without_a_file_there_is_nothing() -> None:
    kept = means(FaultyFiles())
    assert (kept.rounds(), kept.stored(ROUND), kept.record(ROUND)) == ([], None, None)
    assert kept.present(ROUND, FIRST.digests) == set()
    kept.remove(ROUND)
    with pytest.raises(StorageError, match=r"000000000003\.means: .*No such file"):
        kept.read(ROUND, 0)


def test_what_is_removed_is_gone() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    means(disk).remove(ROUND)
    assert disk.names() == set()


def test_slots_may_be_written_and_read_by_several_threads(tmp_path: Path) -> None:
    kept = MeansFiles(tmp_path, RUN, SIZES)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda chunk: kept.put(ROUND, chunk, memoryview(FIRST.payloads[chunk])), range(3)))
        kept.close(ROUND, FIRST.infos)
        found = list(pool.map(lambda chunk: kept.read(ROUND, chunk), range(3)))
    assert [bytes(chunk.payload) for chunk in found] == FIRST.payloads
    assert [chunk.info for chunk in found] == list(FIRST.infos)


@given(st.lists(st.tuples(st.binary(max_size=2), st.integers(0, 2)), min_size=1, max_size=12))
def test_who_is_in_a_mean_is_kept_run_by_run(who: list[tuple[bytes, int]]) -> None:
    infos = tuple(ChunkInfo(digest=bytes(32), contributors=bits, total_weight=weight) for bits, weight in who)
    kept = MeansFiles(DIRECTORY, RUN, [1] * len(infos), FaultyFiles())
    kept.close(ROUND, infos)
    stored = kept.stored(ROUND)
    assert stored is not None
    assert stored.infos == infos
    runs = [(run.contributors, run.total_weight) for run in included(infos)]
    assert all(a != b for a, b in pairwise(runs))


# --- damage ---


def test_any_flipped_bit_is_found() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    path = means(disk).path(ROUND)
    slots = [c for c, size in enumerate(SIZES) for _ in range(4 + size)]
    for bit in range(8 * len(disk.content(path))):
        damaged = disk.copy()
        damaged.flip(path, bit)
        check(damaged, [FIRST.committed, FIRST.closed, None], f"bit {bit}")
        place = bit // 8 - SLOTS_START
        if place < 0:
            assert means(damaged).stored(ROUND) is None, bit
            assert means(damaged).present(ROUND, FIRST.digests) == set()
        elif place < len(slots):
            chunk = slots[place]
            assert means(damaged).present(ROUND, FIRST.digests) == {0, 1, 2} - {chunk}
        else:
            assert means(damaged).stored(ROUND) != FIRST.committed, bit


def test_a_file_that_is_cut_off_anywhere_says_less() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    path = means(disk).path(ROUND)
    whole = disk.content(path)
    for size in range(len(whole)):
        disk.set_content(path, whole[:size])
        check(disk, [FIRST.closed, None], f"{size} bytes")
        again = disk.copy()
        fetch(again, FIRST)
        assert means(again).stored(ROUND) == FIRST.committed
        assert readable(again, FIRST)


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_a_file_of_any_bytes_says_nothing(data: bytes, payload: bytes) -> None:
    item = len(payload).to_bytes(4, "little") + blake3(payload).digest() + payload
    slots = bytes(SLOTS)
    for content in (data, slots + item, HEADER + data, HEADER + slots + item, HEADER + slots + item + data):
        disk = FaultyFiles()
        disk.set_content(means(disk).path(ROUND), content)
        assert means(disk).stored(ROUND) is None
        with pytest.raises(DamagedError) as caught:
            means(disk).read(ROUND, 0)
        assert caught.value.chunk is None
        commit(disk, FIRST)
        assert means(disk).stored(ROUND) == FIRST.committed


def test_what_the_disk_cannot_read_is_an_error_or_damage() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    disk.unreadable.add(means(disk).path(ROUND))
    assert means(disk).present(ROUND, FIRST.digests) == set()
    with pytest.raises(StorageError, match="Input/output"):
        means(disk).stored(ROUND)


# --- crashes and full disks ---

Act = Callable[[FaultyFiles], None]


def nothing(_: FaultyFiles) -> None:
    pass


def commit_second_only(disk: FaultyFiles) -> None:
    means(disk).commit(ROUND, FIRST.commit, PREVIOUS)


def record_only(disk: FaultyFiles) -> None:
    means(disk).save_record(ROUND, FIRST.record)


def close_first(disk: FaultyFiles) -> None:
    close(disk, FIRST)


def commit_first(disk: FaultyFiles) -> None:
    commit(disk, FIRST)


def fetch_first(disk: FaultyFiles) -> None:
    fetch(disk, FIRST)


def close_second(disk: FaultyFiles) -> None:
    close(disk, SECOND)


def fetch_second(disk: FaultyFiles) -> None:
    fetch(disk, SECOND)


def remove(disk: FaultyFiles) -> None:
    means(disk).remove(ROUND)


CASES: list[tuple[Act, Act, list[StoredMeans | None]]] = [
    (nothing, close_first, [None, FIRST.closed]),
    (nothing, commit_first, [None, FIRST.closed, FIRST.committed]),
    (nothing, fetch_first, [None, FIRST.closed, FIRST.committed]),
    (close_first, commit_second_only, [FIRST.closed, FIRST.committed]),
    (close_first, record_only, [FIRST.closed, FIRST.committed]),
    (commit_first, close_first, [FIRST.closed, FIRST.committed]),
    (close_first, close_second, [None, FIRST.closed, SECOND.closed]),
    (commit_first, close_second, [None, FIRST.closed, FIRST.committed, SECOND.closed]),
    (commit_first, fetch_second, [None, FIRST.closed, FIRST.committed, SECOND.closed, SECOND.committed]),
    (commit_first, remove, [None, FIRST.closed, FIRST.committed]),
]  # fmt: skip


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize(("before", "act", "allowed"), CASES)
def test_a_crash_leaves_what_was_there_or_what_was_to_be_or_less(
    before: Act, act: Act, allowed: list[StoredMeans | None], settled: bool
) -> None:
    disk = FaultyFiles()
    before(disk)
    if settled:
        disk.settle()
    for found, how in crashes(disk, act):
        check(found, allowed, how)
        if before is close_first and act in (commit_second_only, record_only):
            assert readable(found, FIRST), how  # what was closed is not at risk
        if act is not remove:
            check_it_can_be_done_again(found, act, how)


def check_it_can_be_done_again(disk: FaultyFiles, act: Act, how: str) -> None:
    """And then survives."""
    if act in (commit_second_only, record_only):
        fetch(disk, FIRST)
        act = fetch_first
    act(disk)
    attempt = SECOND if act in (close_second, fetch_second) else FIRST
    stored = means(disk).stored(ROUND)
    assert stored is not None
    for found, later in losses(disk):
        again = means(found).stored(ROUND)
        assert again is not None, (how, later)
        assert again.infos == attempt.infos, (how, later)
        if act in (fetch_first, fetch_second):
            assert again == attempt.committed, (how, later)
        assert readable(found, attempt), (how, later)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize(("before", "act", "allowed"), CASES)
def test_a_disk_that_is_full_or_fails_leaves_what_was_there(
    before: Act, act: Act, allowed: list[StoredMeans | None], error: int
) -> None:
    disk = FaultyFiles()
    before(disk)
    was = means(disk).stored(ROUND)
    for failing, how in failures(disk, act, error):
        caught = failure(failing, act)
        stored = means(failing).stored(ROUND)
        if caught:
            assert "/node/means/000000000003.means: " in str(caught), how
            assert isinstance(caught, DiskFullError) == (error != errno.EIO), how
            assert stored == was or (stored is not None and stored in allowed), how
        check(failing, allowed, how)
        if act is not remove:
            check_it_can_be_done_again(failing, act, how)


def test_what_is_said_of_the_means_is_put_back_if_there_is_no_room_for_anew() -> None:
    disk = FaultyFiles()
    commit(disk, FIRST)
    put(disk, SECOND)
    for failing, how in failures(disk, lambda d: means(d).close(ROUND, SECOND.infos)):
        caught = failure(failing, lambda d: means(d).close(ROUND, SECOND.infos))
        written = any("sync" in line for line in failing.log)
        assert means(failing).stored(ROUND) == (SECOND.closed if written or not caught else FIRST.committed), how


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "close", "commit", "record", "killed", "power"]), st.integers(0, 2**16)),
        max_size=15,
    )
)
def test_after_any_history_the_file_says_only_what_was_once_so(history: list[tuple[str, int]]) -> None:
    disk = FaultyFiles()
    safe: Attempt | None = None  # whose means are all there, closed
    for what, seed in history:
        attempt, chunk = (FIRST, SECOND)[seed % 2], seed // 2 % 3
        kept = means(disk)
        if what == "put":
            kept.put(ROUND, chunk, attempt.payloads[chunk])
            safe = safe if safe is attempt else None
        elif what == "close":
            close(disk, attempt)
            safe = attempt
        elif what == "commit" and (stored := kept.stored(ROUND)):
            closed = FIRST if stored.infos == FIRST.infos else SECOND
            kept.commit(ROUND, closed.commit, PREVIOUS)
        elif what == "record":
            kept.save_record(ROUND, attempt.record)
            safe = safe if safe is attempt else None
        elif what in ("killed", "power"):
            disk = disk.found_after("process killed" if what == "killed" else "power lost", seed)
        check(disk, [None, FIRST.closed, FIRST.committed, SECOND.closed, SECOND.committed], str(history))
        if safe:
            assert readable(disk, safe)


def test_with_fragments_a_round_has_slots_for_the_chunks_of_one_of_them() -> None:
    sizes = (4, 9, 3, 5, 6)
    disk = FaultyFiles()
    kept = MeansFiles(DIRECTORY, RUN, sizes, disk, fragments=2)
    for round, chunks in enumerate([range(2), range(2, 5), range(2)]):
        payloads = {c: bytes([round + 1]) * sizes[c] for c in chunks}
        infos = [
            ChunkInfo(digest=blake3(p).digest(), contributors=b"\x01", total_weight=c + 1) for c, p in payloads.items()
        ]
        for chunk, payload in payloads.items():
            kept.put(round, chunk, payload)
        kept.close(round, infos)
        again = MeansFiles(DIRECTORY, RUN, sizes, disk, fragments=2)
        assert again.present(round, b"".join(i.digest for i in infos)) == set(chunks)
        for (chunk, payload), info in zip(payloads.items(), infos, strict=True):
            mean = again.read(round, chunk)
            assert (mean.info, bytes(mean.payload)) == (info, payload)
        other = next(c for c in range(5) if c not in chunks)
        with pytest.raises(LocalError, match=f"chunk {other} is none of those of its round"):
            kept.put(round, other, bytes(sizes[other]))
