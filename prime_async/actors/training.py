"""The training actor: inner steps, encoding, the outer step, in worker threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol

import trio

from prime_async.actors.auditor import Auditor
from prime_async.actors.ledger import LedgerKeeper
from prime_async.actors.store import ChunkStore
from prime_async.errors import NonFiniteError
from prime_async.machines.facts import Fact, InnerStepDone
from prime_async.machines.vocabulary import (
    Applied,
    Apply,
    Captured,
    Effect,
    Encode,
    Encoded,
    Evaluate,
    Evaluated,
    EvaluationStopped,
    Event,
    Fail,
    GiveUp,
    Merge,
    Merged,
    Restore,
    Restored,
    RunSteps,
    Save,
    Saved,
    StepsDone,
    StopEvaluation,
    StopSteps,
    TakeBack,
)
from prime_async.messages import ChunkKey, positions
from prime_async.transport.base import Chunk
from prime_async.work.workload import StepReport


class Stepping(Protocol):
    """Does inner steps in some other way than by ``Workload.train`` in a thread."""

    def begin(self) -> None:
        """Steps are asked for: ``run`` comes next."""
        ...

    async def run(self) -> StepsDone:
        """Until they are done, or, after ``stop``, as many as there are."""
        ...

    def stop(self) -> None:
        """End ``run``, which may not have begun yet."""
        ...


class _Stopped(Exception):
    """Ends ``Workload.train`` after a step, and ``Workload.evaluate`` after a batch."""


class TrainingActor:
    """Performs the effects of a training machine.

    ``inner_every``: the inner optimiser's state is written to disk every so many rounds, while the means of the round
    are waited for; 0: only when the node leaves. ``stepping``: who does the inner steps, if not the workload.
    """

    def __init__(
        self,
        keeper: LedgerKeeper,
        store: ChunkStore,
        nursery: trio.Nursery,
        post: Callable[[Event], None],
        *,
        report: Callable[[Fact], None],
        fail: Callable[[Fail], None],
        inner_every: int = 0,
        auditor: Auditor | None = None,
        stepping: Stepping | None = None,
    ) -> None:
        self._keeper = keeper
        self._tensors = keeper.tensors
        self._store = store
        self._nursery = nursery
        self._post = post
        self._report = report
        self._fail = fail
        self._inner_every = inner_every
        self._inner_lock = trio.Lock()  # held while the inner optimiser's state is used
        self._auditor = auditor
        self._stepping = stepping
        self._stop = False
        self._trainer_limiter = trio.CapacityLimiter(1)

    def perform(self, effect: Effect) -> None:
        match effect:
            case RunSteps():
                self._begin_steps(effect)
            case StopSteps():
                self._stop = True
                if self._stepping is not None:
                    self._stepping.stop()
            case Encode():
                self._nursery.start_soon(self._encode, effect)
            case Apply():
                self._nursery.start_soon(self._apply, effect)
            case Merge(round=round):
                self._nursery.start_soon(self._merge, round)
            case GiveUp(round=round):
                self._nursery.start_soon(self._put_right, round, self._tensors.workload.give_up)
            case TakeBack(round=round):
                self._nursery.start_soon(self._put_right, round, self._tensors.workload.take_back)
            case Evaluate():
                self._stop = False
                self._nursery.start_soon(self._evaluate)
            case StopEvaluation():
                self._stop = True
            case Restore():
                self._nursery.start_soon(self._restore)
            case Save():
                self._nursery.start_soon(self._save_state)
            case Fail():
                self._fail(effect)
            case _:
                raise TypeError(f"training does not perform {type(effect).__name__}")

    def _begin_steps(self, effect: RunSteps) -> None:
        self._stop = False
        if self._stepping is None:
            self._nursery.start_soon(self._run_steps, effect)
        else:
            self._stepping.begin()
            self._nursery.start_soon(self._run_other_steps, self._stepping)

    async def _run_other_steps(self, stepping: Stepping) -> None:
        async with self._inner_lock:
            done = await stepping.run()
        self._post(done)

    async def _run_steps(self, effect: RunSteps) -> None:
        """In a thread of its own. It is stopped, and cancelled, between two steps."""
        steps = tokens = 0

        def on_step(report: StepReport) -> None:
            nonlocal steps, tokens
            steps += 1
            tokens += report.tokens
            trio.from_thread.check_cancelled()  # the await below does not end before this thread does
            trio.from_thread.run_sync(self._on_step, effect.round, report)
            if self._stop and steps < effect.steps:
                raise _Stopped

        def train() -> float:
            began = time.perf_counter()
            with suppress(_Stopped):
                self._tensors.workload.train(effect.steps, on_step)
            return time.perf_counter() - began

        async with self._inner_lock:
            seconds = await trio.to_thread.run_sync(train, limiter=self._trainer_limiter)
        self._post(StepsDone(steps=steps, tokens=tokens, seconds=seconds))

    def _on_step(self, round: int, report: StepReport) -> None:
        fact = InnerStepDone(
            round=round, step=report.step, loss=report.loss, tokens=report.tokens, seconds=report.seconds
        )
        self._report(fact)

    async def _encode(self, effect: Encode) -> None:
        """Nothing is served before all is encoded, and written for an audit, if that is wanted.

        So of a contribution that is not finite no chunk gets out.
        """
        round, state_digest = effect.round, self._tensors.workload.state_digest()
        chunks: dict[int, Chunk] = {}
        if effect.beside and not effect.eager:
            await self._tensors.for_each(self._tensors.workload.capture, self._chunks(round))
            self._post(Captured(round=round))

        def encode(chunk: int) -> None:
            payload, info = self._tensors.encode(chunk)
            chunks[chunk] = Chunk(info=info, payload=payload)

        try:
            await self._tensors.for_each(encode, self._chunks(round))
            if effect.eager:
                workload = self._tensors.workload
                await self._tensors.for_each(lambda c: workload.jump(c, chunks[c].payload), self._chunks(round))
                self._post(Captured(round=round))
        except NonFiniteError:
            if effect.eager:
                self._post(Captured(round=round))
            self._post(Encoded(round=round, finite=False))
            return
        if self._auditor is not None:
            await self._auditor.write_contribution(round, chunks)
        for number, chunk in sorted(chunks.items()):
            key = ChunkKey(kind="contribution", round=round, chunk=number, attempt=effect.rejected)
            self._store.put(key, chunk)
        self._post(Encoded(round=round, finite=True))
        if self._inner_every and (round + 1) % self._inner_every == 0:
            async with self._inner_lock:
                await self._keeper.save_inner(round, state_digest)

    async def _apply(self, effect: Apply) -> None:
        """Not cancelled half-way: the outer state on disk, and at peers, is always that of a whole round."""
        self._keeper.served_round = None
        with trio.CancelScope(shield=True):
            await self._tensors.for_each(lambda chunk: self._apply_chunk(effect, chunk), self._chunks(effect.round))
            digest = await self._tensors.run(self._tensors.workload.end_round)
        self._keeper.applied(effect.round + 1)
        self._post(Applied(round=effect.round + 1, digest=digest))

    def _chunks(self, round: int) -> range:
        return self._tensors.workload.fragments.chunks(round)

    def _apply_chunk(self, effect: Apply, chunk: int) -> None:
        key = ChunkKey(kind="mean", round=effect.round, chunk=chunk)  # the settled one
        mean = self._store.find(key)
        if mean is None:
            raise RuntimeError(f"{key} was committed and is not here")
        included = effect.position in positions(mean.info.contributors)
        self._keeper.before_change(chunk)
        workload = self._tensors.workload
        if effect.beside:
            others = mean.info.total_weight - (effect.weight if included else 0)
            workload.apply_beside(chunk, mean.payload, included, effect.weight / max(1, others + effect.weight))
            return
        key = ChunkKey(kind="contribution", round=effect.round, chunk=chunk, attempt=effect.rejected)
        own = self._store.find(key) if included else None
        workload.apply(chunk, mean.payload, included, own.payload if own is not None else None)

    async def _merge(self, round: int) -> None:
        """Not cancelled half-way, as the outer step."""
        with trio.CancelScope(shield=True):
            await self._tensors.for_each(self._tensors.workload.merge, self._chunks(round))
        self._post(Merged(round=round))

    async def _put_right(self, round: int, function: Callable[[int], None]) -> None:
        await self._tensors.for_each(function, self._chunks(round))
        self._post(Restored())

    async def _evaluate(self) -> None:
        """In the thread of the inner steps. It is stopped, and cancelled, between two batches."""

        def on_batch() -> None:
            trio.from_thread.check_cancelled()
            if self._stop:
                raise _Stopped

        evaluate = partial(self._tensors.workload.evaluate, on_batch)
        try:
            loss = await trio.to_thread.run_sync(evaluate, limiter=self._trainer_limiter)
        except _Stopped:
            self._post(EvaluationStopped())
        else:
            self._post(Evaluated(loss=loss))

    async def _restore(self) -> None:
        await self._tensors.run(self._tensors.workload.restore)
        self._post(Restored())

    async def _save_state(self) -> None:
        with trio.CancelScope(shield=True):
            async with self._tensors.state_lock, self._inner_lock:
                path = await self._keeper.save()
        self._post(Saved(path=str(path or "")))
