"""DiLoCo (arXiv 2311.08105): inner steps alone, outer steps on what all nodes moved in the mean.

``blocking``, as INTELLECT-1 ran it (arXiv 2412.01152): inner steps, exchange, outer step, one after the other.
``overlapped``: the exchange runs beside the next inner steps. ``streaming``: so does that of one fragment after the
other (Streaming DiLoCo, arXiv 2501.18512).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from prime_async.config.schema import NodeSettings, RunSpec
from prime_async.errors import LocalError
from prime_async.work.codec import Codec, make_codec
from prime_async.work.corpus import Corpus
from prime_async.work.device import Device, usable_cores
from prime_async.work.factory import open_inner_trainer
from prime_async.work.inner import EVALUATION_BATCHES, Span
from prime_async.work.outer import OuterState
from prime_async.work.reducers import Reducer, make_reducer, mean
from prime_async.work.schedule import Pace, pace
from prime_async.work.threads import torch_threads
from prime_async.work.witness import OuterWorkload, open_witness
from prime_async.work.workload import StepReport, Workload, nothing

RESIDUAL = "residual"
"""Its name beside the inner optimiser's state on disk."""
RESIDUAL_DECAY = 0.95
"""Of what ``topk`` dropped, per contribution: SparseLoCo's (arXiv 2508.15706)."""


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

    def evaluate(
        self,
        batches: int | None = EVALUATION_BATCHES,
        weights: Tensor | None = None,
        on_batch: Callable[[], None] = nothing,
    ) -> float:
        """Held-out loss, nats per token, at ``flat``, or at ``weights``, which trade places with it meanwhile.

        ``on_batch`` as in :meth:`~prime_async.work.workload.Workload.evaluate`.
        """
        ...


class DilocoWorkload(OuterWorkload):
    """A node's share of a DiLoCo run: the inner trainer, and the outer state that all nodes have in common.

    With outer weights theta and local weights x, the contribution to a chunk is the pseudo-gradient ``theta - x``. The
    moments of the inner optimiser stay over a round, as in the paper.

    *One after the other* (``encode``, ``apply``): applying a mean moves theta by the outer step, and x to theta; or, if
    this node's contribution is not in the mean, x by as much as theta, so that the progress ``x - theta`` counts in the
    next round. Importing a state moves x by as much as theta, too.

    *Beside the inner steps* (``capture``, ``encode``, ``apply_beside``, ``merge``): ``capture`` notes s = x at the
    boundary of round r, the contribution is ``theta_r - s``, and x goes on to move. When the mean is there, theta takes
    the outer step, and between two inner steps x moves with it and keeps what it did meanwhile::

        x <- x + (theta_{r+1} - s)                 or, if the contribution is not in the mean,
        x <- x + (theta_{r+1} - theta_r)

    which is the delay-corrected merge: the next contribution is ``theta_{r+1} - x``, as if those inner steps had begun
    at theta_{r+1}. Where x has not moved since s it becomes theta_{r+1} itself, which in fp32 the sum is not: without a
    delay this is the blocking form, bit for bit. The note takes 4 bytes for each parameter of the largest fragment, on
    the host: it holds s, then the contribution, and then by how much x is to move.

    *Eager* (2502.12996, "eager updates"; ``encode``, ``jump``, ``apply_beside``, ``merge``): an exchange may take the
    whole next round, for the local weights do not wait for it. The node's own contribution c_r is fresh, those of the
    others are in the last mean, g_{r-1}, in which its own, c_{r-1}, had the share w::

        g = g_{r-1} + w (c_r - c_{r-1})            or, if c_{r-1} was not in it,
        g = g_{r-1} + w (c_r - g_{r-1})            and in the first round g = c_r
        x, s <- outer step from theta_r with g

    and from s the next inner steps go on. When the mean of round r is there, x moves by ``theta_{r+1} - s`` as above.
    So the outer weights are moved by means alone, and are equal on all nodes; the estimate is local, and what it was
    wrong by is put right, also where means are no plain averages (``run.exchange.reduce``), as the estimate takes them
    to be. It takes three bytes a parameter more, with int8, for g_{r-1}, c_{r-1} and c_r.

    *With error feedback* (arXiv 1901.09847), without a buffer for it: where the contribution c that was decoded from
    what was encoded differs from ``theta_r - s``, the difference stays in x, as progress that was not counted: s is
    ``theta_r - c`` in the two equations. So it enters the next contribution.

    ``topk`` drops nearly all. Were that left in x, the nodes would part from each other, and train alone: in a short
    run that was worse than no feedback. So there it goes from x into a residual e, 4 bytes a parameter on the host, as
    SparseLoCo has it (arXiv 2508.15706), with its decay b::

        c = encode(b e + (theta_r - s))
        e <- b e + (theta_r - s) - c

    and the progress that was contributed is c, no more: it stays in x where c is not in the mean. The residual is kept
    on disk with the inner optimiser's state: where a node goes on with that, it goes on with what was dropped, too.

    *By fragments*: all of this for the chunks of one fragment in each round; x moves on in the others meanwhile. A
    fragment is exchanged every ``fragments.count`` rounds.

    *In the first rounds of ``run.warmup_sync_steps``* the form is that of one after the other, whatever comes later.
    Each is one inner step, after which all nodes have the mean of their weights. With plain SGD and without clipping
    that is data-parallel training, to rounding (and what the codec drops). With AdamW or Muon it is not quite: each
    node goes by the moments of its own gradients, which it keeps, and clips by their norm.

    Where an inner step is in the schedule follows the run: at the beginning of round r it is at least where
    ``Pace.at(r)`` says, and never goes back while there is progress. So a node that is slow, or was away, has the rate
    that the others have. Batches go on likewise, and none is given twice: not even after ``restore``, where the
    schedule begins the round again.

    ``encode`` after ``capture``, ``reduce``, ``check``, ``apply_beside`` and ``export_state`` may run beside ``train``.
    All methods of a chunk may run for different chunks at once. ``train``, ``evaluate``, ``restore`` run alone, and
    ``end_round`` and ``end_import`` without any that changes the outer state; exporting goes on beside them.
    """

    def __init__(
        self,
        trainer: Trainer,
        outer: OuterState,
        codec: Codec,
        pace: Pace,
        threads: int,
        mean_codec: Codec | None = None,
        *,
        reducer: Reducer = mean,
        overlaps: bool = False,
        error_feedback: bool = False,
        eager: bool = False,
    ) -> None:
        """``outer`` starts at the trainer's weights. ``threads``: torch threads of the inner steps.

        ``mean_codec``: of means, if not ``codec``. ``reducer`` makes them. ``overlaps``: there is to be a ``capture``,
        or, ``eager``, a ``jump``.
        """
        super().__init__(outer, trainer.spans, codec, trainer.device.staging, mean_codec, reducer)
        self.trainer = trainer
        self._pace = pace
        self._threads = threads
        self._next_step = 0  # the schedule's, after the last one done
        self._next_batch = 0
        self.note_elements = self._most_elements() if overlaps else 0
        self._notes = trainer.device.staging(self.note_elements)
        has_residual = error_feedback and codec.name == "topk"
        self._residual = torch.zeros(outer.chunks.elements) if has_residual else None
        self._feeds_back = error_feedback and not has_residual
        self._sent: dict[int, bytes] = {}  # by chunk that was captured: our contribution, if there is a residual
        self._moves = 0  # of the local weights by inner steps; 0 at the beginning, when they are the outer ones
        self._equal_at = [0] * self.chunk_count  # by chunk: after this many the local weights were the outer ones
        self._captured_at: dict[int, int] = {}  # by chunk: after so many they were noted
        self._included: dict[int, bool] = {}  # by chunk that is to be merged
        self._jumped: dict[int, bytes] = {}  # by chunk that was moved by an estimate: our contribution
        # By chunk: the last mean, our contribution if it is in it, and our share of the weight.
        self._last: dict[int, tuple[bytes, bytes | None, float]] = {}
        self._is_eager = eager

    def train(self, steps: int, on_step: Callable[[StepReport], None]) -> None:
        def count(report: StepReport) -> None:
            self._moves += 1
            self._next_step += 1
            self._next_batch += 1
            on_step(report)

        first_step, first_batch = self._pace.at(self.round)
        self._next_step = max(self._next_step, first_step)
        self._next_batch = max(self._next_batch, first_batch)
        self._moves += 1  # also if the first step ends in an error
        with torch_threads(self._threads):
            self.trainer.train(self._next_step, steps, count, self._next_batch)

    def capture(self, chunk: int) -> None:
        note = self._note(chunk)
        self._recall(chunk)
        with torch_threads(1):
            self.trainer.device.to_host(self._local(chunk), note)
            self.trainer.device.synchronize()
        self._captured_at[chunk] = self._moves

    def encode(self, chunk: int, out: memoryview) -> None:
        """Once after each ``capture``, if there was one."""
        with self._codec.work_on(chunk) as (delta, scratch):
            if chunk in self._captured_at:
                note = self._note(chunk)
                torch.sub(self._outer.theta(chunk), note, out=note)
                if self._residual is not None:
                    self._encode_with_residual(chunk, note, out, scratch)
                    self._sent[chunk] = bytes(out)
                    return
                self._codec.encode(note, out, scratch=scratch)
                if self._feeds_back:
                    self._codec.decode_contribution(out, note)
            else:
                torch.sub(self._outer.theta(chunk), self._on_host(chunk, delta), out=delta)
                if self._residual is not None:
                    self._encode_with_residual(chunk, delta, out, scratch)
                    self._move_local(chunk, torch.sub(self._outer.theta(chunk), scratch, out=scratch))
                    self._equal_at[chunk] = -1  # also if no inner step was done since it was
                    return
                self._codec.encode(delta, out, scratch=delta)

    def _encode_with_residual(self, chunk: int, progress: Tensor, out: memoryview, scratch: Tensor) -> None:
        """Encode ``progress`` and the residual, which then is what was dropped. ``scratch``: what was not."""
        assert self._residual is not None
        residual = self._residual[self._outer.chunks.span(chunk)]
        torch.mul(residual, RESIDUAL_DECAY, out=scratch)
        scratch.add_(progress)
        self._codec.encode(scratch, out, scratch=scratch)
        residual.copy_(scratch)
        self._codec.decode_contribution(out, scratch)
        residual.sub_(scratch)

    def _recall(self, chunk: int) -> None:
        """A contribution that came to nothing: all of its progress is still in x, so none of it is in the residual."""
        own = self._sent.pop(chunk, None)
        if own is None:
            return
        assert self._residual is not None
        with self._codec.work_on(chunk) as (counted, _):
            self._codec.decode_contribution(memoryview(own), counted)
            self._residual[self._outer.chunks.span(chunk)].add_(counted).sub_(self._note(chunk))

    def apply(self, chunk: int, mean: memoryview, included: bool, own: memoryview | None = None) -> None:
        """Raises :class:`LocalError` if this round had one already: then nothing has changed.

        With error feedback ``own`` must be there if ``included``: else :class:`LocalError`.
        """
        if included and self._feeds_back and own is None:
            raise LocalError(f"chunk {chunk}: what this node contributed is not here, so what it lacks is not known")
        with self._codec.work_on(chunk) as (gradient, scratch):
            self._codec.decode(mean, gradient)
            if included and self._feeds_back:
                assert own is not None
                self._keep_progress(chunk, lambda: self._outer.step(chunk, gradient, scratch), own)
            elif included or self._is_equal(chunk):
                self._outer.step(chunk, gradient, scratch)
                self._become_equal(chunk)
            else:
                self._keep_progress(chunk, lambda: self._outer.step(chunk, gradient, scratch))

    def jump(self, chunk: int, own: memoryview) -> None:
        note, theta, span = self._note(chunk), self._outer.theta(chunk), self._outer.chunks.span(chunk)
        with self._codec.work_on(chunk) as (estimate, scratch):
            self._estimate(chunk, own, estimate, scratch)
            self._outer.preview(chunk, estimate, scratch)
            torch.sub(theta, estimate, out=note)
            if self._feeds_back:  # what was not encoded stays
                self._codec.decode_contribution(own, scratch)
                scratch.add_(self._on_host(chunk, torch.empty_like(scratch))).sub_(theta)
                estimate.add_(scratch)
            self.trainer.device.to_device(estimate, self.trainer.flat[span])
            self.trainer.device.synchronize()
        self._captured_at[chunk] = self._moves
        self._equal_at[chunk] = -1  # also if no inner step was done since it was
        self._jumped[chunk] = bytes(own)

    def _estimate(self, chunk: int, own: memoryview, out: Tensor, scratch: Tensor) -> None:
        """The mean pseudo-gradient of this round, as far as this node can know it before the exchange."""
        last = self._last.get(chunk)
        if last is None:
            self._codec.decode_contribution(own, out)
            return
        mean, part, share = last
        self._codec.decode_contribution(own, out)
        if part is None:
            self._codec.decode(memoryview(mean), scratch)
            out.sub_(scratch).mul_(share).add_(scratch)
            return
        self._codec.decode_contribution(memoryview(part), scratch)
        out.sub_(scratch).mul_(share)
        self._codec.decode(memoryview(mean), scratch)
        out.add_(scratch)

    def apply_beside(self, chunk: int, mean: memoryview, included: bool, share: float) -> None:
        """Raises :class:`LocalError` if this round had one already, or ``included`` and there was no ``capture``."""
        if included and chunk not in self._captured_at:
            raise LocalError(f"chunk {chunk} has no contribution that could be in its mean: capture it first")
        note, theta = self._note(chunk), self._outer.theta(chunk)
        with self._codec.work_on(chunk) as (gradient, scratch):
            self._codec.decode(mean, gradient)
            own, sent = self._jumped.pop(chunk, None), self._sent.pop(chunk, None)
            if included or own is not None:
                note.sub_(theta)  # -s
            elif sent is not None:  # what was dropped is in the residual
                self._codec.decode_contribution(memoryview(sent), scratch)
                note.sub_(scratch).sub_(theta)
            else:
                torch.neg(theta, out=note)
            self._outer.step(chunk, gradient, scratch)
            note.add_(theta)
            if own is not None and not included:
                self._codec.decode_contribution(memoryview(own), scratch)
                note.sub_(scratch)
        self._included[chunk] = included
        if self._is_eager:
            self._last[chunk] = bytes(mean), own if included else None, share

    def merge(self, chunk: int) -> None:
        """Raises :class:`LocalError` if there was no ``apply_beside``."""
        if chunk not in self._included:
            raise LocalError(f"chunk {chunk} has no mean to move with: apply it first")
        included, captured_at = self._included.pop(chunk), self._captured_at.pop(chunk, None)
        is_used_up = captured_at == self._moves and not self._feeds_back
        was_equal = is_used_up if included else self._is_equal(chunk)
        self._move_by_note(chunk, to_theta=was_equal)

    def give_up(self, chunk: int) -> None:
        """Raises :class:`LocalError` if there was no ``capture``."""
        if chunk not in self._captured_at:
            raise LocalError(f"chunk {chunk} has no contribution to give up")
        is_used_up = self._captured_at.pop(chunk) == self._moves and not self._feeds_back
        self._jumped.pop(chunk, None)
        self._sent.pop(chunk, None)
        self._move_by_note(chunk, to_theta=is_used_up)

    def take_back(self, chunk: int) -> None:
        """Raises :class:`LocalError` if there was no ``jump``."""
        if chunk not in self._jumped:
            raise LocalError(f"chunk {chunk} has no contribution to take back")
        with self._codec.work_on(chunk) as (contribution, _):
            self._codec.decode_contribution(memoryview(self._jumped.pop(chunk)), contribution)
            self._note(chunk).sub_(contribution)
        del self._captured_at[chunk]
        self._move_by_note(chunk, to_theta=False)

    def restore(self) -> None:
        for chunk in range(self.chunk_count):
            self._become_equal(chunk)
        self.trainer.reset_optimizer()
        self._next_step = 0
        self._captured_at.clear()
        self._included.clear()
        self._jumped.clear()
        self._sent.clear()
        if self._residual is not None:
            self._residual.zero_()

    def import_state(self, chunk: int, data: memoryview) -> None:
        """Raises :class:`ProtocolError` if ``data`` has another size or is not finite: then nothing has changed."""
        with torch_threads(1):
            if self._is_equal(chunk):
                self._outer.import_chunk(chunk, data)
                self._become_equal(chunk)
            else:
                self._keep_progress(chunk, lambda: self._outer.import_chunk(chunk, data))

    def inner_state(self) -> Mapping[str, Tensor]:
        moments = self.trainer.optimizer_state()
        return moments if self._residual is None else _WithResidual(moments, self._residual)

    def load_inner_state(self, tensors: Mapping[str, Tensor]) -> bool:
        """With ``topk`` and error feedback it fits only if the residual is in it."""
        found = tensors.get(RESIDUAL)
        shapes = [None if tensor is None else tensor.shape for tensor in (found, self._residual)]
        moments = {name: tensor for name, tensor in tensors.items() if name != RESIDUAL}
        if shapes[0] != shapes[1] or not self.trainer.load_optimizer_state(moments):
            return False
        if found is not None and self._residual is not None:
            self._residual.copy_(found)
        return True

    def evaluate(self, on_batch: Callable[[], None] = nothing, *, batches: int | None = EVALUATION_BATCHES) -> float:
        """Of so many ``batches``, or with ``None`` of all that is held out.

        If the local weights are others than the outer ones, the two trade places, and exporting waits meanwhile.
        """
        with torch_threads(self._threads):
            if all(map(self._is_equal, range(self.chunk_count))):
                return self.trainer.evaluate(batches, on_batch=on_batch)
            with self._outer.whole_theta() as theta:
                return self.trainer.evaluate(batches, theta, on_batch)

    def _most_elements(self) -> int:
        """Of one fragment."""
        fragments = map(self.fragments.chunks, range(self.fragments.count))
        return max(sum(map(self._outer.chunks.size, chunks)) for chunks in fragments)

    def _note(self, chunk: int) -> Tensor:
        """There is one for the chunks of one fragment: no two are exchanged at once."""
        first = self.fragments.chunks(self.fragments.holding(chunk))[0]
        start = (chunk - first) * self._outer.chunks.chunk_elements
        return self._notes[start : start + self._outer.chunks.size(chunk)]

    def _local(self, chunk: int) -> Tensor:
        return self.trainer.flat[self._outer.chunks.span(chunk)]

    def _on_host(self, chunk: int, staging: Tensor) -> Tensor:
        """The local weights of ``chunk``, to read: copied into ``staging`` unless the host is the device."""
        if not self.trainer.device.is_cuda:
            return self._local(chunk)
        self.trainer.device.to_host(self._local(chunk), staging)
        self.trainer.device.synchronize()
        return staging

    def _is_equal(self, chunk: int) -> bool:
        """Whether the local weights are, bit for bit, the outer ones."""
        return self._equal_at[chunk] == self._moves

    def _become_equal(self, chunk: int) -> None:
        self._move_local(chunk, self._outer.theta(chunk))
        self._equal_at[chunk] = self._moves

    def _move_local(self, chunk: int, weights: Tensor) -> None:
        self.trainer.device.to_device(weights, self._local(chunk))
        self.trainer.device.synchronize()

    def _move_by_note(self, chunk: int, *, to_theta: bool) -> None:
        """By what is noted; ``to_theta``: that leads to the outer weights, so these are taken."""
        with torch_threads(1):
            if to_theta:
                self._become_equal(chunk)
            else:
                self.trainer.device.add(self._note(chunk), self._local(chunk))
                self.trainer.device.synchronize()

    def _keep_progress(self, chunk: int, move_theta: Callable[[], None], own: memoryview | None = None) -> None:
        """x <- theta' + (x - theta), without what is in ``own``. If ``move_theta`` raises, x stays."""
        with self._codec.work_on(chunk) as (progress, counted):
            torch.sub(self._on_host(chunk, progress), self._outer.theta(chunk), out=progress)
            if own is not None:
                self._codec.decode_contribution(own, counted)
                progress.add_(counted)  # a contribution is theta - x
            move_theta()
            self._move_local(chunk, progress.add_(self._outer.theta(chunk)))


class _WithResidual(Mapping[str, Tensor]):
    """Moments, each still copied only when it is looked up, and the residual."""

    def __init__(self, moments: Mapping[str, Tensor], residual: Tensor) -> None:
        self._moments = moments
        self._residual = residual

    def __getitem__(self, name: str) -> Tensor:
        return self._residual if name == RESIDUAL else self._moments[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._moments
        yield RESIDUAL

    def __len__(self) -> int:
        return len(self._moments) + 1


def build_workload(run: RunSpec, node: NodeSettings, stream: int) -> Workload:
    """The workload of a node: that of a witness, or of one that trains, on data that ``stream`` picks.

    Raises :class:`~prime_async.errors.ConfigError` and :class:`~prime_async.errors.DataError` for settings and files
    that do not fit.
    """
    return open_witness(run, node) if node.witness else open_diloco(run, node, stream)


def open_diloco(run: RunSpec, node: NodeSettings, stream: int, corpus: Corpus | None = None) -> DilocoWorkload:
    """The workload of a node that trains. ``stream`` in [0, 2^64) picks its data: another one for each node.

    ``corpus``: in place of the one of the settings. Raises as :func:`build_workload`.
    """
    trainer = open_inner_trainer(run, node, stream, corpus)
    theta = torch.empty(trainer.flat.numel())
    trainer.device.to_host(trainer.flat, theta)
    trainer.device.synchronize()
    outer = OuterState(
        theta, run.exchange.chunk_elements, run.outer, run.fragment_count, run.rounds, run.warmup_sync_steps
    )
    codec, mean_codec = make_codec(run.exchange.codec), make_codec(run.exchange.codec_of_means)
    threads = node.threads or usable_cores()
    return DilocoWorkload(
        trainer,
        outer,
        codec,
        pace(run),
        threads,
        mean_codec,
        reducer=make_reducer(run.exchange.reduce, run.exchange.trim),
        overlaps=run.overlaps,
        error_feedback=run.exchange.error_feedback,
        eager=run.mode == "eager",
    )
