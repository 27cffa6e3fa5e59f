"""The outer state: the weights that all nodes share bit for bit, their momentum, and the step that moves them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import blake3
import numpy as np
import torch
from torch import Tensor

from prime_async.config.schema import OuterSettings
from prime_async.errors import ConfigError, LocalError, ProtocolError
from prime_async.machines.fragments import Fragments
from prime_async.work.chunks import Chunks
from prime_async.work.codec import as_bytes, as_tensor

MOMENTUM_PREFIX = "momentum."
STATE_PREFIXES = ("", MOMENTUM_PREFIX)
"""Of the parameters' names in a snapshot, for the weights and for the momentum."""


class OuterState:
    """Outer weights theta and momentum m, fp32 on the host, after ``round`` outer steps.

    The outer optimiser is DiLoCo's (arXiv 2311.08105): SGD with Nesterov momentum on the mean pseudo-gradient g, in the
    form of ``torch.optim.SGD(nesterov=True)`` (Sutskever et al. 2013, as torch's documentation gives it)::

        m     <- mu * m + g
        theta <- theta - lr * (g + mu * m)

    Every multiplication and addition is rounded for itself, in fp32. torch's own step is not used: its ``alpha=`` forms
    are fused on some processors and not on others.

    ``lr`` follows ``learning_rate``; with fragments a round moves one of them, the others stay as they are.

    In the first ``sync_rounds`` rounds theta becomes the mean of the nodes' weights, ``theta - g``, and m is 0. The
    schedule of ``lr`` begins after them.

    Methods may be called from any thread. A chunk has a lock of its own: who exports it sees it before or after a step,
    never between. ``round`` and the digest change in ``end_round`` and ``end_import`` alone.

    A chunk's digest is the BLAKE3 of its exported bytes, taken right after they change, while they are in the
    cache. The digest of the whole is the BLAKE3 of the round, 8 bytes little-endian, and the chunks' digests in order.
    """

    def __init__(
        self,
        theta: Tensor,
        chunk_elements: int,
        settings: OuterSettings,
        fragments: int = 1,
        rounds: int = 0,
        sync_rounds: int = 0,
    ) -> None:
        """``theta``, fp32 (n,) on the host, is taken over and not copied. ``rounds``: where the schedule ends.

        Raises :class:`~prime_async.errors.ConfigError` if there are fewer chunks than ``fragments``.
        """
        self.chunks = Chunks(theta.numel(), chunk_elements)
        if fragments > self.chunks.count:
            raise ConfigError(
                [
                    f"[run] fragments = {fragments}: the model has {self.chunks.count} chunks: take as many fragments "
                    "at most, or a smaller exchange.chunk_elements"
                ]
            )
        self.fragments = Fragments(self.chunks.count, fragments)
        self._theta = theta
        self._momentum = torch.zeros_like(theta)
        self._settings = settings
        self._rounds = rounds
        self._sync_rounds = sync_rounds
        self._mu = float(np.float32(settings.momentum))
        self._locks = [threading.Lock() for _ in range(self.chunks.count)]
        self._digests = [self._hash(chunk) for chunk in range(self.chunks.count)]
        self._changed: set[int] = set()  # chunks stepped or imported since the round began
        self._round = 0
        self._digest = self._combine()

    @property
    def round(self) -> int:
        """Outer steps taken."""
        return self._round

    def is_synchronous(self, round: int) -> bool:
        """Whether in ``round`` the weights become the plain mean of the nodes' weights."""
        return round < self._sync_rounds

    @property
    def digest(self) -> bytes:
        """Of the state after ``round`` steps, 32 bytes; unchanged while the chunks of the next step are applied."""
        return self._digest

    def theta(self, chunk: int) -> Tensor:
        """The outer weights of ``chunk``, fp32, to read; a view."""
        return self._theta[self.chunks.span(chunk)]

    @contextmanager
    def whole_theta(self) -> Iterator[Tensor]:
        """All outer weights, fp32 (n,), the caller's alone inside: it leaves them as they were. Exports wait."""
        with self._all_locks():
            yield self._theta

    @property
    def chunk_digests(self) -> bytes:
        """Of each chunk the BLAKE3 of what :meth:`export_chunk` gives, 32 bytes; joined, in order."""
        return b"".join(self._digests)

    def step(self, chunk: int, gradient: Tensor, scratch: Tensor) -> None:
        """Move ``chunk`` along the mean pseudo-gradient, fp32 (elements of the chunk,). ``scratch``: the same size.

        Raises :class:`LocalError` if the chunk was moved before in this round: the state is then unchanged.
        """
        theta, momentum = self.theta(chunk), self._momentum[self.chunks.span(chunk)]
        with self._locks[chunk]:
            if chunk in self._changed:
                raise LocalError(f"chunk {chunk} was applied twice in round {self._round}: apply each mean once")
            self._changed.add(chunk)
            if self.is_synchronous(self._round):
                momentum.zero_()
                theta.sub_(gradient)
            else:
                momentum.mul_(self._mu)
                momentum.add_(gradient)
                torch.mul(momentum, self._mu, out=scratch)
                scratch.add_(gradient)
                scratch.mul_(self._rate)
                theta.sub_(scratch)
            self._digests[chunk] = self._hash(chunk)

    def preview(self, chunk: int, gradient: Tensor, scratch: Tensor) -> None:
        """Make of ``gradient`` the weights to which :meth:`step` would move ``chunk`` with it; nothing changes.

        Both fp32 (elements of the chunk,). Not rounded in the very order of ``step``: an estimate.
        """
        with self._locks[chunk]:
            if self.is_synchronous(self._round):
                torch.sub(self.theta(chunk), gradient, out=gradient)
                return
            torch.mul(self._momentum[self.chunks.span(chunk)], self._mu, out=scratch)
            scratch.add_(gradient).mul_(self._mu)
            gradient.add_(scratch).mul_(-self._rate).add_(self.theta(chunk))

    @property
    def _rate(self) -> float:
        """Of the round that is open, as fp32 has it."""
        round, rounds = self._round - self._sync_rounds, self._rounds - self._sync_rounds
        return float(np.float32(learning_rate(round, self._settings, rounds)))

    def end_round(self) -> bytes:
        """Count the round, once every chunk of it was moved. Returns the digest."""
        return self._close(self._round + 1, self.fragments.chunks(self._round), "apply")

    def state_bytes(self, chunk: int) -> int:
        """Size of an exported chunk."""
        return 8 * self.chunks.size(chunk)

    def export_chunk(self, chunk: int) -> bytes:
        """The chunk's theta and then its momentum, fp32 little-endian. Its BLAKE3 is the chunk's digest."""
        with self._locks[chunk]:
            return b"".join(self._views(chunk))

    def import_chunk(self, chunk: int, data: memoryview) -> None:
        """Replace the chunk by what another node exported.

        Raises :class:`ProtocolError` if the size is wrong, or a number is NaN or infinite; the chunk is then as it was.
        """
        if data.nbytes != self.state_bytes(chunk):
            raise ProtocolError(
                f"the state of chunk {chunk} has {data.nbytes} bytes instead of {self.state_bytes(chunk)}: "
                "fetch it from another member"
            )
        span, half = self.chunks.span(chunk), data.nbytes // 2
        source = as_tensor(data)
        values = source if source.data_ptr() % 4 == 0 else source.clone()
        if values.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(values.view(torch.float32)))).all()):
            raise ProtocolError(f"the state of chunk {chunk} has NaN or infinity in it: fetch it from another member")
        with self._locks[chunk]:
            self._changed.add(chunk)
            self._theta[span].view(torch.uint8).copy_(source[:half])
            self._momentum[span].view(torch.uint8).copy_(source[half:])
            self._digests[chunk] = self._hash(chunk)

    def end_import(self, round: int) -> bytes:
        """After every chunk was imported: this is the state after ``round`` rounds. Returns the digest.

        If it is at that round already, chunks that were not imported stay as they are.
        """
        return self._close(round, range(0 if round == self._round else self.chunks.count), "import")

    def _close(self, round: int, chunks: range, verb: str) -> bytes:
        missing = sum(chunk not in self._changed for chunk in chunks)
        if missing:
            raise LocalError(f"{missing} of {len(chunks)} chunks are missing: {verb} all of them first")
        self._changed.clear()
        self._round = round
        self._digest = self._combine()
        return self._digest

    @contextmanager
    def _all_locks(self) -> Iterator[None]:
        with ExitStack() as held:
            for lock in self._locks:
                held.enter_context(lock)
            yield

    def _combine(self) -> bytes:
        return blake3.blake3(b"".join([self._round.to_bytes(8, "little"), *self._digests])).digest()

    def _hash(self, chunk: int) -> bytes:
        hasher = blake3.blake3()
        for view in self._views(chunk):
            hasher.update(view)
        return hasher.digest()

    def _views(self, chunk: int) -> list[memoryview]:
        span = self.chunks.span(chunk)
        return [as_bytes(self._theta[span]), as_bytes(self._momentum[span])]


def learning_rate(round: int, settings: OuterSettings, rounds: int) -> float:
    """Of outer step ``round``, counted from 0, of ``rounds``.

    Linear warm-up from ``peak / warmup_rounds`` to the peak; then it stays, or goes down linearly to the ratio of the
    peak at ``rounds``. Additions, multiplications and divisions of doubles alone, so that every node has the same bits.
    """
    peak, warmup = settings.learning_rate, settings.warmup_rounds
    if round < warmup:
        return peak * ((round + 1) / warmup)
    if settings.schedule == "constant" or rounds <= warmup:
        return peak
    done = min(1.0, (round - warmup) / (rounds - warmup))
    return peak * (1.0 - done * (1.0 - settings.min_learning_rate_ratio))
