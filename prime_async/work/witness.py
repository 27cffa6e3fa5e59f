"""The outer state and its codec: all that a witness has, and what a node that trains has beside its trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from prime_async.config.schema import NodeSettings, RunSpec
from prime_async.errors import LocalError
from prime_async.machines.fragments import Fragments
from prime_async.work.chunks import ChunkCodec
from prime_async.work.codec import Codec, make_codec
from prime_async.work.device import set_threads
from prime_async.work.factory import build_model, model_vocabulary
from prime_async.work.inner import Span, list_spans
from prime_async.work.outer import STATE_PREFIXES, OuterState
from prime_async.work.reducers import Reducer, make_reducer, mean
from prime_async.work.threads import torch_threads
from prime_async.work.vector_workload import VectorWorkload
from prime_async.work.workload import Reduction, StepReport


class OuterWorkload(VectorWorkload):
    """The outer state of a DiLoCo run, on a node that has no model: no local weights, no data, no device.

    ``reduce``, ``check``, ``apply``, ``export_state`` and ``import_state`` may run for different chunks at once.
    ``restore``, ``end_round`` and ``end_import`` run alone; exporting goes on beside them.
    """

    def __init__(
        self,
        outer: OuterState,
        spans: Sequence[Span],
        codec: Codec,
        allocate: Callable[[int], Tensor] = torch.empty,
        mean_codec: Codec | None = None,
        reducer: Reducer = mean,
    ) -> None:
        """``spans``: where each parameter lies. ``mean_codec``: of means, if not ``codec``. ``reducer`` makes them.

        In synchronous rounds of ``outer`` it is :func:`mean`. ``allocate(n)`` makes scratch on the host, as in
        ``ChunkCodec``.
        """
        super().__init__(ChunkCodec(codec, outer.chunks, allocate, mean_codec))
        self._outer = outer
        self._spans = spans
        self._reducer = reducer

    @property
    def elements(self) -> int:
        """See :class:`Workload`, as for all methods below."""
        return self._outer.chunks.elements

    @property
    def chunk_count(self) -> int:
        return self._outer.chunks.count

    @property
    def fragments(self) -> Fragments:
        return self._outer.fragments

    @property
    def round(self) -> int:
        return self._outer.round

    def state_bytes(self, chunk: int) -> int:
        return self._outer.state_bytes(chunk)

    def train(self, steps: int, on_step: Callable[[StepReport], None]) -> None:  # noqa: ARG002
        """Raises :class:`LocalError`: there is nothing to train."""
        raise LocalError("a witness does no inner steps: set node.witness = false on a node that trains")

    def encode(self, chunk: int, out: memoryview) -> None:  # noqa: ARG002
        """Raises :class:`LocalError`: there is nothing to contribute."""
        raise LocalError("a witness contributes nothing: set node.witness = false on a node that trains")

    def reduce(
        self, chunk: int, payloads: Sequence[memoryview], weights: Sequence[int], out: memoryview, round: int
    ) -> Reduction:
        reducer = mean if self._outer.is_synchronous(round) else self._reducer
        return self._codec.reduce(chunk, payloads, weights, out, reducer)

    def apply(self, chunk: int, mean: memoryview, included: bool, own: memoryview | None = None) -> None:  # noqa: ARG002
        """Raises :class:`LocalError` if this round had one already: then nothing has changed."""
        with self._codec.work_on(chunk) as (gradient, scratch):
            self._codec.decode(mean, gradient)
            self._outer.step(chunk, gradient, scratch)

    def apply_beside(self, chunk: int, mean: memoryview, included: bool, share: float) -> None:  # noqa: ARG002
        """As ``apply``."""
        self.apply(chunk, mean, included)

    def end_round(self) -> bytes:
        return self._outer.end_round()

    def state_digest(self) -> bytes:
        """After ``round`` rounds: while the chunks of the next one are applied, that of the last one."""
        return self._outer.digest

    @property
    def spans(self) -> Sequence[Span]:
        return self._spans

    @property
    def state_prefixes(self) -> Sequence[str]:
        return STATE_PREFIXES

    def export_state(self, chunk: int) -> bytes:
        return self._outer.export_chunk(chunk)

    def chunk_digests(self) -> bytes:
        return self._outer.chunk_digests

    def import_state(self, chunk: int, data: memoryview) -> None:
        """Raises :class:`ProtocolError` if ``data`` has another size or is not finite: then nothing has changed."""
        with torch_threads(1):
            self._outer.import_chunk(chunk, data)

    def end_import(self, round: int) -> bytes:
        return self._outer.end_import(round)


def open_witness(run: RunSpec, node: NodeSettings) -> OuterWorkload:
    """The workload of a witness, with the very initial weights of the nodes that train.

    To have those, the model is built once, on the host, and dropped. Its vocabulary is ``run.vocab_size``; without
    that setting it is read from the data, so they must be here.

    Raises :class:`~prime_async.errors.ConfigError` and :class:`~prime_async.errors.DataError` for settings and files
    that do not fit.
    """
    set_threads(node.threads)
    return outer_workload(run, *flat_weights(build_model(run, model_vocabulary(run, node))))


def outer_workload(run: RunSpec, theta: Tensor, spans: Sequence[Span]) -> OuterWorkload:
    """The outer state of a run that begins with ``theta`` (n,) fp32 on the host, which is taken over."""
    codec, mean_codec = make_codec(run.exchange.codec), make_codec(run.exchange.codec_of_means)
    reducer = make_reducer(run.exchange.reduce, run.exchange.trim)
    outer = OuterState(
        theta, run.exchange.chunk_elements, run.outer, run.fragment_count, run.rounds, run.warmup_sync_steps
    )
    return OuterWorkload(outer, spans, codec, mean_codec=mean_codec, reducer=reducer)


def flat_weights(model: nn.Module) -> tuple[Tensor, list[Span]]:
    """fp32 (n,), in the order of ``InnerTrainer.flat``, and where each parameter lies in it."""
    spans = list_spans(model)
    theta = torch.empty(spans[-1].stop)
    parameters = dict(model.named_parameters())
    for span in spans:
        theta[span.start : span.stop].view(span.shape).copy_(parameters[span.name].detach())
    return theta, spans
