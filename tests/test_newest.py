"""The newest weights are read from a node's directory as the node itself would, and nothing in it is changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prime_async.config.load import load_config
from prime_async.config.spec import flatten
from prime_async.errors import ConfigError, StorageError
from prime_async.ledger import inspect_directory, read_newest
from tests.ledger_directory import flip
from tests.trained_node import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with node.toml and state: snapshots 2 and 3, and the means of the rounds 0 to 2."""
    folder = tmp_path_factory.mktemp("trained") / "node"
    train(folder)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return Path(shutil.copytree(trained, tmp_path / "node"))


def snapshot(folder: Path, round: int) -> Path:
    return folder / "state" / "snapshots" / f"{round:012d}.safetensors"


def means(folder: Path, round: int) -> Path:
    return folder / "state" / "means" / f"{round:012d}.means"


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    """As any program for such files reads them."""
    return {name: tensor for name, tensor in load_file(path).items() if not name.startswith("momentum.")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_newest(folder: Path, reference: Path, *, with_config: bool = False) -> None:
    """That what is read is what stands in snapshot 3 of ``reference``."""
    config = load_config(folder / "node.toml")
    before = contents(folder)
    found = read_newest(config.node.directory, config if with_config else None)
    expected = weights_in(snapshot(reference, 3))
    assert found.round == 3
    assert flatten(found.run) == flatten(config.run)
    assert found.weights.keys() == expected.keys()
    assert all(torch.equal(found.weights[name], expected[name]) for name in expected)
    assert contents(folder) == before


def test_the_newest_snapshot_is_read(folder: Path, trained: Path) -> None:
    assert_newest(folder, trained)


def test_the_means_since_the_snapshot_are_applied(folder: Path, trained: Path) -> None:
    """Given a node that was killed before it wrote a snapshot, when it is read, then the last round is in it."""
    snapshot(folder, 3).unlink()
    assert_newest(folder, trained)


def test_without_a_snapshot_the_rounds_are_lived_through_from_the_initial_weights(folder: Path, trained: Path) -> None:
    for round in (2, 3):
        snapshot(folder, round).unlink()
    with pytest.raises(ConfigError, match="no snapshot there says yet what is trained; name the node's TOML file"):
        read_newest(folder / "state")
    assert_newest(folder, trained, with_config=True)


def test_a_damaged_snapshot_is_left_alone_and_the_one_before_and_the_means_are_used(
    folder: Path, trained: Path
) -> None:
    flip(snapshot(folder, 3), snapshot(folder, 3).stat().st_size - 1)
    assert_newest(folder, trained)
    snapshot(folder, 3).write_bytes(b"torn")
    assert_newest(folder, trained)


def test_what_is_older_than_the_newest_round_is_not_taken_for_it(folder: Path) -> None:
    snapshot(folder, 3).unlink()
    flip(means(folder, 2), 5000)
    with pytest.raises(StorageError, match="only 2 of 3 rounds can be read, the rest is damaged"):
        read_newest(folder / "state")


def test_a_snapshot_that_a_running_node_deletes_meanwhile_is_no_damage(
    folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a listing that is out of date at once, when it is read, then it is listed again."""
    look = inspect_directory
    extra = snapshot(folder, 4)
    shutil.copy(snapshot(folder, 3), snapshot(folder, 1))

    def listed(directory: Path, *, verify: bool) -> object:
        report = look(directory, verify=verify)
        if snapshot(folder, 1).exists():
            for round in (1, 2, 3):
                snapshot(folder, round).rename(extra.with_name(f"{round}"))
        elif extra.with_name("3").exists():
            extra.with_name("3").rename(snapshot(folder, 3))
        return report

    monkeypatch.setattr("prime_async.ledger.newest.inspect_directory", listed)
    found = read_newest(folder / "state")
    expected = weights_in(snapshot(trained, 3))
    assert all(torch.equal(found.weights[name], expected[name]) for name in expected)


def test_a_directory_without_a_round_explains_itself(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(StorageError, match=r"no node has done a round there; name a node's node\.directory"):
        read_newest(tmp_path / "nowhere")
    shutil.rmtree(folder / "state" / "snapshots")
    shutil.rmtree(folder / "state" / "means")
    with pytest.raises(StorageError, match="no node has done a round there"):
        read_newest(folder / "state", load_config(folder / "node.toml"))


def test_a_configuration_of_another_run_is_refused(folder: Path) -> None:
    file = folder / "node.toml"
    file.write_text(file.read_text().replace('name = "short"', 'name = "long"'))
    with pytest.raises(ConfigError, match=r"the configuration is of run .* mend its \[run\] table"):
        read_newest(folder / "state", load_config(file))
