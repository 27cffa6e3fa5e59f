"""Whole nodes over the real network, on loopback: joining, being refused, and bad peers."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import zmq

from prime_async.errors import AddressInUseError, RefusedError
from prime_async.log import read_log, replay
from prime_async.machines.facts import Fact, HelloRefused, KeyDenied, MemberLost, PeerDropped, RoundFinished
from prime_async.node import Node, open_node
from tests.zeromq_nodes import allow, configuration, key_of, workload

pytestmark = pytest.mark.xdist_group("real time")

LIMIT_S = 30.0


@asynccontextmanager
async def founder(home: Path, **run: Any) -> AsyncIterator[Node]:
    async with open_node(configuration(home, "first", **run), workload=workload(0)) as node:
        yield node


async def next_fact(node: Node, kind: type[Fact], limit_s: float = LIMIT_S) -> Any:
    """The next fact of a kind; others are passed over."""
    with trio.fail_after(limit_s):
        async for fact in node.events:
            if isinstance(fact, kind):
                return fact
    raise AssertionError(f"{node.id}: the events ended without a {kind.__name__}")


async def rounds_of(node: Node, count: int) -> dict[int, str]:
    digests: dict[int, str] = {}
    while len(digests) < count:
        fact = await next_fact(node, RoundFinished)
        digests[fact.round] = fact.state_digest
    return digests


async def test_three_nodes_average_and_their_logs_replay(tmp_path: Path) -> None:
    """Given three nodes with a key each, when they do all rounds, then all digests agree and all logs replay."""
    names = ("first", "second", "third")
    for name in names:
        configuration(tmp_path, name)
    allow(tmp_path, "first", key_of(tmp_path, "second"), key_of(tmp_path, "third"))
    run: dict[str, Any] = {"rounds": 4, "min_members": 3}
    digests: dict[str, dict[int, str]] = {}

    async def member(name: str, seed: int, contact: str) -> None:
        config = configuration(tmp_path, name, join=(contact,), **run)
        async with open_node(config, workload=workload(seed)) as node:
            digests[name] = await rounds_of(node, 4)
            await node.wait()

    with trio.fail_after(LIMIT_S):
        async with founder(tmp_path, **run) as node, trio.open_nursery() as nursery:
            nursery.start_soon(member, "second", 1, node.contact)
            nursery.start_soon(member, "third", 2, node.contact)
            digests["first"] = await rounds_of(node, 4)
            await node.wait()
            assert node.traffic.sent > 0

    assert digests["first"].keys() == {0, 1, 2, 3}
    assert digests["first"] == digests["second"] == digests["third"]
    for name in names:
        log = read_log(tmp_path / name / "messages.log")
        assert sum(1 for _ in replay(log)) == len(log.records) > 20


async def test_a_key_that_is_not_allowed_is_refused_with_the_reason_and_training_goes_on(tmp_path: Path) -> None:
    async with founder(tmp_path) as node:
        config = configuration(tmp_path, "stranger", join=(node.contact,))
        with pytest.raises(RefusedError, match=r"does not allow this node's key [0-9a-f]{64}.*allow_file") as caught:
            async with open_node(config, workload=workload(1)) as stranger:
                await next_fact(stranger, KeyDenied)
                await trio.sleep_forever()
        assert caught.value.reason == "key_not_allowed"
        await rounds_of(node, 2)


async def test_a_key_that_is_added_while_the_node_runs_is_let_in(tmp_path: Path) -> None:
    configuration(tmp_path, "late")
    async with founder(tmp_path) as node:
        allow(tmp_path, "first", "# a comment", key_of(tmp_path, "late") + "  # of late")
        async with open_node(configuration(tmp_path, "late", join=(node.contact,)), workload=workload(1)) as late:
            await rounds_of(late, 2)


async def test_a_node_of_another_run_is_refused_with_the_settings_that_differ(tmp_path: Path) -> None:
    configuration(tmp_path, "other")
    allow_other = key_of(tmp_path, "other")
    async with founder(tmp_path, seed=1) as node:
        allow(tmp_path, "first", allow_other)
        config = configuration(tmp_path, "other", join=(node.contact,), seed=2, rounds=9)
        with pytest.raises(RefusedError) as caught:
            async with open_node(config, workload=workload(1)):
                await trio.sleep_forever()
        assert caught.value.reason == "other_run"
        assert caught.value.differences == (
            "run.rounds: 0 in the run, 9 at the node that asks",
            "run.seed: 1 in the run, 2 at the node that asks",
        )
        refused = await next_fact(node, HelloRefused)
        assert refused.differences == caught.value.differences
        await rounds_of(node, 2)


async def test_a_taken_port_is_said_with_the_fix(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = configuration(tmp_path, "first")
        node = config.node.model_copy(update={"port": taken.getsockname()[1]})
        with pytest.raises(AddressInUseError, match=r"127\.0\.0\.1:\d+.*port"):
            async with open_node(config.model_copy(update={"node": node}), workload=workload(0)):
                pass


async def test_garbage_on_both_sockets_is_dropped_and_counted_and_training_goes_on(tmp_path: Path) -> None:
    """Given two nodes that train, when an allowed peer and a raw connection send garbage, then rounds go on."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for name in ("second", "vandal"):
        configuration(tmp_path, name)
    async with founder(tmp_path, min_members=2) as node:
        allow(tmp_path, "first", key_of(tmp_path, "second"), key_of(tmp_path, "vandal"))
        second = configuration(tmp_path, "second", join=(node.contact,), min_members=2)
        async with open_node(second, workload=workload(1)) as other:
            await rounds_of(other, 1)
            addresses = [node._transport.control_address, node._transport.bulk_address]
            vandalise_raw(addresses, chance)
            with vandal_sockets(tmp_path, node.id, addresses) as sockets:
                for s in sockets:
                    s.send_multipart([chance.randbytes(chance.randint(1, 300)) for _ in range(chance.randint(1, 4))])
                dropped = [await next_fact(node, PeerDropped) for _ in sockets]
            assert {d.plane for d in dropped} == {"control", "bulk"}
            assert {d.peer for d in dropped} == {key_of(tmp_path, "vandal")}
            assert node.traffic.violations[key_of(tmp_path, "vandal")] >= 2
            done = await rounds_of(node, 3)
            theirs = await rounds_of(other, max(done) + 1)
            assert all(theirs[r] == digest for r, digest in done.items() if r in theirs)


def vandalise_raw(addresses: list[str], chance: random.Random) -> None:
    """What is not even ZeroMQ."""
    for address in addresses:
        host, port = address.removeprefix("tcp://").rsplit(":", 1)
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(chance.randbytes(4096))


class vandal_sockets:
    """DEALERs of an allowed key, without our transport around them."""

    def __init__(self, home: Path, server: str, addresses: list[str]) -> None:
        from prime_async.transport.keys import read_key_file

        self._key = read_key_file(home / "vandal" / "node.key")
        self._server, self._addresses = server, addresses

    def __enter__(self) -> list[zmq.Socket[bytes]]:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        sockets = []
        for address in self._addresses:
            s = self._context.socket(zmq.DEALER)
            s.routing_id = f"{self._key.id}/vandal".encode()
            s.curve_secretkey, s.curve_publickey = self._key.secret, self._key.public
            s.curve_serverkey = bytes.fromhex(self._server)
            s.linger = 0
            s.connect(address)
            sockets.append(s)
        return sockets

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)


async def test_a_node_that_dies_without_a_word_holds_up_the_others_for_the_failure_timeout(tmp_path: Path) -> None:
    """Given three nodes, when one is cut off in the middle, then the others finish the round and go on."""
    for name in ("second", "third"):
        configuration(tmp_path, name)
    run: dict[str, Any] = {"failure_timeout_s": 1.0}
    async with founder(tmp_path, **run) as node:
        allow(tmp_path, "first", key_of(tmp_path, "second"), key_of(tmp_path, "third"))
        second = configuration(tmp_path, "second", join=(node.contact,), **run)
        async with open_node(second, workload=workload(1)) as other:
            await rounds_of(other, 1)
            with trio.CancelScope() as life:
                third = configuration(tmp_path, "third", join=(node.contact,), **run)
                async with open_node(third, workload=workload(2)) as dying:
                    await rounds_of(dying, 2)
                    life.cancel()  # no goodbye: the others see silence
                    await trio.sleep_forever()
            lost = await next_fact(node, MemberLost)
            assert lost.name == "third"
            assert 1.0 <= lost.silent_s < 3.0  # a fact has milliseconds: 1.0003 is 1.0 there
            await rounds_of(other, 2)
