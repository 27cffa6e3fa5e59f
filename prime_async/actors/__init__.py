"""One trio task around each machine: it receives an event, calls ``handle``, and has the effects performed."""
