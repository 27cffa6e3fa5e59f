"""What must hold after every event of a simulated run, each rule with a name of its own."""

from __future__ import annotations

from collections.abc import Callable

from prime_async.machines.ballot import Ballot
from prime_async.machines.vocabulary import ActorName, Effect, Event, StoreBallot
from prime_async.messages import ChunkInfo, ChunkKey, View
from prime_async.testing.host import SimNode
from prime_async.testing.properties_of_rounds import RoundProperties
from prime_async.testing.properties_of_views import ViewProperties
from prime_async.testing.simulation import Simulation


class BrokenPropertyError(AssertionError):
    """A property does not hold. The text begins with its name, and says the seed."""


class Properties:
    """Watches a simulation from its beginning; see the two parts for the rules."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.views = ViewProperties(self._require)
        self.rounds = RoundProperties(simulation, self.views, self._require)

    def watch(self) -> Properties:
        self.simulation.observers.append(self._on_effects)
        self.simulation.disk_observers.append(self._on_disk)
        self.simulation.store.observers.append(self._on_put)
        return self

    @property
    def newest(self) -> View | None:
        """The newest view that is decided, whether anybody knows it yet or not."""
        return self.views.newest

    def _require(self, holds: bool, name: str, what: Callable[[], str]) -> None:
        if not holds:
            raise BrokenPropertyError(f"{name}: {what()}; {self.simulation.where()}")

    def _on_effects(self, node: SimNode, actor: ActorName, event: Event, effects: list[Effect]) -> None:
        self.views.on_effects(node, actor, event, effects)
        if actor != "membership":
            self.rounds.on_effects(node, actor, event, effects)
            return
        for effect in effects:
            if isinstance(effect, StoreBallot) and effect.ballot.view is not None:
                self.rounds.on_accepted(node, effect.ballot.view)

    def _on_disk(self, node: SimNode, ballot: Ballot) -> None:
        self.views.on_disk(node, ballot)
        self.rounds.on_chosen()

    def _on_put(self, node: SimNode, key: ChunkKey, info: ChunkInfo) -> None:
        self.rounds.on_put(node, key, info)
