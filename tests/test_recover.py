"""``prime-async recover``: what it makes of a ballot on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from prime_async.cli.init import init
from prime_async.cli.recover import recover
from prime_async.config.load import load_config
from prime_async.config.spec import run_id
from prime_async.errors import ConfigError
from prime_async.ledger import BallotFile
from prime_async.machines.ballot import Ballot, is_quorum, new_lineage
from prime_async.messages import Commit, Member, View
from prime_async.transport.keys import read_key_file


def member(id: str, incarnation: int = 1) -> Member:
    return Member(
        id=id, name=id[:8], incarnation=incarnation, control="c", bulk="b", active=True, voter=True, reachable=True
    )


COMMIT = Commit(round=6, epoch=3, attempt=0, state=bytes(32), digest=bytes(32), chain=bytes(32), view=3)


def two_nodes(me: str) -> Ballot:
    """Of a run of two whose leader is lost."""
    view = View(
        lineage=bytes(32),
        epoch=3,
        number=4,
        previous=bytes(32),
        leader="a",
        members=(member("a"), member(me, 8)),
        commit=COMMIT,
    )
    return Ballot(incarnations=(7, 8), promised=3, promised_to="a", accepted=3, view=view, decided=True)


def test_the_new_lineage_has_this_node_as_its_only_voter_in_a_higher_epoch() -> None:
    ballot = new_lineage(two_nodes("b"), "b", COMMIT)
    assert ballot.view is not None
    assert [(m.id, m.incarnation, m.voter, m.active) for m in ballot.view.members] == [("b", 8, True, False)]
    assert is_quorum(ballot.view, {"b"})
    assert not is_quorum(ballot.view, {"a"})
    assert (ballot.promised, ballot.promised_to, ballot.decided) == (4, "b", True)
    assert (ballot.view.number, ballot.view.epoch) == (5, 4)
    assert ballot.view.lineage != bytes(32)


def test_the_chain_goes_on_from_the_commit_that_led_to_the_state_that_is_left() -> None:
    for tip in (COMMIT, replace(COMMIT, round=3), None):
        view = new_lineage(two_nodes("b"), "b", tip).view
        assert view is not None
        assert view.commit == tip


def test_a_node_that_was_never_a_member_has_no_lineage() -> None:
    with pytest.raises(ValueError, match="never a member"):
        new_lineage(Ballot(incarnations=(1,)), "b", None)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    init(tmp_path)
    return tmp_path / "node.toml"


def ballots(config: Path) -> BallotFile:
    settings = load_config(config)
    return BallotFile(settings.node.directory, run_id(settings.run))


def test_without_a_ballot_there_is_nothing_to_recover(config: Path) -> None:
    with pytest.raises(ConfigError, match="never a member"):
        recover(config, force=True)


def test_without_a_flag_it_says_what_is_there_and_changes_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = two_nodes(read_key_file(load_config(config).node.key).id)
    ballots(config).save(stored)
    assert recover(config) == 0
    said = capsys.readouterr().out
    assert "view 4, 2 voters" in said
    assert "nothing was changed" in said
    assert ballots(config).load() == stored


def test_forced_it_leaves_a_ballot_of_a_new_lineage(config: Path) -> None:
    me = read_key_file(load_config(config).node.key).id
    stored = two_nodes(me)
    ballots(config).save(stored)
    assert recover(config, force=True) == 0
    assert ballots(config).load() == new_lineage(stored, me, None)


def test_adopting_gives_the_ballot_up_and_keeps_a_copy(config: Path) -> None:
    stored = replace(two_nodes("b"), decided=False)
    ballots(config).save(stored)
    assert recover(config, adopt=True) == 0
    assert ballots(config).load() is None
    assert list(load_config(config).node.directory.iterdir())


def test_both_flags_at_once_are_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match="choose one"):
        recover(config, force=True, adopt=True)
