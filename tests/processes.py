"""What processes hold, and what they leave behind, as Linux tells it."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent


def processes_about(path: Path) -> list[str]:
    """Command lines of processes that name ``path``: what a test of this folder has left behind."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(str(path).encode() in word for word in words):
            found.append(b" ".join(words).decode(errors="replace"))
    return found


def written_by(pid: int) -> set[Path]:
    """What would outlive this process: files open to write, shared memory, sockets that have a name."""
    process = Path(f"/proc/{pid}")
    return _open_files(process) | _shared_memory(process) | _sockets(process)


def _open_files(process: Path) -> set[Path]:
    """Those that it may write to."""
    found = set()
    for place in (process / "fd").iterdir():
        try:
            path, info = place.readlink(), (process / "fdinfo" / place.name).read_text()
        except OSError:
            continue  # closed by now
        flags = next(line for line in info.splitlines() if line.startswith("flags:"))
        writes = int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
        if writes and path.is_absolute() and path != Path("/dev/null"):
            found.add(path)
    return found


def _shared_memory(process: Path) -> set[Path]:
    """Mappings that are shared, writable, and have a name."""
    fields = [line.split(maxsplit=5) for line in (process / "maps").read_text().splitlines()]
    named = [(f[1], f[5]) for f in fields if len(f) == 6 and f[5].startswith("/")]
    return {
        Path(path) for mode, path in named if mode.startswith("rw") and mode.endswith("s") and "/dev/zero" not in path
    }


def _sockets(process: Path) -> set[Path]:
    ours = {_target(place) for place in (process / "fd").iterdir()}
    fields = [line.split(maxsplit=7) for line in (process / "net" / "unix").read_text().splitlines()[1:]]
    return {Path(f[7]) for f in fields if len(f) == 8 and f[7].startswith("/") and f"socket:[{f[6]}]" in ours}


def _target(place: Path) -> str:
    """Where it points to; "" if it is closed by now."""
    try:
        return str(place.readlink())
    except OSError:
        return ""


def unused_tcp_ports(count: int) -> list[int]:
    """Of this machine, now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
