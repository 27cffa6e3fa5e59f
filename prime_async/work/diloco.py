"""DiLoCo (arXiv 2311.08105): inner steps alone, outer steps on what all nodes moved in the mean.

The blocking form, as INTELLECT-1 ran it (arXiv 2412.01152): inner steps, exchange, outer step, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from prime_async.config.schema import NodeSettings, RunSpec
from prime_async.work.codec import Codec, make_codec
from prime_async.work.device import Device, usable_cores
from prime_async.work.factory import open_inner_trainer
from prime_async.work.inner import Span
from prime_async.work.outer import OuterState
from prime_async.work.schedule import Pace, pace
from prime_async.work.threads import torch_threads
from prime_async.work.witness import OuterWorkload, open_witness
from prime_async.work.workload import StepReport, Workload


class Trainer(Protocol):
    """What DiLoCo needs of the inner loop; :class:`prime_async.work.inner.InnerTrainer` is the one that trains."""

    @property
    def flat(self) -> Tensor:
        """All parameters, fp32 (n,) on the device; the model's own are views into it."""
        ...

    @property
    def device(self) -> Device:
        """Where ``flat`` lies."""
        ...

    @property
    def spans(self) -> Sequence[Span]:
        """Where each parameter lies in ``flat``."""
        ...

    def train(
        self, first_step: int, steps: int, on_step: Callable[[StepReport], None], first_batch: int | None = None
    ) -> None:
        """Do the inner steps ``first_step`` to ``first_step + steps - 1`` of the schedule.

        With the batches from ``first_batch`` on.
        """
        ...

    def reset_optimizer(self) -> None:
        """Forget the inner optimiser's moments."""
        ...

    def optimizer_state(self) -> Mapping[str, Tensor]:
        """The inner optimiser's moments and counts, on the host, by name."""
        ...

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> bool:
        """Take over what ``optimizer_state`` gave. ``False``, and nothing has changed, if it does not fit."""
        ...

    def evaluate(self, *, weights: Tensor | None = None) -> float:
        """Held-out loss, nats per token, at ``flat``, or at ``weights``, which trade places with it meanwhile."""
        ...


class DilocoWorkload(OuterWorkload):
    """A node's share of a DiLoCo run: the inner trainer, and the outer state that all nodes have in common.

    The contribution to a chunk is ``theta - x``: outer minus local weights. Applying a mean moves theta by the outer
    step, and x to theta; or, if this node's contribution is not in the mean, x by as much as theta, so that the
    progress ``x - theta`` counts in the next round. Importing a state moves x by as much as theta, too. The moments of
    the inner optimiser stay, as in the paper.

    Where an inner step is in the schedule follows the run: at the beginning of round r it is at least at r times
    ``Pace.steps``, and never goes back while there is progress. So a node that is slow, or was away, has the rate that
    the others have. Batches go on likewise, and none is given twice: not even after ``restore``, where the schedule
    begins the round again.

    ``encode``, ``reduce``, ``check``, ``apply``, ``export_state`` and ``import_state`` may run for different chunks
    at once. ``train``, ``evaluate``, ``restore``, ``end_round`` and ``end_import`` run alone; exporting goes on
    beside them.
    """

    def __init__(
        self,
        trainer: Trainer,
        outer: OuterState,
        codec: Codec,
        pace: Pace,
        threads: int,
        mean_codec: Codec | None = None,
    ) -> None:
        """``outer`` starts at the trainer's weights. ``threads``: torch threads of the inner steps.

        ``mean_codec``: of means, if not ``codec``.
        """
        super().__init__(outer, trainer.spans, codec, trainer.device.staging, mean_codec)
        self.trainer = trainer
        self._pace = pace
        self._threads = threads
        self._next_step = 0  # the schedule's, after the last one done
        self._next_batch = 0
        self._away = False  # local weights are not the outer weights
        self._kept = False  # in a chunk of this round, local progress was kept

    def train(self, steps: int, on_step: Callable[[StepReport], None]) -> None:
        def count(report: StepReport) -> None:
            self._next_step += 1
            self._next_batch += 1
            on_step(report)

        self._next_step = max(self._next_step, self.round * self._pace.steps)
        self._next_batch = max(self._next_batch, self.round * self._pace.batches)
        self._away = True
        with torch_threads(self._threads):
            self.trainer.train(self._next_step, steps, count, self._next_batch)

    def encode(self, chunk: int, out: memoryview) -> None:
        with self._codec.work_on(chunk) as (delta, _):
            torch.sub(self._outer.theta(chunk), self._on_host(chunk, delta), out=delta)
            self._codec.encode(delta, out, scratch=delta)

    def apply(self, chunk: int, mean: memoryview, included: bool) -> None:
        """Raises :class:`ProtocolError` if ``mean`` is not valid, :class:`LocalError` if this round had one already.

        Then nothing has changed.
        """
        with self._codec.work_on(chunk) as (gradient, scratch):
            self._codec.decode(mean, gradient)
            if included or not self._away:
                self._outer.step(chunk, gradient, scratch)
                self._move_local(chunk, self._outer.theta(chunk))
            else:
                self._keep_progress(chunk, lambda: self._outer.step(chunk, gradient, scratch))
                self._kept = True

    def end_round(self) -> bytes:
        digest = self._outer.end_round()
        self._away, self._kept = self._kept, False
        return digest

    def restore(self) -> None:
        for chunk in range(self.chunk_count):
            self._move_local(chunk, self._outer.theta(chunk))
        self.trainer.reset_optimizer()
        self._next_step, self._away, self._kept = 0, False, False

    def import_state(self, chunk: int, data: memoryview) -> None:
        """Raises :class:`ProtocolError` if ``data`` has another size or is not finite: then nothing has changed."""
        with torch_threads(1):
            if self._away:
                self._keep_progress(chunk, lambda: self._outer.import_chunk(chunk, data))
            else:
                self._outer.import_chunk(chunk, data)
                self._move_local(chunk, self._outer.theta(chunk))

    def inner_state(self) -> Mapping[str, Tensor]:
        return self.trainer.optimizer_state()

    def load_inner_state(self, tensors: Mapping[str, Tensor]) -> bool:
        return self.trainer.load_optimizer_state(tensors)

    def evaluate(self) -> float:
        """If the local weights are others than the outer ones, the two trade places, and exporting waits meanwhile."""
        with torch_threads(self._threads):
            if not self._away:
                return self.trainer.evaluate()
            with self._outer.whole_theta() as theta:
                return self.trainer.evaluate(weights=theta)

    def _local(self, chunk: int) -> Tensor:
        return self.trainer.flat[self._outer.chunks.span(chunk)]

    def _on_host(self, chunk: int, staging: Tensor) -> Tensor:
        """The local weights of ``chunk``, to read: copied into ``staging`` unless the host is the device."""
        if not self.trainer.device.is_cuda:
            return self._local(chunk)
        self.trainer.device.to_host(self._local(chunk), staging)
        self.trainer.device.synchronize()
        return staging

    def _move_local(self, chunk: int, weights: Tensor) -> None:
        self.trainer.device.to_device(weights, self._local(chunk))
        self.trainer.device.synchronize()

    def _keep_progress(self, chunk: int, move_theta: Callable[[], None]) -> None:
        """x <- theta' + (x - theta): where x is theta it becomes theta' itself, which x + (theta' - theta) is not.

        If ``move_theta`` raises, x stays.
        """
        with self._codec.work_on(chunk) as (progress, _):
            torch.sub(self._on_host(chunk, progress), self._outer.theta(chunk), out=progress)
            move_theta()
            self._move_local(chunk, progress.add_(self._outer.theta(chunk)))


def build_workload(run: RunSpec, node: NodeSettings, stream: int) -> Workload:
    """The workload of a node: that of a witness, or of one that trains, on data that ``stream`` picks.

    Raises :class:`~prime_async.errors.ConfigError` and :class:`~prime_async.errors.DataError` for settings and files
    that do not fit.
    """
    return open_witness(run, node) if node.witness else open_diloco(run, node, stream)


def open_diloco(run: RunSpec, node: NodeSettings, stream: int) -> DilocoWorkload:
    """The workload of a node that trains. ``stream`` in [0, 2^64) picks its data: another one for each node.

    Raises as :func:`build_workload`.
    """
    trainer = open_inner_trainer(run, node, stream)
    theta = torch.empty(trainer.flat.numel())
    trainer.device.to_host(trainer.flat, theta)
    trainer.device.synchronize()
    outer = OuterState(theta, run.exchange.chunk_elements, run.outer)
    codec, mean_codec = make_codec(run.exchange.codec), make_codec(run.exchange.codec_of_means)
    return DilocoWorkload(trainer, outer, codec, pace(run), node.threads or usable_cores(), mean_codec)
