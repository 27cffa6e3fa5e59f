"""What an inspection says of a node's directory: whole, damaged, in the making, or changing while it is read."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from prime_async.cli import app
from prime_async.cli.init import init
from prime_async.cli.inspect import inspect
from prime_async.cli.recover import recover
from prime_async.config.load import load_config
from prime_async.config.spec import run_id
from prime_async.errors import ConfigError, StorageError
from prime_async.ledger import BallotFile, LocalFiles, Report, SnapshotInfo, Snapshots, inspect_directory
from prime_async.ledger.files import LocalFile
from prime_async.ledger.means_format import SLOTS_START
from prime_async.messages import Commit, next_chain, state_digest
from prime_async.transport.keys import read_key_file
from prime_async.work.chunks import Chunks
from prime_async.work.outer import MOMENTUM_PREFIX
from tests import ledger_directory as made
from tests.ledger_directory import flip, write_ballot, write_inner, write_ledger, write_means, write_snapshot


def look(directory: Path, *, verify: bool = True) -> Report:
    return inspect_directory(directory, verify=verify)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    return write_ledger(tmp_path / "state")


# --- a directory that is whole ---


def test_a_whole_ledger_carries_on_from_the_round_after_the_last_means(node: Path) -> None:
    report = look(node)
    assert report.problems == ()
    assert report.is_good
    assert report.conclusion == "carries on from round 43: snapshot 40 and 3 rounds of means"
    assert (report.run_id, report.name, report.settings) == (made.RUN.hex(), "tiny", made.SETTINGS)
    assert [(s.round, s.parameters, s.chunks, s.bad) for s in report.snapshots] == [
        (30, 1000, 4, ()),
        (40, 1000, 4, ()),
    ]
    assert report.snapshots[1].state_digest == made.info(40).state_digest.hex()
    assert (report.newest_round, report.tip) == (43, made.commit(42))
    assert [m.round for m in report.means] == list(range(30, 43))
    assert {(m.state, m.chunks, m.checked) for m in report.means} == {("committed", 4, True)}
    assert report.means[0].chain == made.commit(30).chain.hex() == report.means[1].previous
    assert report.ballot is not None
    assert (report.ballot.view, report.ballot.members, report.ballot.voters) == (7, 3, ("a", "b"))
    assert report.inner is not None
    assert report.inner.round == 42
    assert report.others == ()
    assert report.total_bytes == sum(file.stat().st_size for file in node.rglob("*") if file.is_file())


def test_nothing_is_written(node: Path) -> None:
    def seen() -> dict[str, tuple[int, bytes]]:
        return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in node.rglob("*") if f.is_file()}

    before = seen()
    look(node)
    assert seen() == before


def test_without_a_snapshot_it_carries_on_from_the_initial_weights(tmp_path: Path) -> None:
    write_ballot(tmp_path)
    assert look(tmp_path).conclusion == "carries on from round 0: the initial weights"
    assert look(tmp_path).tip is None
    write_means(tmp_path, 0)
    report = look(tmp_path)
    assert report.tip == made.commit(0)
    assert report.conclusion == "carries on from round 1: the initial weights and 1 round of means"
    assert report.is_good


def test_an_empty_or_missing_directory_holds_no_ledger(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        report = look(directory)
        assert not report.is_good
        assert report.conclusion == f"nothing is there: {directory} holds no ledger"


def test_a_snapshot_of_a_model_without_momentum_is_understood(tmp_path: Path) -> None:
    kept = Snapshots(tmp_path, made.RUN, made.SETTINGS, made.SPANS, Chunks(1000, 512), prefixes=("",))
    chunks = [bytes(2048), bytes(1952)]
    digests = b"".join(blake3(data).digest() for data in chunks)
    info = SnapshotInfo(round=5, state_digest=state_digest(5, digests), chunk_digests=digests)
    part = kept.open_partial(info)
    for chunk, data in enumerate(chunks):
        part.write(chunk, data)
    part.finish()
    report = look(tmp_path)
    assert (report.snapshots[0].parameters, report.snapshots[0].chunks, report.problems) == (1000, 2, ())
    assert MOMENTUM_PREFIX.encode() not in kept.path(5).read_bytes()


def test_other_files_are_named_and_counted(node: Path) -> None:
    (node / "node.key").write_bytes(bytes(10))
    (node / "old").mkdir()
    (node / "old" / "x").write_bytes(bytes(100))
    (node / "means" / "notes.txt").write_bytes(bytes(5))
    (node / "inner.part").write_bytes(bytes(7))
    report = look(node)
    assert {(o.name, o.bytes) for o in report.others} == {
        ("node.key", 10), ("old/", 100), ("means/notes.txt", 5), ("inner.part", 7),
    }  # fmt: skip
    assert report.is_good
    assert report.total_bytes == sum(file.stat().st_size for file in node.rglob("*") if file.is_file())


# --- what a crash, or a node at work, leaves ---


def test_a_partial_snapshot_is_no_damage_and_its_missing_chunks_are_named(node: Path) -> None:
    write_snapshot(node, 50, range(1, 3))
    report = look(node)
    assert report.is_good
    assert (report.snapshots[-1].whole, report.snapshots[-1].missing) == (False, (0, 3))
    (node / "snapshots" / "000000000050.part").write_bytes(b"torn")
    report = look(node)
    assert report.is_good
    assert "header" in report.snapshots[-1].problem


def test_pending_means_of_the_newest_round_are_no_damage(node: Path) -> None:
    path = write_means(node, 43, committed=False)
    assert look(node).is_good
    assert (look(node).means[-1].state, look(node).newest_round) == ("pending", 43)
    flip(path, SLOTS_START)  # an attempt after that one puts its means
    assert look(node).is_good


def test_a_round_that_was_just_begun_is_no_damage(node: Path) -> None:
    path = write_means(node, 43)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        report = look(node)
        assert report.is_good, size
        assert (report.newest_round, report.means[-1].state == "committed") == (43, False), size


# --- damage ---


def test_a_damaged_chunk_of_a_snapshot_is_named_and_the_older_one_leads_on(node: Path) -> None:
    flip(node / "snapshots" / "000000000040.safetensors", -1)
    report = look(node)
    assert report.problems == (
        "chunk 3 of snapshot 40 is damaged: the node fetches it from another member when it starts",
    )
    assert report.conclusion == "carries on from round 43: snapshot 30 and 13 rounds of means"
    assert not report.is_good
    unread = look(node, verify=False)
    assert unread.problems == ()
    assert unread.conclusion.endswith("as far as can be told without reading the chunks")


def test_many_damaged_chunks_are_counted(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-8000] + bytes(8000))
    assert look(tmp_path).problems[0].startswith("chunks 0, 1, 2, 3 of snapshot 1 are damaged: the node fetches them")


def test_a_snapshot_whose_header_is_damaged_or_that_is_cut_off_is_of_no_use(node: Path) -> None:
    path = node / "snapshots" / "000000000040.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:100], b"", whole[:50] + b"x" + whole[51:]):
        path.write_bytes(data)
        report = look(node)
        assert len(report.problems) == 1
        assert report.problems[0].startswith("snapshot 40 is damaged (")
        assert (report.snapshot, report.newest_round) == (30, 43)


def test_a_snapshot_under_the_name_of_another_round_is_damaged(node: Path) -> None:
    (node / "snapshots" / "000000000040.safetensors").rename(node / "snapshots" / "000000000041.safetensors")
    report = look(node)
    assert "snapshot 41 is damaged (" in report.problems[0]
    assert "it is of round 40" in report.problems[0]


def test_a_damaged_mean_is_named_and_the_rounds_before_it_count(node: Path) -> None:
    flip(node / "means" / "000000000041.means", SLOTS_START + 300)
    report = look(node)
    assert report.problems == (
        "chunk 1 of the means of round 41 is damaged: the node fetches it from another member when it starts",
    )
    assert report.conclusion == "carries on from round 41: snapshot 40 and 1 round of means"


def test_any_damage_to_a_file_of_means_before_the_newest_is_found(node: Path) -> None:
    path = node / "means" / "000000000041.means"
    whole = path.read_bytes()
    for offset in range(0, len(whole), 11):
        flip(path, offset)
        report = look(node)
        assert not report.is_good, offset
        assert report.newest_round == 41, offset
        path.write_bytes(whole)


def test_missing_means_and_a_missing_commit_are_named(node: Path) -> None:
    (node / "means" / "000000000041.means").unlink()
    assert look(node).problems == (
        "the means of round 41 are missing, and later ones are there: the node fetches them from another member when "
        "it starts",
    )
    write_means(node, 41, committed=False)
    assert look(node).problems == (
        "the commit of round 41 is missing: the node fetches it from another member when it starts",
    )


def test_means_from_before_a_long_absence_are_no_damage(tmp_path: Path) -> None:
    for round in (10, 11):
        write_means(tmp_path, round)
    write_snapshot(tmp_path, 40)
    write_means(tmp_path, 40)
    assert look(tmp_path).is_good


def test_a_commit_that_does_not_follow_on_the_one_before_or_on_the_snapshot_is_named(tmp_path: Path) -> None:
    write_snapshot(tmp_path, 40)
    kept = made.means(tmp_path)
    write_means(tmp_path, 39)
    write_means(tmp_path, 40)
    other = b"o" * 32
    digest = made.commit(40).digest
    foreign = Commit(
        round=40, epoch=1, attempt=0, state=other, digest=digest, view=1, chain=next_chain(other, other, digest)
    )
    kept.commit(40, foreign, other)
    report = look(tmp_path)
    assert [line.split(":")[0] for line in report.problems] == [
        "round 40 does not follow on round 39", "round 40 does not follow on snapshot 40",
    ]  # fmt: skip
    assert report.newest_round == 40


def test_a_commit_that_contradicts_itself_is_damage(tmp_path: Path) -> None:
    write_snapshot(tmp_path, 40)
    write_means(tmp_path, 40)
    good = made.commit(40)
    bad = {
        "its commit is of round 41": Commit(
            round=41, epoch=1, attempt=0, state=good.state, digest=good.digest, view=1, chain=good.chain
        ),
        "its commit is of other means": Commit(
            round=40, epoch=1, attempt=0, state=good.state, digest=bytes(32), view=1, chain=good.chain
        ),
        "its chain is not that of its commit": Commit(
            round=40, epoch=1, attempt=0, state=good.state, digest=good.digest, view=1, chain=bytes(32)
        ),
    }
    for reason, commit in bad.items():
        made.means(tmp_path).commit(40, commit, made.chain(40))
        report = look(tmp_path)
        assert report.newest_round == 40
        assert report.problems == (
            f"the means of round 40 are damaged ({reason}): the node fetches them from another member when it starts",
        )


def test_a_damaged_ballot_and_inner_state_are_named_with_what_to_do(node: Path) -> None:
    flip(node / "ballot.cbor", 100)
    flip(node / "inner.safetensors", -1)
    report = look(node)
    assert len(report.problems) == 2
    assert report.problems[0].startswith("the ballot is damaged (")
    assert report.problems[0].endswith("): move it away, and the node joins as a new one")
    assert report.problems[1].startswith("the inner state is damaged (the data do not have their digest)")
    assert report.newest_round == 43
    assert len(look(node, verify=False).problems) == 1


def test_files_of_two_runs_are_a_problem(node: Path) -> None:
    write_snapshot(node, 50, run=b"o" * 32)
    report = look(node)
    assert report.problems[0].startswith("the files are of 2 runs (")
    assert (report.run_id, report.newest_round) == (made.RUN.hex(), 43)


@given(st.binary(max_size=300), st.integers(0, 2**20))
def test_files_of_any_bytes_are_reported_and_not_raised(data: bytes, length: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        header = length.to_bytes(8, "little") + data
        for folder, names in (
            ("snapshots", ("000000000001.safetensors", "000000000002.part")),
            ("means", ("000000000001.means",)),
        ):
            (directory / folder).mkdir()
            for file in names:
                (directory / folder / file).write_bytes(header)
        for file in ("ballot.cbor", "inner.safetensors"):
            (directory / file).write_bytes(header)
        report = look(directory)
        assert not report.is_good
        assert report.newest_round == 0


def test_what_may_not_be_read_is_an_error_that_says_so(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> LocalFile:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(LocalFiles, "open", forbidden)
    with pytest.raises(StorageError, match="Permission denied; look after"):
        look(node)


# --- while the node runs ---


class Busy(LocalFiles):
    """Something happens before a file is opened."""

    def __init__(self, when: str, happens: Callable[[], object]) -> None:
        self.when, self.happens = when, happens

    def open(self, path: Path, *, create: bool) -> LocalFile:
        if path.name == self.when:
            self.when = ""
            self.happens()
        return super().open(path, create=create)


def test_a_node_that_ends_a_snapshot_and_deletes_the_old_ones_meanwhile_is_no_damage(node: Path) -> None:
    def goes_on() -> None:
        for round in range(43, 52):
            write_means(node, round)
        write_snapshot(node, 50)
        shutil.rmtree(node / "snapshots", ignore_errors=False)
        write_snapshot(node, 50)
        for round in range(30, 48):
            (node / "means" / f"{round:012d}.means").unlink()

    for when in ("000000000030.safetensors", "000000000040.safetensors", "000000000030.means", "000000000042.means"):
        shutil.rmtree(node)
        write_ledger(node)
        report = inspect_directory(node, verify=True, files=Busy(when, goes_on))
        assert report.problems == ()
        assert report.conclusion == "carries on from round 52: snapshot 50 and 2 rounds of means"


def test_a_round_that_is_committed_meanwhile_counts(node: Path) -> None:
    write_means(node, 43, committed=False)

    def commits() -> None:
        write_means(node, 43)
        write_means(node, 44)

    report = inspect_directory(node, verify=True, files=Busy("000000000042.means", commits))
    assert report.problems == ()
    report = inspect_directory(node, verify=True, files=Busy("ballot.cbor", lambda: (node / "ballot.cbor").unlink()))
    assert report.ballot is None
    assert report.is_good


# --- the command ---


def test_the_command_shows_a_table_and_ends_well(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(node) == 0
    said = capsys.readouterr().out
    assert "run tiny, run id 7272727272727272" in said
    assert "view 7, 2 voters: a, b" in said
    assert "committed, good" in said
    assert said.strip().splitlines()[-1] == "carries on from round 43: snapshot 40 and 3 rounds of means"


def test_the_command_ends_with_1_if_something_is_damaged_or_nothing_is_there(
    node: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(node / "snapshots" / "000000000040.safetensors", -1)
    assert inspect(node) == 1
    assert "chunk 3 of snapshot 40 is damaged: the node fetches it" in capsys.readouterr().out
    assert inspect(node, verify=False) == 0
    assert inspect(tmp_path / "nowhere") == 1
    assert "nothing is there" in capsys.readouterr().out


def test_the_command_prints_json_as_the_last_line(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_snapshot(node, 50, range(2))
    assert inspect(node, json_=True) == 0
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])
    assert (found["good"], found["newest_round"], found["snapshot"]) == (True, 43, 40)
    assert found["snapshots"][-1]["missing"] == [2, 3]
    assert found["tip"]["chain"] == made.commit(42).chain.hex()
    assert found["conclusion"] in said.err


def test_the_command_finds_the_directory_by_the_toml_file_or_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init(tmp_path)
    write_snapshot(load_config(tmp_path / "node.toml").node.directory, 3)
    for where in (tmp_path, tmp_path / "node.toml", tmp_path / "state"):
        assert inspect(where) == 0
        assert "carries on from round 3: snapshot 3" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no such file"):
        inspect(tmp_path / "other.toml")


def test_the_command_line_knows_the_command(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["inspect", str(node), "--no-verify", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verified"] is False
    write_inner(node, 40)


# --- recover, which goes by an inspection ---


@pytest.fixture
def config(tmp_path: Path) -> Path:
    init(tmp_path)
    settings = load_config(tmp_path / "node.toml")
    write_ballot(settings.node.directory, run_id(settings.run), read_key_file(settings.node.key).id)
    return tmp_path / "node.toml"


def test_recover_goes_on_from_the_newest_sound_round(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_config(config)
    directory, run = settings.node.directory, run_id(settings.run)
    for round in (30, 31):
        write_means(directory, round, run=run)
    write_snapshot(directory, 30, run=run)
    flip(write_snapshot(directory, 40, run=run), -1)
    assert recover(config, force=True) == 0
    said = capsys.readouterr().out
    assert "chunk 3 of snapshot 40 is damaged" in said
    assert "outer state on disk: carries on from round 32: snapshot 30 and 2 rounds of means" in said
    ballot = BallotFile(directory, run).load()
    assert ballot is not None
    assert ballot.view is not None
    assert ballot.view.commit == made.commit(31)


def test_recover_refuses_a_directory_with_snapshots_of_another_run(config: Path) -> None:
    directory = load_config(config).node.directory
    write_snapshot(directory, 40, run=b"o" * 32)
    before = (directory / "ballot.cbor").read_bytes()
    with pytest.raises(ConfigError, match="snapshot 40: of another run than the ballot: choose another"):
        recover(config, force=True)
    assert (directory / "ballot.cbor").read_bytes() == before
