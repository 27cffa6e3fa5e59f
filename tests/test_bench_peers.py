"""Other programs in the benchmark of the exchange: who is measured, and what is said of those that are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prime_async.bench.exchange import ExchangeBench, Group, measure
from prime_async.bench.peers import NAMES, PeerName, choose, why_not
from prime_async.cli.bench_peers import peers_table
from prime_async.errors import EnvironmentFault

pytestmark = pytest.mark.xdist_group("real time")

SMALL = ("--nodes", "2", "--mib", "1", "--iterations", "2", "--chunk-elements", str(2**15), "--plain", "--json")
SETTINGS = {
    "hivemind": {"hivemind int8 blockwise", "hivemind fp32"},
    "pccl": {"pccl int8 zero-point", "pccl fp32"},
    "torchft": {"torchft gloo fp32"},
}
TIMEOUT_S = 300
LEFT = ("tmp/hivemind-*", "tmp/pymp-*", "tmp/torch-shm-dir-*", "dev/shm/torch_*")
AFTERWARDS_S = 30.0
"""torch removes shared memory of processes that were killed, within seconds."""


def _only_torchft(name: PeerName) -> str:
    return "" if name == "torchft" else f"No module named {name!r}"


def test_of_all_peers_those_that_can_be_imported_are_measured_and_the_others_named_with_the_cause() -> None:
    choice = choose(["all"], _only_torchft)

    assert choice.names == ("torchft",)
    assert set(choice.left_out) == {"hivemind", "pccl"}
    assert "No module named 'pccl'" in choice.left_out["pccl"]
    assert "pip install pypccl" in choice.left_out["pccl"]


def test_nothing_is_imported_that_was_not_asked_for() -> None:
    tried: list[PeerName] = []

    def never(name: PeerName) -> str:
        tried.append(name)
        return ""

    assert choose([], never).names == ()
    assert choose(["torchft", "hivemind"], never).names == ("hivemind", "torchft")
    assert tried == ["hivemind", "torchft"]


@pytest.mark.parametrize("asked", [["hivemind"], ["all", "hivemind"]])
def test_a_peer_that_is_named_and_not_installed_is_refused(asked: list[Any]) -> None:
    with pytest.raises(EnvironmentFault, match=r"--peers hivemind: it cannot be imported: No module named 'hivemind'"):
        choose(asked, _only_torchft)


def test_what_is_called_like_a_peer_and_is_another_program_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pccl.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    assert "cannot import name" in why_not("pccl")


async def test_a_peer_that_breaks_in_one_process_is_left_out_in_all_and_the_report_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a torchft whose group cannot be made, when it is measured, then gloo's figures stand, and it says why."""
    package = tmp_path / "torchft"
    package.mkdir()
    (package / "__init__.py").touch()
    broken = "class ProcessGroupGloo:\n    def __init__(self, timeout): raise OSError('no such device')\n"
    (package / "process_group.py").write_text(broken)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    bench = ExchangeBench(nodes=2, mib=1, chunk_elements=2**15, iterations=1, peers=("torchft",))

    figures = await measure(bench, Group())

    assert figures["peers"]["gloo fp32"]["relative_error"] < 1e-6
    failed = figures["peers"]["torchft gloo fp32"]["failed"]
    assert failed == "it could not be opened: OSError: no such device (process 0)"
    console = Console(width=120)
    with console.capture() as shown:
        console.print(peers_table({"plain": figures}))
    assert f"torchft gloo fp32 failed: {failed}" in " ".join(shown.get().split())


async def test_a_peer_that_does_not_average_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a torchft that says it is done and has done nothing, when it is measured, then it has no figures."""
    package = tmp_path / "torchft"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "process_group.py").write_text(
        "class ProcessGroupGloo:\n"
        "    def __init__(self, timeout): pass\n"
        "    def configure(self, *_): pass\n"
        "    def allreduce(self, *_): return self\n"
        "    def wait(self): pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    bench = ExchangeBench(nodes=2, mib=1, chunk_elements=2**15, iterations=1, peers=("torchft",))

    figures = await measure(bench, Group())

    assert "away from the mean: it did not average" in figures["peers"]["torchft gloo fp32"]["failed"]


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_that_is_installed_averages_in_all_its_settings_and_leaves_nothing_behind(name: PeerName) -> None:
    if reason := why_not(name):
        pytest.skip(f"{name} cannot be imported: {reason}")
    before = _left_behind()
    words = (sys.executable, "-m", "prime_async", "bench", "exchange", *SMALL, "--peers", name)

    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    peers = result["plain"]["peers"]
    assert set(peers) == {"gloo fp32", *SETTINGS[name]}
    for setting, figures in peers.items():
        assert "failed" not in figures, figures
        assert len(figures["seconds"]) == 2
        assert figures["cpu_s_per_process"] >= 0
        eighth = "int8" in setting
        assert figures["relative_error"] < (0.05 if eighth else 1e-6)
        assert figures["wire_bytes"] > (0.45 if eighth else 1.9) * 2**20  # two nodes: each sends its vector once
        assert figures["bitwise_equal"] is True or name == "hivemind"
    deadline = time.monotonic() + AFTERWARDS_S
    while left := _left_behind() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _left_behind() -> set[str]:
    """What hivemind is known to leave: daemons, sockets and shared memory."""
    daemons = {
        str(path)
        for path in Path("/proc").glob("[0-9]*/comm")
        if _text(path).strip() in ("p2pd", "torch_shm_manager", "torch_shm_manag")
    }
    files = [found for pattern in LEFT for found in Path("/").glob(pattern)]
    return daemons | set(map(str, files))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
