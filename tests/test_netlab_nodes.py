"""Whole nodes, ``prime-async run``, in hosts of the network lab: lossy links, splits, NAT, and links that blink.

What several streams per peer give a round is measured by ``python -m tests.test_netlab_nodes --help``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from prime_async.bench.netlab import Lab, Links, why_not
from tests.node_processes import (
    MODES,
    PACED_RUN,
    NodeProcess,
    Nodes,
    assert_digests_are_equal,
    assert_no_step_is_lost,
    merged,
    modes,
    node_processes,
    pairs,
)

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no network lab: {why_not()}"),
    pytest.mark.xdist_group("real time"),
]

LINKS: Final = Links(hosts=4, rate_mbit=50, delay_ms=20, loss_percent=0.5)
"""40 ms there and back. TCP is Reno's, as the lab has it."""
FAILURE_S: Final = 3.0
HASTY_RUN: Final = merged(PACED_RUN, {"heartbeat_s": 0.5, "failure_timeout_s": FAILURE_S, "round": {"inner_steps": 6}})
DELAYED_STEPS: Final = 14
"""Between two contributions, where the exchange of the last one takes up some of them."""
SPLITS: Final = {"a member": 3, "the leader": 0}
USUAL: Final = {("a member", "overlapped"), ("the leader", "blocking")}
CHUNKS: Final = 8  # of the paced model
NAMES: Final = "abcd"
LIMIT_S: Final = 60.0
"""How long a test waits for any one thing, on a busy machine too."""
QUIET: Final = ("member_lost", "member_left", "leader_silent", "leader_elected", "stepped_down", "cut_off")
"""What nobody says while the members stay as they are."""


def hasty_run(mode: str) -> Mapping[str, Any]:
    steps = {} if mode == "blocking" else {"inner_steps": DELAYED_STEPS * MODES[mode].get("fragments", 1)}
    return merged(merged(MODES[mode], HASTY_RUN), {"round": steps})


@dataclass(frozen=True)
class Four:
    """Nodes a, b, c and d in hosts 0 to 3; a founded the run."""

    lab: Lab
    nodes: Sequence[NodeProcess]

    def __iter__(self) -> Iterator[NodeProcess]:
        return iter(self.nodes)

    async def rounds_of(self, count: int, contributors: int = 4) -> None:
        """Wait until each has finished ``count`` rounds more that were planned with so many contributors."""
        goals = [(node, len(shared_rounds(node, contributors)) + count) for node in self]
        for node, goal in goals:
            await until_shared(node, goal, contributors)


async def until_shared(node: NodeProcess, goal: int, contributors: int) -> None:
    await node.until(lambda: len(shared_rounds(node, contributors)) >= goal, LIMIT_S)


@asynccontextmanager
async def four(
    directory: Path, run: Mapping[str, Any], *, links: Links = LINKS, behind_nat: Sequence[int] = (), **node: Any
) -> AsyncIterator[Four]:
    """Four nodes that have joined and are waited for. ``node``: settings of each."""
    with Lab(links) as lab:
        for host in behind_nat:
            lab.put_behind_nat(host)
        async with node_processes(directory, run, lab) as nodes:
            await nodes.start(NAMES[0], 0, **node)
            async with trio.open_nursery() as nursery:
                for host in (1, 2, 3):
                    nursery.start_soon(start, nodes, host, node)
            all_four = Four(lab, sorted(nodes.started, key=lambda n: n.host))
            await all_four.rounds_of(1)
            yield all_four


async def start(nodes: Nodes, host: int, settings: Mapping[str, Any]) -> None:
    await nodes.start(NAMES[host], host, **settings)


def shared_rounds(node: NodeProcess, contributors: int = 4) -> list[int]:
    """Rounds that it has finished, and that were planned with so many contributors."""
    planned = {fact["round"]: fact["contributors"] for fact in node.told("round_planned")}
    return [fact["round"] for fact in node.told("round_finished") if planned.get(fact["round"]) == contributors]


def counted_tokens(node: NodeProcess, began: float) -> int:
    return sum(fact["tokens"] for fact in since(node, began, "round_finished"))


def since(node: NodeProcess, began: float, *kinds: str) -> list[dict[str, Any]]:
    """The facts of these kinds that it told from then on."""
    return [fact for when, fact in node.facts if when >= began and fact["type"] in kinds]


async def half_way(nodes: Sequence[NodeProcess]) -> None:
    """Wait until all of them are in the midst of inner steps of which nobody has anything.

    Where steps go on beside an exchange, that of the last contribution may still end, and bring a round.
    """
    with trio.fail_after(LIMIT_S):
        while not all(map(is_half_way, nodes)):
            for node in nodes:
                await node.next("inner_step_done", LIMIT_S)


def is_half_way(node: NodeProcess) -> bool:
    """Whether it has finished the round of its last contribution, and the next one is some steps away."""
    steps, finished = 0, -1
    for _, fact in reversed(node.facts):
        match fact["type"]:
            case "inner_step_done":
                steps += 1
            case "round_finished":
                finished = max(finished, fact["round"])
            case "contribution_ready":
                between = node.run.round.inner_steps // node.run.fragment_count
                return finished == fact["round"] and 0 < steps <= between - 3
    return False


# --- long links, and lossy ones -------------------------------------------------------------------------------------


async def test_four_nodes_do_rounds_over_a_long_link_that_loses_packets(tmp_path: Path) -> None:
    """Given 50 Mbit/s, 40 ms there and back and 0.5 % loss, when a real model trains, then all do the same rounds."""
    run = {"min_members": 4, "heartbeat_s": 0.5, "failure_timeout_s": FAILURE_S}
    async with four(tmp_path, run) as nodes:
        began = trio.current_time()
        await nodes.rounds_of(5)
        for node in nodes:
            assert node.told("round_finished")[0]["round"] == 0
            assert since(node, began, *QUIET) == []
            assert_no_step_is_lost(node)
        assert_digests_are_equal(nodes)


# --- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alone", "mode"), pairs(USUAL, SPLITS))
async def test_who_is_split_from_three_others_keeps_its_work_and_comes_back(
    tmp_path: Path, alone: str, mode: str
) -> None:
    """Given a split 3|1, when it heals, then the three have gone on, and the one comes back by itself."""
    async with four(tmp_path, hasty_run(mode)) as nodes:
        cut_off = SPLITS[alone]
        await split_and_heal(nodes, [host for host in range(4) if host != cut_off], [cut_off])


@pytest.mark.parametrize("mode", modes("eager"))
async def test_of_equal_halves_the_one_with_the_leader_goes_on(tmp_path: Path, mode: str) -> None:
    """Given a split 2|2, when it heals, then the leader's half has gone on, and the others come back by themselves."""
    async with four(tmp_path, hasty_run(mode)) as nodes:
        await split_and_heal(nodes, [0, 1], [2, 3])


async def split_and_heal(nodes: Four, majority: Sequence[int], minority: Sequence[int]) -> None:
    await nodes.rounds_of(2)  # from then on all four vote
    go_on, wait = ([nodes.nodes[host] for host in island] for island in (majority, minority))
    await half_way(wait)
    began = trio.current_time()
    nodes.lab.split(majority, minority)
    async with trio.open_nursery() as nursery:
        for node in wait:
            nursery.start_soon(is_cut_off, node, len(minority))
        for node in go_on:
            nursery.start_soon(until_shared, node, 3, len(majority))
    for node in wait:
        assert since(node, began, "round_finished", "leader_elected") == []
    healed = trio.current_time()
    nodes.lab.heal()
    await nodes.rounds_of(2)
    for node in wait:
        assert since(node, healed, "joined") != []
    assert_digests_are_equal(nodes)
    for node in nodes:
        assert counted_tokens(node, healed) > 0
        assert_no_step_is_lost(node)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
async def test_after_any_split_at_any_time_all_come_back_with_the_same_weights(tmp_path: Path, seed: int) -> None:
    """Given splits into random islands, at random moments of a round, for random times, then each heals."""
    chance = random.Random(seed)
    async with four(tmp_path, HASTY_RUN) as nodes:
        for _ in range(5):
            await nodes.rounds_of(1)
            await trio.sleep(chance.uniform(0.0, 1.5))  # a round and a half
            hosts = chance.sample(range(4), 4)
            cuts = sorted(chance.sample([1, 2, 3], chance.choice([1, 1, 2])))
            islands = [hosts[a:b] for a, b in itertools.pairwise([0, *cuts, 4])]
            nodes.lab.split(*islands)
            lasts_s = chance.choice([chance.uniform(0.0, FAILURE_S), chance.uniform(FAILURE_S, 3 * FAILURE_S)])
            print(f"seed {seed}: {islands} for {lasts_s:.2f} s")
            await trio.sleep(lasts_s)
            nodes.lab.heal()
            await nodes.rounds_of(2)
            assert_digests_are_equal(nodes)


async def is_cut_off(node: NodeProcess, heard: int) -> None:
    fact = await node.next("cut_off", LIMIT_S)
    assert fact["heard"] == heard
    if node.host:  # a leader counts those of the view that it has proposed without the first that were silent
        assert fact["voters"] == 4


# --- NAT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", modes("streaming"))
async def test_a_node_behind_nat_contributes_and_owns_nothing(tmp_path: Path, mode: str) -> None:
    """Given a host that drops what comes uncalled, when its node has no settings for it, then its work counts."""
    async with four(tmp_path, hasty_run(mode), behind_nat=[3]) as nodes:
        await nodes.rounds_of(3)
        assert_takes_part_from_behind_nat(nodes, [3])


@pytest.mark.parametrize("mode", modes("eager"))
async def test_one_node_that_can_be_reached_is_enough(tmp_path: Path, mode: str) -> None:
    """Given four nodes, when all but one are behind NAT, then that one owns all, and the work of all counts."""
    async with four(tmp_path, hasty_run(mode), behind_nat=[1, 2, 3]) as nodes:
        await nodes.rounds_of(3)
        assert_takes_part_from_behind_nat(nodes, [1, 2, 3])


def assert_takes_part_from_behind_nat(nodes: Four, behind_nat: Sequence[int]) -> None:
    hidden = [nodes.nodes[host] for host in behind_nat]
    for round in set.intersection(*(set(shared_rounds(node)) for node in nodes)):
        owned = {node.name: node.told("round_planned", round=round)[-1]["chunks_owned"] for node in nodes}
        assert sum(owned.values()) == CHUNKS // nodes.nodes[0].run.fragment_count
        assert [owned[node.name] for node in hidden] == [0] * len(hidden)
        assert all(node.told("round_finished", round=round)[0]["tokens"] > 0 for node in hidden)
    assert_digests_are_equal(nodes)
    for node in nodes:
        assert_no_step_is_lost(node)


# --- links that blink -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "drops"),
    [(3, 2), pytest.param(3, 4, marks=pytest.mark.long), pytest.param(0, 4, marks=pytest.mark.long)],
    ids=["a member's, twice", "a member's", "the leader's"],
)
async def test_a_link_that_drops_for_2_s_every_10_changes_no_view(tmp_path: Path, host: int, drops: int) -> None:
    """Given the default failure timeout, when a link blinks, then nobody loses anybody, and rounds go on."""
    async with four(tmp_path, PACED_RUN) as nodes:
        before = views(nodes)
        began = trio.current_time()
        nodes.lab.blink(host, off_s=2.0, period_s=10.0)
        await trio.sleep(10.0 * drops - 7.0)  # it has just come up again
        await nodes.rounds_of(2)
        assert [since(node, began, *QUIET, "member_joined", "joined") for node in nodes] == [[]] * 4
        assert views(nodes) == before
        assert_digests_are_equal(nodes)
        for node in nodes:
            assert_no_step_is_lost(node)


def views(nodes: Four) -> list[tuple[object, ...]]:
    """Whom each node goes by. (Weights and votes change the view's number, too.)"""
    last = [node.told("view_adopted")[-1] for node in nodes]
    return [(view["epoch"], view["leader"], tuple(view["members"])) for view in last]


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RoundsMeasured:
    """Rounds of four nodes: medians over rounds and nodes."""

    streams: int
    rtt_ms: float
    loss_percent: float
    rate_mbit: float
    congestion: str
    parameters: int
    rounds: int
    training_s: float
    exchange_s: float
    rounds_per_minute: float


async def measure(links: Links, streams: int, rounds: int, run: Mapping[str, Any]) -> RoundsMeasured:
    with tempfile.TemporaryDirectory() as directory:
        async with four(Path(directory), run, links=links, streams=streams) as nodes:
            await nodes.rounds_of(1)
            began = trio.current_time()
            await nodes.rounds_of(rounds)
    finished = [(when, fact) for node in nodes for when, fact in node.facts if fact["type"] == "round_finished"]
    measured = [fact for when, fact in finished if when >= began]
    whens = [when for when, fact in nodes.nodes[0].facts if fact["type"] == "round_finished" and when >= began]
    gaps = [after - before for before, after in itertools.pairwise(whens)]
    return RoundsMeasured(
        streams=streams,
        rtt_ms=2 * links.delay_ms,
        loss_percent=links.loss_percent,
        rate_mbit=links.rate_mbit,
        congestion=links.congestion,
        parameters=nodes.nodes[0].told("started")[0]["parameters"],
        rounds=len(whens),
        training_s=statistics.median(fact["training_s"] for fact in measured),
        exchange_s=statistics.median(fact["exchange_s"] for fact in measured),
        rounds_per_minute=round(60 / statistics.median(gaps), 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Rounds of four nodes, by the number of streams: a JSON line each.")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--model", default="llama-1m")
    parser.add_argument("--rtt", type=float, default=40.0, help="ms")
    parser.add_argument("--loss", type=float, default=0.5, help="percent of packets")
    args = parser.parse_args()
    links = replace(LINKS, delay_ms=args.rtt / 2, loss_percent=args.loss)
    run = {"min_members": 4, "model": args.model}
    for streams in args.streams:
        print(json.dumps(asdict(trio.run(measure, links, streams, args.rounds, run))), flush=True)


if __name__ == "__main__":
    main()
