"""What several exchange machines do together, whatever is lost on the way and whoever dies."""

from __future__ import annotations

import random

import pytest

from prime_async.machines.vocabulary import Reduce
from prime_async.messages import Ask, Plan
from tests.exchange_cluster import Cluster


def made_of(cluster: Cluster, round: int) -> dict[int, list[Reduce]]:
    found: dict[int, list[Reduce]] = {}
    for _, reduce in cluster.made:
        if reduce.key.round == round:
            found.setdefault(reduce.key.chunk, []).append(reduce)
    return found


def test_rounds_follow_each_other_and_each_mean_is_made_once() -> None:
    cluster = Cluster(4)
    cluster.rounds(5)
    for round in range(5):
        assert all(len(reduces) == 1 for reduces in made_of(cluster, round).values())
        assert all(len(reduces[0].contributors) == 4 for reduces in made_of(cluster, round).values())
    assert all(len(digests) == 1 for digests in cluster.handed_over.values())


@pytest.mark.parametrize("seed", range(6))
def test_lost_repeated_and_late_messages_cost_time_alone(seed: int) -> None:
    cluster = Cluster(4, seed=seed, loss=0.3)
    cluster.rounds(4)


def test_a_witness_and_a_hidden_node_take_part() -> None:
    cluster = Cluster(4, witnesses=frozenset({"n3"}), hidden=frozenset({"n2"}))
    cluster.rounds(3)
    assert {node for node, _ in cluster.made} == {"n0", "n1", "n3"}


@pytest.mark.parametrize("seed", range(10))
def test_an_owner_that_dies_costs_its_chunks_and_never_the_round(seed: int) -> None:
    cluster = Cluster(4, seed=seed, chunks=16)
    cluster.run(lambda: any(isinstance(m, Plan) for *_, m in cluster.sent), 30)
    cluster.run_for(cluster.random.uniform(0, 0.4))
    open_round = cluster.committed
    victim = cluster.random.choice(["n1", "n2", "n3"])
    cluster.kill(victim)
    cluster.rounds(2)
    for chunk, reduces in made_of(cluster, open_round).items():
        first = [r for node, r in cluster.made if (r.key.round, r.key.chunk, node) == (open_round, chunk, victim)]
        assert len(reduces) <= 1 + len(first)


@pytest.mark.parametrize("seed", range(30))
def test_whoever_dies_whoever_leads_and_whatever_is_lost_the_rounds_go_on(seed: int) -> None:
    chance = random.Random(seed)
    cluster = Cluster(
        chance.choice((3, 5, 6)),
        seed=seed,
        chunks=chance.choice((1, 5, 12)),
        loss=chance.choice((0.0, 0.1, 0.3)),
        witnesses=frozenset({"n2"} if chance.random() < 0.3 else ()),
        hidden=frozenset({"n1"} if chance.random() < 0.3 else ()),
        straggler_timeout_s=chance.choice((0.0, 1.0)),
    )
    for _ in range(12):
        cluster.run_for(chance.uniform(0.05, 8))
        alive = [n for n in cluster.nodes.values() if n.alive]
        able = [m.id for m in cluster.view.members if m.voter and m.reachable and cluster.nodes[m.id].alive]
        victim = chance.choice(alive).id
        spared = [id for id in able if id != victim] if not cluster.is_last(victim) else []
        match chance.choice(("kill", "kill", "restart", "elect", "back")):
            case "kill" if len(alive) > 2 and spared:
                cluster.kill(victim, noticed_s=chance.choice((0.1, 3.0, 10.0)))
            case "restart" if spared and cluster.view.member(victim) is not None:
                cluster.restart(victim)
            case "elect" if able:
                cluster.elect(chance.choice(able))
            case "back":
                dead = [n.id for n in cluster.nodes.values() if not n.alive and cluster.view.member(n.id) is None]
                if dead:
                    cluster.restart(chance.choice(dead))
            case _:
                pass
    cluster.run_for(15)
    cluster.rounds(3, within_s=600)
    assert all(len(digests) == 1 for digests in cluster.handed_over.values())


def test_a_new_owner_asks_before_it_makes_a_mean_again() -> None:
    cluster = Cluster(3, chunks=9)
    cluster.run(lambda: any(isinstance(m, Plan) for *_, m in cluster.sent), 30)
    cluster.kill("n2", noticed_s=0.0)
    cluster.rounds(1)
    assert any(isinstance(m, Ask) for *_, m in cluster.sent)
