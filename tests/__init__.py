"""The tests: `pytest` runs all but those marked long."""
