"""The peers of the benchmark in one of its processes: an average of each in turn, timed between barriers and checked.

All processes average with a setting, or none: where one cannot, or its result is not the mean, all leave the setting
out from then on, and the report says why.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import blake3
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from prime_async.bench import data, proc
from prime_async.bench.figures import Averaged, PeerReport, Timing, WorkerSpec
from prime_async.bench.peers import GLOO
from prime_async.bench.peers.base import Group, Opened, Setting
from prime_async.work.chunks import Chunks
from prime_async.work.codec import as_bytes

LIMIT_S: Final = 100.0
"""Longer than any timeout of a peer's own: who is stuck then, is stuck for good."""
MOST_CHECKED: Final = 8
"""Chunks, by each process."""
MOST_ERROR: Final = 0.5
"""Relative to the mean. No codec of 8 bits comes near it; a vector that was not averaged is off by 1 and more."""


class Stopwatch:
    """The counters of this process and of the machine, from one barrier to the next. ``forks``: see ``Setting``."""

    def __init__(self, forks: bool = False) -> None:
        self._forks = forks
        dist.barrier()
        self._wire = proc.loopback_bytes()
        self._cpu = self._cpu_seconds()
        self.began_at = time.monotonic()

    def stop(self, ended_at: float) -> Timing:
        """Wait until all have the result."""
        dist.barrier()
        return Timing(
            began_s=self.began_at,
            ended_s=ended_at,
            cpu_s=self._cpu_seconds() - self._cpu,
            wire_bytes=proc.loopback_bytes() - self._wire,
        )

    def _cpu_seconds(self) -> float:
        forked = sum(map(proc.cpu_seconds, proc.group_members())) if self._forks else 0.0
        return time.process_time() + forked


class Contestant:
    """One setting of a peer, until it fails. ``setting``: None if it could not be opened, for ``reason``."""

    def __init__(self, name: str, setting: Setting | None, reason: str) -> None:
        self.name = name
        self.reason = reason
        self.runs: list[Averaged] = []
        self.setting = setting

    def report(self) -> PeerReport:
        return PeerReport(name=self.name, runs=self.runs, reason=self.reason)


class Contest:
    """gloo, and the peers of ``spec``, each in all its settings."""

    def __init__(self, spec: WorkerSpec, store: Store) -> None:
        """Opens the peers, but for the process group; they have forked when this returns.

        ``store``: where the processes of the benchmark leave word for each other.
        """
        self._spec = spec
        self._chunks = Chunks(spec.elements, spec.chunk_elements)
        self._contestants = [c for name in (GLOO, *spec.peers) for c in _opened(name, spec, store)]

    def turn(self, source: Tensor, values: Tensor, keep: bool) -> None:
        """Each averages ``source``, with ``values`` as room for it; both fp32 (elements,). ``keep``: it counts."""
        for contestant in self._contestants:
            self._average(contestant, source, values, keep)

    def reports(self) -> list[PeerReport]:
        return [contestant.report() for contestant in self._contestants]

    def _average(self, contestant: Contestant, source: Tensor, values: Tensor, keep: bool) -> None:
        if _any_failed(contestant):
            return
        setting = contestant.setting
        assert setting is not None
        with _limit(contestant.name), _told(contestant):
            setting.prepare(source, values)
        if _any_failed(contestant):
            return
        watch = Stopwatch(setting.forks)
        with _limit(contestant.name), _told(contestant):
            setting.average()
        timing = watch.stop(time.monotonic())
        if _any_failed(contestant):
            return
        with _told(contestant):
            averaged = self._checked(timing, setting.result())
        if not _any_failed(contestant) and keep:
            contestant.runs.append(averaged)

    def _checked(self, timing: Timing, mean: Tensor) -> Averaged:
        """Each process checks other chunks: making the exact mean of all takes longer than the exchange."""
        spec, count = self._spec, self._chunks.count
        step = spec.nodes * math.ceil(count / (spec.nodes * MOST_CHECKED))
        error = data.relative_error(mean, self._chunks, spec.nodes, range(spec.rank % count, count, step))
        if not error < MOST_ERROR:
            raise ValueError(f"its result is {error:.0%} away from the mean: it did not average")
        return Averaged(timing=timing, digest=blake3.blake3(as_bytes(mean)).hexdigest(), relative_error=error)


def _opened(name: str, spec: WorkerSpec, store: Store) -> list[Contestant]:
    directory = Path(spec.directory) / f"node-{spec.rank}" / name
    directory.mkdir()
    group = Group(
        rank=spec.rank,
        nodes=spec.nodes,
        elements=spec.elements,
        store=PrefixStore(f"peers/{name}", store),
        directory=directory,
    )
    adapter = importlib.import_module(f"prime_async.bench.peers.{name}")
    names: Sequence[str] = adapter.SETTINGS
    opened: Opened = adapter.opened
    settings: Sequence[Setting | None] = [None] * len(names)
    reason = ""
    with _limit(name):
        try:
            settings = opened(group)
        except Exception as error:
            reason = f"it could not be opened: {_said(error)}"
    return [Contestant(each, setting, reason) for each, setting in zip(names, settings, strict=True)]


@contextmanager
def _told(contestant: Contestant) -> Iterator[None]:
    """What goes wrong in the block becomes the contestant's reason: any library may raise anything."""
    try:
        yield
    except Exception as error:
        contestant.reason = _said(error)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _any_failed(contestant: Contestant) -> bool:
    """Whether it failed in any process: the same answer in all, none of whom gets it before all have asked."""
    failed = torch.tensor([1.0 if contestant.reason else 0.0])
    dist.all_reduce(failed)
    return bool(failed.item())


@contextmanager
def _limit(name: str) -> Iterator[None]:
    """End this process, and with it the benchmark, if the block takes too long: a collective cannot be cancelled."""
    timer = threading.Timer(LIMIT_S, _end_stuck, (name,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_stuck(name: str) -> None:
    print(f"{name} was stuck for {LIMIT_S:g} s: leave it out of --peers", file=sys.stderr, flush=True)
    os._exit(1)
