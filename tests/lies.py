"""What a peer may give that is false: each must be found out."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from prime_async.messages import ChunkInfo, Record
from prime_async.testing import SimulationSettings
from prime_async.testing.host import digest_of
from prime_async.testing.schedules import Chaos
from tests.simulation_harness import ALL_MEANS, KEEPS


def false_record(chaos: Chaos, info: ChunkInfo) -> ChunkInfo:
    """A record of the same round that proves itself, and not with the chain."""
    contents = chaos.simulation.ledger.contents
    record = contents[info.digest]
    assert isinstance(record, Record)
    commit = msgspec.structs.replace(record.commit, state=digest_of("false", record.commit.state))
    lie = msgspec.structs.replace(record, commit=commit)
    made = ChunkInfo(digest=digest_of("content", lie))
    contents[made.digest] = lie
    return made


def false_manifest(chaos: Chaos, info: ChunkInfo) -> ChunkInfo:
    contents = chaos.simulation.ledger.contents
    state = contents[info.digest]
    assert isinstance(state, tuple)
    lie = digest_of("false", state[0]), state[1]
    made = ChunkInfo(digest=digest_of("content", lie))
    contents[made.digest] = lie
    return made


def false_bytes(_chaos: Chaos, info: ChunkInfo) -> ChunkInfo:
    return msgspec.structs.replace(info, digest=digest_of("false", info.digest))


LIES: list[tuple[str, Callable[[Chaos, ChunkInfo], ChunkInfo], SimulationSettings]] = [
    ("record", false_record, ALL_MEANS),
    ("mean", false_bytes, ALL_MEANS),
    ("manifest", false_manifest, KEEPS),
    ("state", false_bytes, KEEPS),
]
