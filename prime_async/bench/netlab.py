"""Several hosts on one machine, joined by slow, lossy, breakable links.

A host is a network namespace with the address ``10.77.0.(i + 1)`` on a TUN device. Every packet between two hosts
passes through one process, the switch, which delays it, paces it to the sender's uplink and the receiver's downlink,
drops it with some probability, or cuts it. (Not every kernel has netem, so this lives in user space. About 400 Mbit/s
pass before the switch is the bottleneck: stay below 200 to measure, all hosts together.)

It needs root, ``/dev/net/tun``, iproute2 and nftables; :func:`why_not` says what is missing. Namespaces belong to one
:class:`Lab` and have its process in their names, so that labs do not meet. Leaving a lab ends every process in its
hosts and removes them; if the process that made it dies, the switch does the same.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import json
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

SUBNET: Final = bytes([10, 77, 0])
NETWORK: Final = "10.77.0.0"
PREFIX: Final = "primelab"
BATCH: Final = 64
"""Packets of one host that the switch takes before it looks at the others."""
STOP_S: Final = 20.0

_TUNSETIFF: Final = 0x400454CA
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_labs = itertools.count()

_FIREWALL: Final = """
table inet lab {
    chain input {
        type filter hook input priority 0; policy accept;
        iifname "lo" accept
        RULE
    }
}
"""


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


@cache
def why_not() -> str | None:
    """Why there can be no lab on this machine; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "nft", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: install iproute2, nftables and util-linux"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun is missing"
    rules = _FIREWALL.replace("RULE", "ct state new drop")
    tried = subprocess.run(["unshare", "--net", "nft", "-f", "-"], input=rules, text=True, capture_output=True)
    return None if tried.returncode == 0 else f"this kernel has no namespaces or no nftables: {tried.stderr.strip()}"


@dataclass(frozen=True, kw_only=True)
class Links:
    """What all links have in common at first."""

    hosts: int
    rate_mbit: float = 100.0  # of each host, each way
    delay_ms: float = 20.0  # one-way, between any two hosts
    loss_percent: float = 0.0  # of packets
    queue_ms: float = 200.0  # of packets that a link holds before it drops
    mtu: int = 1500
    congestion: str = "reno"  # TCP's control of it: every Linux has this one, whatever its default; also cubic, bbr
    seed: int = 0


class LabError(Exception):
    """The lab is not what it should be."""


class Lab:
    """The network, from ``with Lab(Links(hosts=3)) as lab`` to the end of the block."""

    def __init__(self, links: Links) -> None:
        self.hosts = links.hosts
        self._links = links
        self._name = f"{PREFIX}{os.getpid()}x{next(_labs)}"
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        reason = why_not()
        if reason is not None:
            raise LabError(reason)
        command = [sys.executable, "-m", "prime_async.bench.netlab", self._name, json.dumps(asdict(self._links))]
        self._switch = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that Ctrl-C reaches us first
        )
        try:
            self._reply()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` in a host, as the process that it starts."""
        return ["ip", "netns", "exec", namespace(self._name, host), *command]

    def bytes_sent(self) -> dict[tuple[int, int], int]:
        """Bytes of IP packets by (from, to), without those that were dropped."""
        return {(source, target): count for source, target, count in self._ask("bytes")}

    def set_rate(self, host: int, up_mbit: float, down_mbit: float) -> None:
        self._ask("rate", host, up_mbit, down_mbit)

    def set_delay(self, one: int, other: int, delay_ms: float) -> None:
        self._ask("delay", one, other, delay_ms)

    def set_loss(self, percent: float) -> None:
        self._ask("loss", percent)

    def cut(self, host: int) -> None:
        """From now on this host hears and reaches nobody."""
        self._ask("cut", host)

    def split(self, *islands: Sequence[int]) -> None:
        """From now on packets pass only within an island."""
        self._ask("split", *[list(island) for island in islands])

    def heal(self) -> None:
        """Undo cuts, splits and blinking."""
        self._ask("heal")

    def blink(self, host: int, off_s: float, period_s: float) -> None:
        """From now on nothing passes to or from this host in the first ``off_s`` of every ``period_s``."""
        self._ask("blink", host, off_s, period_s)

    def put_behind_nat(self, host: int) -> None:
        """From now on nobody opens a connection to this host: what would is dropped without an answer."""
        self._filter(host, "ct state new drop")

    def drop_ports(self, host: int, *ports: int) -> None:
        """From now on packets to these TCP ports of the host vanish, those of open connections too."""
        self._filter(host, f"tcp dport {{ {', '.join(map(str, ports))} }} drop")

    def open_ports(self, host: int) -> None:
        """Undo :meth:`put_behind_nat` and :meth:`drop_ports`."""
        self._filter(host, "")

    def _filter(self, host: int, rule: str) -> None:
        rules = "table inet lab\ndelete table inet lab\n" + _FIREWALL.replace("RULE", rule)
        subprocess.run(self.command(host, ["nft", "-f", "-"]), input=rules, text=True, check=True)

    def _ask(self, *words: object) -> Any:
        assert self._switch is not None
        assert self._switch.stdin is not None
        self._switch.stdin.write(json.dumps(words) + "\n")
        self._switch.stdin.flush()
        return self._reply()

    def _reply(self) -> Any:
        assert self._switch is not None
        assert self._switch.stdout is not None
        line = self._switch.stdout.readline()
        if not line:
            raise LabError(f"the switch ended with status {self._switch.wait(STOP_S)}; stderr says why")
        return json.loads(line)

    def _close(self) -> None:
        if self._switch is not None:
            try:
                self._switch.communicate(timeout=STOP_S)  # closes its stdin, which ends it
            except subprocess.TimeoutExpired:
                self._switch.kill()
                self._switch.communicate()
        for host in range(self.hosts):
            remove_host(self._name, host)  # in case it could not do so itself


def namespace(lab: str, host: int) -> str:
    return f"{lab}h{host}"


def remove_host(lab: str, host: int) -> None:
    """End every process in a host, and remove it, if it is there."""
    name = namespace(lab, host)
    if not Path("/run/netns", name).exists():
        return
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _make_host(lab: str, host: int, links: Links) -> int:
    """The descriptor of the host's TUN device: what the host sends is read from it, and the other way round."""
    name, device = namespace(lab, host), f"nl{os.getpid()}t{host}"
    _ip("netns", "add", name)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    _ip("link", "set", device, "netns", name)
    _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", name, "addr", "add", f"{address(host)}/24", "dev", device)
    _ip("-n", name, "link", "set", device, "mtu", str(links.mtu), "txqueuelen", "1000", "up")
    # By route: as a host's default, a namespace may choose those alone that the system allows to everybody.
    _ip("-n", name, "route", "replace", f"{NETWORK}/24", "dev", device, "congctl", links.congestion)
    return tun


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stdout=subprocess.DEVNULL)


class Switch:
    """Moves the packets. ``tuns``: a TUN device for each host."""

    def __init__(self, links: Links, tuns: Sequence[int]) -> None:
        n = links.hosts
        self._tuns = tuns
        self._up_rate = [links.rate_mbit * 1e6 / 8] * n  # bytes/s
        self._down_rate = [links.rate_mbit * 1e6 / 8] * n
        self._delay_s = [[links.delay_ms / 1e3] * n for _ in range(n)]
        self._loss = links.loss_percent / 100
        self._queue_s = links.queue_ms / 1e3
        self._chance = random.Random(links.seed)
        self._island = [0] * n  # packets pass only within an island
        self._blink: dict[int, tuple[float, float, float]] = {}  # host -> (since, off_s, period_s)
        self._up_free = [0.0] * n  # when the link has sent all it holds
        self._down_free = [0.0] * n
        self._sent: Counter[tuple[int, int]] = Counter()
        self._coming: list[tuple[float, int, int, int, bytes]] = []  # at a downlink: (when, tie, from, to, packet)
        self._due: list[tuple[float, int, int, bytes]] = []  # at a host: (when, tie, to, packet)
        self._ties = itertools.count()

    def set_rate(self, host: int, up_mbit: float, down_mbit: float) -> None:
        """Of a host's links, from the next packet on."""
        self._up_rate[host], self._down_rate[host] = up_mbit * 1e6 / 8, down_mbit * 1e6 / 8

    def serve(self, commands: int) -> None:
        """Move packets, and obey the JSON lines that come from the descriptor ``commands``, until it is closed."""
        poll = select.epoll()
        host_of = {tun: host for host, tun in enumerate(self._tuns)}
        for descriptor in (commands, *self._tuns):
            poll.register(descriptor, select.EPOLLIN)
        wait_s = -1.0
        while True:
            for descriptor, _ in poll.poll(wait_s):
                if descriptor in host_of:
                    self._take(host_of[descriptor])
                elif not self._obey(commands):
                    return
            wait_s = self._deliver()

    def _take(self, source: int) -> None:
        now = time.monotonic()
        with suppress(BlockingIOError):
            for _ in range(BATCH):
                self._accept(source, os.read(self._tuns[source], 65535), now)

    def _accept(self, source: int, packet: bytes, now: float) -> None:
        target = packet[19] - 1
        is_ours = packet[0] >> 4 == 4 and packet[16:19] == SUBNET and 0 <= target < len(self._tuns)
        if not is_ours or target == source or self._is_cut(source, target, now) or self._chance.random() < self._loss:
            return
        up = max(now, self._up_free[source])
        if up - now > self._queue_s:
            return
        self._up_free[source] = up + len(packet) / self._up_rate[source]
        when = self._up_free[source] + self._delay_s[source][target]
        heapq.heappush(self._coming, (when, next(self._ties), source, target, packet))

    def _pass_down(self, now: float) -> None:
        """Let the downlinks take what has come to them, in the order in which it came.

        Only then: were a downlink promised to a packet that still waits for its uplink, it could not be used by those
        that come from elsewhere meanwhile.
        """
        while self._coming and self._coming[0][0] <= now:
            came, _, source, target, packet = heapq.heappop(self._coming)
            free = self._down_free[target]
            if free - came > self._queue_s:
                continue
            # It passes while it comes: a packet takes its time once if both links are idle, and not twice.
            self._down_free[target] = max(came, free + len(packet) / self._down_rate[target])
            heapq.heappush(self._due, (self._down_free[target], next(self._ties), target, packet))
            self._sent[source, target] += len(packet)

    def _is_cut(self, source: int, target: int, now: float) -> bool:
        return self._island[source] != self._island[target] or self._is_off(source, now) or self._is_off(target, now)

    def _is_off(self, host: int, now: float) -> bool:
        if host not in self._blink:
            return False
        since, off_s, period_s = self._blink[host]
        return (now - since) % period_s < off_s

    def _deliver(self) -> float:
        """Hand over what is due; gives the seconds until the next packet, -1 if there is none."""
        now = time.monotonic()
        self._pass_down(now)
        while self._due and self._due[0][0] <= now:
            _, _, target, packet = heapq.heappop(self._due)
            with suppress(OSError):  # the host's own queue is full
                os.write(self._tuns[target], packet)
        next_at = min((queue[0][0] for queue in (self._coming, self._due) if queue), default=None)
        return -1.0 if next_at is None else max(0.0, next_at - time.monotonic())

    def _obey(self, commands: int) -> bool:
        data = b""
        while not data.endswith(b"\n"):
            more = os.read(commands, 65536)
            if not more:
                return False
            data += more
        print(json.dumps(self._do(json.loads(data))), flush=True)
        return True

    def _do(self, words: list[Any]) -> Any:
        match words:
            case ["bytes"]:
                return [[source, target, count] for (source, target), count in sorted(self._sent.items())]
            case ["rate", host, up_mbit, down_mbit]:
                self.set_rate(host, up_mbit, down_mbit)
            case ["delay", one, other, ms]:
                self._delay_s[one][other] = self._delay_s[other][one] = ms / 1e3
            case ["loss", percent]:
                self._loss = percent / 100
            case ["cut", host]:
                self._island[host] = -1 - host
            case ["split", *islands]:
                for number, island in enumerate(islands):
                    for host in island:
                        self._island[host] = number
            case ["blink", host, off_s, period_s]:
                self._blink[host] = (time.monotonic(), off_s, period_s)
            case ["heal"]:
                self._island = [0] * len(self._island)
                self._blink.clear()
            case _:
                raise LabError(f"the switch does not know {words}")
        return None


def main() -> None:
    """The switch's process: its hosts live as long as its stdin is open."""
    name, links = sys.argv[1], Links(**json.loads(sys.argv[2]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        tuns = [_make_host(name, host, links) for host in range(links.hosts)]
        print("null", flush=True)
        Switch(links, tuns).serve(sys.stdin.fileno())
    finally:
        for host in range(links.hosts):
            remove_host(name, host)


if __name__ == "__main__":
    main()
