"""What taking part in a run will mean for this machine: measured, and in words."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Final

from prime_async.config.schema import Config
from prime_async.errors import EnvironmentFault
from prime_async.watch.words import size

MEASURED_STEPS: Final = 3


def prospect(config: Config) -> str:
    """Do a few inner steps, and say how long rounds will take, and what will be sent.

    Raises what opening the model and data raises; :class:`EnvironmentFault` without memory.
    """
    return _description(config, _measure_step(config))


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepSpeed:
    """Of an inner step here. ``seconds``: the median of a few, after a first one. ``parameters``: of the model."""

    seconds: float
    tokens: int
    parameters: int


def _measure_step(config: Config) -> _StepSpeed:
    import torch

    from prime_async.work.factory import open_inner_trainer
    from prime_async.work.workload import StepReport

    reports: list[StepReport] = []
    try:
        trainer = open_inner_trainer(config.run, config.node, 0)
        trainer.train(0, 1 + MEASURED_STEPS, reports.append)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EnvironmentFault(
            "an inner step needs more memory than there is: join with a smaller --micro-batch-size"
        ) from error
    seconds = statistics.median(r.seconds for r in reports[1:])
    return _StepSpeed(seconds=seconds, tokens=reports[-1].tokens, parameters=trainer.flat.numel())


def _description(config: Config, speed: _StepSpeed) -> str:
    from prime_async.work.codec import make_codec

    run = config.run
    steps = run.steps_per_round
    rounds = (
        f"{steps} inner steps, about {_duration(steps * speed.seconds)} here" if steps else f"{run.round.seconds:g} s"
    )
    if run.warmup_sync_steps:
        rounds += f" (in each of the first {run.warmup_sync_steps:,} one step)"
    payload = make_codec(run.exchange.codec).payload_bytes(-(-speed.parameters // run.fragment_count))
    tokens_per_s = speed.tokens / speed.seconds
    until = f"it ends after {run.rounds} rounds" if run.rounds else "it goes on until it is stopped"
    return (
        f"\n{run.name!r}: {speed.parameters:,} parameters, {run.model}, on {run.data}; {until}.\n"
        f"An inner step of {speed.tokens:,} tokens takes {speed.seconds:.3g} s: {tokens_per_s:,.0f} tokens/s.\n"
        f"A round is {rounds}; after it about {size(2 * payload)} are sent, and as much comes."
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
