"""What is in a node's directory, and what the node would begin with: for people, while it runs or when it does not.

What holds always: nothing is written. A file that appears, changes or goes meanwhile is no damage. What the newest
round has not finished yet is no damage either: a crash leaves such files, and the node knows how to go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from msgspec import Struct

from prime_async.ledger.ballots import BALLOT_FILE, RESERVE_FILE, WITHOUT_BALLOT
from prime_async.ledger.errors import translated
from prime_async.ledger.examination import (
    BallotFound,
    InnerFound,
    MeansFound,
    SnapshotFound,
    examine_ballot,
    examine_inner,
    examine_means,
    examine_snapshot,
)
from prime_async.ledger.files import LOCAL_FILES, Files, list_rounds
from prime_async.ledger.inner import INNER_FILE
from prime_async.ledger.means import DIRECTORY as MEANS
from prime_async.ledger.means import ENDING
from prime_async.ledger.snapshots import DIRECTORY as SNAPSHOTS
from prime_async.ledger.snapshots import PARTIAL, WHOLE
from prime_async.messages import FIRST_CHAIN, Commit

PASSES: Final = 5
"""The directory is listed so often at most, until nothing new has come while what is there was read."""

SHOWN_CHUNKS: Final = 4
FETCHES: Final = "from another member when it starts"
Found = TypeVar("Found")


class OtherFile(Struct, frozen=True, kw_only=True):
    """Not of the ledger; a folder's name ends with a slash, and it counts with all that is in it."""

    name: str
    bytes: int


class Report(Struct, frozen=True, kw_only=True):
    """A node's directory. ``problems``: a line each, with what to do.

    The node would begin with the outer state after ``newest_round`` rounds: ``snapshot`` (0: the initial weights) and
    the means since; ``tip`` is the commit that led to it, ``None`` for the initial weights. ``run_id``, ``name`` and
    ``settings``: of the run, as far as files tell.
    """

    directory: str
    verified: bool
    run_id: str
    name: str
    settings: dict[str, str]
    ballot: BallotFound | None
    snapshots: tuple[SnapshotFound, ...]
    means: tuple[MeansFound, ...]
    inner: InnerFound | None
    others: tuple[OtherFile, ...]
    total_bytes: int
    snapshot: int
    newest_round: int
    tip: Commit | None
    problems: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        return not (self.snapshots or self.means or self.ballot or self.inner)

    @property
    def is_good(self) -> bool:
        return not self.problems and not self.is_empty

    @property
    def conclusion(self) -> str:
        """A line."""
        if self.is_empty:
            return f"nothing is there: {self.directory} holds no ledger"
        rounds = self.newest_round - self.snapshot
        begins = f"snapshot {self.snapshot}" if self.snapshot else "the initial weights"
        means = f" and {rounds} round{'s' if rounds != 1 else ''} of means" if rounds else ""
        unread = "" if self.verified else ", as far as can be told without reading the chunks"
        return f"carries on from round {self.newest_round}: {begins}{means}{unread}"


def inspect_directory(directory: Path, *, verify: bool, files: Files = LOCAL_FILES) -> Report:
    """Look at all files of a node's ``directory``; with ``verify`` read every chunk and compare it with its digest.

    Raises :class:`StorageError` if this user may not look at one; a directory that is not there is an empty one.
    """
    with translated(directory, "it cannot be looked at"):
        snapshots, means = _rounds(files, directory, verify)
        total, others = _sizes(directory)
    ballot = _examined(directory / BALLOT_FILE, partial(examine_ballot, files))
    inner = _examined(directory / INNER_FILE, partial(examine_inner, files, verify=verify))
    known = [s for s in snapshots if s.run_id]
    ids = [f.run_id for f in (ballot, *reversed(known), *reversed(means), inner) if f is not None and f.run_id]
    run_id = ids[0] if ids else ""
    settings = next((s.settings for s in reversed(known) if s.run_id == run_id), {})
    snapshot, round, tip = _leads_to(run_id, snapshots, means)
    problems = [
        *_of_runs(ids),
        *_of_ballot(ballot),
        *(line for found in snapshots for line in _of_snapshot(found)),
        *_of_means(means),
        *_of_links(snapshots, means),
        *_of_gap(round, snapshot, means),
        *_of_inner(inner),
    ]
    return Report(
        directory=str(directory),
        verified=verify,
        run_id=run_id,
        name=settings.get("run.name", "").strip('"'),
        settings=settings,
        ballot=ballot,
        snapshots=tuple(snapshots),
        means=tuple(means),
        inner=inner,
        others=tuple(others),
        total_bytes=total,
        snapshot=snapshot,
        newest_round=round,
        tip=tip,
        problems=tuple(problems),
    )


def _rounds(files: Files, directory: Path, verify: bool) -> tuple[list[SnapshotFound], list[MeansFound]]:
    """A running node may end a snapshot, and delete the one before, while that is read: so look again afterwards."""
    snapshots: dict[Path, SnapshotFound] = {}
    means: dict[Path, MeansFound] = {}
    for _ in range(PASSES):
        listed_snapshots = {
            path: partial(examine_snapshot, files, round=round, whole=ending == WHOLE, verify=verify)
            for ending in (WHOLE, PARTIAL)
            for round, path in _listed(files, directory / SNAPSHOTS, ending)
        }
        news = _update(snapshots, listed_snapshots, lambda found: found.whole)
        listed_means = {
            path: partial(examine_means, files, round=round, verify=verify)
            for round, path in _listed(files, directory / MEANS, ENDING)
        }
        news |= _update(means, listed_means, lambda found: found.state == "committed" and not found.bad)
        if not news:
            break
    return (
        sorted(snapshots.values(), key=lambda s: (s.round, s.whole)),
        sorted(means.values(), key=lambda m: m.round),
    )


def _listed(files: Files, directory: Path, ending: str) -> list[tuple[int, Path]]:
    return [(round, directory / f"{round:012d}{ending}") for round in list_rounds(files, directory, ending)]


def _update(
    found: dict[Path, Found], listed: Mapping[Path, Callable[[Path], Found]], is_final: Callable[[Found], bool]
) -> bool:
    """Examine what is new, and what may have changed; forget what is gone. Returns whether something was new."""
    news = listed.keys() - found.keys()
    if news or found.keys() - listed.keys():
        for path, examine in listed.items():
            if path in found and is_final(found[path]):
                continue
            examined = _examined(path, examine)
            if examined is not None:
                found[path] = examined
    for path in found.keys() - listed.keys():
        del found[path]
    return bool(news)


def _examined(path: Path, examine: Callable[[Path], Found]) -> Found | None:
    """``None`` if the file is not there, or no longer."""
    with translated(path, "it cannot be looked at"), suppress(FileNotFoundError):
        return examine(path)
    return None


def _leads_to(
    run_id: str, snapshots: Sequence[SnapshotFound], means: Sequence[MeansFound]
) -> tuple[int, int, Commit | None]:
    """The newest sound snapshot, the round that it and the means since lead to, and the commit that does."""
    sound = [s for s in snapshots if s.whole and _is_sound(s, run_id)]
    snapshot, chain, tip = (
        (sound[-1].round, sound[-1].chain, sound[-1].commit) if sound else (0, FIRST_CHAIN.hex(), None)
    )
    committed = {m.round: m for m in means if m.state == "committed" and _is_sound(m, run_id)}
    states = {s.round: s.state_digest for s in sound}
    round = snapshot
    while (found := committed.get(round)) is not None and found.previous == chain:
        if states.get(round, found.state_digest) != found.state_digest:
            break
        round, chain, tip = round + 1, found.chain, found.commit
    return snapshot, round, tip


def _is_sound(found: SnapshotFound | MeansFound, run_id: str) -> bool:
    return not found.problem and not found.bad and found.run_id == run_id


def _of_runs(ids: Iterable[str]) -> Iterator[str]:
    runs = sorted(set(ids))
    if len(runs) > 1:
        named = ", ".join(run[:16] for run in runs)
        yield f"the files are of {len(runs)} runs ({named}): choose a node.directory for each, or move the others away"


def _of_ballot(ballot: BallotFound | None) -> Iterator[str]:
    if ballot is not None and ballot.problem:
        yield f"the ballot is damaged ({ballot.problem}): {WITHOUT_BALLOT}"


def _of_snapshot(found: SnapshotFound) -> Iterator[str]:
    if not found.whole:
        return  # of no use or not, the node begins it anew, or goes on with it
    if found.problem:
        yield (
            f"snapshot {found.round} is damaged ({found.problem}): the node fetches a newer one {FETCHES}, or move the "
            "file away"
        )
    elif found.bad:
        yield f"{_chunks(found.bad)} of snapshot {found.round} {_are(found.bad)} damaged: {_fetches(found.bad)}"


def _of_means(means: Sequence[MeansFound]) -> Iterator[str]:
    newest = max((m.round for m in means if m.state == "committed"), default=-1)
    for found in means:
        if found.state == "committed" and not found.problem and found.bad:
            yield f"{_chunks(found.bad)} of the means of round {found.round} {_are(found.bad)} damaged: " + _fetches(
                found.bad
            )
        elif found.problem and (found.state != "begun" or found.round < newest):
            yield f"the means of round {found.round} are damaged ({found.problem}): the node fetches them {FETCHES}"
        elif found.state == "pending" and found.round < newest:
            yield f"the commit of round {found.round} is missing: the node fetches it {FETCHES}"


def _of_links(snapshots: Sequence[SnapshotFound], means: Sequence[MeansFound]) -> Iterator[str]:
    """Whether each commit follows on the one before, and on the snapshot that it names."""
    sound = {s.round: s for s in snapshots if s.whole and not s.problem}
    committed = {m.round: m for m in means if m.state == "committed" and not m.problem}
    for round, found in committed.items():
        before, snapshot = committed.get(round - 1), sound.get(round)
        if before is not None and found.previous != before.chain:
            yield f"round {round} does not follow on round {round - 1}: the node fetches its means {FETCHES}"
        elif round == 0 and found.previous != FIRST_CHAIN.hex():
            yield f"round 0 does not follow on the initial weights: the node fetches its means {FETCHES}"
        if snapshot is not None and (found.previous, found.state_digest) != (snapshot.chain, snapshot.state_digest):
            yield f"round {round} does not follow on snapshot {round}: the node fetches what its run has {FETCHES}"


def _of_gap(round: int, snapshot: int, means: Sequence[MeansFound]) -> Iterator[str]:
    """Rounds that cannot be come to, though nothing that is there is damaged: what is missing is one that is not."""
    there = {m.round for m in means}
    later = sorted(m.round for m in means if m.state == "committed" and m.round > round)
    if later and round not in there and round >= snapshot:
        yield f"the means of round {round} are missing, and later ones are there: the node fetches them {FETCHES}"


def _of_inner(inner: InnerFound | None) -> Iterator[str]:
    if inner is not None and inner.problem:
        yield f"the inner state is damaged ({inner.problem}): the inner optimiser starts afresh, nothing needs be done"


def _chunks(chunks: Sequence[int]) -> str:
    if len(chunks) == 1:
        return f"chunk {chunks[0]}"
    more = f" and {len(chunks) - SHOWN_CHUNKS} more" if len(chunks) > SHOWN_CHUNKS else ""
    return f"chunks {', '.join(map(str, chunks[:SHOWN_CHUNKS]))}{more}"


def _are(chunks: Sequence[int]) -> str:
    return "is" if len(chunks) == 1 else "are"


def _fetches(chunks: Sequence[int]) -> str:
    return f"the node fetches {'it' if len(chunks) == 1 else 'them'} {FETCHES}"


def _sizes(directory: Path) -> tuple[int, list[OtherFile]]:
    """Bytes of all files, and those that are not of the ledger."""
    ours = {BALLOT_FILE, RESERVE_FILE, INNER_FILE}
    total, others = 0, []
    for entry in sorted(_entries(directory), key=lambda e: e.name):
        size = _size(entry)
        total += size
        if entry.name in (SNAPSHOTS, MEANS):
            others += [OtherFile(name=f"{entry.name}/{e.name}", bytes=_size(e)) for e in _strange(Path(entry.path))]
        elif entry.name not in ours:
            folder = "/" if entry.is_dir(follow_symlinks=False) else ""
            others.append(OtherFile(name=entry.name + folder, bytes=size))
    return total, others


def _strange(directory: Path) -> Iterator[os.DirEntry[str]]:
    endings = (WHOLE, PARTIAL) if directory.name == SNAPSHOTS else (ENDING,)
    known = {path.name for ending in endings for _, path in _listed(LOCAL_FILES, directory, ending)}
    return (entry for entry in _entries(directory) if entry.name not in known)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size(entry: os.DirEntry[str]) -> int:
    with suppress(OSError):
        if entry.is_dir(follow_symlinks=False):
            return sum(map(_size, _entries(Path(entry.path))))
        return entry.stat(follow_symlinks=False).st_size
    return 0
