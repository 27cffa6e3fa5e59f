"""The ZeroMQ transport between hosts of the network lab: long links, lossy ones, NAT, and lines that go dead.

What several streams give is measured by ``python -m tests.netlab_streams``.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import trio

from prime_async.bench.netlab import Lab, Links, why_not
from tests.netlab_streams import measure
from tests.netlab_worker import Remote, remote
from tests.transport_harness import port_of

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no network lab: {why_not()}"),
    pytest.mark.xdist_group("real time"),
]

CHUNKS, SIZE = 8, 1 << 18
NOTICED_S = 9.0
"""A dead line is found within the 7 s that the control plane's settings give it, and some slack for busy machines."""
HEALED_S = 8.0
"""A healed line carries again within one attempt to connect, a pause, and the handshakes."""
LINKS = Links(hosts=2, rate_mbit=50, delay_ms=20, loss_percent=0.5)


@dataclass
class Pair:
    lab: Lab
    a: Remote
    b: Remote

    def connections(self) -> set[tuple[str, str]]:
        """Addresses (ours, theirs) of the open TCP connections of the first host."""
        command = self.lab.command(0, ["ss", "--tcp", "--numeric", "--no-header", "state", "established"])
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return {(words[2], words[3]) for words in (line.split() for line in lines)}


@asynccontextmanager
async def pair(links: Links, **settings: object) -> AsyncIterator[Pair]:
    """Two hosts with a transport each, which serve the same chunks, and have dialled nobody."""
    with Lab(links) as lab:
        async with remote(lab, 0, **settings) as a, remote(lab, 1, **settings) as b:
            for node in (a, b):
                await node.hold(CHUNKS, SIZE)
            yield Pair(lab, a, b)


@asynccontextmanager
async def joined_pair(links: Links = LINKS) -> AsyncIterator[Pair]:
    """Two that have dialled each other, of which the first tells the second something four times a second."""
    async with pair(links) as two, trio.open_nursery() as nursery:
        for one, other in ((two.a, two.b), (two.b, two.a)):
            await one.dial(other)
            await one.until_reachable(other, True)
        nursery.start_soon(talk, two.a, two.b)
        yield two
        nursery.cancel_scope.cancel()


async def talk(sender: Remote, receiver: Remote) -> None:
    while True:
        await sender.send(receiver, "still here")
        await trio.sleep(0.25)


async def hears_again_within(receiver: Remote, limit_s: float) -> None:
    heard = len(receiver.heard)
    await receiver.until(lambda: len(receiver.heard) > heard, limit_s)


async def test_more_streams_are_no_slower_on_a_long_link_that_loses_packets() -> None:
    """Given 100 ms and 0.5 % loss, when 2 MB are fetched over 1 and 8 streams, then all comes intact, and no later."""
    links = Links(hosts=2, rate_mbit=50, delay_ms=50, loss_percent=0.5)
    one = await measure(links, 1, CHUNKS, SIZE)
    eight = await measure(links, 8, CHUNKS, SIZE)
    assert eight.took_s < 1.5 * one.took_s  # here it took a fifth


async def test_a_node_behind_nat_gets_and_serves() -> None:
    """Given a host that drops what comes uncalled, when it dials, then messages and chunks go both ways."""
    async with pair(LINKS, unreachable_s=2.0) as two:
        inner, outer = two.a, two.b
        two.lab.put_behind_nat(0)
        await outer.dial(inner)
        await inner.dial(outer)
        await inner.until_reachable(outer, True)
        await outer.until_reachable(inner, False)
        await inner.fetch(outer, CHUNKS, SIZE)
        await outer.fetch(inner, CHUNKS, SIZE)
        assert await outer.send(inner, "to the inside")
        await inner.until(lambda: [text for _, _, text in inner.heard] == ["to the inside"])
        assert {reachable for _, _, reachable in outer.reachable} == {False}


async def test_two_nodes_behind_nat_learn_that_they_cannot_reach_each_other() -> None:
    async with pair(LINKS, unreachable_s=2.0) as two:
        for host, one, other in ((0, two.a, two.b), (1, two.b, two.a)):
            two.lab.put_behind_nat(host)
            await one.dial(other)
        with trio.fail_after(10.0):
            assert await two.a.fetch_error(two.b, timeout_s=60.0) == "PeerUnreachableError"
        await two.a.until_reachable(two.b, False)
        assert not await two.a.send(two.b, "nobody hears this")


async def test_a_line_that_was_dead_for_25_s_carries_soon_after_it_has_healed() -> None:
    """Given a cut of 25 s, when it heals, then neither TCP's pauses nor ZeroMQ's take as long again."""
    async with joined_pair() as two:
        two.lab.cut(0)
        await two.a.until_reachable(two.b, False)
        assert await two.a.fetch_error(two.b, timeout_s=30.0) == "PeerUnreachableError"
        await trio.sleep_until(two.a.reachable[-1][0] + 14.0)  # it was told after 11 s
        two.lab.heal()
        with trio.fail_after(HEALED_S):
            await two.a.until_reachable(two.b, True)
            await two.b.until_reachable(two.a, True)
            await hears_again_within(two.b, HEALED_S)
        await two.a.fetch(two.b, CHUNKS, SIZE)


async def test_a_line_that_drops_for_2_s_every_10_keeps_its_connections() -> None:
    """Given a link that blinks, when messages and chunks pass for 22 s, then nothing is lost or made anew.

    It loses nothing in between: a connection whose first packet after a pause is lost as well may be made anew.
    """
    async with joined_pair(replace(LINKS, loss_percent=0.0)) as two:
        connections = two.connections()
        assert connections
        two.lab.blink(0, off_s=2.0, period_s=10.0)
        end = trio.current_time() + 22.0
        while trio.current_time() < end:
            await two.a.fetch(two.b, CHUNKS, SIZE)
        await hears_again_within(two.b, 6.0)
        assert two.connections() == connections
        when = [at for at, _, _ in two.b.heard]
        assert max(after - before for before, after in itertools.pairwise(when)) < 6.0
        assert [reachable for node in (two.a, two.b) for _, _, reachable in node.reachable] == [True, True]


async def test_what_vanishes_on_our_connection_goes_over_the_peer_s() -> None:
    """Given two that dialled each other, when one way goes dead without a word, then the other one is used."""
    async with joined_pair() as two:
        two.lab.drop_ports(1, port_of(two.b.control), port_of(two.b.bulk))
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.a.fetch, two.b, CHUNKS, SIZE)
            await trio.sleep(0.2)  # what was on its way has come
            await hears_again_within(two.b, NOTICED_S)
            await two.a.until_reachable(two.b, False)
        assert trio.current_time() - began < 2 * NOTICED_S
        assert [reachable for _, _, reachable in two.b.reachable] == [True]
