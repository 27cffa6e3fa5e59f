"""A copy of a node's snapshots and means somewhere else, from which a node can begin when its own disk is lost.

The files have the names that they have in the node's directory. ``ledger.json`` says which there are, with their sizes
and digests: what it does not name is not of the copy, whatever lies there.

What holds always: a reader finds the set of one push, whole, or that of the one before. A file that an index names is
never changed: another of the same name is put beside it, under its name and the first digits of its digest. The index
changes at once, when all that it names is there; only then goes what the one before it named. A push that died is
gone on with by the next: ``ledger.next.json`` says what it wanted to put, so what has come is not sent again. One node
writes to a copy; two that do so would each delete the other's files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final, TypeAlias

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from prime_async.errors import ConfigError, LocalError, StorageError
from prime_async.ledger.errors import DamagedError, translated
from prime_async.ledger.examination import MeansFound, SnapshotFound, examine_means, examine_snapshot
from prime_async.ledger.files import LOCAL_FILES
from prime_async.ledger.means import DIRECTORY as MEANS
from prime_async.ledger.means import ENDING
from prime_async.ledger.remote_store import SENDING, Store
from prime_async.ledger.snapshots import DIRECTORY as SNAPSHOTS
from prime_async.ledger.snapshots import WHOLE

INDEX: Final = "ledger.json"
NEXT: Final = "ledger.next.json"
STAGING: Final = "restore.part"
NOBODYS: Final = frozenset({"lost+found"})
"""What a file system makes by itself where a directory is all of a disk, such as a volume of a container."""
FORMAT: Final = "prime-async remote copy 1"
PIECE_BYTES: Final = 1 << 23
ATTEMPTS: Final = 3
"""How often a reader begins again because a push has just replaced what it was reading."""

OURS: Final = re.compile(
    rf"({SNAPSHOTS}/[0-9]{{12,19}}(\.[0-9a-f]{{16}})?{re.escape(WHOLE)}"
    rf"|{MEANS}/[0-9]{{12,19}}(\.[0-9a-f]{{16}})?{re.escape(ENDING)})({re.escape(SENDING)})?"
)
"""What a push may delete."""

Name: TypeAlias = Annotated[str, Meta(pattern=r"\A(snapshots/[0-9]{12,19}\.safetensors|means/[0-9]{12,19}\.means)\Z")]
Stored: TypeAlias = Annotated[
    str, Meta(pattern=r"\A(snapshots|means)/[0-9]{12,19}(\.[0-9a-f]{16})?\.(safetensors|means)\Z")
]


class Entry(Struct, frozen=True, kw_only=True):
    """A file: what it is called in a node's directory, and where it lies in the copy. ``blake3``: in hexadecimal."""

    name: Name
    stored: Stored
    bytes: Annotated[int, Meta(ge=0)]
    blake3: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]

    def is_of(self, other: Entry) -> bool:
        """Whether they are of the same name and bytes."""
        return (self.name, self.bytes, self.blake3) == (other.name, other.bytes, other.blake3)


class Index(Struct, frozen=True, kw_only=True):
    """What a copy holds. ``round``: after how many rounds the newest outer state is that it leads to."""

    format: str
    run_id: str
    round: int
    files: tuple[Entry, ...]


class PushReport(Struct, frozen=True, kw_only=True):
    """What a push did: names in the copy."""

    sent: tuple[str, ...]
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    sent_bytes: int


class RemoteCopy:
    """The copy at ``url`` of the snapshots and means in ``directory``. Synchronous, used by one worker thread.

    Both methods raise :class:`RemoteCopyError` if the store fails, :class:`StorageError`, of which that is one, if this
    machine's disk does, and :class:`ConfigError` if a package is missing, or the copy is of another run.
    """

    def __init__(self, url: str, directory: Path, run_id: bytes | None) -> None:
        """``directory``: the node's. ``run_id``: ``None`` to pull, whichever run it is of."""
        self._url = url
        self._directory = directory
        self._run_id = run_id.hex() if run_id is not None else None
        self._store: Store | None = None
        self._digests: dict[str, tuple[tuple[int, int, int], str]] = {}  # of files as they were: big ones are read once

    def push(self, snapshots: Sequence[int], means: Sequence[int]) -> PushReport:
        """Make the copy hold the snapshots and the committed means of these rounds, and no others.

        If it raises, the copy is as it was, or as it was to be. Raises :class:`DamagedError` if a file that is to be
        sent is damaged here: it takes the place of no good one.
        """
        if self._run_id is None:
            raise LocalError("a copy can only be made of a run: give its id")
        store = self._open()
        index, plan = self._read(store, INDEX), self._read(store, NEXT)
        named = {entry.stored for entry in index.files} if index else set()
        known = [*(index.files if index else ()), *(plan.files if plan else ())]
        entries = [self._entry(name, known, named) for name in _names(snapshots, means)]
        there = store.list(SNAPSHOTS) | store.list(MEANS)
        kept = [e for e in entries if e in known and there.get(e.stored) == e.bytes]
        todo = [e for e in entries if e not in kept]
        for entry in todo:
            self._check(entry.name)
        wanted = self._index(self._run_id, snapshots, means, entries)
        removed = self._clean(store, there, named | {e.stored for e in kept})
        if todo:
            store.write(NEXT, _encode(wanted))
        for entry in todo:
            self._send(store, entry)
        if wanted != index:
            store.write(INDEX, _encode(wanted))
        removed += self._clean(store, {name: 0 for name in there if name not in removed}, {e.stored for e in entries})
        if todo or plan is not None:
            store.remove(NEXT)
        return PushReport(
            sent=tuple(e.stored for e in todo),
            kept=tuple(e.stored for e in kept),
            removed=tuple(removed),
            sent_bytes=sum(e.bytes for e in todo),
        )

    def pull(self) -> list[str]:
        """Fetch the copy into the directory, in which nothing may be yet. Returns the names of its files.

        They are there, on disk, when it returns. If it raises, what has come is in ``restore.part``, in which the next
        pull goes on; :class:`StorageError` if the copy is damaged, or there is none.
        """
        if self._is_settling():
            return self._settle()
        self._check_empty()
        store, index = self._open(), None
        for _ in range(ATTEMPTS):
            before, index = index, self._read(store, INDEX)
            if index is None:
                raise StorageError(f"{store.where(INDEX)}: there is no copy of a ledger; see that the URL is right")
            if index == before:
                break  # it names what is not there, and not because a push has just replaced it
            missing = self._fetch_all(store, index)
            if missing is None:
                return self._settle()
        raise StorageError(f"{store.where(missing or INDEX)}: is missing: the node's next push puts it there again")

    def _open(self) -> Store:
        if self._store is None:
            self._store = Store(self._url)
        return self._store

    # --- push ---------------------------------------------------------------------------------------------------

    def _entry(self, name: str, known: Iterable[Entry], named: set[str]) -> Entry:
        """Of the file as it is here; ``stored`` where it lies already, or where nothing lies that is named."""
        path = self._directory / name
        with translated(path, "it could not be read"):
            made = Entry(name=name, stored=name, bytes=path.stat().st_size, blake3=self._digest(name))
        for entry in known:
            if entry.is_of(made):
                return entry
        if name not in named:
            return made
        stem, ending = name.split(".")
        return msgspec.structs.replace(made, stored=f"{stem}.{made.blake3[:16]}.{ending}")

    def _digest(self, name: str) -> str:
        path = self._directory / name
        before = _state(path)
        if self._digests.get(name, (None, ""))[0] != before:
            digest = _hash(path)
            self._digests[name] = before, digest
        return self._digests[name][1]

    def _check(self, name: str) -> None:
        path, round = self._directory / name, int(name.split("/")[1].split(".")[0])
        found: SnapshotFound | MeansFound
        with translated(path, "it could not be read"):
            if name.startswith(SNAPSHOTS):
                found = examine_snapshot(LOCAL_FILES, path, round, whole=True, verify=True)
            else:
                found = examine_means(LOCAL_FILES, path, round, verify=True)
        if found.problem or found.bad:
            raise DamagedError(path, found.bad[0] if found.bad else None, found.problem or "it is not copied")
        if isinstance(found, MeansFound) and found.state != "committed":
            raise LocalError(f"{path}: the means of round {round} are not committed: copy them when they are")
        if found.run_id != self._run_id:
            raise ConfigError([f"{path}: is of another run than this node: move it away"])

    def _send(self, store: Store, entry: Entry) -> None:
        path = self._directory / entry.name
        before = self._digests[entry.name][0]
        store.put(path, entry.stored)
        with translated(path, "it could not be read"):
            if _state(path) != before:
                store.remove(entry.stored)  # it is not what the plan says, and a later push would take it for that
                raise StorageError(f"{path}: was changed while it was copied; copy it again")

    @staticmethod
    def _clean(store: Store, there: Iterable[str], kept: set[str]) -> list[str]:
        """Remove what is not ``kept``, and was put there by a push."""
        gone = [name for name in there if name not in kept and OURS.fullmatch(name)]
        for name in gone:
            store.remove(name)
        return gone

    @staticmethod
    def _index(run_id: str, snapshots: Sequence[int], means: Sequence[int], entries: Sequence[Entry]) -> Index:
        newest = max([*snapshots, *(round + 1 for round in means)], default=0)
        return Index(format=FORMAT, run_id=run_id, round=newest, files=tuple(entries))

    # --- pull ---------------------------------------------------------------------------------------------------

    def _check_empty(self) -> None:
        with translated(self._directory, "it could not be listed"):
            there = [name for name in LOCAL_FILES.list(self._directory) if name not in {STAGING} | NOBODYS]
        if there:
            raise ConfigError(
                [
                    f"{self._directory}: is not empty ({', '.join(sorted(there)[:4])}), and nothing in it is "
                    "overwritten: choose another node.directory, or move away what is in this one"
                ]
            )

    def _fetch_all(self, store: Store, index: Index) -> str | None:
        """Into the staging folder. Returns the name of a file that is not there, if one is not."""
        staging = self._directory / STAGING
        wanted = {entry.name for entry in index.files}
        for folder in (SNAPSHOTS, MEANS):
            with translated(staging / folder, "it could not be made"):
                LOCAL_FILES.make_directory(staging / folder)
                for name in LOCAL_FILES.list(staging / folder):
                    if f"{folder}/{name}" not in wanted:  # of another push
                        LOCAL_FILES.remove(staging / folder / name)
        return next((e.stored for e in index.files if not self._fetch(store, e, staging / e.name)), None)

    @staticmethod
    def _fetch(store: Store, entry: Entry, path: Path) -> bool:
        """Returns whether the file is there."""
        with translated(path, "it could not be read"):
            if path.exists() and _is(path, entry):
                return True
        partial = path.with_name(path.name + SENDING)
        if not store.get(entry.stored, partial):
            return False
        with translated(path, "it could not be written"):
            if not _is(partial, entry):
                LOCAL_FILES.remove(partial)
                raise StorageError(
                    f"{store.where(entry.stored)}: is damaged, or was cut off on the way: try again, or restore from "
                    "another member or copy"
                )
            with LOCAL_FILES.open(partial, create=True) as file:
                file.sync()
            LOCAL_FILES.replace(partial, path)
            LOCAL_FILES.sync_directory(path.parent)
        return True

    def _is_settling(self) -> bool:
        """Whether a pull was cut off when all had come, and the snapshots were in their place."""
        with translated(self._directory, "it could not be listed"):
            there = set(LOCAL_FILES.list(self._directory)) - NOBODYS
            staged = LOCAL_FILES.list(self._directory / STAGING)
        return {STAGING, SNAPSHOTS} <= there <= {STAGING, SNAPSHOTS, MEANS} and SNAPSHOTS not in staged

    def _settle(self) -> list[str]:
        """All has come: to its place with it, the snapshots first, without which the means lead nowhere.

        Returns the names of all files.
        """
        staging = self._directory / STAGING
        with translated(self._directory, "what was fetched could not be put in its place"):
            for folder in (SNAPSHOTS, MEANS):
                if (staging / folder).exists():
                    (staging / folder).replace(self._directory / folder)
                    LOCAL_FILES.sync_directory(self._directory)
            staging.rmdir()
            LOCAL_FILES.sync_directory(self._directory)
            listed = {folder: sorted(LOCAL_FILES.list(self._directory / folder)) for folder in (SNAPSHOTS, MEANS)}
        return [f"{folder}/{name}" for folder, names in listed.items() for name in names]

    # --- the index ----------------------------------------------------------------------------------------------

    def _read(self, store: Store, name: str) -> Index | None:
        data = store.read(name)
        if data is None:
            return None
        try:
            index = msgspec.json.decode(data, type=Index)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            text = f"is damaged ({error}): remove it, and the node's next push sends all again"
            raise StorageError(f"{store.where(name)}: {text}") from error
        if index.format != FORMAT:
            raise StorageError(f"{store.where(name)}: is of another version ({index.format!r}): use that one")
        if self._run_id is not None and index.run_id != self._run_id:
            raise ConfigError(
                [
                    f"{store.where(name)}: is the copy of another run ({index.run_id[:16]}), or of this one before its "
                    "[run] table was changed: choose another URL"
                ]
            )
        return index


def _names(snapshots: Iterable[int], means: Iterable[int]) -> list[str]:
    """The snapshots first: what was sent of a push that died is then of the most use."""
    kept = [f"{SNAPSHOTS}/{round:012d}{WHOLE}" for round in sorted(set(snapshots))]
    return kept + [f"{MEANS}/{round:012d}{ENDING}" for round in sorted(set(means))]


def _encode(index: Index) -> bytes:
    return msgspec.json.format(msgspec.json.encode(index), indent=1)


def _state(path: Path) -> tuple[int, int, int]:
    """Changes when the file does."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _is(path: Path, entry: Entry) -> bool:
    return path.stat().st_size == entry.bytes and _hash(path) == entry.blake3


def _hash(path: Path) -> str:
    hasher = blake3()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            hasher.update(piece)
    return hasher.hexdigest()
