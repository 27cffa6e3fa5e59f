"""Kinds of options that several commands have. Those that mean the same in each bring their help with them."""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

from cyclopts import Parameter
from cyclopts.validators import Number

SEVERAL: Final = Parameter(negative="", consume_multiple=True)
"""Values one after the other behind one name."""

Json: TypeAlias = Annotated[
    bool,
    Parameter(
        name="--json", negative="", help="Print one JSON object as the last line of stdout; all else goes to stderr."
    ),
]
Flag: TypeAlias = Annotated[bool, Parameter(negative="")]
Count: TypeAlias = Annotated[int, Parameter(validator=Number(gte=1))]
Repetitions: TypeAlias = Annotated[int, Parameter(validator=Number(gte=1, lte=1000))]
Runs: TypeAlias = Annotated[int, Parameter(validator=Number(gte=1, lte=100))]
Positive: TypeAlias = Annotated[float, Parameter(validator=Number(gt=0))]
NotNegative: TypeAlias = Annotated[float, Parameter(validator=Number(gte=0))]

Model: TypeAlias = Annotated[str, Parameter(help="As run.model.")]
Fragments: TypeAlias = Annotated[Count, Parameter(help="Of mode streaming.")]
ChunkElements: TypeAlias = Annotated[int, Parameter(validator=Number(gte=256, lte=2**26, modulo=256))]

# --- of benchmarks: nodes on this machine ---------------------------------------------------------------------------

Nodes: TypeAlias = Annotated[int, Parameter(validator=Number(gte=2, lte=16))]
TrainingNodes: TypeAlias = Annotated[
    Nodes, Parameter(help="How many, with a thread each: no more than there are cores.")
]
LongSteps: TypeAlias = Annotated[
    int,
    Parameter(
        validator=Number(gte=4),
        help="H, a multiple of fragments. Long enough that the exchange's CPU time is little of a round.",
    ),
]
MeasuredRounds: TypeAlias = Annotated[
    Count, Parameter(help="Exchanges of the whole model that are measured in each run.")
]
LinkRtt: TypeAlias = Annotated[NotNegative, Parameter(help="Of the links.")]
Congestion: TypeAlias = Annotated[
    list[str],
    SEVERAL,
    Parameter(help="TCP's control of it: cubic, reno, bbr, as the system offers. Each is measured."),
]

# --- of forecasts: nodes as somebody describes them -----------------------------------------------------------------

ManyNodes: TypeAlias = Annotated[int, Parameter(validator=Number(gte=2, lte=65536), help="How many.")]
Cores: TypeAlias = Annotated[Count, Parameter(help="Of a node, for encoding and the like.")]
LongestRtt: TypeAlias = Annotated[NotNegative, Parameter(help="Round trip between the two most distant nodes.")]
