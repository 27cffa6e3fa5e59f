"""What the tests of the training machine have in common."""

from __future__ import annotations

from prime_async.machines.training import Training
from prime_async.machines.vocabulary import Applied, Effect, Event, MeansCommitted, StepsDone, ViewChanged
from prime_async.messages import FIRST_CHAIN
from tests.machine_harness import member, view

DIGEST = b"d" * 32


def give(node: Training, *events: Event) -> list[Effect]:
    """The effects of all ``events``, one second apart."""
    return [effect for i, event in enumerate(events) for effect in node.handle(1.0 + i, event)]


def seen(*, active: bool = True, others: int = 1) -> ViewChanged:
    peers = [member(f"m{i}") for i in range(others)]
    return ViewChanged(view=view(2, *peers, member("n1", active=active)))


def done(steps: int = 10, tokens: int = 100) -> StepsDone:
    return StepsDone(steps=steps, tokens=tokens, seconds=2.0)


def means(round: int = 0, position: int = 1) -> MeansCommitted:
    return MeansCommitted(round=round, position=position, chain=FIRST_CHAIN)


def applied(round: int = 1) -> Applied:
    return Applied(round=round, digest=DIGEST)
