"""Workers that train one model together in this process, round by round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from prime_async.config.schema import NodeSettings, RunSpec
from prime_async.errors import LocalError
from prime_async.machines.account import Account
from prime_async.work.corpus import Batch, Corpus, open_shakespeare
from prime_async.work.diloco import DilocoWorkload, open_diloco
from prime_async.work.factory import open_inner_trainer
from prime_async.work.inner import EVALUATION_BATCHES
from prime_async.work.workload import StepReport

Delay: TypeAlias = Callable[[int, int], int]
"""``(worker, round)`` -> inner steps that it does between the boundary of the round and the moment at which it applies
the round's means: from 0 to those of a round. It does not do them after the last round."""


class LabError(LocalError):
    """An experiment that cannot be right: workers that should have equal outer weights have not."""


def no_delay(worker: int, round: int) -> int:  # noqa: ARG001
    """The exchange takes no time."""
    return 0


@dataclass(slots=True)
class Worker:
    """A node without its network."""

    workload: DilocoWorkload
    account: Account
    contribution: dict[int, memoryview] = field(default_factory=dict)  # the last one, by chunk

    def train(self, steps: int) -> None:
        def count(report: StepReport) -> None:
            self.account.add(1, report.tokens, report.seconds)

        if steps > 0:
            self.workload.train(steps, count)

    def contribute(self, round: int, *, beside: bool, eager: bool) -> dict[int, memoryview]:
        """The encoded contribution, by chunk."""
        chunks = self.workload.fragments.chunks(round)
        if beside and not eager:
            for chunk in chunks:
                self.workload.capture(chunk)
        payloads = {}
        for chunk in chunks:
            payloads[chunk] = memoryview(bytearray(self.workload.payload_bytes(chunk)))
            self.workload.encode(chunk, payloads[chunk])
        if eager:
            for chunk, payload in payloads.items():
                self.workload.jump(chunk, payload)
        self.account.make_offer(round)
        self.contribution = payloads
        return payloads

    def apply(self, means: dict[int, memoryview], share: float, *, beside: bool) -> bytes:
        """Take the outer step of a round in whose means this worker is, with this share of the weight.

        Returns the digest of the outer state.
        """
        for chunk, mean in means.items():
            if beside:
                self.workload.apply_beside(chunk, mean, True, share)
            else:
                self.workload.apply(chunk, mean, True, self.contribution[chunk])
        digest = self.workload.end_round()
        if beside:
            for chunk in means:
                self.workload.merge(chunk)
        self.account.use_up()
        return digest


class Team:
    """The workers of a run in any mode, with its synchronous rounds; ``run`` is as for nodes.

    They are nodes that are equally fast and never fail: the contributions to a round are those of all of them, in the
    order of ``streams``. ``rounds_late``: the means of a round are applied so many rounds later, in the place of that
    round's own, without a correction (2502.12996's "naive" delay): at each boundary the local weights are set to outer
    weights that do not have the round's progress in them yet. It needs mode ``blocking``, and is there to lose.
    """

    def __init__(
        self,
        run: RunSpec,
        streams: Sequence[int],
        *,
        delay: Delay = no_delay,
        rounds_late: int = 0,
        threads: int = 1,
        corpus: Corpus | None = None,
    ) -> None:
        """``streams``: the data of each worker. ``corpus``: in place of the one that ``run`` names."""
        node = NodeSettings(threads=threads, device="cpu")
        if rounds_late and run.overlaps:
            raise LabError(f"rounds_late goes with mode blocking, not {run.mode}")
        self.run = run
        self.round = 0
        self._delay = delay
        self._waiting: list[dict[int, memoryview]] = []
        self._rounds_late = rounds_late
        self.workers = [
            Worker(open_diloco(run, node, stream, corpus), Account(run.fragment_count)) for stream in streams
        ]

    @property
    def sent_bytes(self) -> int:
        """What the payloads of a contribution to all weights have, of one worker."""
        workload = self.workers[0].workload
        return sum(map(workload.payload_bytes, range(workload.chunk_count)))

    def rounds(self, count: int) -> Iterator[bytes]:
        """Do so many rounds more; the run ends with the last of them. Gives the digest of the outer state after each.

        Raises :class:`LabError` if the workers' outer states differ.
        """
        last = self.round + count - 1
        while self.round <= last:
            yield self._do_round(is_last=self.round == last)

    def evaluate(self, batches: int | None = EVALUATION_BATCHES) -> float:
        """Held-out loss of the outer weights, nats per token; ``None``: of all that is held out."""
        return self.workers[0].workload.evaluate(batches=batches)

    def _do_round(self, *, is_last: bool) -> bytes:
        is_synchronous = self.run.is_synchronous(self.round)
        steps = 1 if is_synchronous else self.run.steps_per_round
        beside = self.run.overlaps and not is_synchronous
        for worker in self.workers:
            worker.train(steps - worker.account.work.steps)
        eager = self.run.mode == "eager" and not is_synchronous
        contributions = [worker.contribute(self.round, beside=beside, eager=eager) for worker in self.workers]
        weights = [worker.account.weight for worker in self.workers]
        means = self._reduce(contributions, weights)
        if beside and not is_last:
            for index, worker in enumerate(self.workers):
                worker.train(self._delay(index, self.round))
        self._waiting.append(means)
        means = self._waiting.pop(0) if len(self._waiting) > self._rounds_late else self._reduce([], [])
        shares = [weight / sum(weights) for weight in weights]
        pairs = zip(self.workers, shares, strict=True)
        digests = {worker.apply(means, share, beside=beside) for worker, share in pairs}
        if len(digests) != 1:
            raise LabError(f"after round {self.round} the outer states of the workers differ")
        self.round += 1
        return digests.pop()

    def _reduce(self, contributions: list[dict[int, memoryview]], weights: list[int]) -> dict[int, memoryview]:
        """Each chunk is reduced by one of the workers, as by its owner. The mean of nothing is zero."""
        means = {}
        for chunk in self.workers[0].workload.fragments.chunks(self.round):
            workload = self.workers[chunk % len(self.workers)].workload
            out = memoryview(bytearray(workload.mean_bytes(chunk)))
            made = workload.reduce(chunk, [c[chunk] for c in contributions], weights, out, self.round)
            if made.left_out:
                raise LabError(f"in round {self.round} contributions to chunk {chunk} were not valid: {made.left_out}")
            means[chunk] = out[: made.size]
        return means


class DataParallel:
    """One model whose every step is on the batches of all workers together, with the same code for training.

    It is what synchronous workers compute that average their gradients in each step.
    """

    def __init__(self, run: RunSpec, streams: Sequence[int], *, threads: int = 1, corpus: Corpus | None = None) -> None:
        node = NodeSettings(threads=threads, device="cpu", micro_batch_size=run.inner.batch_size)
        self._corpus = _Together(corpus or open_shakespeare(run.seed), tuple(streams))
        inner = run.inner.model_copy(update={"batch_size": run.inner.batch_size * len(streams)})
        self.trainer = open_inner_trainer(run.model_copy(update={"inner": inner}), node, 0, self._corpus)
        self.step = 0

    def train(self, steps: int) -> None:
        """Raises :class:`LabError` if the weights are not finite after it."""
        self.trainer.train(self.step, steps, lambda _: None)
        self.step += steps
        if not math.isfinite(float(self.trainer.flat.sum())):
            raise LabError(f"after step {self.step} the weights are not finite")

    def evaluate(self, batches: int | None = EVALUATION_BATCHES) -> float:
        """As :meth:`Team.evaluate`."""
        return self.trainer.evaluate(batches)


class _Together(Corpus):
    """A batch has those of all streams in it, one after the other."""

    def __init__(self, corpus: Corpus, streams: tuple[int, ...]) -> None:
        self._corpus = corpus
        self._streams = streams

    @property
    def vocab_size(self) -> int:
        return self._corpus.vocab_size

    def batch(self, stream: int, step: int, batch_size: int, sequence_length: int) -> Batch:  # noqa: ARG002
        share = batch_size // len(self._streams)
        parts = [self._corpus.batch(s, step, share, sequence_length) for s in self._streams]
        return torch.cat([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts])

    def heldout(self, batch_size: int, sequence_length: int) -> Iterator[Batch]:
        return self._corpus.heldout(batch_size // len(self._streams), sequence_length)

    def encode(self, text: str) -> list[int] | None:
        return self._corpus.encode(text)

    def decode(self, tokens: Sequence[int]) -> str | None:
        return self._corpus.decode(tokens)
