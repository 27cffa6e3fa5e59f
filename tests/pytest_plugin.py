"""How a pytest that a test runs comes to the plugin."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Final

PLUGIN: Final = "prime_async.testing.plugin"
LOADED: Final = () if any(e.value == PLUGIN for e in entry_points(group="pytest11")) else ("-p", PLUGIN)
"""Arguments: none where the package is installed with its entry point, as it is for its users."""
