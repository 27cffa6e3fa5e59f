"""Programs that average vectors too, measured beside ours where they are installed. None is a dependency of this one.

``prime_async.bench.peers.NAME`` is the adapter of one. It imports its program when it is imported itself, has the names
of its ``SETTINGS``, and ``opened(group)`` gives them in that order (:class:`~prime_async.bench.peers.base.Setting`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from prime_async.errors import EnvironmentFault

PeerName: TypeAlias = Literal["hivemind", "pccl", "torchft"]
NAMES: Final[tuple[PeerName, ...]] = (
    "hivemind",
    "pccl",
    "torchft",
)  # hivemind first: it forks, and the others have threads
GLOO: Final = "gloo"
"""Always there: it comes with torch."""
INSTALL: Final[dict[PeerName, str]] = {
    "pccl": "pip install pypccl (what is called pccl there is another project), with Python 3.12 and glibc 2.38",
    "torchft": "pip install torchft",
    "hivemind": "pip install hivemind bitsandbytes 'numpy<2.4'",
}
IMPORT_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Choice:
    """Who is measured, and why the others are not."""

    names: tuple[PeerName, ...]
    left_out: dict[PeerName, str]


def why_not(name: PeerName) -> str:
    """Why a peer cannot be imported; empty if it can. In a process of its own: a native library may end it."""
    words = (sys.executable, "-c", f"import prime_async.bench.peers.{name}")
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"importing it takes more than {IMPORT_TIMEOUT_S:g} s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"importing it ends the process with status {done.returncode}"


def choose(asked: Sequence[PeerName | Literal["all"]], cause: Callable[[PeerName], str] = why_not) -> Choice:
    """Those that were asked for, in the order of ``NAMES``; with ``all`` those that can be imported.

    ``cause`` says why one cannot be. Raises :class:`~prime_async.errors.EnvironmentFault` if that is one that was asked
    for by its name.
    """
    causes = {name: cause(name) for name in NAMES if name in asked or "all" in asked}
    for name, reason in causes.items():
        if reason and name in asked:
            raise EnvironmentFault(
                f"--peers {name}: it cannot be imported: {reason}. Install it beside prime-async ({INSTALL[name]}), "
                "or leave it out"
            )
    return Choice(
        tuple(name for name, reason in causes.items() if not reason),
        {name: f"{reason}; {INSTALL[name]}" for name, reason in causes.items() if reason},
    )
