"""What the README, and its page on programs of your own, show is run here, as it stands there."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx
import pytest

import prime_async
from prime_async.testing import Simulation
from prime_async.transport.keys import read_key_file
from tests.processes import processes_about
from tests.programs import README, block
from tests.pytest_plugin import LOADED

pytestmark = pytest.mark.xdist_group("real time")
LIMIT_S = 120.0


def test_a_users_own_model_and_data_train_in_the_embedding_program(tmp_path: Path) -> None:
    """Given the README's own model, TOML and program, when the program runs, then rounds end and the loss falls."""
    (tmp_path / "mine.py").write_text(block("python", "def build_model"))
    (tmp_path / "embed.py").write_text(block("python", "open_node"))
    root = Path(prime_async.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    settings = ["run.model=mine:build_model", "run.data=mine:open_data", "run.rounds=2", "run.sequence_length=8"]
    settings += ["run.round.inner_steps=30", "run.inner.learning_rate=0.05", "run.inner.warmup_steps=1"]
    settings += ["run.exchange.chunk_elements=1024", "node.host=127.0.0.1", "node.port=0", "node.bulk_port=0"]
    init = [sys.executable, "-m", "prime_async", "init", ".", *(f"--set={s}" for s in settings)]
    subprocess.run(init, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=LIMIT_S)

    done = subprocess.run(
        [sys.executable, "embed.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    losses = [float(text) for text in re.findall(r"^step \d+: (\d+\.\d+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 60
    assert losses[-1] < losses[0] / 2
    assert re.findall(r"^round (\d): [0-9a-f]{16}, \d+ bytes sent$", done.stdout, re.MULTILINE) == ["0", "1"]


def test_the_tests_that_the_readme_shows_pass(tmp_path: Path) -> None:
    """Given the README's test file and a log of a node, when pytest runs it, then both tests pass."""
    simulation = Simulation(2, 1)
    simulation.record_to(tmp_path)
    simulation.run_for(20.0)
    (tmp_path / "n1.log").rename(tmp_path / "messages.log")
    (tmp_path / "test_mine.py").write_text(block("python", "replay_log"))
    environment = {**os.environ, "PYTHONPATH": str(Path(prime_async.__file__).parent.parent)}

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "trio_mode=true", *LOADED],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )

    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_a_node_trains_inside_a_real_web_application(tmp_path: Path) -> None:
    """Given the README's FastAPI app under uvicorn, when it is asked over HTTP, then it answers while its node trains.

    And when it is told to end, then the node leaves, with its state on disk, and the server ends as it should.
    """
    (tmp_path / "app.py").write_text(block("python", "lifespan"))
    root = Path(prime_async.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    settings = ["run.model=llama-1m", "run.sequence_length=16", "run.round.inner_steps=2", "run.inner.batch_size=1"]
    settings += ["node.host=127.0.0.1", "node.port=0", "node.bulk_port=0", "node.threads=1"]
    init = [sys.executable, "-m", "prime_async", "init", ".", *(f"--set={s}" for s in settings)]
    subprocess.run(init, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=LIMIT_S)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "uvicorn", "app:app", "--fd", str(listener.fileno())]
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment, pass_fds=[listener.fileno()], stderr=subprocess.PIPE, text=True
        )
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=address, timeout=LIMIT_S) as client:
            progress = client.get("/progress").json()  # answered once the node is open
            until = time.monotonic() + LIMIT_S
            while progress["round"] < 2 and time.monotonic() < until:
                time.sleep(0.05)
                progress = client.get("/progress").json()
            assert client.get("/openapi.json").status_code == 200
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=LIMIT_S)
    finally:
        server.kill()
        server.wait()

    assert progress["round"] >= 2, said
    assert progress["steps"] >= 4
    assert len(progress["id"]) == 64
    assert "Application shutdown complete" in said
    assert server.returncode in (0, -signal.SIGTERM), said  # uvicorn ends by the signal that it was told to end by
    assert "Traceback" not in said
    assert list((tmp_path / "state").glob("*.safetensors"))
    assert processes_about(tmp_path) == []


def test_friends_in_two_processes_average_a_tensor(tmp_path: Path) -> None:
    """Given the README's program in two processes, when each gives a number, then both print the mean."""
    (tmp_path / "friends.py").write_text(block("python", "open_exchange"))
    environment = {**os.environ, "PYTHONPATH": str(Path(prime_async.__file__).parent.parent)}
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [listener.getsockname()[1] for listener in (first, second)]
    common = ["--set=run.min_members=2", "--set=run.exchange.codec=fp32", "--set=node.host=127.0.0.1"]

    def prime(*words: str) -> str:
        command = [sys.executable, "-m", "prime_async", *words]
        run = partial(subprocess.run, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        return str(run(command, timeout=LIMIT_S).stdout)

    prime("init", "one", f"--set=node.port={ports[0]}", f"--set=node.bulk_port={ports[1]}", *common)
    keys = {name: tmp_path / name / "node.key" for name in ("one", "two")}
    contact = f"{read_key_file(keys['one']).id}@127.0.0.1:{ports[0]}"
    prime("init", "two", f'--set=node.join=["{contact}"]', "--set=node.port=0", "--set=node.bulk_port=0", *common)
    (tmp_path / "one" / "allowed-keys.txt").write_text(read_key_file(keys["two"]).id)

    command = [sys.executable, "friends.py"]
    friends = [
        subprocess.Popen(
            [*command, f"{name}/node.toml", number],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, number in (("one", "1.0"), ("two", "4.0"))
    ]
    try:
        said = [friend.communicate(timeout=LIMIT_S)[0] for friend in friends]
    finally:
        for friend in friends:
            friend.kill()
            friend.wait()

    assert all("the mean is 2.5" in text for text in said), said
    assert [friend.returncode for friend in friends] == [0, 0], said


def test_a_users_own_actor_runs_beside_ours_and_its_log_replays(tmp_path: Path) -> None:
    """Given the README's actor on a node that records, when two rounds are done, then it is replayed."""
    (tmp_path / "hello.py").write_text(block("python", "OwnActor"))
    environment = {**os.environ, "PYTHONPATH": str(Path(prime_async.__file__).parent.parent)}
    settings = ["run.rounds=2", "run.sequence_length=16", "run.round.inner_steps=1", "run.inner.batch_size=1"]
    settings += ["node.host=127.0.0.1", "node.port=0", "node.bulk_port=0", "node.record=messages.log"]

    def python(*words: str) -> str:
        run = partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return str(run([sys.executable, *words], timeout=LIMIT_S).stdout)

    python("-m", "prime_async", "init", ".", *(f"--set={s}" for s in settings))
    said = python("hello.py")
    replayed = python("-m", "prime_async", "replay", "messages.log", "--own", "hello:hello")

    assert "Show(text='round 0 is over')" in said
    assert "own/hello" in replayed


def test_every_command_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"prime-async ([a-z]+)", README))
    said = subprocess.run(
        [sys.executable, "-m", "prime_async", "--help"], capture_output=True, text=True, check=True, timeout=LIMIT_S
    ).stdout

    assert named >= {"demo", "init", "check", "run", "data", "replay", "bench"}
    assert [name for name in named if f" {name} " not in said] == []


def test_the_folders_that_the_readme_names_exist() -> None:
    root = Path(__file__).parent.parent
    paths = re.findall(r"`(prime_async/[a-z/]+)`", README)

    assert paths
    assert [place for place in paths if not (root / place).exists()] == []
