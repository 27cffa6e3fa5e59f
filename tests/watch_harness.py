"""What happens in a run that is watched, and a board that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prime_async.config.load import config_from
from prime_async.machines.facts import (
    ChunksRedone,
    Fact,
    HeldOutLoss,
    MemberLost,
    MemberSeen,
    MembersSeen,
    RoundFinished,
)
from prime_async.messages import Figures, RoundTimes
from prime_async.watch.board import Board
from prime_async.watch.history import History
from prime_async.watch.journal import Journal
from prime_async.watch.station import open_station


def figures(tokens: int = 1000, *, rounds: tuple[int, ...] = (), loss: float = 2.5, **more: Any) -> Figures:
    times = tuple(
        RoundTimes(round=r, training_ms=900, waiting_ms=50, exchange_ms=40, other_ms=10, tokens=100) for r in rounds
    )
    known = {"phase": "training", "tokens_per_s": 100, "training_ms": 900, "elapsed_ms": 1000}
    return Figures(tokens=tokens, loss_micronats=round(loss * 1e6), rounds=times, **{**known, **more})


def seen(*ids: str, first: int = 0, total: int = 0, round: int = 3, incarnation: int = 1, **more: Any) -> MembersSeen:
    members = tuple(
        MemberSeen(
            id=id,
            name=f"node-{id}",
            incarnation=incarnation,
            leads=id == "1",
            active=True,
            witness=id == "w",
            round=round,
            inner_steps=10,
            silent_s=0.2,
            figures=figures(**more),
        )
        for id in ids
    )
    return MembersSeen(epoch=1, view=2, first=first, total=total or len(ids), members=members)


def lost(id: str, silent_s: float = 10.02) -> MemberLost:
    return MemberLost(peer=id, name=f"node-{id}", silent_s=silent_s, view=3)


def redone(*gone: str, chunks: int = 12, round: int = 41, took_s: float = 0.4) -> ChunksRedone:
    return ChunksRedone(round=round, chunks=chunks, lost=gone, owners=("node-1", "node-2"), seconds=took_s)


STORY: list[Fact] = [
    seen("1", "2", "3", round=41, rounds=(40,)),
    HeldOutLoss(round=41, loss=2.5),
    lost("3"),
    redone("node-3"),
    RoundFinished(round=41, state_digest="ab", tokens=5, training_s=1.0, exchange_s=0.1),
    seen("1", "2", round=42, rounds=(41,)),
]


def config(tmp_path: Path, **node: Any) -> Any:
    directory = str(tmp_path / "state")
    return config_from({"run": {"name": "watched"}, "node": {"name": "node-1", "directory": directory, **node}})


def a_board(tmp_path: Path, *facts: Fact) -> Board:
    made = Board(Journal(tmp_path / "h", History("1", "node-1")), about(tmp_path))
    for fact in facts:
        made.add(fact)
    return made


def about(tmp_path: Path) -> dict[str, Any]:
    with open_station(config(tmp_path), "1") as made:
        return made.board.about
