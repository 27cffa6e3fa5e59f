"""What all tests have in common."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog
from hypothesis import settings

if TYPE_CHECKING:
    from tests.memory_nodes import Place

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two run beside each other: of torch, before it is imported, one thread each. (Nodes set what they are told to.)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As where these run in the background of a script. Programs that are started would inherit it, and not end.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What helpers assert tells its values, too.
HERE = Path(__file__)
pytest.register_assert_rewrite(*(f"tests.{path.stem}" for path in HERE.parent.glob("[a-z]*.py") if path != HERE))

# A deadline would be a timed test: these machines are busy at times. Failing examples print how to run them again.
settings.register_profile("prime_async", deadline=None, print_blob=True)
settings.load_profile("prime_async")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that is called in a test lets the whole process log to the stderr of that test, which is closed."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    from tests.memory_nodes import Place  # and torch with it: after the number of its threads is set

    return Place(tmp_path)
