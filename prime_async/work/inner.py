"""The inner steps: what one node does alone between two exchanges.

What holds always: every parameter of the model is a view into ``InnerTrainer.flat``, one fp32 vector in the order of
the parameters' sorted names. Whoever writes ``flat`` between two steps has changed the model, and no copy is made.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import structlog
import torch
from blake3 import blake3
from torch import Tensor, nn

from prime_async.config.schema import RunSpec
from prime_async.errors import ConfigError
from prime_async.work.corpus import Corpus
from prime_async.work.device import Device
from prime_async.work.llama import cross_entropy, max_z
from prime_async.work.optimizer import InnerOptimizer
from prime_async.work.schedule import learning_rate, total_steps
from prime_async.work.workload import StepReport, nothing

EVALUATION_BATCHES = 32
SWAP_ELEMENTS = 2**20


class Span(NamedTuple):
    """Where a parameter lies in the flat vector."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]


class InnerTrainer:
    """A model, its data and its inner optimiser. Used by one thread at a time."""

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus,
        run: RunSpec,
        device: Device,
        stream: int,
        micro_batch_size: int = 0,
        *,
        compiled: bool = False,
    ) -> None:
        """Takes ``model`` over: moves it to ``device``, into ``flat``.

        ``stream`` in [0, 2^64) picks the node's data. ``micro_batch_size`` sequences at once; 0: the whole batch.

        Raises :class:`~prime_async.errors.ConfigError` if a parameter is not fp32.
        """
        self.model = model
        self.corpus = corpus
        self.device = device
        self.run = run
        self.stream = stream
        self.spans = list_spans(model)
        self.flat, self.gradients = flatten(model, self.spans, device)
        self.steps_done = 0
        self.steps_skipped = 0
        self._micro_batch_size = micro_batch_size or run.inner.batch_size
        self._total_steps = total_steps(run)
        self._forward: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
        self._optimizer = InnerOptimizer(model, run.inner, corpus.vocab_size)
        _warn_of_buffers(model)

    @property
    def layout_digest(self) -> bytes:
        """Of the names and shapes in their order: equal digests mean that two flat vectors can be averaged."""
        return blake3("".join(f"{span.name} {span.shape}\n" for span in self.spans).encode()).digest()

    def learning_rate(self, step: int) -> float:
        """Of inner step ``step`` of the run."""
        return learning_rate(step, self.run.inner, self._total_steps)

    def train(
        self, first_step: int, steps: int, on_step: Callable[[StepReport], None], first_batch: int | None = None
    ) -> None:
        """Inner steps ``first_step`` .. ``first_step + steps - 1`` of the run.

        A step's index alone decides its learning rate and, with the stream, its batch, unless the batches are counted
        from ``first_batch`` on. ``on_step`` is called after each, and may raise to stop there: that step is done, the
        next has not begun. A step whose loss or gradient is not finite changes nothing: it is reported with its loss,
        counted and logged.
        """
        self.model.train()
        ahead = 0 if first_batch is None else first_batch - first_step
        for step in range(first_step, first_step + steps):
            began = time.perf_counter()
            loss = self._step(step, step + ahead)
            self.steps_done += 1
            tokens = self.run.inner.batch_size * self.run.sequence_length
            on_step(StepReport(self.steps_done, loss, tokens, time.perf_counter() - began))

    def reset_optimizer(self) -> None:
        """Forget the moments, as in the first step."""
        self._optimizer.reset()

    def optimizer_state(self) -> Mapping[str, Tensor]:
        """The moments and step counts, by the name of the moment, a dot, and that of the parameter.

        Each is a copy on the host that is made when it is looked up; on a host device the tensor itself.
        """
        return _HostCopies({f"{kind}.{name}": t for name, kind, t in self._optimizer.moments()})

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> bool:
        """Take over what :meth:`optimizer_state` gave. ``False`` if it is of other parameters; nothing has changed."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            found.setdefault(name, {})[kind] = tensor
        return self._optimizer.load(found)

    def evaluate(
        self,
        batches: int | None = EVALUATION_BATCHES,
        weights: Tensor | None = None,
        on_batch: Callable[[], None] = nothing,
    ) -> float:
        """Held-out loss in nats per token of the current weights, or of ``weights``.

        ``batches`` of ``[run.inner] batch_size`` sequences, the same ones each time; None: all that is held out. Just
        after a blocking round the local weights are the outer weights: then leave ``weights`` out. Else
        ``weights`` ``(n,)`` fp32, on any device, trades places with ``flat``, piece by piece, and back when it is done,
        so that there is no second copy: meanwhile it holds the local weights, and nobody may read it. ``on_batch`` is
        called after each micro-batch, and may raise to stop there: the weights are back in their places then.
        """
        with contextlib.nullcontext() if weights is None else _swapped(self.flat, weights):
            return self._evaluate(batches, on_batch)

    def _step(self, step: int, batch: int) -> float:
        """One optimiser step; returns the loss."""
        self.gradients.zero_()
        loss = self._accumulate(batch)
        norm = torch.linalg.vector_norm(self.gradients)
        loss_value, norm_value = torch.stack((loss, norm)).tolist()  # the step's only wait for the device
        if not torch.isfinite(torch.tensor([loss_value, norm_value])).all():
            self.steps_skipped += 1
            structlog.get_logger().warning("step_skipped", step=step, loss=loss_value, gradient_norm=norm_value)
            return float(loss_value)
        clip = self.run.inner.clip_norm
        if 0 < clip < norm_value:
            self.gradients.mul_(clip / norm_value)
        self._optimizer.step(self.learning_rate(step))
        return float(loss_value)

    def _accumulate(self, batch: int) -> Tensor:
        """Add the gradients of a batch into ``gradients``; returns the cross-entropy, a scalar on the device."""
        settings = self.run.inner
        inputs, targets = self.corpus.batch(self.stream, batch, settings.batch_size, self.run.sequence_length)
        total = torch.zeros((), device=self.device.torch_device)
        for some_inputs, some_targets in self._micro_batches(inputs, targets):
            share = len(some_inputs) / len(inputs)
            with self.device.autocast():
                logits = self._logits(some_inputs)
                loss = cross_entropy(logits, some_targets)
                objective = loss + settings.max_z_loss * max_z(logits) if settings.max_z_loss else loss
            (objective * share).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() * share
        return total

    def _evaluate(self, batches: int | None, on_batch: Callable[[], None]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device.torch_device)
        tokens = 0
        self.model.eval()
        with torch.no_grad():
            for batch in islice(self.corpus.heldout(self.run.inner.batch_size, self.run.sequence_length), batches):
                for inputs, targets in self._micro_batches(*batch):
                    with self.device.autocast():
                        loss = cross_entropy(self._logits(inputs), targets)
                    total += loss.double() * targets.numel()
                    tokens += targets.numel()
                    on_batch()
        return float(total) / tokens if tokens else float("nan")

    def _micro_batches(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``(B, T)`` in pieces of at most ``(micro_batch_size, T)``, on the device."""
        size = self._micro_batch_size
        pieces = zip(torch.split(inputs, size), torch.split(targets, size), strict=True)
        return ((self.device.moved(some), self.device.moved(more)) for some, more in pieces)

    def _logits(self, inputs: Tensor) -> Tensor:
        logits = self._forward(inputs)
        wanted = (*inputs.shape, self.corpus.vocab_size)
        if logits.shape[:-1] != inputs.shape or logits.shape[-1] < wanted[-1]:
            got = f"made {tuple(logits.shape)} of tokens {tuple(inputs.shape)}"
            raise ConfigError([f'[run] model = "{self.run.model}": {got}, not logits {wanted}'])
        return logits


class _HostCopies(Mapping[str, Tensor]):
    """Tensors by name, each moved to the host when it is looked up."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu().contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def list_spans(model: nn.Module) -> list[Span]:
    """The parameters in the order of their sorted names, tied ones once, end to end.

    Raises :class:`~prime_async.errors.ConfigError` if one is not fp32, or there is none.
    """
    spans: list[Span] = []
    problems: list[str] = []
    start = 0
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dtype != torch.float32 or parameter.is_meta:
            problems.append(f"[run] model: parameter {name} is {parameter.dtype} on {parameter.device}, not float32")
        spans.append(Span(name, start, start + parameter.numel(), tuple(parameter.shape)))
        start = spans[-1].stop
    if not spans:
        problems.append("[run] model: it has no parameters")
    if problems:
        raise ConfigError([*problems, "make the model in float32: [node] precision sets what is computed with"])
    return spans


def flatten(model: nn.Module, spans: list[Span], device: Device) -> tuple[Tensor, Tensor]:
    """Move ``model`` to ``device``, its parameters and their gradients into two flat vectors, ``(n,)`` fp32 each.

    One parameter at a time, so that no second copy of the whole is needed. Autograd adds into gradients that exist,
    so they stay in place too, and one operation on the vector clips them all.
    """
    flat = device.empty(spans[-1].stop)
    gradients = torch.zeros_like(flat)
    parameters = dict(model.named_parameters())
    for span in spans:
        parameter = parameters[span.name]
        place = flat[span.start : span.stop].view(span.shape)
        place.copy_(parameter.detach())
        parameter.data = place
        parameter.grad = gradients[span.start : span.stop].view(span.shape)
    model.to(device.torch_device)  # what is left: buffers
    return flat, gradients


def _warn_of_buffers(model: nn.Module) -> None:
    """Running statistics of a batch norm, say, would differ from node to node for ever."""
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            structlog.get_logger().warning("buffer_is_not_averaged", buffer=name, shape=tuple(buffer.shape))


@contextlib.contextmanager
def _swapped(a: Tensor, b: Tensor) -> Iterator[None]:
    """``a`` and ``b``, ``(n,)`` each, hold each other's elements inside; the very bits come back."""
    _swap(a, b)
    try:
        yield
    finally:
        _swap(a, b)


def _swap(a: Tensor, b: Tensor) -> None:
    with torch.no_grad():
        for some, other in zip(torch.split(a, SWAP_ELEMENTS), torch.split(b, SWAP_ELEMENTS), strict=True):
            kept = some.clone()
            some.copy_(other)
            other.copy_(kept)
