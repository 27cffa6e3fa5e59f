"""For tests of programs that use prime-async: whole runs in virtual time."""

from prime_async.testing.host import SimNode
from prime_async.testing.settings import SimulationSettings
from prime_async.testing.simulation import Simulation

__all__ = ["SimNode", "Simulation", "SimulationSettings"]
