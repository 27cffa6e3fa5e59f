"""``prime-async demo --chaos``: the leader is killed in the middle of an exchange, and started again.

The leader, since that is the hard case: the others have to find out, agree on another one, and find out what is open.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prime_async.bench.failover import Kill, end_of_round, kill_in_mid_exchange, leader_of
from prime_async.errors import ConfigError
from prime_async.machines.facts import RoundFinished
from prime_async.node.children import Child

MIN_NODES = 3
"""Of two nodes, the one that is left when the leader is killed cannot know which of them was cut off."""
MIN_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Incident:
    """What was done to whom, how long the others took for the round, and the process that took the victim's place."""

    kill: Kill
    killed_at_s: float  # since the demo began
    ended_after_s: float
    again: Child

    def figures(self, children: Sequence[Child], failure_timeout_s: float) -> dict[str, Any]:
        """As the demo's JSON has it. Rounds count from 0; ``lost_tokens``: of the others."""
        back_in = next((fact.round for fact in self.again.told(RoundFinished) if fact.tokens), None)
        return {
            "killed": self.kill.victim.name,
            "signal": "SIGKILL",
            "killed_at_s": round(self.killed_at_s, 2),
            "in_exchange_of_round": self.kill.round,
            "round_ended_after_s": round(self.ended_after_s, 2),
            "failure_timeout_s": failure_timeout_s,
            "lost_tokens": {child.name: child.lost_tokens for child in children if child is not self.again},
            "back_in_round": back_in,
        }


def require_enough(nodes: int, rounds: int) -> None:
    """Raises :class:`ConfigError` if the others could not go on, or the victim not come back."""
    if nodes < MIN_NODES or rounds < MIN_ROUNDS:
        raise ConfigError([f"--chaos: needs at least {MIN_NODES} --nodes and {MIN_ROUNDS} --rounds"])


async def upset(
    children: list[Child],
    rounds: int,
    began: float,
    start_again: Callable[[Child, Child], Awaitable[Child]],
    say: Callable[[str], None],
) -> Incident:
    """Kill the leader in mid run, wait until the others have ended the round, and start it again, in its place.

    ``start_again(victim, contact)`` starts a process that asks ``contact``. Raises :class:`EnvironmentFault` if the run
    ends before there was a round of all nodes to disturb.
    """
    kill = await kill_in_mid_exchange(children, "leader", (rounds - 1) // 2)
    say(
        f"{kill.at - began:6.1f} s  {kill.victim.name}, the leader, is killed in the exchange of round {kill.round + 1}"
    )
    others = [child for child in children if child is not kill.victim]
    seconds = await end_of_round(others, kill)
    say(f"{_since(began)}  the others have finished round {kill.round + 1}, and {leader_of(others)} leads")
    again = await start_again(kill.victim, others[0])
    children[children.index(kill.victim)] = again
    say(f"{_since(began)}  {kill.victim.name} is started again")
    return Incident(kill, kill.at - began, seconds, again)


def _since(began: float) -> str:
    return f"{time.monotonic() - began:6.1f} s"
