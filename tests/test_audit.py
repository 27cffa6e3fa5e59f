"""An audit finds what is wrong with the means that nodes settled, and says what it cannot check."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from prime_async.actors.auditor import Auditor
from prime_async.actors.tensors import Tensors
from prime_async.audit import Audit, AuditFolder, audit
from prime_async.cli.audit import audit as command
from prime_async.config.schema import ExchangeSettings, ReducerName
from prime_async.errors import DataError
from prime_async.machines.vocabulary import Settle
from prime_async.messages import ChunkInfo, ChunkKey, Commit, bitmap
from prime_async.transport.base import Chunk
from prime_async.work.buffer_workload import BufferWorkload
from prime_async.work.chunks import Chunks
from prime_async.work.codec import as_bytes, make_codec
from prime_async.work.reduce import weighted_mean
from prime_async.work.reducers import make_reducer

CHUNKS = Chunks(elements=600, chunk_elements=512)
EXCHANGE = ExchangeSettings(codec="int8", mean_codec="fp16", trim=2)
MEMBERS = ("a" * 64, "b" * 64, "c" * 64)
WEIGHTS = (3, 0, 5)
"""The second one was not ready for the round."""
LINEAGE = bytes(32)


def mean_key(chunk: int, attempt: int = 0) -> ChunkKey:
    return ChunkKey(kind="mean", round=4, chunk=chunk, epoch=1, attempt=attempt)


def payload(chunk: int, seed: int) -> memoryview:
    codec, n = make_codec("int8"), CHUNKS.size(chunk)
    out = torch.empty(codec.payload_bytes(n), dtype=torch.uint8)
    codec.encode(torch.randn(n, generator=torch.Generator().manual_seed(seed)), out, torch.empty(n))
    return as_bytes(out)


def mean_of(
    chunk: int, payloads: Sequence[memoryview], weights: Sequence[int], reduce: ReducerName = "mean"
) -> memoryview:
    codec, mean_codec, n = make_codec("int8"), make_codec("fp16"), CHUNKS.size(chunk)
    out = torch.empty(mean_codec.payload_bytes(n), dtype=torch.uint8)
    tensors = [torch.frombuffer(bytearray(p), dtype=torch.uint8) for p in payloads]
    scratch, reducer = (torch.empty(n), torch.empty(n)), make_reducer(reduce, EXCHANGE.trim)
    assert weighted_mean(codec, tensors, weights, out, scratch, mean_codec, reducer).left_out == []
    return as_bytes(out)


class Run:
    """Three nodes' folders in ``home``, with what the first and the third contributed to round 4."""

    def __init__(self, home: Path, reduce: ReducerName = "mean") -> None:
        self.home = home
        exchange = EXCHANGE.model_copy(update={"reduce": reduce})
        self.folders = [AuditFolder(home / m[0] / "audit", m, exchange, CHUNKS) for m in MEMBERS]
        for chunk in range(CHUNKS.count):
            for i in (0, 2):
                self.contribute(i, chunk, seed=i)

    def contribute(self, node: int, chunk: int, seed: int) -> None:
        key = ChunkKey(kind="contribution", round=4, chunk=chunk)
        self.folders[node].contribution(key, payload(chunk, seed))

    def settle(
        self,
        node: int,
        chunk: int,
        *,
        seeds: Sequence[int] = (0, 2),
        who: Sequence[int] = (0, 2),
        total: int = 8,
        members: tuple[str, ...] = MEMBERS,
        reduce: ReducerName = "mean",
    ) -> None:
        mean = mean_of(chunk, [payload(chunk, s) for s in seeds], [WEIGHTS[i] for i in who], reduce)
        info = ChunkInfo(digest=bytes(32), contributors=bitmap(list(who)), total_weight=total)
        weights = WEIGHTS[: len(members)]
        self.folders[node].mean(mean_key(chunk), info, mean, lineage=LINEAGE, members=members, weights=weights)

    def settle_all(self) -> None:
        for node in range(3):
            for chunk in range(CHUNKS.count):
                self.settle(node, chunk)

    def audit(self) -> Audit:
        return audit([self.home])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_means_of_the_contributions_that_they_name_are_equal(run: Run) -> None:
    run.settle_all()
    found = run.audit()
    assert (found.means, found.copies, found.rounds, found.nodes) == (2, 6, {4}, set(MEMBERS))
    assert found.differences == found.unchecked == []
    assert {node: dict(rounds) for node, rounds in found.counted.items()} == {MEMBERS[0]: {4: 2}, MEMBERS[2]: {4: 2}}


def test_what_was_found_is_said_in_words_also_of_a_single_node(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Defect: "1 nodes settled"."""
    shutil.rmtree(run.home / "c")
    run.settle(0, 0, seeds=(0,), who=(0,), total=3)

    assert command(run.home) == 0

    assert " ".join(capsys.readouterr().out.split()) == (
        "1 mean of 1 round made anew from the contributions, and compared with the 1 that 1 node settled: "
        "all are bitwise equal"
    )


@pytest.mark.parametrize(
    ("seeds", "who", "total"),
    [
        ((0, 7), (0, 2), 8),  # the third one's bytes are not those that it contributed
        ((2, 0), (0, 2), 8),  # the weights have changed places
        ((0,), (0,), 3),  # right: the third one was left out
    ],
)
def test_a_mean_of_other_bytes_or_with_other_weights_is_found(
    run: Run, seeds: Sequence[int], who: Sequence[int], total: int
) -> None:
    run.settle(1, 0, seeds=seeds, who=who, total=total)
    differences = run.audit().differences
    if len(seeds) == 1:
        assert differences == []
    else:
        assert differences == [
            "round 4, chunk 0: the mean of the contributions of aaaaaaaa, cccccccc is another than the settled one"
        ]


@pytest.mark.parametrize("reduce", ["rda", "trimmed_mean", "median"])
def test_a_mean_is_made_anew_as_the_run_makes_it(tmp_path: Path, reduce: ReducerName) -> None:
    run = Run(tmp_path, reduce)
    run.settle(0, 0, reduce=reduce)
    run.settle(0, 1, reduce="mean")
    found = run.audit()
    assert found.means == 1
    assert found.differences == [
        "round 4, chunk 1: the mean of the contributions of aaaaaaaa, cccccccc is another than the settled one"
    ]


def test_weights_that_are_not_those_of_the_header_are_found(run: Run) -> None:
    run.settle(0, 1, total=9)
    assert run.audit().differences == ["round 4, chunk 1: the weights [3, 5] are not 9, as the header says"]


def test_nodes_that_settled_different_means_are_found(run: Run) -> None:
    run.settle(0, 0)
    run.settle(2, 0, seeds=(0,), who=(0,), total=3)
    assert run.audit().differences == ["round 4, chunk 0: aaaaaaaa and cccccccc settled different means"]


def test_what_a_node_did_not_know_of_the_plan_another_knew(run: Run) -> None:
    run.settle(0, 0, members=())
    assert run.audit().unchecked == ["round 4, chunk 0: no node here knew its plan"]
    run.settle(1, 0)
    found = run.audit()
    assert (found.means, found.copies, found.unchecked) == (1, 2, [])


def test_a_mean_whose_contributions_are_not_all_here_is_told(run: Run, tmp_path: Path) -> None:
    run.settle_all()
    found = audit([tmp_path / "a", tmp_path / "b"])
    assert (found.means, found.differences) == (0, [])
    missing = "there is no contribution of cccccccc, which the header names"
    assert found.unchecked == [f"round 4, chunk {chunk}: {missing}" for chunk in (0, 1)]


def test_of_two_contributions_of_a_node_that_started_again_either_may_count(run: Run) -> None:
    run.contribute(2, 0, seed=8)
    run.settle(0, 0, seeds=(0, 8))
    run.settle(0, 1)
    assert (run.audit().means, run.audit().differences) == (2, [])


def test_a_damaged_file_is_named_and_one_that_was_not_finished_is_passed_over(run: Run, tmp_path: Path) -> None:
    run.settle_all()
    path = next((tmp_path / "b").rglob("mean-000001-*"))
    path.with_suffix(".partial-17").write_bytes(b"half a")
    assert run.audit().differences == []
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert run.audit().differences == [f"{path}: damaged: its bytes are not those that were written"]


def test_folders_without_a_mean_are_no_success(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no settled mean"):
        run.audit()
    with pytest.raises(DataError, match="no such folder"):
        audit([tmp_path / "z"])


def test_a_disk_that_cannot_be_written_ends_the_writing_and_not_the_node(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = AuditFolder(tmp_path / "file", MEMBERS[0], EXCHANGE, CHUNKS)
    for _ in range(2):
        folder.contribution(ChunkKey(kind="contribution", round=0, chunk=0), payload(0, 0))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


async def test_an_auditor_writes_what_an_audit_reads(tmp_path: Path) -> None:
    """Given contributions and means of a node alone, when both are written, then each mean is that of the other."""
    workload = BufferWorkload.random(CHUNKS.elements, CHUNKS.chunk_elements, make_codec("int8"), seed=0)
    tensors = Tensors(workload, 2)
    auditor = Auditor(AuditFolder(tmp_path, MEMBERS[0], EXCHANGE, CHUNKS), tensors)
    chunks, means = {}, {}
    for chunk in range(workload.chunk_count):
        encoded, info = tensors.encode(chunk)
        chunks[chunk] = Chunk(info=info, payload=encoded)
        mean = ChunkInfo(digest=bytes(32), contributors=bitmap([0]), total_weight=7)
        means[mean_key(chunk, attempt=chunk)] = Chunk(info=mean, payload=mean_of(chunk, [encoded], [7]))
    await auditor.write_contribution(4, chunks)
    commit = Commit(round=4, epoch=1, attempt=0, state=bytes(32), digest=bytes(32), chain=bytes(32), view=1)
    settle = Settle(
        round=4,
        epoch=1,
        attempt=0,
        commit=commit,
        previous=bytes(32),
        lineage=LINEAGE,
        members=MEMBERS[:1],
        weights=(7,),
    )
    await auditor.write_means(settle, means)
    found = audit([tmp_path])
    assert (found.means, found.copies, found.differences, found.unchecked) == (2, 2, [], [])
