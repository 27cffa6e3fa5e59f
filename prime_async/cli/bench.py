"""``prime-async bench``: how fast, against what others offer, on this machine."""

from __future__ import annotations

from cyclopts import App

from prime_async.cli.commands import add_commands

app = App(name="bench", help="Measure this program on this machine.")
add_commands(
    app,
    {
        "exchange": "bench_exchange:exchange",
        "overlap": "bench_overlap:overlap",
        "links": "bench_links:links",
        "bytes": "bench_bytes:bytes_",
        "join": "bench_join:join",
        "failover": "bench_failover:failover",
        "restart": "bench_restart:restart",
        "plan": "bench_plan:plan",
    },
)
