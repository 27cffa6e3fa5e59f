"""What an exchange needs of whoever trains: the interface between the actors and the tensors.

:class:`prime_async.work.diloco.DilocoWorkload` is the one that trains a model; a witness has only the outer state
(:mod:`prime_async.work.witness`); the benchmark averages a plain buffer. All methods but the properties run in
worker threads, never two at once on the same chunk; none of them knows of an event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from prime_async.machines.fragments import Fragments
    from prime_async.work.inner import Span


@dataclass(frozen=True, slots=True)
class StepReport:
    """One inner step that was done."""

    step: int  # inner steps of this node since it started
    loss: float  # nats per token, mean over the step's batch
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Reduction:
    """A mean that was encoded. ``size``: bytes of it; ``left_out``: positions of contributions that were not valid."""

    size: int
    left_out: list[int]


def nothing() -> None:
    """What is done after each batch where nobody asks for more."""


class Workload(Protocol):
    """A flat vector of fp32 elements in chunks, shared by all nodes, and the local work that moves it."""

    @property
    def elements(self) -> int:
        """How long the vector is: the parameters of a model."""
        ...

    @property
    def chunk_count(self) -> int:
        """How many chunks the vector has."""
        ...

    @property
    def fragments(self) -> Fragments:
        """Which chunks a round exchanges."""
        ...

    @property
    def round(self) -> int:
        """Outer steps in the outer state."""
        ...

    def payload_bytes(self, chunk: int) -> int:
        """Size of an encoded contribution to ``chunk``."""
        ...

    def mean_bytes(self, chunk: int) -> int:
        """Size of an encoded mean of ``chunk``, at most: of a codec of means that are sparse it depends on them."""
        ...

    def usual_mean_bytes(self, chunk: int) -> int:
        """Size of a mean of ``chunk`` to reckon with, when there is none yet."""
        ...

    def state_bytes(self, chunk: int) -> int:
        """Size of the outer state of ``chunk``."""
        ...

    def train(self, steps: int, on_step: Callable[[StepReport], None]) -> None:
        """Do ``steps`` inner steps. ``on_step`` is called after each, and may raise to stop there."""
        ...

    def encode(self, chunk: int, out: memoryview) -> None:
        """Write this node's contribution to ``chunk``, ``payload_bytes(chunk)`` bytes, into ``out``.

        Raises :class:`~prime_async.errors.NonFiniteError` if an element is NaN or infinite.
        """
        ...

    def reduce(
        self, chunk: int, payloads: Sequence[memoryview], weights: Sequence[int], out: memoryview, round: int
    ) -> Reduction:
        """Write the encoded mean of ``payloads``, weighted or otherwise, into ``out``: the same bytes on every node.

        They are contributions to ``round``, which is not always the one that this node's state is at.

        ``out`` has ``mean_bytes(chunk)``; the mean may be shorter. Payloads that are not valid (wrong size, or not
        finite) are left out, and their weights do not count. With nothing left the mean is zero.
        """
        ...

    def check(self, chunk: int, payload: memoryview) -> bool:
        """Whether ``payload`` is a valid mean of ``chunk``, of the right size and finite: ``apply`` takes it."""
        ...

    def apply(self, chunk: int, mean: memoryview, included: bool, own: memoryview | None = None) -> None:
        """Take the outer step on ``chunk`` with the encoded ``mean``, and move the local weights with it.

        ``mean``: of which ``check`` is true. It is not looked at again.
        ``included``: this node's contribution, ``own`` as it was encoded, is in the mean, so its local progress is used
        up. Otherwise it is kept, for the next contribution.
        """
        ...

    def capture(self, chunk: int) -> None:
        """Note the local weights of ``chunk``, between two inner steps. ``encode`` then goes by the note.

        So it can run beside the next inner steps.
        """
        ...

    def jump(self, chunk: int, own: memoryview) -> None:
        """Instead of ``capture``, and after ``encode``: move the local weights by an estimate of the outer step.

        ``own``: what ``encode`` made. The next inner steps go on from there.
        """
        ...

    def apply_beside(self, chunk: int, mean: memoryview, included: bool, share: float) -> None:
        """As ``apply``, but beside inner steps: the local weights stay as they are until ``merge``.

        ``share``: of this node's weight in that of all who are in the mean, and it.
        """
        ...

    def merge(self, chunk: int) -> None:
        """Move the local weights of ``chunk`` as ``apply_beside`` says, between two inner steps.

        What they moved since ``capture`` they keep.
        """
        ...

    def give_up(self, chunk: int) -> None:
        """Between two inner steps: the local progress of ``chunk`` up to ``capture`` is used up, what came after stays.

        Also if the outer state was replaced since.
        """
        ...

    def take_back(self, chunk: int) -> None:
        """Between two inner steps: undo ``jump``. The contribution is local progress again, with what came after it.

        Also if the outer state was replaced since.
        """
        ...

    def end_round(self) -> bytes:
        """After ``apply`` of every chunk of the round: count it. Returns the digest of the outer state, 32 bytes."""
        ...

    def state_digest(self) -> bytes:
        """The digest of the outer state, 32 bytes: equal on two nodes if and only if all its bits are."""
        ...

    def restore(self) -> None:
        """Give up the local progress: local weights are the outer weights, the inner optimiser starts afresh."""
        ...

    @property
    def spans(self) -> Sequence[Span]:
        """Where each parameter lies in the vector. Empty: the outer state is not kept on disk."""
        ...

    @property
    def state_prefixes(self) -> Sequence[str]:
        """Of the parameters' names in a snapshot: one for each vector that an outer state has, the weights first."""
        ...

    def chunk_digests(self) -> bytes:
        """Of each chunk the BLAKE3 of what ``export_state`` gives; joined, in chunk order.

        The state's digest is the BLAKE3 of the round, 8 bytes little-endian, and of these.
        """
        ...

    def export_state(self, chunk: int) -> bytes:
        """The outer state of ``chunk``: ``state_bytes(chunk)`` bytes that ``import_state`` takes on another node."""
        ...

    def import_state(self, chunk: int, data: memoryview) -> None:
        """Replace the outer state of ``chunk``, and move the local weights as far as the outer ones: progress is kept.

        Raises :class:`~prime_async.errors.ProtocolError` if ``data`` cannot be that: then nothing has changed.
        """
        ...

    def end_import(self, round: int) -> bytes:
        """After ``import_state`` of every chunk: the outer state is that after ``round`` rounds. Returns its digest.

        At the round at which it is already, the chunks that were not imported stay as they are.
        """
        ...

    def inner_state(self) -> Mapping[str, Tensor]:
        """The inner optimiser's state to keep on disk, on the host, by name, and what else is this node's alone.

        Empty: there is none.

        A tensor may be copied from the device when it is looked up: look at one after the other.
        """
        ...

    def load_inner_state(self, tensors: Mapping[str, Tensor]) -> bool:
        """Take over what ``inner_state`` gave. ``False``, and nothing has changed, if it does not fit the model."""
        ...

    def evaluate(self, on_batch: Callable[[], None]) -> float:
        """Held-out loss of the outer weights, nats per token; NaN if the workload has none.

        ``on_batch`` is called after each batch, or part of one, and may raise to stop there: then all is as it was.
        """
        ...
