"""Makes a node's directory of a small run, byte for byte the same each time, without a model."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
from blake3 import blake3

from prime_async.ledger import BallotFile, InnerFile, MeansFiles, SnapshotInfo, Snapshots
from prime_async.machines.ballot import Ballot
from prime_async.messages import FIRST_CHAIN, ChunkInfo, Commit, Member, View, next_chain, state_digest
from prime_async.work.chunks import Chunks
from prime_async.work.inner import Span

RUN = b"r" * 32
SETTINGS = {"run.name": '"tiny"', "run.rounds": "50"}
SPANS = [Span("a.weight", 0, 600, (20, 30)), Span("b", 600, 1000, (400,))]
CHUNKS = Chunks(1000, 256)
SIZES = (256, 256, 256, 232)


@cache
def state(round: int) -> list[bytes]:
    chance = random.Random(round)
    return [chance.randbytes(8 * CHUNKS.size(c)) for c in range(CHUNKS.count)]


@cache
def info(round: int) -> SnapshotInfo:
    digests = b"".join(blake3(data).digest() for data in state(round))
    return SnapshotInfo(
        round=round,
        state_digest=state_digest(round, digests),
        chunk_digests=digests,
        commit=commit(round - 1) if round else None,
    )


@cache
def payloads(round: int) -> list[bytes]:
    chance = random.Random(-1 - round)
    return [chance.randbytes(size) for size in SIZES]


def infos(round: int) -> tuple[ChunkInfo, ...]:
    return tuple(
        ChunkInfo(digest=blake3(data).digest(), contributors=b"\x07", total_weight=3) for data in payloads(round)
    )


@cache
def chain(round: int) -> bytes:
    """Before the commit of ``round``."""
    return commit(round - 1).chain if round else FIRST_CHAIN


@cache
def commit(round: int, view: int = 4) -> Commit:
    digests = b"".join(blake3(data).digest() for data in payloads(round))
    chance = random.Random(round)
    digest = state_digest(
        round, b"".join(blake3(chance.randbytes(8 * CHUNKS.size(c))).digest() for c in range(CHUNKS.count))
    )
    means = blake3(digests).digest()
    return Commit(
        round=round, epoch=1, attempt=0, state=digest, digest=means, view=view,
        chain=next_chain(chain(round), digest, means),
    )  # fmt: skip


def snapshots(directory: Path, run: bytes = RUN) -> Snapshots:
    return Snapshots(directory, run, SETTINGS, SPANS, CHUNKS)


def means(directory: Path, run: bytes = RUN) -> MeansFiles:
    return MeansFiles(directory, run, SIZES)


def write_snapshot(directory: Path, round: int, chunks: range = range(CHUNKS.count), run: bytes = RUN) -> Path:
    """All of it, or a partial one with these ``chunks``."""
    kept = snapshots(directory, run)
    part = kept.open_partial(info(round))
    for chunk in chunks:
        part.write(chunk, state(round)[chunk])
    if len(chunks) == CHUNKS.count:
        part.finish()
    part.close()
    return kept.path(round) if len(chunks) == CHUNKS.count else kept.partial_path(round)


def write_means(directory: Path, round: int, *, committed: bool = True, view: int = 4, run: bytes = RUN) -> Path:
    """``view``: another one makes another file, of the same means."""
    kept = means(directory, run)
    for chunk, payload in enumerate(payloads(round)):
        kept.put(round, chunk, payload)
    kept.close(round, infos(round))
    if committed:
        kept.commit(round, commit(round, view), chain(round))
    return kept.path(round)


def write_inner(directory: Path, round: int) -> Path:
    kept = InnerFile(directory, RUN)
    kept.save(round, info(round).state_digest, {"step": torch.tensor(round), "a.exp_avg": torch.zeros(30)})
    return kept.path


def write_ballot(directory: Path, run: bytes = RUN, node: str = "a" * 64) -> Path:
    """Of the members a, b and c, of which ``node`` is the first."""
    members = tuple(
        Member(
            id=node if name == "a" else name * 64,
            name=name,
            incarnation=1,
            control="c",
            bulk="b",
            active=True,
            voter=name != "c",
        )
        for name in "abc"
    )
    view = View(
        lineage=b"l" * 32, epoch=1, number=7, previous=bytes(32), leader="a" * 64, members=members, commit=commit(42)
    )
    kept = BallotFile(directory, run)
    kept.save(Ballot(incarnations=(1,), promised=1, promised_to="a" * 64, accepted=1, view=view, decided=True))
    return kept.path


def write_ledger(directory: Path) -> Path:
    """Snapshots 30 and 40, the means from 30 to 42, the ballot and the inner state: as a node has it at round 43."""
    for round in (30, 40):
        write_snapshot(directory, round)
    for round in range(30, 43):
        write_means(directory, round)
    write_ballot(directory)
    write_inner(directory, 42)
    return directory


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))
