"""The command, as a user runs it: real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prime_async.config.load import load_config
from prime_async.config.spec import run_id
from prime_async.errors import ReplayMismatchError
from prime_async.log import read_log, replay
from tests.commands import LIMIT_S, SMALL, command, lines_of, run, wait_for
from tests.processes import processes_about

pytestmark = pytest.mark.xdist_group("real time")


@pytest.mark.parametrize("name", ["demo", "init", "check", "run", "data", "replay", "audit", "bench"])
def test_every_command_explains_itself(name: str) -> None:
    assert "Usage: prime-async" in run(name, "--help").stdout


@pytest.mark.parametrize("arguments", [(), ("bench",)])
def test_the_list_of_commands_says_what_each_does(arguments: tuple[str, ...]) -> None:
    listed = run(*arguments, "--help", env={**os.environ, "COLUMNS": "200"}).stdout.splitlines()
    commands = [line.strip("│ ") for line in listed if re.match("│ [a-z]", line)]
    assert len(commands) > 7
    assert all(re.fullmatch(r"[a-z]+ +[A-Z].*\.", command) for command in commands), commands


def test_commands_that_do_not_train_start_without_torch() -> None:
    """Given what a user runs to begin, when it is imported, then torch is not: it takes a second."""
    names = ("init", "invite", "check", "join", "docs", "status", "run", "demo")
    script = f"import sys, {', '.join(f'prime_async.cli.{name}' for name in names)}; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_init_check_and_run_lead_a_new_user_to_a_training_node(tmp_path: Path) -> None:
    """Given a fresh directory, when a user does as each command says, then a node trains, stops well, and goes on."""
    home = tmp_path / "node"
    said = run("init", home, *SMALL).stdout
    assert f"prime-async run {home / 'node.toml'}" in said
    assert (home / "node.key").stat().st_mode & 0o777 == 0o600

    report = json.loads(run("check", home / "node.toml", "--json").stdout.splitlines()[-1])
    assert report["ok"]
    subjects = {f["subject"] for f in report["findings"]}
    assert {"config", "key", "ports", "address", "device", "data", "memory", "disk"} <= subjects

    with subprocess.Popen(command("run", home / "node.toml", "--events"), stdout=subprocess.PIPE, text=True) as node:
        lines = lines_of(node)
        wait_for(lines, "round_finished")
        node.send_signal(signal.SIGINT)
        last = wait_for(lines, "state_saved")
        list(lines)
        assert node.wait(LIMIT_S) == 0
    assert last["round"] >= 2  # the round that was under way is finished

    with subprocess.Popen(command("run", home / "node.toml", "--events"), stdout=subprocess.PIPE, text=True) as node:
        lines = lines_of(node)
        assert wait_for(lines, "round_finished")["round"] == last["round"]
        node.send_signal(signal.SIGTERM)
        list(lines)
        assert node.wait(LIMIT_S) == 0


def test_a_second_signal_stops_a_node_at_once_and_keeps_its_state(tmp_path: Path) -> None:
    """Given a round that takes long, when a node is told to stop twice, then it does not finish the round."""
    home = tmp_path / "node"
    run("init", home, *SMALL, "--set=run.round.inner_steps=100000")
    with subprocess.Popen(
        command("run", home / "node.toml", "--events"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as node:
        wait_for(lines_of(node), "inner_step_done")
        node.send_signal(signal.SIGINT)
        assert node.stderr is not None
        assert any("stopping_after_the_round" in line for line in node.stderr)
        node.send_signal(signal.SIGINT)
        events, _ = node.communicate(timeout=LIMIT_S)
        assert '"round_finished"' not in events
        assert node.returncode == 130


def test_a_node_leaves_before_the_end_of_a_round_that_takes_longer_than_it_may(tmp_path: Path) -> None:
    """Given a long round and --leave-within, when a node is told to stop once, then it leaves in good order."""
    home = tmp_path / "node"
    run("init", home, *SMALL, "--set=run.round.inner_steps=100000")
    with subprocess.Popen(
        command("run", home / "node.toml", "--events", "--leave-within", "1"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as node:  # fmt: skip
        wait_for(lines_of(node), "inner_step_done")
        node.send_signal(signal.SIGTERM)
        events, errors = node.communicate(timeout=LIMIT_S)
    assert node.returncode == 0
    assert "leaving_before_the_end_of_the_round" in errors
    assert '"round_finished"' not in events


def test_the_line_that_init_prints_makes_a_node_of_the_same_run(tmp_path: Path) -> None:
    """Given a founder with settings of its own, when its line is run elsewhere, then both have one run id."""
    said = run("init", tmp_path / "first", *SMALL, '--set=run.name="ours"', "--set=run.outer.momentum=0.5").stdout
    line = next(text.strip() for text in said.splitlines() if text.strip().startswith("prime-async init --join"))
    line = re.sub(r":0(?= )", ":7700", line)  # the test's founder listens on any free port

    second = tmp_path / "second"
    subprocess.run(
        line.replace("prime-async init", f'"{sys.executable}" -m prime_async init {second}'),
        shell=True,
        check=True,
        capture_output=True,
        timeout=LIMIT_S,
    )

    ours, theirs = load_config(tmp_path / "first" / "node.toml"), load_config(second / "node.toml")
    assert run_id(ours.run) == run_id(theirs.run)
    assert theirs.run.name == "ours"
    assert len(theirs.node.join) == 1


def test_init_says_how_to_join_with_a_string_that_brings_the_settings_of_the_run(tmp_path: Path) -> None:
    """A founder is told of `invite`, which works as printed; a joiner of `join`, and that [run] was not fetched."""
    founder = run("init", tmp_path / "first", "--set=node.advertise=10.1.2.3").stdout
    line = next(text.strip() for text in founder.splitlines() if text.strip().startswith("prime-async invite"))
    assert run(*line.split()[1:]).stdout.startswith("prime-async:")

    joiner = run("init", tmp_path / "second", "--join", f"{'a' * 64}@10.1.2.3:7700").stdout
    assert f"[run] of {tmp_path / 'second' / 'node.toml'} is what --set said and the defaults" in joiner
    assert "`prime-async join STRING`" in joiner


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    run("init", tmp_path)
    before = (tmp_path / "node.toml").read_bytes(), (tmp_path / "node.key").read_bytes()
    assert "is already there" in run("init", tmp_path, code=2).stderr
    assert ((tmp_path / "node.toml").read_bytes(), (tmp_path / "node.key").read_bytes()) == before


def test_a_wrong_configuration_is_said_whole_and_nothing_starts(tmp_path: Path) -> None:
    run("init", tmp_path)
    path = tmp_path / "node.toml"
    path.write_text(path.read_text().replace("\n[node]", "\nsead = 3\n\n[node]\nportt = 1", 1))
    said = run("run", path, code=2)
    assert "sead: unknown" in said.stderr
    assert "did you mean node.port?" in said.stderr
    assert said.stdout == ""
    assert "Traceback" not in said.stderr


def test_check_names_what_is_in_the_way_and_the_fix(tmp_path: Path) -> None:
    """Given a taken port, a missing key and a member that nobody can reach, when checked, then all three are said."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run("init", tmp_path, "--join", f"{'a' * 64}@127.0.0.1:1", *SMALL, f"--set=node.port={port}")
        (tmp_path / "node.key").unlink()
        done = run("check", tmp_path / "node.toml", "--json", code=1)
    problems = {
        f["subject"]: f for f in json.loads(done.stdout.splitlines()[-1])["findings"] if f["verdict"] == "problem"
    }
    assert problems.keys() == {"key", "ports", "join"}
    assert all(f["fix"] for f in problems.values())
    assert str(port) in problems["ports"]["text"]


def test_data_makes_a_token_file_that_a_node_can_train_on(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 4000)
    said = run("data", text, "--out", tmp_path / "book.tokens").stdout
    digest = re.search(r'data_digest = "([0-9a-f]{64})"', said)
    assert digest is not None
    home = tmp_path / "node"
    tokens = ('--set=run.data="tokens"', f'--set=run.data_digest="{digest[1]}"')
    run("init", home, *SMALL, *tokens, f'--set=node.data_path="{tmp_path / "book.tokens"}"')
    assert json.loads(run("check", home / "node.toml", "--json").stdout.splitlines()[-1])["ok"]


def test_the_demo_trains_equal_weights_and_its_logs_replay(tmp_path: Path) -> None:
    """Given nothing, when the demo runs, then its JSON has every figure, and each node's log replays equal."""
    done = run("demo", "--nodes", "2", "--rounds", "1", "--json", "--keep", tmp_path / "kept")
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["nodes"], result["rounds"], result["inner_steps"]) == (2, 1, [50, 50])
    assert result["heldout_loss_before"] > 5.0
    assert result["heldout_loss_after"] < 3.5
    assert len(result["state_digests"]) == 2
    assert len(set(result["state_digests"])) == 1
    assert result["equal_after_every_round"]
    assert all(sent > result["parameters"] for sent in result["bytes_sent"])  # int8, both ways, and headers
    assert result["reduction"] > 150
    assert all(0.5 < share <= 1 for share in result["training_share"])
    assert result["sample"].startswith("KING HENRY.")
    assert 0 < result["nodes_s"] < result["wall_s"]
    nodes = f"{result['nodes_s']:.0f} s"
    assert f"prime-async demo, nodes run for {nodes}" in done.stderr
    assert f"wall time  {result['wall_s']:.0f} s: the {nodes} of the nodes, and then the text below" in done.stderr
    assert processes_about(tmp_path) == []
    for name in ("node-1", "node-2"):
        log = read_log(tmp_path / "kept" / name / "messages.log")
        assert sum(1 for _ in replay(log)) == len(log.records) > 50
        assert "all as recorded" in run("replay", tmp_path / "kept" / name / "messages.log").stdout


def test_a_demo_whose_leader_is_killed_goes_on_and_all_its_values_are_right(tmp_path: Path) -> None:
    """Given chaos, when the leader is killed in mid run, then the others lose nothing, and the audit finds nothing."""
    done = run("demo", "--chaos", "--rounds", "6", "--json", "--keep", tmp_path / "kept")
    result = json.loads(done.stdout.splitlines()[-1])
    chaos, audit = result["chaos"], result["chaos"]["audit"]
    assert (chaos["signal"], chaos["in_exchange_of_round"] >= 2) == ("SIGKILL", True)
    assert set(chaos["lost_tokens"]) == {"node-1", "node-2", "node-3"} - {chaos["killed"]}
    assert set(chaos["lost_tokens"].values()) == {0}
    assert result["equal_after_every_round"]
    assert result["heldout_loss_after"] < result["heldout_loss_before"] - 2
    assert (audit["differences"], audit["unchecked"]) == ([], [])
    assert audit["means"] == 6 * 16
    assert all(count >= 2 * 16 for count in audit["counted"].values())
    assert f"{chaos['killed']}, the leader, is killed" in done.stderr
    assert processes_about(tmp_path) == []

    again = run("audit", tmp_path / "kept", "--json")
    assert json.loads(again.stdout.splitlines()[-1]) == audit
    mean = next((tmp_path / "kept").rglob("mean-*"))
    mean.write_bytes(mean.read_bytes()[:-1] + b"!")
    assert f"{mean}: damaged" in run("audit", tmp_path / "kept", code=1).stdout


def test_chaos_needs_somebody_who_goes_on() -> None:
    assert "needs at least 3 --nodes and 4 --rounds" in run("demo", "--chaos", "--nodes", "2", code=2).stderr


def test_a_log_that_was_altered_does_not_replay(tmp_path: Path) -> None:
    run("demo", "--nodes", "1", "--rounds", "1", "--json", "--keep", tmp_path / "kept")
    path = tmp_path / "kept" / "node-1" / "messages.log"
    data = path.read_bytes()
    place = data.index(b"steps_done")
    changed = data.index(b"esteps", place - 60)
    altered = bytearray(data)
    altered[changed + 6 + 1] ^= 1  # the number of steps that were done
    path.write_bytes(altered)
    with pytest.raises(ReplayMismatchError, match=r"event \d+, number \d+ of training"):
        list(replay(read_log(path)))
    assert "other effects than the recorded ones" in run("replay", path, code=1).stderr


@pytest.mark.parametrize("after", ["at the start", "while it trains"])
def test_ctrl_c_ends_the_demo_without_a_trace(tmp_path: Path, after: str) -> None:
    """Given a demo, when it is interrupted, then no process, no file and no traceback is left."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command("demo", "--rounds", "500"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as demo:
        wait_until(lambda: len(processes_about(tmp_path)) >= 1)
        if after == "while it trains":
            wait_until(lambda: len(list(tmp_path.glob("*/node-3/messages.log"))) == 1)
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=LIMIT_S)
    assert demo.returncode == 130
    assert "Traceback" not in errors
    assert processes_about(tmp_path) == []
    assert list(tmp_path.glob("prime-async*")) == []


def test_nodes_whose_demo_was_killed_end_by_themselves(tmp_path: Path) -> None:
    with subprocess.Popen(
        command("demo", "--rounds", "500", "--keep", tmp_path / "kept"), stdout=subprocess.DEVNULL
    ) as demo:
        wait_until(lambda: len(list(tmp_path.glob("kept/node-3/messages.log"))) == 1)
        demo.kill()
    wait_until(lambda: processes_about(tmp_path) == [])


def wait_until(condition: Any) -> None:
    """Poll what another process does; bounded."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
