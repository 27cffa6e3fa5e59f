"""Kinds of options that several commands have."""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

from cyclopts import Parameter
from cyclopts.validators import Number

SEVERAL: Final = Parameter(negative="", consume_multiple=True)
"""Values one after the other behind one name."""

Json: TypeAlias = Annotated[bool, Parameter(name="--json", negative="")]
Flag: TypeAlias = Annotated[bool, Parameter(negative="")]
Count: TypeAlias = Annotated[int, Parameter(validator=Number(gte=1))]
Repetitions: TypeAlias = Annotated[int, Parameter(validator=Number(gte=1, lte=1000))]
Nodes: TypeAlias = Annotated[int, Parameter(validator=Number(gte=2, lte=16))]
ChunkElements: TypeAlias = Annotated[int, Parameter(validator=Number(gte=256, lte=2**26, modulo=256))]
Positive: TypeAlias = Annotated[float, Parameter(validator=Number(gt=0))]
NotNegative: TypeAlias = Annotated[float, Parameter(validator=Number(gte=0))]
