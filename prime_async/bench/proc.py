"""What Linux knows of this process and of the loopback interface."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from prime_async.errors import EnvironmentFault

LOOPBACK = "lo"


def loopback_bytes() -> int:
    """Bytes that passed the loopback interface since the machine started, headers and acknowledgements included."""
    for line in _read(Path("/proc/net/dev")).splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == LOOPBACK:
            return int(counters.split()[0])
    raise EnvironmentFault(f"/proc/net/dev has no interface {LOOPBACK!r}: run this where there is one")


def resident_bytes() -> int:
    """Memory of this process now."""
    return _status("VmRSS")


def peak_bytes(pid: int | None = None) -> int:
    """The most memory that this process had since :func:`reset_peak`, or that another one had since it started."""
    return _status("VmHWM", pid)


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, in user and in system mode, since it started."""
    fields = _read(Path("/proc", str(pid), "stat")).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def group_members() -> list[int]:
    """The other processes of this process's group."""
    group, found = os.getpgrp(), []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if int(path.name) != os.getpid() and os.getpgid(int(path.name)) == group:
                found.append(int(path.name))
    return found


def reset_peak() -> None:
    """Count the peak from now on. Where the system forbids it, it counts since the process started: never less."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(key: str, pid: int | None = None) -> int:
    path = Path("/proc", str(pid or "self"), "status")
    for line in _read(path).splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise EnvironmentFault(f"{path} has no {key}: this kernel cannot tell a process's memory")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError as error:
        raise EnvironmentFault(f"{path}: {error.strerror}; the benchmark needs Linux") from error
