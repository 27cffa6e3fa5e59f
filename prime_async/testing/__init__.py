"""For tests: a deterministic simulation of whole runs."""

from prime_async.testing.simulation import SimNode, Simulation, SimulationSettings

__all__ = ["SimNode", "Simulation", "SimulationSettings"]
