"""For tests of programs that use prime-async.

* :class:`Simulation`: whole runs in virtual time, without network, tensors or clock; a seed decides all of chance.
* :class:`MemoryRun`: real nodes in the test's own process, over :class:`MemoryNetwork`, training by a script
  (:class:`ScriptedTrainer`): real machines, actors, ledger and outer steps, in seconds.
* The pytest plugin, which is there once prime-async is installed: the fixture ``replay_log``, and
  ``--record-failures DIRECTORY`` (:mod:`prime_async.testing.plugin`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prime_async.testing.host import SimNode
    from prime_async.testing.nodes import MemoryRun
    from prime_async.testing.scripted import ScriptedStep, ScriptedTrainer, scripted_workload
    from prime_async.testing.settings import SimulationSettings
    from prime_async.testing.simulation import Simulation
    from prime_async.transport.memory import MemoryNetwork

__all__ = [
    "MemoryNetwork",
    "MemoryRun",
    "ScriptedStep",
    "ScriptedTrainer",
    "SimNode",
    "Simulation",
    "SimulationSettings",
    "scripted_workload",
]

_HOMES = {
    "MemoryNetwork": "prime_async.transport.memory",
    "MemoryRun": "prime_async.testing.nodes",
    "ScriptedStep": "prime_async.testing.scripted",
    "ScriptedTrainer": "prime_async.testing.scripted",
    "SimNode": "prime_async.testing.host",
    "Simulation": "prime_async.testing.simulation",
    "SimulationSettings": "prime_async.testing.settings",
    "scripted_workload": "prime_async.testing.scripted",
}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: the plugin is loaded by every pytest, and must cost it nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
