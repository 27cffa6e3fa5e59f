"""The network lab does what it says, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prime_async.bench.netlab import PREFIX, Lab, LabError, Links, address, why_not
from tests.processes import ROOT

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no network lab: {why_not()}"),
    pytest.mark.xdist_group("real time"),
]

LIMIT_S = 20.0
ECHO = """
import socket, sys
with socket.create_server(("0.0.0.0", 7)) as server:
    print("listening", flush=True)
    while True:
        stream, _ = server.accept()
        with stream:
            while data := stream.recv(65536):
                stream.sendall(data)
"""
CALL = """
import socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 7), timeout=float(sys.argv[3])) as stream:
    size = int(sys.argv[2])
    stream.sendall(bytes(size))
    while size:
        size -= len(stream.recv(65536))
print(time.monotonic() - began)
"""


def hosts_left() -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"{PREFIX}{os.getpid()}x*")]


@pytest.fixture
def links() -> Links:
    return Links(hosts=3, rate_mbit=20, delay_ms=10)


@pytest.fixture
def lab(links: Links) -> Iterator[Lab]:
    """Three hosts, the last of which echoes."""
    with Lab(links) as lab:
        command = lab.command(2, [sys.executable, "-c", ECHO])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            yield lab
            server.kill()


def call(lab: Lab, host: int, target: int = 2, size: int = 1, timeout_s: float = LIMIT_S) -> float | None:
    """Seconds until ``size`` bytes came back from ``target``, connecting included; None if they did not."""
    command = lab.command(host, [sys.executable, "-c", CALL, address(target), str(size), str(timeout_s)])
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3 * LIMIT_S)
    if done.returncode != 0:
        assert "TimeoutError" in done.stderr or "ConnectionRefusedError" in done.stderr, done.stderr
        return None
    return float(done.stdout)


def test_a_packet_takes_its_delay_each_way(lab: Lab) -> None:
    lab.set_delay(1, 2, 100)
    near, far = call(lab, 0), call(lab, 1)
    assert near is not None
    assert far is not None
    assert near >= 4 * 0.010  # there and back to connect, and again for the byte
    assert far >= 4 * 0.100


def test_bytes_are_counted_and_paced(lab: Lab) -> None:
    lab.set_rate(0, 4, 8)
    took_s = call(lab, 0, size=500_000)
    assert took_s is not None
    assert took_s >= 500_000 * 8 / 4e6
    sent = lab.bytes_sent()
    assert 500_000 < sent[0, 2] < 650_000
    assert sent.get((1, 2), 0) == 0


def test_nothing_passes_a_cut_or_a_split_until_it_heals(lab: Lab) -> None:
    lab.cut(0)
    assert call(lab, 0, timeout_s=0.5) is None
    assert call(lab, 1) is not None
    lab.heal()
    lab.split([0, 1], [2])
    assert call(lab, 1, timeout_s=0.5) is None
    lab.heal()
    assert call(lab, 0) is not None


def test_a_blinking_host_is_there_between_its_absences(lab: Lab) -> None:
    lab.blink(2, off_s=0.5, period_s=1000)
    assert call(lab, 0, timeout_s=0.3) is None
    assert call(lab, 0) is not None


def test_loss_of_all_packets_loses_all(lab: Lab) -> None:
    lab.set_loss(100)
    assert call(lab, 0, timeout_s=0.5) is None


def test_nobody_connects_to_a_host_behind_nat_which_connects_to_others(lab: Lab) -> None:
    lab.put_behind_nat(2)
    assert call(lab, 0, timeout_s=0.5) is None
    lab.open_ports(2)
    lab.put_behind_nat(0)
    assert call(lab, 0) is not None


def test_packets_to_a_dropped_port_vanish(lab: Lab) -> None:
    lab.drop_ports(2, 7, 9)
    assert call(lab, 0, timeout_s=0.5) is None
    lab.open_ports(2)
    assert call(lab, 0) is not None


def test_two_labs_do_not_meet(lab: Lab, links: Links) -> None:
    with Lab(links) as other:
        assert len(hosts_left()) == 6
        assert call(other, 0) is None  # nobody echoes there
    assert len(hosts_left()) == 3
    assert call(lab, 0) is not None


@pytest.mark.parametrize("fails", [True, False])
def test_a_lab_leaves_no_host_and_no_process(links: Links, fails: bool) -> None:
    try:
        with Lab(links) as lab:
            sleeper = subprocess.Popen(lab.command(1, ["sleep", "1000"]))
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert sleeper.wait(LIMIT_S) == -signal.SIGKILL
    assert hosts_left() == []


def test_a_lab_whose_maker_is_killed_goes_away(links: Links) -> None:
    code = f"""
import subprocess, sys, time
from prime_async.bench.netlab import Lab, {Links.__name__}
with Lab({links}) as lab:
    subprocess.Popen(lab.command(0, ["sleep", "1000"]))
    print("up", flush=True)
    time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "up\n"
        assert list(Path("/run/netns").glob(f"{PREFIX}{maker.pid}x*"))
        maker.kill()
    end = time.monotonic() + LIMIT_S
    while list(Path("/run/netns").glob(f"{PREFIX}{maker.pid}x*")):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_lab_that_cannot_start_says_so_and_leaves_nothing() -> None:
    with pytest.raises(LabError, match="the switch ended"), Lab(Links(hosts=2, mtu=1)):
        pass
    assert hosts_left() == []
