"""PCCL: a ring all-reduce among peers that one master brings together; of its 8-bit codecs the fastest, and fp32."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any, Final

import torch
from pccl import (
    Attribute,
    Communicator,
    DataType,
    MasterNode,
    QuantizationAlgorithm,
    QuantizationOptions,
    ReduceOp,
)
from torch import Tensor

from prime_async.bench.peers.base import TIMEOUT_S, Group, Setting
from prime_async.errors import EnvironmentFault

SETTINGS: Final = ("pccl int8 zero-point", "pccl fp32")
HOST: Final = "127.0.0.1"
POLL_S: Final = 0.02


class AllReduce:
    """The mean, from one vector to another. ``master``: on rank 0, kept while the communicator is in use."""

    forks = False

    def __init__(self, communicator: Any, codec: Any, master: Any) -> None:
        self._communicator = communicator
        self._codec = codec
        self._master = master
        self._source = self._values = torch.empty(0)

    def prepare(self, source: Tensor, values: Tensor) -> None:
        """See :class:`Setting`, as for all methods here."""
        self._source, self._values = source, values

    def average(self) -> None:
        self._communicator.all_reduce(self._source, self._values, op=ReduceOp.AVG, quantization_options=self._codec)

    def result(self) -> Tensor:
        return self._values


def opened(group: Group) -> Sequence[Setting]:
    """Rank 0 runs the master, in threads of its own; all connect to it, and order the ring."""
    master = None
    if group.rank == 0:
        address = f"{HOST}:{_free_port()}"
        master = MasterNode(listen_address=address)
        master.run()
        group.store.set("pccl", address)
    communicator = Communicator(group.store.get("pccl").decode(), 0)
    communicator.connect(n_attempts=int(TIMEOUT_S))  # a second between two
    _gather(communicator, group.nodes)
    communicator.optimize_topology()
    zero_point = QuantizationOptions(DataType.UINT8, QuantizationAlgorithm.ZERO_POINT_SCALE)
    return tuple(AllReduce(communicator, codec, master) for codec in (zero_point, None))


def _gather(communicator: Any, nodes: int) -> None:
    """Let others in until all are there."""
    deadline = time.monotonic() + TIMEOUT_S
    while (there := communicator.get_attribute(Attribute.GLOBAL_WORLD_SIZE)) < nodes:
        if time.monotonic() > deadline:
            raise EnvironmentFault(f"only {there} of {nodes} processes were connected after {TIMEOUT_S:g} s")
        if communicator.are_peers_pending():
            communicator.update_topology()
        time.sleep(POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
