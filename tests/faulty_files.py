"""A disk in memory that crashes, fills up and forgets, at the operation that a test names.

What a program sees of a file is not what is on disk: writes and truncations wait in the file's journal until it is
synced, and changes of a directory in the directory's until that is synced. ``found_after`` makes the disk that is
found after a crash. If a process was killed, all that waits is still there, and still waits. If the power was lost, of
what waits in a file any part may have got through, and a write may be torn, or have left zeros where it made the file
longer; of what waits in a directory, the first few changes. A sync that is cut off is one that did not begin.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from prime_async.errors import StorageError

Found = Literal["process killed", "power lost"]
SEEDS = range(4)


class Crash(BaseException):
    """The machine, or the process, is gone: nothing runs after this, no ``except`` and no cleaning up."""


@dataclass
class Inode:
    """A file: ``synced`` is on disk, ``journal`` (offset and data; ``None``: the file ends here) waits."""

    synced: bytearray = field(default_factory=bytearray)
    seen: bytearray = field(default_factory=bytearray)
    journal: list[tuple[int, bytes | None]] = field(default_factory=list)

    def change(self, offset: int, data: bytes | None) -> None:
        self.journal.append((offset, data))
        apply(self.seen, offset, data)

    def sync(self) -> None:
        self.synced, self.journal = bytearray(self.seen), []

    def lose_power(self, chance: random.Random) -> None:
        for offset, data in self.journal:
            kind = chance.choice(["kept", "lost", "torn", "zeros"])
            if kind == "lost":
                continue
            if data is not None and kind == "torn":
                first, last = sorted(chance.choices(range(len(data) + 1), k=2))
                offset, data = offset + first, data[first:last]
            if data is not None and kind == "zeros" and offset + len(data) > len(self.synced):
                data = data[: max(0, len(self.synced) - offset)] + bytes(offset + len(data) - len(self.synced))
            apply(self.synced, offset, data)
        self.seen, self.journal = bytearray(self.synced), []


def apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
    end = offset + len(data or b"")
    content.extend(bytes(max(0, end - len(content))))
    content[offset:end] = data or b""


@dataclass
class Directory:
    """``journal``: a name, what it stands for from now on, and the name that this is taken from, if one."""

    synced: dict[str, Inode] = field(default_factory=dict)
    seen: dict[str, Inode] = field(default_factory=dict)
    journal: list[tuple[str, Inode | None, str | None]] = field(default_factory=list)

    def change(self, name: str, inode: Inode | None, source: str | None = None) -> None:
        self.journal.append((name, inode, source))
        relink(self.seen, name, inode, source)

    def sync(self) -> None:
        self.synced, self.journal = dict(self.seen), []

    def lose_power(self, chance: random.Random) -> None:
        for name, inode, source in self.journal[: chance.randint(0, len(self.journal))]:
            relink(self.synced, name, inode, source)
        self.seen, self.journal = dict(self.synced), []


def relink(entries: dict[str, Inode], name: str, inode: Inode | None, source: str | None) -> None:
    if source is not None:
        entries.pop(source, None)
    if inode is None:
        entries.pop(name, None)
    else:
        entries[name] = inode


@dataclass
class Fault:
    """At operation ``at``, counted from 0: a crash, or this error of the system. ``half``: in the middle of it."""

    at: int
    half: bool
    error: int | None = None


class FaultyFiles:
    """A disk of ``capacity`` bytes. Operations that change it are counted; those that read are not."""

    def __init__(self) -> None:
        self.directories: dict[Path, Directory] = {}
        self.operations = 0
        self.fault: Fault | None = None
        self.capacity: int | None = None
        self.unreadable: set[Path] = set()
        self.log: list[str] = []
        self._chance = random.Random(0)
        self._crashed = False

    # --- for tests ---

    def copy(self) -> FaultyFiles:
        made = deepcopy(self)
        made.operations, made.log = 0, []
        return made

    def found_after(self, found: Found, seed: int) -> FaultyFiles:
        """The disk as it is when the program starts again."""
        made = self.copy()
        made.fault, made._crashed = None, False
        if found == "power lost":
            chance = random.Random(seed)
            for inode in made._inodes():
                inode.lose_power(chance)
            for directory in made.directories.values():
                directory.lose_power(chance)
        return made

    def settle(self) -> FaultyFiles:
        """Everything is on disk."""
        for inode in self._inodes():
            inode.sync()
        for directory in self.directories.values():
            directory.sync()
        return self

    def content(self, path: Path) -> bytes:
        return bytes(self._inode(path).seen)

    def set_content(self, path: Path, data: bytes) -> None:
        """From outside, and on disk."""
        inode = Inode(bytearray(data), bytearray(data))
        directory = self.directories.setdefault(path.parent, Directory())
        directory.seen[path.name] = directory.synced[path.name] = inode

    def flip(self, path: Path, bit: int) -> None:
        data = bytearray(self.content(path))
        data[bit // 8] ^= 1 << bit % 8
        self.set_content(path, bytes(data))

    def names(self) -> set[str]:
        return {name for directory in self.directories.values() for name in directory.seen}

    # --- Files ---

    def make_directory(self, path: Path) -> None:
        if path not in self.directories:
            self._operation(f"make_directory {path.name}", needs_room=True)
            self.directories[path] = Directory()

    def list(self, directory: Path) -> list[str]:
        self._read()
        return list(self.directories[directory].seen) if directory in self.directories else []

    def open(self, path: Path, *, create: bool) -> FaultyFile:
        self._read()
        directory = self.directories.get(path.parent)
        if directory is None or (path.name not in directory.seen and not create):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        if path.name not in directory.seen:
            self._operation(f"create {path.name}", needs_room=True)
            directory.change(path.name, Inode())
        return FaultyFile(self, path, directory.seen[path.name], writable=create)

    def replace(self, source: Path, target: Path) -> None:
        assert source.parent == target.parent
        self._operation(f"replace {source.name} {target.name}", needs_room=True)
        inode = self._inode(source)
        self.directories[source.parent].change(target.name, inode, source.name)

    def remove(self, path: Path) -> None:
        self._operation(f"remove {path.name}")
        if self.exists(path):
            self.directories[path.parent].change(path.name, None)

    def sync_directory(self, path: Path) -> None:
        self._operation(f"sync_directory {path.name}", needs_room=True)
        self.directories[path].sync()

    def exists(self, path: Path) -> bool:
        self._read()
        return path.parent in self.directories and path.name in self.directories[path.parent].seen

    # --- inside ---

    def _inodes(self) -> Iterable[Inode]:
        found: dict[int, Inode] = {}
        for directory in self.directories.values():
            waiting = [inode for _, inode, _ in directory.journal if inode is not None]
            for inode in [*directory.synced.values(), *directory.seen.values(), *waiting]:
                found[id(inode)] = inode
        return found.values()

    def _inode(self, path: Path) -> Inode:
        if path.parent not in self.directories or path.name not in self.directories[path.parent].seen:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return self.directories[path.parent].seen[path.name]

    def _read(self) -> None:
        if self._crashed:
            raise Crash

    def _operation(
        self, name: str, half: Callable[[random.Random], None] | None = None, *, needs_room: bool = False
    ) -> None:
        """Count one, and fail in it if it is its turn: before it, or after ``half`` of it."""
        self._read()
        number, self.operations = self.operations, self.operations + 1
        self.log.append(f"{number}: {name}")
        fault = self.fault
        if fault is None or number != fault.at:
            return
        if fault.error is None:
            if fault.half and half is not None:
                half(self._chance)
            self._crashed = True
            raise Crash
        if needs_room:
            if fault.half and half is not None:
                half(self._chance)
            raise OSError(fault.error, os.strerror(fault.error))

    def _room_for(self, more_bytes: int) -> None:
        used = sum(len(inode.seen) for directory in self.directories.values() for inode in directory.seen.values())
        if self.capacity is not None and more_bytes > 0 and used + more_bytes > self.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FaultyFile:
    """An open file of a :class:`FaultyFiles`."""

    def __init__(self, disk: FaultyFiles, path: Path, inode: Inode, *, writable: bool) -> None:
        self._disk = disk
        self._path = path
        self._inode = inode
        self._writable = writable
        self._open = True

    def __enter__(self) -> FaultyFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def size(self) -> int:
        self._disk._read()
        return len(self._inode.seen)

    def read_at(self, offset: int, size: int) -> bytes:
        assert self._open
        self._disk._read()
        if self._path in self._disk.unreadable:
            raise OSError(errno.EIO, "Input/output error")
        return bytes(self._inode.seen[offset : offset + size])

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        assert self._open
        assert self._writable
        whole = bytes(data)

        def half(chance: random.Random) -> None:
            self._inode.change(offset, whole[: chance.randint(0, len(whole))])

        self._disk._operation(f"write {self._path.name} {offset}+{len(whole)}", half, needs_room=True)
        self._disk._room_for(offset + len(whole) - len(self._inode.seen))
        self._inode.change(offset, whole)

    def truncate(self, size: int) -> None:
        assert self._writable
        self._disk._operation(f"truncate {self._path.name} {size}")
        self._inode.change(size, None)

    def sync(self) -> None:
        self._disk._operation(f"sync {self._path.name}", needs_room=True)
        self._inode.sync()

    def close(self) -> None:
        self._open = False


def count_operations(disk: FaultyFiles, act: Callable[[FaultyFiles], object]) -> int:
    counted = disk.copy()
    act(counted)
    return counted.operations


def crashes(
    disk: FaultyFiles, act: Callable[[FaultyFiles], object], seeds: Sequence[int] = SEEDS
) -> Iterator[tuple[FaultyFiles, str]]:
    """The disks that are found if ``act`` on ``disk`` is cut off before, and in the middle of, each of its operations.

    And how each came to be, for the message of a test that fails.
    """
    for at in range(count_operations(disk, act)):
        for half in (False, True):
            for seed in seeds:
                cut = disk.copy()
                cut.fault, cut._chance = Fault(at, half), random.Random(seed)
                try:
                    act(cut)
                except Crash:
                    pass
                else:
                    raise AssertionError("the program went on after a crash")
                how = f"{'in' if half else 'before'} operation {cut.log[-1]!r}, seed {seed}"
                if seed == 0 or half:
                    yield cut.found_after("process killed", seed), f"process killed {how}"
                yield cut.found_after("power lost", seed), f"power lost {how}"


def losses(disk: FaultyFiles) -> Iterator[tuple[FaultyFiles, str]]:
    """The disks that are found if the power is lost now, when all calls have returned."""
    for seed in range(20):
        yield disk.found_after("power lost", seed), f"power lost at the end, seed {seed}"


def failure(disk: FaultyFiles, act: Callable[[FaultyFiles], object]) -> StorageError | None:
    """What ``act`` raised."""
    try:
        act(disk)
    except StorageError as error:
        return error
    return None


def failures(
    disk: FaultyFiles, act: Callable[[FaultyFiles], object], error: int = errno.ENOSPC
) -> Iterator[tuple[FaultyFiles, str]]:
    """Copies of ``disk`` that will fail once: before, or in the middle of, each operation of ``act`` that can."""
    for at in range(count_operations(disk, act)):
        for half in (False, True):
            failing = disk.copy()
            failing.fault, failing._chance = Fault(at, half, error), random.Random(at)
            yield failing, f"error {error} at operation {at}, half {half}"
