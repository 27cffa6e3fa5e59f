"""``prime-async simulate``: what a run of many nodes says to each other, counted in virtual time."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from prime_async.cli.options import Count
from prime_async.testing.scale import Load, Scale, measure_scale

FACTOR = 10


def simulate(
    *,
    nodes: Annotated[int, Parameter(validator=Number(gte=2))] = 100,
    rounds: Count = 3,
    seed: int = 1,
) -> int:
    """Count the control messages of a run of this many nodes, and of runs a tenth and a hundredth of its size.

    The real machines of all nodes, on a simulated network: no weights, no sockets, no waiting. Rounds of 20 s, as many
    chunks as nodes. A thousand nodes take some minutes.

    Parameters
    ----------
    nodes
        Of the largest run.
    rounds
        To count through, after everybody has joined.
    seed
        Decides what chance decides.
    """
    console = Console(highlight=False)
    measured: list[Scale] = []
    for size in sizes_up_to(nodes):
        began = time.monotonic()
        measured.append(measure_scale(size, rounds, seed=seed))
        console.print(f"{size} nodes: {rounds} rounds simulated in {time.monotonic() - began:.1f} s")
    console.print(table_of(measured))
    console.print(growth_of(measured))
    return 0


def sizes_up_to(nodes: int) -> list[int]:
    """``nodes``, a tenth of it, and so on down to about ten, the smallest first."""
    sizes = [nodes]
    while sizes[-1] // FACTOR >= FACTOR:
        sizes.append(sizes[-1] // FACTOR)
    return sizes[::-1]


def table_of(measured: list[Scale]) -> Table:
    table = Table(title="Control messages and bytes, per round")
    for heading in ("nodes", "who", "sent", "bytes sent", "received", "bytes received", "gets"):
        table.add_column(heading, justify="left" if heading == "who" else "right")
    for scale in measured:
        for who, load in (("a member", scale.member), ("the leader", scale.leader)):
            table.add_row(str(scale.nodes), who, *_cells(load))
    return table


def _cells(load: Load) -> list[str]:
    numbers = (load.sent, load.sent_bytes, load.received, load.received_bytes, load.gets)
    return [f"{number:,.0f}" if number >= 100 else f"{number:,.1f}" for number in numbers]


def growth_of(measured: list[Scale]) -> Table:
    """By how much the bytes sent and received grow from one size to the next."""
    table = Table(title="Growth of the bytes")
    for heading in ("nodes", "a member's", "the leader's", "the leader's, per node"):
        table.add_column(heading, justify="right")
    for small, large in pairwise(measured):
        factor = large.nodes / small.nodes
        leaders = _bytes(large.leader) / _bytes(small.leader)
        table.add_row(
            f"{small.nodes} to {large.nodes}",
            f"x {_bytes(large.member) / _bytes(small.member):.2f}",
            f"x {leaders:.2f}",
            f"x {leaders / factor:.2f}",
        )
    return table


def _bytes(load: Load) -> float:
    return max(1.0, load.sent_bytes + load.received_bytes)
