"""Message logs and ``protocols/v1/log.cddl``: logs that nodes write, the golden one, and damaged ones."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import cbor2
import msgspec
import msgspec.inspect as mi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_async.errors import LogFormatError
from prime_async.log import LOG_VERSION, LogHeader, LogRecord, LogWriter, MachineSettings, read_log, replay
from prime_async.machines.sharing import Sharing
from prime_async.machines.vocabulary import MACHINES, ActorName, Event
from prime_async.messages import encode
from prime_async.testing import Simulation, SimulationSettings
from tests.protocols_harness import EVENTS, V1, bytes_of, choices, from_diagnostic, load, rule_of, tag, validate, values

GOLDEN = V1 / "vectors" / "every-event.cborseq"
ITEMS: list[dict[str, Any]] = load("vectors/every-event.json")
REJECTED: list[dict[str, Any]] = load("rejected/log.json")
OUT_OF_ORDER = {"no_header", "two_headers"}
"""Their items are valid each, and a schema does not see more than one."""

derandomized = settings(deadline=None, derandomize=True, max_examples=40)


def items_of(path: Path) -> list[bytes]:
    """The items of a CBOR sequence, encoded again."""
    log = read_log(path)
    return [encode(log.header), *(encode(r) for r in log.records)]


# --- nothing is left out --------------------------------------------------------------------------------------------


def test_every_event_has_a_rule_and_every_rule_an_event() -> None:
    assert sorted(choices("log", "event")) == sorted(rule_of(tag(kind)) for kind in EVENTS)


def test_every_event_and_every_message_is_in_the_golden_log() -> None:
    events = [item["value"]["event"] for item in ITEMS[1:]]
    messages = {e["message"]["t"] for e in events if e["type"] == "heard"}

    assert {e["type"] for e in events} == {tag(kind) for kind in EVENTS}
    assert {rule_of(t) for t in messages} == set(choices("log", "control-message"))


# --- code to schema -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVENTS, ids=[tag(kind) for kind in EVENTS])
def test_a_record_of_any_event_is_what_the_schema_describes(kind: type) -> None:
    @derandomized
    @given(values(kind), st.sampled_from([*MACHINES, "own/tally_2"]), st.floats(0, 1e9))
    def holds(event: Event, actor: ActorName, now: float) -> None:
        record = LogRecord(actor=actor, seq=0, now=now, event=event, effects=bytes(16))

        assert validate("log", encode(record), closed=True) is None

    holds()


@derandomized
@given(values(MachineSettings))
def test_a_header_is_what_the_schema_describes(machines: MachineSettings) -> None:
    header = LogHeader(version=LOG_VERSION, node="n0", machines=machines)

    assert validate("log", encode(header), closed=True) is None


@pytest.mark.parametrize("seed", [1, 2])
def test_the_logs_of_a_run_are_what_the_schema_describes_and_replay(seed: int, tmp_path: Path) -> None:
    rough = SimulationSettings(loss=0.1, doubled=0.1, rounds=6)
    simulation = Simulation(3, seed, rough)
    simulation.record_to(tmp_path)

    simulation.run_for(8.0)
    simulation.crash("n2")
    simulation.run_for(30.0)

    for name in simulation.nodes:
        path = tmp_path / f"{name}.log"
        reasons = [reason for item in items_of(path) if (reason := validate("log", item, closed=True))]
        assert reasons == []
        assert path.read_bytes() == b"".join(items_of(path))
        assert len(list(replay(read_log(path)))) == len(read_log(path).records) > 50


# --- the golden log -------------------------------------------------------------------------------------------------


def test_the_golden_log_reads_as_its_description() -> None:
    log = read_log(GOLDEN)
    found = [msgspec.to_builtins(item, builtin_types=(bytes,)) for item in (log.header, *log.records)]

    # NaN is in it, which equals nothing: compare what it encodes to.
    assert [encode(item) for item in found] == [encode(from_diagnostic(item["value"])) for item in ITEMS]
    assert log.torn_bytes == 0


def test_the_golden_log_is_what_the_code_writes(tmp_path: Path) -> None:
    log = read_log(GOLDEN)

    assert b"".join(items_of(GOLDEN)) == GOLDEN.read_bytes() == b"".join(bytes_of(item) for item in ITEMS)
    writer = LogWriter(tmp_path / "log", log.header.node, log.header.machines)
    writer.close()
    assert (tmp_path / "log").read_bytes() == bytes_of(ITEMS[0])


def test_the_golden_log_is_what_the_schema_describes() -> None:
    assert [validate("log", bytes_of(item), closed=True) for item in ITEMS] == [None] * len(ITEMS)


def test_unknown_fields_in_a_log_are_ignored(tmp_path: Path) -> None:
    header, record = (cbor2.loads(bytes_of(item)) for item in ITEMS[:2])
    header["machines"]["training"]["later"] = 1
    record["event"]["later"] = record["later"] = "x"
    path = tmp_path / "log"
    path.write_bytes(cbor2.dumps(header) + cbor2.dumps(record))

    log = read_log(path)

    assert log.header == read_log(GOLDEN).header
    assert log.records == read_log(GOLDEN).records[:1]
    assert validate("log", cbor2.dumps(record)) is None


def test_settings_with_a_default_may_be_missing_from_a_log(tmp_path: Path) -> None:
    header = cbor2.loads(bytes_of(ITEMS[0]))
    kept: dict[str, dict[str, Any]] = {}
    for name, given_settings in ((n, s) for n, s in header["machines"].items() if s is not None):
        required = {f.name for f in fields_of_settings(name) if f.required}
        kept[name] = {k: v for k, v in given_settings.items() if k in required}
    path = tmp_path / "log"
    path.write_bytes(cbor2.dumps(header | {"machines": kept}, canonical=True))

    assert read_log(path).header.machines.build().keys() == kept.keys()
    assert validate("log", path.read_bytes(), closed=True) is None


def test_machines_that_a_node_does_not_have_may_be_missing_from_a_log(tmp_path: Path) -> None:
    """Given a header with the settings of membership alone, then the log is one of a node without rounds."""
    header = cbor2.loads(bytes_of(ITEMS[0]))
    alone = {"membership": header["machines"]["membership"]}
    path = tmp_path / "log"
    for machines in (alone, alone | {"exchange": None, "checkpoint": None, "training": None}):
        path.write_bytes(cbor2.dumps(header | {"machines": machines}, canonical=True))

        assert read_log(path).header.machines.build().keys() == {"membership"}
        assert validate("log", path.read_bytes(), closed=True) is None


def test_a_node_that_shares_files_has_another_machine_for_its_checkpoint_actor(tmp_path: Path) -> None:
    header = cbor2.loads(bytes_of(ITEMS[0]))
    machines = {"membership": header["machines"]["membership"], "sharing": {"me": "n0"}}
    path = tmp_path / "log"
    path.write_bytes(cbor2.dumps(header | {"machines": machines}, canonical=True))

    built = read_log(path).header.machines.build()

    assert built.keys() == {"membership", "checkpoint"}
    assert isinstance(built["checkpoint"], Sharing)
    assert validate("log", path.read_bytes(), closed=True) is None


def fields_of_settings(name: str) -> tuple[mi.Field, ...]:
    info = mi.type_info(MachineSettings)
    assert isinstance(info, mi.StructType)
    [of_field] = [f.type for f in info.fields if f.name == name]
    types = of_field.types if isinstance(of_field, mi.UnionType) else (of_field,)
    [settings_type] = [t for t in types if isinstance(t, mi.StructType)]
    return settings_type.fields


# --- rejected and damaged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REJECTED, ids=[case["name"] for case in REJECTED])
def test_a_rejected_log_is_refused(case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "log"
    start = bytes_of(ITEMS[0]) if case["after_header"] else b""
    path.write_bytes(start + bytes.fromhex(case["cborseq_hex"]))

    with pytest.raises(LogFormatError):
        read_log(path)


@pytest.mark.parametrize("case", [case for case in REJECTED if case["name"] not in OUT_OF_ORDER])
def test_an_item_of_a_rejected_log_does_not_fit_the_schema(case: dict[str, Any]) -> None:
    data = bytes.fromhex(case["cborseq_hex"])

    assert validate("log", data) is not None


def test_a_log_cut_anywhere_gives_its_whole_records(tmp_path: Path) -> None:
    whole = GOLDEN.read_bytes()
    header = len(bytes_of(ITEMS[0]))
    path = tmp_path / "log"
    for end in range(header, len(whole), 97):
        path.write_bytes(whole[:end])

        log = read_log(path)

        kept = b"".join(bytes_of(item) for item in ITEMS[: 1 + len(log.records)])
        assert len(kept) + log.torn_bytes == end
        assert whole.startswith(kept)


@settings(derandomized, max_examples=150)
@given(st.integers(0, len(GOLDEN.read_bytes()) - 1), st.integers(0, 255))
def test_a_damaged_log_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int) -> None:
    damaged = bytearray(GOLDEN.read_bytes())
    damaged[at] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.cborseq"
    path.write_bytes(damaged)

    with suppress(LogFormatError):
        read_log(path)
