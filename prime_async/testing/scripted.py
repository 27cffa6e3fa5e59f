"""Inner steps by a script, under the real outer steps: a node that trains without a model, as fast as it is told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from prime_async.config.schema import RunSpec
from prime_async.work.codec import make_codec
from prime_async.work.device import Device
from prime_async.work.diloco import DilocoWorkload
from prime_async.work.inner import EVALUATION_BATCHES, Span
from prime_async.work.outer import OuterState
from prime_async.work.reducers import make_reducer
from prime_async.work.schedule import pace
from prime_async.work.workload import StepReport, nothing

ELEMENTS: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedStep:
    """What one inner step does: every weight moves by ``move`` (NaN: training has gone wrong), in ``seconds``.

    ``loss``, in nats per token, and ``tokens`` are what it reports.
    """

    move: float = 1.0
    loss: float = 1.0
    tokens: int = 10
    seconds: float = 0.01


class ScriptedTrainer:
    """A trainer whose steps a function decides: ``script(n)`` is the ``n``-th of this node, from 0.

    What ``script`` raises ends the step as an error of the training would. It is called in a worker thread. The weights
    are ``elements`` zeros at first, on all nodes.
    """

    def __init__(
        self, script: Callable[[int], ScriptedStep] = lambda _: ScriptedStep(), elements: int = ELEMENTS
    ) -> None:
        self.flat = torch.zeros(elements)
        self.device = Device.open("cpu", "float32")
        self.spans: Sequence[Span] = [Span("weights", 0, elements, (elements,))]
        self.steps = 0
        self._script = script

    def train(
        self,
        first_step: int,  # noqa: ARG002
        steps: int,
        on_step: Callable[[StepReport], None],
        first_batch: int | None = None,  # noqa: ARG002
    ) -> None:
        """Do the next ``steps`` steps of the script, wherever the schedule of the run is."""
        for _ in range(steps):
            step = self._script(self.steps)
            time.sleep(step.seconds)  # this is the work
            self.flat += step.move
            self.steps += 1
            on_step(StepReport(step=self.steps, loss=step.loss, tokens=step.tokens, seconds=step.seconds))

    def reset_optimizer(self) -> None:
        """There is none."""

    def optimizer_state(self) -> Mapping[str, Tensor]:
        """There is none."""
        return {}

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> bool:
        """There is none."""
        return not tensors

    def evaluate(
        self,
        batches: int | None = EVALUATION_BATCHES,  # noqa: ARG002
        weights: Tensor | None = None,  # noqa: ARG002
        on_batch: Callable[[], None] = nothing,  # noqa: ARG002
    ) -> float:
        """There is no held-out text: NaN."""
        return math.nan


def scripted_workload(run: RunSpec, trainer: ScriptedTrainer) -> DilocoWorkload:
    """What ``open_node(..., workload=...)`` takes: the run's mode, codec, reducer and outer steps, around ``trainer``.

    Raises :class:`~prime_async.errors.ConfigError` if the run has more fragments than the trainer has chunks.
    """
    exchange = run.exchange
    outer = OuterState(
        trainer.flat.clone(), exchange.chunk_elements, run.outer, run.fragment_count, run.rounds, run.warmup_sync_steps
    )
    return DilocoWorkload(
        trainer,
        outer,
        make_codec(exchange.codec),
        pace(run),
        1,
        make_codec(exchange.codec_of_means),
        reducer=make_reducer(exchange.reduce, exchange.trim),
        overlaps=run.overlaps,
        error_feedback=exchange.error_feedback,
        eager=run.mode == "eager",
    )
