"""Message logs of simulated nodes, which replay as those of real ones do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from prime_async.log import LogWriter
from prime_async.machines.vocabulary import ActorName, Effect, Event, Machine
from prime_async.testing.host import SimNode


class Recorded:
    """A machine whose calls are written down."""

    def __init__(self, actor: ActorName, machine: Machine, writer: LogWriter) -> None:
        self._actor, self._machine, self._writer = actor, machine, writer
        self._calls = 0

    def handle(self, now: float, event: Event) -> list[Effect]:
        """As the machine's own."""
        effects = self._machine.handle(now, event)
        self._writer.record(self._actor, self._calls, now, event, effects)
        self._calls += 1
        return effects


class SimRecorders:
    """The logs of a simulation: one for each process, in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._starts: Counter[str] = Counter()

    def record(self, node: SimNode) -> None:
        """From its first call on. Raises :class:`StorageError` if the log cannot be written."""
        self._starts[node.id] += 1
        count = self._starts[node.id]
        name = node.id if count == 1 else f"{node.id}-{count}"
        record(node, self._directory / f"{name}.log")


def record(node: SimNode, path: Path) -> None:
    """Write the calls of a node's machines to ``path``, from now on."""
    writer = LogWriter(path, node.id, node.settings)
    node.machines = {actor: Recorded(actor, machine, writer) for actor, machine in node.machines.items()}
