"""What joining and catching up cost over given links: ``python -m tests.netlab_join``, JSON lines. Needs root.

With ``--slow-down``, one provider trains on a core of its own, without sleeping, and the links and the joiner have
another: how much slower its inner steps are while the joiner fetches its state at the rate of the uplink.

With ``--missed``, a member is cut off for so many rounds, and what it fetches afterwards is counted.

(How fast a node joins: ``prime-async bench join``.)
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from prime_async.bench.netlab import Lab, Links
from tests.node_processes import merged, node_processes

if TYPE_CHECKING:
    from torch import nn

    from prime_async.config.schema import RunSpec

WIDTH = 16_384
"""Of the model by default; the environment of the nodes can say another (``--width``)."""
WIDTH_VARIABLE = "PRIME_ASYNC_JOIN_WIDTH"
PACE_S = 0.5
"""Of an inner step, long enough that the two cores of a small machine have time for four nodes and the links."""
RUN: dict[str, Any] = {
    "name": "join",
    "model": "tests.netlab_join:wide_model",
    "sequence_length": 8,
    "inner": {"batch_size": 1, "warmup_steps": 2},
    "exchange": {"chunk_elements": 1 << 18},
}


PACE_VARIABLE = "PRIME_ASYNC_JOIN_PACE_S"


def wide_model(run: RunSpec, vocab_size: int) -> nn.Module:
    """512 parameters for each unit of width, for the 256 byte tokens, whose inner steps sleep for ``PACE_S``."""
    import torch

    torch.manual_seed(run.seed)
    width = int(os.environ.get(WIDTH_VARIABLE, WIDTH))
    model = torch.nn.Sequential(torch.nn.Embedding(vocab_size, width), torch.nn.Linear(width, vocab_size, bias=False))
    pace_s = float(os.environ.get(PACE_VARIABLE, PACE_S))
    model.register_forward_pre_hook(lambda module, _: time.sleep(pace_s) if module.training else None)
    return model


async def measure_slow_down(up_mbit: float, rtt_ms: float) -> dict[str, Any]:
    links = Links(hosts=2, rate_mbit=up_mbit, delay_ms=rtt_ms / 2)
    run = merged(RUN, {"round": {"seconds": 4.0, "inner_steps": 0}, "inner": {"schedule": "constant"}})
    kept: dict[str, Any] = {"snapshot_every": 1, "keep_snapshots": 100}
    os.environ[PACE_VARIABLE] = "0"
    pin(os.getpid(), JOINERS_CORE)  # and by inheritance the links and the joiner
    with tempfile.TemporaryDirectory() as directory, Lab(links) as lab:
        async with node_processes(Path(directory), run, lab) as nodes:
            provider = await nodes.start("a", 0, **kept)
            await provider.rounds(1)
            pin(provider.process.pid, PROVIDERS_CORE)
            await provider.rounds(4)
            joiner = await nodes.start("d", 1, **kept)
            await joiner.until(lambda: joiner.told("catch_up_started") != [])
            await joiner.until(lambda: joiner.told("caught_up") != [])
            began = next(at for at, f in joiner.facts if f["type"] == "catch_up_started")
            ended = next(at for at, f in joiner.facts if f["type"] == "caught_up")
            finished = [(at, f) for at, f in provider.facts if f["type"] == "round_finished"]
    before = [f for at, f in finished if at < began][2:]
    during = [f for at, f in finished if began + 4.5 < at < ended]  # all of the round
    if not during:
        raise AssertionError("the joiner was done within a round: take a wider model, or a slower link")
    alone, beside = (sum(f["tokens"] for f in fs) / sum(f["training_s"] for f in fs) for fs in (before, during))
    return {
        "rounds_before": len(before),
        "rounds_during": len(during),
        "fetched_bytes": joiner.told("caught_up")[0]["fetched_bytes"],
        "slow_down": round(alone / beside - 1, 4),
    }


PROVIDERS_CORE, JOINERS_CORE = 0, 1


def pin(pid: int, core: int) -> None:
    """All threads of the process, and what they start, run on this core."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


async def measure_missed(missed: int) -> dict[str, Any]:
    links = Links(hosts=3, rate_mbit=100.0, delay_ms=10.0)
    run = merged(RUN, {"round": {"inner_steps": 4}, "failure_timeout_s": 2.5, "heartbeat_s": 0.5})
    kept: dict[str, Any] = {"snapshot_every": 0, "keep_rounds": 1000}
    with tempfile.TemporaryDirectory() as directory, Lab(links) as lab:
        async with node_processes(Path(directory), run, lab) as nodes:
            first, second, late = [await nodes.start(name, host, **kept) for host, name in enumerate("abc")]
            await late.rounds(2)
            lab.cut(2)
            await first.until(lambda: first.told("member_lost") != [])
            for node in (first, second):
                await node.rounds(missed)
            before = len(late.told("caught_up"))  # its joining may be one
            lab.heal()
            await late.until(lambda: len(late.told("caught_up")) > before)
            started, done = late.told("catch_up_started")[-1], late.told("caught_up")[-1]
    rounds = done["round"] - started["round"]
    return {"rounds": rounds, "fetched_bytes": done["fetched_bytes"], "seconds": done["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--up", type=float, default=40.0, help="Mbit/s of the provider")
    parser.add_argument("--rtt", type=float, default=20.0, help="ms")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the model: 512 parameters each, 4 KiB to fetch")
    parser.add_argument("--missed", type=int, nargs="*", help="rounds that a member is cut off for")
    parser.add_argument("--slow-down", type=int, default=0, help="runs that measure what a joiner costs a provider")
    args = parser.parse_args()
    os.environ[WIDTH_VARIABLE] = str(args.width)
    for _ in range(args.slow_down):
        print(json.dumps(trio.run(measure_slow_down, args.up, args.rtt)), flush=True)
    if not args.missed and not args.slow_down:
        parser.error("say what to measure: --slow-down RUNS, or --missed ROUNDS ...")
    for missed in args.missed or ():
        print(json.dumps(trio.run(measure_missed, missed)), flush=True)


if __name__ == "__main__":
    main()
