"""Where a node's figures go beside its own page: TensorBoard, Weights & Biases, trackio, each if it is installed.

A sink has two verbs. It runs in a thread of its own, behind a queue of bounded length: one that is slow misses figures,
one that fails is let go, and neither holds up the training.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import structlog
import trio

from prime_async.errors import ConfigError
from prime_async.machines.facts import Fact, HeldOutLoss, InnerStepDone, RoundFinished

QUEUED_FIGURES = 4096
BATCH_S = 0.5
LAST_WRITE_S = 5.0

log = structlog.get_logger(__name__)


class Sink(Protocol):
    """Called by one thread at a time."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Finite values at an inner step of this node. Steps never go back."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


class TensorBoardSink:
    """Event files in ``folder``, for ``tensorboard --logdir``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(folder), flush_secs=10)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A run in ``project`` of Weights & Biases; where it goes, WANDB_MODE and the like say."""

    def __init__(self, project: str, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(project=project, name=name, config=dict(settings), reinit="create_new")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioSink:
    """A run in ``project`` of trackio, which is a database on this machine."""

    def __init__(self, project: str, name: str, settings: Mapping[str, Any]) -> None:
        import trackio

        self._trackio: Any = trackio
        self._run: Any = trackio.init(project=project, name=name, config=dict(settings), embed=False)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def open_sink(text: str, name: str, settings: Mapping[str, Any], base: Path) -> Sink:
    """The sink that a setting names, such as "tensorboard:logs"; a relative folder is one of ``base``.

    Raises :class:`ConfigError` if its package is not installed.
    """
    kind, _, target = text.partition(":")
    try:
        match kind:
            case "tensorboard":
                return TensorBoardSink(base / target / name)
            case "wandb":
                return WandbSink(target, name, settings)
            case _:
                return TrackioSink(target, name, settings)
    except ImportError as error:
        raise ConfigError([f'node.sinks: "{text}" needs a package: `pip install {kind}` ({error})']) from error


class Feeder:
    """Turns facts into figures, and gives them to a sink."""

    def __init__(self, name: str, open: Callable[[], Sink], steps_before: int = 0) -> None:
        self.name = name
        self.missed = 0
        self._open = open
        self._steps = self._steps_before = steps_before
        self._queue: deque[tuple[int, dict[str, float]]] = deque()
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Figures that are queued."""
        return len(self._queue)

    def add(self, fact: Fact) -> None:
        """Queue what ``fact`` has for it."""
        values: dict[str, float] = {}
        match fact:
            case InnerStepDone(step=step, loss=loss, tokens=tokens, seconds=seconds):
                self._steps = max(self._steps, self._steps_before + step)
                values = {"train/loss": loss, "train/tokens_per_second": tokens / seconds if seconds else math.nan}
            case HeldOutLoss(loss=loss, round=round):
                values = {"heldout/loss": loss, "heldout/round": float(round)}
            case RoundFinished(round=round, tokens=tokens, training_s=training_s, exchange_s=exchange_s):
                values = {"round/number": float(round), "round/tokens": float(tokens)}
                values |= {"round/training_seconds": training_s, "round/exchange_seconds": exchange_s}
            case _:
                return
        finite = {k: v for k, v in values.items() if math.isfinite(v)}
        if len(self._queue) == QUEUED_FIGURES:
            self.missed += 1
        elif finite:
            self._queue.append((self._steps, finite))

    async def run(self) -> None:
        """Until cancelled; then what is queued is written, for a few seconds at most."""
        try:
            sink = await trio.to_thread.run_sync(self._open, abandon_on_cancel=True)
        except Exception as error:  # a library of others: it may fail with anything, and training goes on
            log.error("sink_failed", sink=self.name, error=str(error))
            return
        try:
            while True:
                await trio.sleep(BATCH_S)
                if not await self._write(sink):
                    return
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + LAST_WRITE_S):
                if await self._write(sink):
                    await self._do(sink.close)

    async def _write(self, sink: Sink) -> bool:
        batch = tuple(self._queue)
        self._queue.clear()

        def write() -> None:
            for step, values in batch:
                sink.write(step, values)

        return not batch or await self._do(write)

    async def _do(self, work: Callable[[], None]) -> bool:
        """In a thread. One that is abandoned goes on, and the next waits for it: a sink has one thread at a time."""

        def alone() -> None:
            with self._lock:
                work()

        try:
            await trio.to_thread.run_sync(alone, abandon_on_cancel=True)
        except Exception as error:  # as above
            log.error("sink_failed", sink=self.name, error=str(error))
            self._queue.clear()
            return False
        return True
