"""What all tests have in common."""

from __future__ import annotations

from hypothesis import settings

# A deadline would be a timed test: these machines are busy at times. Failing examples print how to run them again.
settings.register_profile("prime_async", deadline=None, print_blob=True)
settings.load_profile("prime_async")
