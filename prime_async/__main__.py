"""``python -m prime_async`` is the command ``prime-async``."""

from prime_async.cli import main

main()
