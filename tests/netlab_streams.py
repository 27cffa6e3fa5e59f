"""What several streams per peer give on a long link that loses packets: ``python -m tests.netlab_streams --help``.

Prints one JSON line for each number of streams. Needs what :mod:`prime_async.bench.netlab` needs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

import trio

from prime_async.bench.netlab import Lab, Links
from tests.netlab_worker import remote


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """Chunks that one host got from another."""

    streams: int
    rtt_ms: float
    loss_percent: float
    rate_mbit: float
    congestion: str
    payload_bytes: int
    took_s: float
    mbit_per_s: float  # of payload


async def measure(links: Links, streams: int, chunks: int, size: int, window: int = 16) -> Streamed:
    """Get ``chunks`` chunks of ``size`` bytes over ``streams`` connections, after one that opens them."""
    with Lab(links) as lab:
        async with (
            remote(lab, 0, streams=streams, window=window) as asker,
            remote(lab, 1, streams=streams) as server,
        ):
            await server.hold(chunks, size)
            await asker.dial(server)
            await asker.until_reachable(server, True)
            took_s = await asker.fetch(server, chunks, size, timeout_s=600.0)
    return Streamed(
        streams=streams,
        rtt_ms=2 * links.delay_ms,
        loss_percent=links.loss_percent,
        rate_mbit=links.rate_mbit,
        congestion=links.congestion,
        payload_bytes=chunks * size,
        took_s=round(took_s, 3),
        mbit_per_s=round(chunks * size * 8 / took_s / 1e6, 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rtt", type=float, default=100.0, help="ms")
    parser.add_argument("--loss", type=float, default=0.5, help="percent of packets")
    parser.add_argument("--rate", type=float, default=50.0, help="Mbit/s")
    parser.add_argument(
        "--congestion",
        default="reno",
        help="TCP's control of it, such as reno, cubic (where the system allows it), bbr",
    )
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--size", type=int, default=1 << 20, help="bytes of a chunk")
    parser.add_argument("--window", type=int, default=16, help="gets under way at once")
    args = parser.parse_args()
    links = Links(
        hosts=2, rate_mbit=args.rate, delay_ms=args.rtt / 2, loss_percent=args.loss, congestion=args.congestion
    )
    for streams in args.streams:
        print(json.dumps(asdict(trio.run(measure, links, streams, args.chunks, args.size, args.window))), flush=True)


if __name__ == "__main__":
    main()
