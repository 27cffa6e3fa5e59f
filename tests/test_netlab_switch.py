"""The switch of the network lab, with sockets in place of the hosts' devices: what waits for what."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from prime_async.bench.netlab import SUBNET, Links, Switch

LIMIT_S = 20.0
FAST_MBIT = 100.0
SLOW_MBIT = 0.1
PACKET_BYTES = 1000


def packet(source: int, target: int, number: int) -> bytes:
    """An IPv4 packet, as far as the switch looks at it, with its number in the last byte."""
    header = bytes([0x45, *bytes(11), *SUBNET, source + 1, *SUBNET, target + 1])
    return header + bytes(PACKET_BYTES - len(header) - 1) + bytes([number])


@contextmanager
def switched(up_mbit: tuple[float, ...], queue_ms: float = 10_000.0) -> Iterator[list[socket.socket]]:
    """Hosts with these uplinks, and downlinks that are fast: what one sends comes out at another."""
    links = Links(hosts=len(up_mbit), rate_mbit=FAST_MBIT, delay_ms=1.0, queue_ms=queue_ms)
    with ExitStack() as stack:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in up_mbit]
        for ours, device in pairs:
            stack.enter_context(ours).settimeout(LIMIT_S)
            stack.enter_context(device).setblocking(False)
        switch = Switch(links, [device.fileno() for _, device in pairs])
        for host, mbit in enumerate(up_mbit):
            switch.set_rate(host, mbit, FAST_MBIT)
        reading, writing = os.pipe()
        serving = threading.Thread(target=switch.serve, args=(reading,))
        serving.start()
        try:
            yield [ours for ours, _ in pairs]
        finally:
            os.close(writing)
            serving.join()
            os.close(reading)


def test_a_downlink_is_not_kept_for_a_packet_that_still_waits_for_its_uplink() -> None:
    """Given a slow uplink with a queue, when another host sends to the same receiver, then it does not wait behind it.

    Else no set of hosts that all send to each other could use their links, however they do it.
    """
    waiting = 10  # 80 ms each
    with switched((SLOW_MBIT, FAST_MBIT, FAST_MBIT)) as (slow, fast, receiver):
        for number in range(waiting):
            slow.send(packet(0, 2, number))
        first = receiver.recv(PACKET_BYTES)
        fast.send(packet(1, 2, 100))
        came = [first[-1], *(receiver.recv(PACKET_BYTES)[-1] for _ in range(waiting))]
    assert came.index(100) <= waiting // 2, "the other host's packet waited for those that wait for the slow uplink"
    assert [number for number in came if number != 100] == list(range(waiting)), "one sender's packets stay in order"


def test_an_uplink_that_holds_its_queue_full_of_packets_drops_the_next_ones() -> None:
    """Given a queue of 0.2 s, when more is sent at once, then the first of it comes, and the rest does not."""
    sent, seconds_each = 10, PACKET_BYTES * 8 / (SLOW_MBIT * 1e6)
    with switched((SLOW_MBIT, FAST_MBIT), queue_ms=200.0) as (slow, receiver):
        for number in range(sent):
            slow.send(packet(0, 1, number))
        receiver.settimeout(2 * sent * seconds_each)
        came = []
        with suppress(TimeoutError):
            while True:
                came.append(receiver.recv(PACKET_BYTES)[-1])
    assert came == list(range(len(came)))
    assert 200 / 1000 / seconds_each <= len(came) < sent
