"""What all tests have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

# A deadline would be a timed test: these machines are busy at times. Failing examples print how to run them again.
settings.register_profile("prime_async", deadline=None, print_blob=True)
settings.load_profile("prime_async")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that is called in a test lets the whole process log to the stderr of that test, which is closed."""
    yield
    structlog.reset_defaults()
