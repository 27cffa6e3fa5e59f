"""Message logs: whole ones replay, torn ones lose their tail, wrong ones are refused with the place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from prime_async.errors import LogFormatError, ReplayMismatchError, StorageError
from prime_async.log import LOG_VERSION, LogHeader, LogRecord, LogWriter, MessageLog, effects_digest, read_log, replay
from prime_async.machines.facts import PeerDropped
from prime_async.machines.vocabulary import Offended, Report
from prime_async.messages import encode
from prime_async.testing import Simulation, SimulationSettings


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a member of three that saw a crash, and of rounds before and after it."""
    directory = tmp_path_factory.mktemp("logs")
    simulation = Simulation(3, 5, SimulationSettings(loss=0.1, doubled=0.1))
    simulation.record_to(directory)
    simulation.run_for(12.0)
    simulation.crash("n2")
    simulation.run_for(20.0)
    assert simulation.nodes["n1"].state[0] > 3
    return directory / "n1.log"


def write(path: Path, *items: LogHeader | LogRecord) -> Path:
    path.write_bytes(b"".join(encode(item) for item in items))
    return path


def parts(path: Path) -> tuple[LogHeader, tuple[LogRecord, ...]]:
    log = read_log(path)
    return log.header, log.records


def test_a_log_holds_every_call_and_what_the_machines_were_made_with(recorded: Path) -> None:
    log = read_log(recorded)
    assert (log.header.version, log.header.node, log.torn_bytes) == (LOG_VERSION, "n1", 0)
    assert {r.actor for r in log.records} == {"membership", "exchange", "checkpoint", "training"}
    assert len(log.records) > 200
    assert log.header.machines.membership.me.id == "n1"
    assert log.header.machines.build().keys() == {r.actor for r in log.records}


def test_a_replay_gives_the_recorded_effects_of_every_event(recorded: Path) -> None:
    log = read_log(recorded)
    steps = list(replay(log))
    assert [s.record for s in steps] == list(log.records)
    assert [s.index for s in steps] == list(range(len(log.records)))
    assert all(effects_digest(s.effects) == s.record.effects for s in steps)
    assert any(s.effects for s in steps)


def test_a_torn_tail_is_left_out_wherever_the_last_record_was_cut(recorded: Path, tmp_path: Path) -> None:
    header, records = parts(recorded)
    whole = [encode(item) for item in (header, *records[:5])]
    before = b"".join(whole[:-1])
    path = tmp_path / "torn.log"
    for cut in range(len(whole[-1])):
        path.write_bytes(before + whole[-1][:cut])
        log = read_log(path)
        assert log.records == records[:4]
        assert log.torn_bytes == cut
    path.write_bytes(before + whole[-1])
    assert (read_log(path).records, read_log(path).torn_bytes) == (records[:5], 0)


def test_a_log_without_a_whole_header_is_not_one(recorded: Path, tmp_path: Path) -> None:
    header, _ = parts(recorded)
    path = tmp_path / "cut.log"
    data = encode(header)
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(LogFormatError, match="not a message log"):
            read_log(path)


@pytest.mark.parametrize("data", [b"\xff", b"\x00", b"hello, world", b"\xa1atclog", b"\x1c\x1c\x1c", b"[" * 100])
def test_another_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(data)
    with pytest.raises(LogFormatError, match="other: not a message log"):
        read_log(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogFormatError, match=r"none\.log: cannot read the message log: No such file"):
        read_log(tmp_path / "none.log")


def test_a_log_of_another_version_is_refused(recorded: Path, tmp_path: Path) -> None:
    header, _ = parts(recorded)
    path = write(tmp_path / "new.log", replace(header, version=LOG_VERSION + 1))
    with pytest.raises(LogFormatError, match="a log of version 2; this program reads version 1"):
        read_log(path)


def test_a_record_that_is_not_one_is_refused_with_its_number(recorded: Path, tmp_path: Path) -> None:
    header, records = parts(recorded)
    good = b"".join(encode(item) for item in (header, *records[:3]))
    path = tmp_path / "bad.log"
    for bad in (encode({"t": "step"}), encode(header), b"\x00", b"\xff"):
        path.write_bytes(good + bad + encode(records[3]))
        with pytest.raises(LogFormatError, match=r"bad\.log: record 3 is not one"):
            read_log(path)


def test_a_damaged_byte_never_raises_anything_but_a_clear_error(recorded: Path, tmp_path: Path) -> None:
    """A byte may also hit a value that is as good as another, or make a length that runs past the end."""
    header, records = parts(recorded)
    data = b"".join(encode(item) for item in (header, *records[:4]))
    path = tmp_path / "flipped.log"
    for i in range(0, len(data), 3):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        try:
            log = read_log(path)
        except LogFormatError:
            continue
        assert len(log.records) <= 4


def altered(log: MessageLog, index: int, **changes: object) -> MessageLog:
    records = list(log.records)
    records[index] = replace(records[index], **changes)
    return MessageLog(log.header, tuple(records), 0)


def test_another_effect_than_the_recorded_one_names_the_event(recorded: Path) -> None:
    log = read_log(recorded)
    wrong = altered(log, 100, effects=bytes(16))
    record = log.records[100]
    where = f"event 100, number {record.seq} of {record.actor}, {type(record.event).__name__}"
    seen = []
    with pytest.raises(ReplayMismatchError, match=where):
        for step in replay(wrong):
            seen.append(step.index)
    assert seen == list(range(100))


def test_another_event_than_the_recorded_one_is_noticed(recorded: Path) -> None:
    log = read_log(recorded)
    index = next(i for i, r in enumerate(log.records) if r.actor == "membership" and i > 50)
    event = Offended(peer="n9", plane="bulk", reason="never happened", times=1, shut_out=False)
    with pytest.raises(ReplayMismatchError, match=f"event {index}, .*Offended.*other effects"):
        list(replay(altered(log, index, event=event)))


def test_a_record_that_is_missing_is_noticed(recorded: Path) -> None:
    log = read_log(recorded)
    missing = MessageLog(log.header, log.records[:50] + log.records[51:], 0)
    lost = log.records[50]
    with pytest.raises(ReplayMismatchError, match=f"number {lost.seq} is missing"):
        list(replay(missing))


def test_a_machine_that_raises_on_replay_names_the_event(recorded: Path) -> None:
    log = read_log(recorded)
    index = next(i for i, r in enumerate(log.records) if r.actor == "training" and i > 50)
    event = Offended(peer="n9", plane="bulk", reason="for membership", times=1, shut_out=False)
    with pytest.raises(ReplayMismatchError, match=f"event {index}, .*the machine raised TypeError"):
        list(replay(altered(log, index, event=event)))


def test_the_digest_depends_on_every_effect_and_their_order() -> None:
    one, two = (
        Report(fact=PeerDropped(peer=peer, plane="bulk", reason="r", times=1, shut_out=False)) for peer in ("a", "b")
    )
    digests = [effects_digest(effects) for effects in ([], [one], [two], [one, two], [two, one])]
    assert len(set(digests)) == 5


def test_a_disk_that_is_full_ends_the_log_and_not_the_node(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, records = parts(recorded)
    path = tmp_path / "full.log"
    writer = LogWriter(path, header.node, header.machines)
    room = 1000
    real_write = os.write

    def limited(fd: int, data: bytes | memoryview) -> int:
        nonlocal room
        if room == 0:
            raise OSError(28, "No space left on device")
        written = real_write(fd, data[:room])
        room -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    machines = header.machines.build()
    for item in records:
        writer.record(item.actor, item.seq, item.now, item.event, machines[item.actor].handle(item.now, item.event))
    writer.close()
    monkeypatch.undo()
    log = read_log(path)
    assert 0 < len(log.records) < len(records)
    assert log.records == records[: len(log.records)]
    assert log.torn_bytes > 0
    assert len(list(replay(log))) == len(log.records)


def test_a_short_write_is_continued(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, records = parts(recorded)
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:7]))
    path = tmp_path / "short.log"
    writer = LogWriter(path, header.node, header.machines)
    writer.record(records[0].actor, 0, records[0].now, records[0].event, [])
    writer.close()
    assert read_log(path).records[0].event == records[0].event


def test_a_log_that_cannot_be_opened_says_why(recorded: Path, tmp_path: Path) -> None:
    header, _ = parts(recorded)
    with pytest.raises(StorageError, match=r"no/such/place\.log: cannot write the message log: No such file"):
        LogWriter(tmp_path / "no" / "such" / "place.log", "n0", header.machines)
