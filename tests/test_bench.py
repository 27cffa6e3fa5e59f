"""A small benchmark: its figures are whole and right, and no process is left. Never a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from prime_async.bench import data
from prime_async.bench.exchange import GROUPS
from prime_async.bench.figures import Busy, Phases
from prime_async.bench.journal import Journal, mean_of
from prime_async.cli import app
from prime_async.work.chunks import Chunks

pytestmark = pytest.mark.xdist_group("real time")

SMALL = ("--nodes", "2", "--mib", "1", "--iterations", "2", "--chunk-elements", str(2**15), "--json")
COMMAND = (sys.executable, "-m", "prime_async", "bench", "exchange", *SMALL)
TIMEOUT_S = 180


def _processes_of(test: int) -> list[str]:
    """The benchmark's processes that ``test`` started, itself or through others: they inherit a mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if "prime_async.bench.worker" in command and f"PRIME_ASYNC_TEST={test}".encode() in environment:
            found.append(command)
    return found


def _start(**options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PRIME_ASYNC_TEST": str(os.getpid())}
    return subprocess.Popen(
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_a_small_benchmark_reports_every_figure_and_leaves_nothing_behind() -> None:
    process = _start()
    output, errors = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 0, errors
    result = json.loads(output.splitlines()[-1])
    assert (result["nodes"], result["mib"], result["iterations"], result["chunk_elements"]) == (2, 1, 2, 2**15)
    for mode in GROUPS:
        _assert_complete(result[mode])
    assert "relative L2 error" in errors  # the table
    assert _processes_of(os.getpid()) == []


def _assert_complete(figures: dict[str, Any]) -> None:
    assert len(figures["seconds"]) == len(figures["gloo_seconds"]) == 2
    assert all(s > 0 for s in (*figures["seconds"], *figures["gloo_seconds"], figures["ratio"]))
    assert figures["bitwise_equal"] is True
    assert len(figures["digests"]) == 2
    assert 0 < figures["relative_error"] < 0.0105
    # Two nodes: each sends half of the vector as a contribution and half as a mean, a byte and a bit per element.
    payloads = 2 * 2**18 * (1 + 4 / 256)
    assert payloads < figures["sent_bytes"] < 1.05 * payloads
    assert figures["wire_bytes"] > payloads
    assert figures["gloo_wire_bytes"] > 2 * 2**20
    assert set(figures["phases_s"]) == set(Phases.__struct_fields__)
    assert set(figures["busy_s"]) == set(Busy.__struct_fields__)
    assert min(figures["phases_s"].values()) >= 0
    assert figures["cpu_s_per_process"] > 0
    assert figures["peak_memory_vectors"] > 0
    (gloo,) = figures["peers"].values()
    assert gloo["seconds"] == figures["gloo_seconds"]
    assert gloo["relative_error"] < 1e-6
    assert gloo["bitwise_equal"] is True


def test_a_small_failover_benchmark_times_each_kill_and_counts_what_was_lost() -> None:
    command = (sys.executable, "-m", "prime_async", "bench", "failover", "--nodes", "3", "--runs", "1", "--json")
    done = subprocess.run(
        (*command, "--failure-timeout-s", "2.5"), capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for role in ("leader", "member"):
        (seconds,) = result[role]["seconds"]
        assert seconds == result[role]["median_s"] > 1.0  # the last heartbeat was up to a second before the kill
        assert result[role]["lost_tokens"] == 0
    assert "lost tokens" in done.stderr  # the table


def test_a_benchmark_that_is_killed_takes_its_processes_along() -> None:
    process = _start(start_new_session=True)
    deadline = time.monotonic() + TIMEOUT_S
    while len(_processes_of(os.getpid())) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "its processes did not start"
        time.sleep(0.05)

    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)

    while left := _processes_of(os.getpid()):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_the_relative_error_is_that_against_the_exact_mean() -> None:
    chunks, nodes = Chunks(1000, 256), 3
    vectors = torch.empty(nodes, 1000)
    for node in range(nodes):
        data.fill(vectors[node], chunks, node)
    exact = vectors.double().mean(0)
    moved = exact.clone()
    moved[0] += 0.01 * float(exact.norm())

    assert not torch.equal(vectors[0], vectors[1])
    assert data.relative_error(exact.float(), chunks, nodes) < 1e-7
    assert data.relative_error(moved.float(), chunks, nodes) == pytest.approx(0.01, rel=1e-4)
    assert data.relative_error(moved.float(), chunks, nodes, range(1, 4, 2)) < 1e-7  # the first element is in chunk 0


def test_phases_follow_each_other_and_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal()
    moments = iter((1.0, 2.0, 3.0, 5.0, 2.5, 6.0, 6.0, 7.0, 8.0, 9.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    for work in ("encode", "contribution", "mean", "reduce", "apply"):
        with journal.entry(work):
            pass

    phases = journal.phases(began=0.5, ended=10.0)

    # The last mean came before the last reduction ended, so nothing waited for it.
    expected = {"encode": 1.5, "plan": 0.5, "contributions": 2.5, "reduce": 2.0, "means": 0, "commit": 1, "apply": 2}
    assert mean_of([phases]) == pytest.approx(expected)
    assert sum(expected.values()) == 9.5
    assert mean_of([journal.busy()]) == {"encode": 1.0, "reduce": 1.0, "apply": 1.0}


def test_models_to_restart_are_named_one_after_the_other() -> None:
    _, bound, _ = app.parse_args(["bench", "restart", "--models", "llama-1m", "llama-10m"], exit_on_error=False)
    assert bound.arguments["models"] == ["llama-1m", "llama-10m"]
