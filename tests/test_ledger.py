"""The ledger as a whole: a snapshot and the means since give the same bits as living through the rounds did."""

from __future__ import annotations

import errno
import math
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from prime_async.config.schema import OuterSettings
from prime_async.errors import ChunkUnavailableError, ConfigError, ProtocolError, StorageError
from prime_async.ledger import Files, Ledger
from prime_async.ledger.files import LOCAL_FILES
from prime_async.ledger.ledger import digest_of_means, in_threads
from prime_async.messages import FIRST_CHAIN, ChunkInfo, Commit, Manifest, Record, bitmap, decode, next_chain
from prime_async.work.codec import CodecName, make_codec
from prime_async.work.inner import Span
from prime_async.work.outer import OuterState
from prime_async.work.witness import OuterWorkload
from tests.faulty_files import Crash, Fault, FaultyFiles, Found

RUN = b"r" * 32
ELEMENTS, CHUNK = 1000, 256
SPANS = [Span("a", 0, 600, (2, 300)), Span("b", 600, ELEMENTS, (400,))]
CHUNKS = range(4)


def fresh(mean_codec: CodecName = "int8") -> OuterWorkload:
    """The initial weights, which all nodes have."""
    theta = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0))
    return OuterWorkload(
        OuterState(theta, CHUNK, OuterSettings()), SPANS, make_codec("int8"), mean_codec=make_codec(mean_codec)
    )


def ledger(where: Path, workload: OuterWorkload, files: Files = LOCAL_FILES, run: bytes = RUN) -> Ledger:
    return Ledger(where, run, {"name": "x"}, workload, CHUNK, files)


@dataclass
class Run:
    """A run on one node, whose rounds are made here: what it has in memory, and its ledger."""

    where: Path
    files: Files = LOCAL_FILES
    mean_codec: CodecName = "int8"
    least: float = -math.inf
    """Elements of a gradient below this are zero."""
    chain: bytes = FIRST_CHAIN
    tip: Commit | None = None
    digests: list[bytes] = field(default_factory=list)  # of the outer state after each round

    def __post_init__(self) -> None:
        self.workload = fresh(self.mean_codec)
        self.ledger = ledger(self.where, self.workload, self.files)
        self.digests.append(self.workload.state_digest())

    def means(self) -> list[tuple[ChunkInfo, memoryview]]:
        """Those of the next round: the same for everybody, whatever happened before."""
        made = []
        for chunk in CHUNKS:
            seed = self.workload.round * 100 + chunk
            gradient = torch.randn(len(range(ELEMENTS)[chunk * CHUNK : (chunk + 1) * CHUNK]), generator=_chance(seed))
            gradient[gradient < self.least] = 0
            payload = bytearray(self.workload.mean_bytes(chunk))
            out = torch.frombuffer(payload, dtype=torch.uint8)
            payload = payload[: make_codec(self.mean_codec).encode(gradient, out, gradient.clone())]
            info = ChunkInfo(digest=blake3(payload).digest(), contributors=bitmap([0, chunk % 3]), total_weight=chunk)
            made.append((info, memoryview(payload)))
        return made

    def live(self, *, snapshot: bool = False) -> None:
        """A round: its means are put on disk, committed, and applied."""
        round, means = self.workload.round, self.means()
        for chunk, (_, payload) in enumerate(means):
            self.ledger.put_mean(round, chunk, payload)
        infos = [info for info, _ in means]
        self.ledger.close_means(round, infos)
        commit = self.commit(infos)
        self.ledger.commit_means(round, commit, self.chain)
        for chunk, (_, payload) in enumerate(means):
            self.workload.apply(chunk, payload, False)
        self.digests.append(self.workload.end_round())
        self.chain, self.tip = commit.chain, commit
        if snapshot:
            self.snapshot()

    def commit(self, infos: list[ChunkInfo]) -> Commit:
        state, digest = self.workload.state_digest(), digest_of_means(infos)
        return Commit(
            round=self.workload.round,
            epoch=1,
            attempt=0,
            state=state,
            digest=digest,
            chain=next_chain(self.chain, state, digest),
            view=3,
        )

    def snapshot(self) -> None:
        job = self.ledger.begin_snapshot(self.tip)
        in_threads(job.before_change, CHUNKS)
        job.finish()


def _chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(8))
def test_a_snapshot_and_the_means_since_give_the_bits_of_living_through_the_rounds(tmp_path: Path, seed: int) -> None:
    print("seed", seed)
    chance = random.Random(seed)
    run = Run(tmp_path)
    for _ in range(chance.randint(0, 9)):
        run.live(snapshot=chance.random() < 0.4)
    again = fresh()
    restored = ledger(tmp_path, again).restore()
    assert (restored.round, restored.digest) == (run.workload.round, run.workload.state_digest())
    assert (restored.tip, restored.chain) == (run.tip, run.chain)
    for chunk in CHUNKS:
        assert again.export_state(chunk) == run.workload.export_state(chunk)


def test_means_of_any_length_are_lived_through_again_and_given_to_members(tmp_path: Path) -> None:
    """Sparse means are as long as what is in them."""
    run = Run(tmp_path / "one", mean_codec="sparse", least=1.5)
    for round in range(4):
        run.least = 0.5 * round
        run.live(snapshot=round == 1)
    chunk_bytes = [run.ledger.read_mean(3, chunk).payload.nbytes for chunk in CHUNKS]
    assert len(set(chunk_bytes)) > 1
    assert max(chunk_bytes) < run.workload.mean_bytes(0)
    again, joiner = fresh("sparse"), fresh("sparse")
    restored = ledger(tmp_path / "one", again).restore()
    assert (restored.round, restored.snapshot, restored.digest) == (4, 2, run.workload.state_digest())
    theirs = ledger(tmp_path / "two", joiner)
    for round in range(4):
        record = decode(run.ledger.read_record(round), Record)
        assert theirs.missing_means(record) == tuple(CHUNKS)
        for chunk in CHUNKS:
            payload = run.ledger.read_mean(round, chunk).payload
            with pytest.raises(ProtocolError):
                theirs.put_committed(record, chunk, memoryview(bytes(payload) + b"\0"))
            theirs.put_committed(record, chunk, payload)
        assert theirs.missing_means(record) == ()
        theirs.save_record(record)
        assert theirs.advance(round, in_threads) == run.digests[round + 1]


def test_an_empty_directory_leaves_the_initial_weights(tmp_path: Path) -> None:
    workload = fresh()
    restored = ledger(tmp_path / "none", workload).restore()
    assert (restored.round, restored.digest, restored.tip) == (0, fresh().state_digest(), None)


def test_the_tip_is_told_without_changing_anything(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for round in range(5):
        run.live(snapshot=round == 2)
    workload = fresh()
    assert ledger(tmp_path, workload).tip() == (5, run.tip)
    assert workload.round == 0


def test_what_is_not_committed_is_pending_and_not_applied(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.live()
    means = run.means()
    for chunk, (_, payload) in enumerate(means):
        run.ledger.put_mean(1, chunk, payload)
    run.ledger.close_means(1, [info for info, _ in means])
    other = ledger(tmp_path, fresh())
    assert other.restore().round == 1
    holdings = other.holdings
    assert (holdings.means, holdings.pending) == ((0,), 1)
    assert holdings.pending_digest == digest_of_means([info for info, _ in means])
    other.commit_means(1, run.commit([info for info, _ in means]), run.chain)
    assert other.holdings.means == (0, 1)
    assert ledger(tmp_path, fresh()).restore().round == 2


def test_means_of_another_history_are_not_applied(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.live()
    run.chain = b"?" * 32
    run.live()
    assert ledger(tmp_path, fresh()).restore().round == 1


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    Run(tmp_path).live(snapshot=True)
    with pytest.raises(ConfigError, match="another run"):
        ledger(tmp_path, fresh(), run=b"o" * 32).restore()


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_snapshot_gives_way_to_the_one_before_and_becomes_a_partial(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for round in range(6):
        run.live(snapshot=round in (1, 3))
    flip(run.ledger.snapshots.path(4), -3)
    workload = fresh()
    other = ledger(tmp_path, workload)
    restored = other.restore()
    assert (restored.snapshot, restored.digest) == (2, run.workload.state_digest())
    assert (other.holdings.snapshots, other.holdings.partials) == ((2,), (4,))
    info = run.ledger.snapshots.partial_info(4)
    assert info is not None
    missing = other.open_snapshot(Manifest(round=4, chunks=info.chunk_digests, commit=info.commit))
    assert missing == (3,), "the good chunks are kept"


def test_damaged_means_end_what_can_be_restored_and_are_told_apart(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(4):
        run.live()
    flip(run.ledger.means.path(2), run.ledger.means._layout(0).slot(1)[0] + 5)
    other = ledger(tmp_path, fresh())
    restored = other.restore()
    assert (restored.round, restored.digest) == (2, run.digests[2])
    assert other.holdings.means == (0, 1, 3)
    record = run.ledger.means.record(2)
    assert record is not None
    assert other.missing_means(record) == (1,)


def test_means_that_nobody_could_have_committed_are_not_applied(tmp_path: Path) -> None:
    """Given a file that is right by its digests but holds no mean, when it is to be lived through, then it is named."""
    run = Run(tmp_path)
    payload = memoryview(b"\xff" * run.workload.mean_bytes(0))
    run.ledger.put_mean(0, 0, payload)
    rest = run.means()[1:]
    for chunk, (_, good) in enumerate(rest, 1):
        run.ledger.put_mean(0, chunk, good)
    infos = [ChunkInfo(digest=blake3(payload).digest()), *(info for info, _ in rest)]
    run.ledger.close_means(0, infos)
    run.ledger.commit_means(0, run.commit(infos), run.chain)

    before = run.workload.export_state(0)
    with pytest.raises(StorageError, match=f"{run.ledger.means.path(0)}: the mean of chunk 0 cannot be applied"):
        ledger(tmp_path, run.workload).restore()
    assert run.workload.export_state(0) == before


def test_what_is_found_to_be_damaged_when_a_peer_asks_is_not_given(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.live(snapshot=True)
    flip(run.ledger.snapshots.path(1), -3)
    flip(run.ledger.means.path(0), run.ledger.means._layout(0).slot(2)[0] + 5)
    with pytest.raises(ChunkUnavailableError, match="damaged"):
        run.ledger.read_state(1, 3)
    assert run.ledger.read_state(1, 0) == run.workload.export_state(0)
    with pytest.raises(ChunkUnavailableError, match="damaged"):
        run.ledger.read_mean(0, 2)
    assert run.ledger.holdings.means == (), "nobody else is sent here for it"


# --- for peers, and from them ---------------------------------------------------------------------------------------


def test_another_node_comes_to_the_same_state_by_what_it_is_given(tmp_path: Path) -> None:
    run = Run(tmp_path / "one")
    for round in range(5):
        run.live(snapshot=round == 2)
    workload = fresh()
    other = ledger(tmp_path / "two", workload)
    manifest = decode(run.ledger.read_manifest(3), Manifest)
    for chunk in other.open_snapshot(manifest):
        other.put_state(3, chunk, memoryview(run.ledger.read_state(3, chunk)))
    other.finish_snapshot(3)
    other.load(3, in_threads)
    assert workload.state_digest() == run.digests[3]
    for round in (3, 4):
        record = decode(run.ledger.read_record(round), Record)
        assert other.missing_means(record) == tuple(CHUNKS)
        for chunk in CHUNKS:
            other.put_committed(record, chunk, run.ledger.read_mean(round, chunk).payload)
        assert other.missing_means(record) == ()
        other.save_record(record)
        other.advance(round, in_threads)
    assert workload.state_digest() == run.workload.state_digest()
    assert other.read_mean(4, 1).info == run.ledger.read_mean(4, 1).info
    assert ledger(tmp_path / "two", fresh()).restore().digest == run.workload.state_digest()


def test_a_mean_that_the_record_does_not_name_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "one")
    run.live()
    other = ledger(tmp_path / "two", fresh())
    record = decode(run.ledger.read_record(0), Record)
    payload = bytearray(run.ledger.read_mean(0, 1).payload)
    payload[-1] ^= 1
    for wrong in (payload, payload[:-1], bytearray()):
        with pytest.raises(ProtocolError):
            other.put_committed(record, 1, memoryview(wrong))
    assert other.missing_means(record) == tuple(CHUNKS)


def test_what_is_not_here_is_said_to_be_gone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.live()
    for ask in (
        lambda: run.ledger.read_mean(1, 0),
        lambda: run.ledger.read_mean(0, 9),
        lambda: run.ledger.read_state(1, 0),
        lambda: run.ledger.read_record(1),
        lambda: run.ledger.read_manifest(1),
    ):
        with pytest.raises(ChunkUnavailableError):
            ask()


def test_keeping_deletes_the_rest(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for round in range(6):
        run.live(snapshot=round in (1, 3, 5))
    run.ledger.keep((4, 6), 4)
    assert (run.ledger.holdings.snapshots, run.ledger.holdings.means) == ((4, 6), (4, 5))
    assert ledger(tmp_path, fresh()).restore().digest == run.workload.state_digest()


# --- while the state changes ----------------------------------------------------------------------------------------


def test_a_snapshot_is_of_one_round_though_the_next_ones_are_lived_through_while_it_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.live()
    job = run.ledger.begin_snapshot(run.tip)
    means = run.means()

    def write() -> None:
        for chunk in reversed(CHUNKS):
            job.before_change(chunk)

    writer = threading.Thread(target=write)
    writer.start()
    for chunk in CHUNKS:
        job.before_change(chunk)
        run.workload.apply(chunk, means[chunk][1], False)
    writer.join()
    job.finish()
    workload = fresh()
    other = ledger(tmp_path, workload)
    other.load(1, in_threads)
    assert workload.state_digest() == run.digests[1]


@pytest.mark.parametrize("found", ["process killed", "power lost"])
@pytest.mark.parametrize("half", [False, True])
def test_a_crash_at_any_step_of_three_rounds_and_a_snapshot_loses_at_most_the_last_round(
    found: Found, half: bool
) -> None:
    """And never one that was committed before the means of the next were closed; what is found has the right bits."""
    where = Path("/node")
    lived = Run(where, FaultyFiles())
    for round in range(3):
        lived.live(snapshot=round == 1)
    assert isinstance(lived.files, FaultyFiles)
    for step in range(lived.files.operations):
        disk = FaultyFiles()
        disk.fault = Fault(step, half)
        run = Run(where, disk)
        with pytest.raises(Crash):
            for round in range(3):
                run.live(snapshot=round == 1)
        for seed in range(2 if found == "power lost" else 1):
            workload = fresh()
            restored = ledger(where, workload, disk.found_after(found, seed)).restore()
            where_now = f"step {step}, seed {seed}"
            assert restored.round >= run.workload.round - (found == "power lost"), where_now
            assert restored.digest == lived.digests[restored.round], where_now


def test_a_full_disk_fails_the_snapshot_and_not_the_training() -> None:
    where = Path("/node")
    run = Run(where, FaultyFiles())
    run.live()
    assert isinstance(run.files, FaultyFiles)
    before = run.files.copy()
    run.snapshot()
    steps = run.files.operations - before.operations
    failed = 0
    for step in range(steps):
        disk = before.copy()
        disk.fault = Fault(step, False, errno.ENOSPC)
        again = Run(where, disk)
        again.ledger.restore()
        job = again.ledger.begin_snapshot(run.tip)
        for chunk in CHUNKS:
            job.before_change(chunk)
        try:
            job.finish()
        except StorageError:
            failed += 1
        else:
            assert again.ledger.holdings.snapshots == (1,), f"step {step}"
        assert ledger(where, fresh(), disk.found_after("process killed", 0)).restore().digest == run.digests[1]
    assert failed > 6
