"""What `prime-async check` says of the disk, and of weights to begin with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from prime_async.cli import preflight
from prime_async.cli.preflight import MIB, Finding
from prime_async.config.load import config_from
from prime_async.config.schema import Config
from prime_async.ledger.snapshots import DIRECTORY
from prime_async.work.sizes import DiskEstimate, estimate_disk

P = 10**9
DIGEST = "ab" * 32


class Usage(NamedTuple):
    free: int


def config(tmp_path: Path, run: dict[str, Any] | None = None, **node: Any) -> Config:
    values = {"name": "x", "model": "llama-360k", **(run or {})}
    return config_from({"run": values, "node": {"directory": str(tmp_path / "state"), **node}})


def estimate(tmp_path: Path, run: dict[str, Any] | None = None, **node: Any) -> DiskEstimate:
    made = config(tmp_path, run, **node)
    return estimate_disk(made.run, made.node, P)


# --- how it is said -------------------------------------------------------------------------------------------------


def test_texts_stand_below_each_other_whatever_they_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    """Defect: the line about the dashboard, the longest subject, stood a column further right than the others."""
    findings = [
        Finding(subject="key", verdict="good", text="a text"),
        Finding(subject="dashboard", verdict="problem", text="a text", fix="a way"),
        Finding(subject="address", verdict="warning", text="a text"),
    ]

    preflight.print_findings(findings)

    lines = capsys.readouterr().out.splitlines()
    assert len({line.index("a text") for line in lines if "a text" in line}) == 1
    assert lines[2].index("fix: a way") == lines[1].index("a text")


# --- disk -----------------------------------------------------------------------------------------------------------


def test_the_defaults_need_sixty_bytes_for_each_parameter(tmp_path: Path) -> None:
    """Three snapshots, twenty means in int8, and the inner optimiser's state twice."""
    need = estimate(tmp_path)
    assert (need.snapshot_bytes, need.inner_bytes, need.grows) == (24 * P, 16 * P, False)
    assert need.mean_bytes == pytest.approx(20 * 65 / 64 * P)
    assert need.total_bytes == pytest.approx(60.3 * P, rel=0.001)


def test_what_is_kept_is_what_the_settings_say(tmp_path: Path) -> None:
    need = estimate(tmp_path, keep_snapshots=1, snapshot_every=100, keep_rounds=5)
    assert need.snapshot_bytes == 16 * P
    assert need.mean_bytes == pytest.approx(100 * 65 / 64 * P)
    fp32 = {"exchange": {"mean_codec": "fp32"}, "mode": "streaming", "fragments": 4}
    assert estimate(tmp_path, fp32).mean_bytes == 20 * P
    assert estimate(tmp_path, {"inner": {"optimizer": "sgd"}}).inner_bytes == 0
    assert estimate(tmp_path, witness=True).inner_bytes == 0
    topk = {"exchange": {"codec": "topk", "error_feedback": True}}
    assert estimate(tmp_path, topk).inner_bytes == 24 * P


def test_without_snapshots_all_means_of_the_run_are_kept(tmp_path: Path) -> None:
    of_fifty = estimate(tmp_path, {"rounds": 50}, snapshot_every=0)
    assert of_fifty.mean_bytes == pytest.approx(50 * 65 / 64 * P)
    assert not of_fifty.grows
    assert estimate(tmp_path, snapshot_every=0).grows


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """What is found about a disk with so many bytes free."""

    def found(free: int, **node: Any) -> list[Finding]:
        monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(free))
        return list(preflight._disk(config(tmp_path, **node), 256))

    return found


def test_a_disk_without_room_for_all_that_is_kept_is_a_problem(disk: Callable[..., list[Finding]]) -> None:
    """Defect: 16 bytes free for each parameter were enough, where the defaults keep 60."""
    [finding] = disk(10 * MIB)
    assert finding.verdict == "problem"
    assert "node.keep_snapshots" in finding.fix
    assert [f.verdict for f in disk(30 * MIB)] == ["good"]
    assert [f.verdict for f in disk(1 << 40, snapshot_every=0)] == ["good", "warning"]


def test_what_the_node_has_on_disk_already_needs_no_more_room(
    disk: Callable[..., list[Finding]], tmp_path: Path
) -> None:
    (tmp_path / "state" / "snapshots").mkdir(parents=True)
    (tmp_path / "state" / "snapshots" / "000000000010.safetensors").write_bytes(bytes(15 * MIB))
    assert [f.verdict for f in disk(10 * MIB)] == ["good"]


# --- weights to begin with ------------------------------------------------------------------------------------------


def test_weights_that_the_run_begins_with_must_be_here_or_at_a_member(tmp_path: Path) -> None:
    """Defect: nothing was said, and the node did not start."""
    imported = {"initial_digest": DIGEST}
    assert list(preflight._beginning(config(tmp_path))) == []
    [missing] = preflight._beginning(config(tmp_path, imported))
    assert missing.verdict == "problem"
    assert "prime-async import" in missing.fix
    [fetched] = preflight._beginning(config(tmp_path, imported, join=[f"{'1' * 64}@10.0.0.1:7700"]))
    assert (fetched.verdict, "from a member" in fetched.text) == ("good", True)
    (tmp_path / "state" / DIRECTORY).mkdir(parents=True)
    (tmp_path / "state" / DIRECTORY / f"{0:012d}.safetensors").touch()
    assert [f.verdict for f in preflight._beginning(config(tmp_path, imported))] == ["good"]
