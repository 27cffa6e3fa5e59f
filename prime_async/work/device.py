"""One object behind which all that differs between a CPU and a GPU lives.

The rest of the program asks a :class:`Device` for memory, copies and the precision of the arithmetic, and never
names CUDA itself.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from prime_async.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a device, or of the host."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model trains, and in which precision it computes. Parameters are fp32 everywhere."""

    torch_device: torch.device
    autocast_dtype: torch.dtype | None  # None: compute in fp32

    @classmethod
    def open(cls, name: str = "auto", precision: Precision = "auto") -> Device:
        """The device called "auto", "cpu", "cuda" or "cuda:N".

        Raises :class:`~prime_async.errors.ConfigError` if there is no such device here.
        """
        device = _find(name)
        return cls(device, _autocast_dtype(device, precision))

    @property
    def is_cuda(self) -> bool:
        """Whether copies between it and the host take a bus, and can run behind the arithmetic."""
        return self.torch_device.type == "cuda"

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which forward passes run."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.torch_device.type, dtype=self.autocast_dtype)

    def empty(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(n,)`` elements on the device, not initialised."""
        return torch.empty(n, dtype=dtype, device=self.torch_device)

    def staging(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(n,)`` elements on the host, page-locked if that makes copies faster. Make it once and keep it."""
        return torch.empty(n, dtype=dtype, pin_memory=self.is_cuda)

    def to_host(self, src: Tensor, dst: Tensor) -> None:
        """Copy device ``src`` into host ``dst``. With pinned ``dst``: read it after :meth:`synchronize`."""
        dst.copy_(src, non_blocking=True)

    def to_device(self, src: Tensor, dst: Tensor) -> None:
        """Copy host ``src`` into device ``dst``. With pinned ``src``: leave it alone until :meth:`synchronize`."""
        dst.copy_(src, non_blocking=True)

    def add(self, src: Tensor, dst: Tensor) -> None:
        """Add host ``src`` to device ``dst``. With pinned ``src``: leave it alone until :meth:`synchronize`."""
        dst.add_(src.to(dst.device, non_blocking=True))

    def moved(self, tensor: Tensor) -> Tensor:
        """Host ``tensor`` on the device; itself where the host is the device."""
        if not self.is_cuda:
            return tensor
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until all that this thread asked of the device is done."""
        if self.is_cuda:
            torch.cuda.current_stream(self.torch_device).synchronize()

    def memory(self) -> Memory:
        """Of the device; for a CPU that of the host."""
        if not self.is_cuda:
            return host_memory()
        available, total = torch.cuda.mem_get_info(self.torch_device)
        return Memory(total, available)


def host_memory() -> Memory:
    """What this process may use: of the machine, or of its control group if that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = _meminfo_available() or total
    group = Path("/sys/fs/cgroup")
    limit, used = _read_int(group / "memory.max"), _read_int(group / "memory.current")
    if limit is not None:
        total, available = min(total, limit), min(available, max(0, limit - (used or 0)))
    return Memory(total, available)


def usable_cores() -> int:
    """Cores this process may use: its affinity, or the quota of its control group if that is less; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def set_threads(n: int) -> int:
    """Let torch use ``n`` threads in this process; 0: :func:`usable_cores`. Returns how many it is.

    More threads than cores are worse than few: nodes that share a machine should share its cores among them.
    """
    threads = n or usable_cores()
    torch.set_num_threads(threads)
    return threads


def _find(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdecimal())):
        raise ConfigError([f'[node] device = "{name}": not one of "auto", "cpu", "cuda", "cuda:N"'])
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no GPU or no driver"
        raise ConfigError([f'[node] device = "{name}": {why}; set device = "cpu", or install torch for CUDA'])
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise ConfigError([f'[node] device = "{name}": this machine has {count} GPU(s), counted from 0'])
    return torch.device("cuda", int(index or 0))


def _autocast_dtype(device: torch.device, precision: Precision) -> torch.dtype | None:
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if precision == "bfloat16" else None


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None  # not Linux
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cpu_quota() -> float | None:
    """Cores that the control group allows (cgroup v2 ``cpu.max``: "quota period", or "max period")."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _read_int(path: Path) -> int | None:
    """None where the file is absent, or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
