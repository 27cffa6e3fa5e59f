"""The average of a tensor among friends: real nodes, over the network in memory; README's program over the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

import prime_async.guest
from prime_async.errors import ConfigError, LocalError, NonFiniteError, RefusedError
from prime_async.guest.side import trio_side
from prime_async.node import Friends, open_exchange
from tests.memory_nodes import LIMIT_S, Place

SHAPE = (30, 20)
ELEMENTS = 600  # three chunks of 256, the last one shorter


def filled(value: float) -> Tensor:
    return torch.full(SHAPE, value)


@asynccontextmanager
async def friend(place: Place, name: int, elements: int = ELEMENTS, **run: Any) -> AsyncIterator[Friends]:
    run = {"exchange": {"chunk_elements": 256, "codec": "fp32"}, **run}
    async with (
        place.network.open(place.id(name)) as transport,
        open_exchange(place.config(name, **run), elements, transport=transport) as friends,
    ):
        yield friends


@asynccontextmanager
async def three(place: Place, **run: Any) -> AsyncIterator[list[Friends]]:
    with trio.fail_after(LIMIT_S):
        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(friend(place, n, min_members=3, **run)) for n in range(3)]


async def together(*calls: Callable[[], Awaitable[Tensor]]) -> list[Tensor]:
    """All at once; the results in the order of the calls."""
    results: dict[int, Tensor] = {}

    async def call(number: int) -> None:
        results[number] = await calls[number]()

    async with trio.open_nursery() as nursery:
        for number in range(len(calls)):
            nursery.start_soon(call, number)
    return [results[number] for number in range(len(calls))]


async def test_friends_get_the_weighted_mean_again_and_again_and_their_logs_replay(place: Place) -> None:
    """Given three friends, when each gives a tensor, twice, then all get the same mean of the three, in its shape."""
    async with three(place) as all_three:
        for turn in range(2):
            means = await together(
                *(partial(f.average, filled(10.0 * n + turn), n + 1) for n, f in enumerate(all_three))
            )
            expected = (0 * 1 + 10 * 2 + 20 * 3) / 6 + turn
            torch.testing.assert_close(means[0], filled(expected))
            assert all(torch.equal(means[0], mean) for mean in means)
        assert [f.node.round for f in all_three] == [2, 2, 2]
    for name in range(3):
        assert place.replayed(name) > 30


@pytest.mark.parametrize(
    ("reduce", "expected"), [("mean", 34.0), ("median", 2.0), ("trimmed_mean", 2.0), ("rda", 34.0)]
)
async def test_friends_get_what_their_run_makes_of_the_tensors(place: Place, reduce: str, expected: float) -> None:
    """Given three friends, one of whom gives far more, when their run names a reducer, then they get its result.

    The means are encoded as ``mean_codec`` says, in half as many bytes as the tensors.
    """
    exchange = {"chunk_elements": 256, "codec": "fp32", "mean_codec": "fp16", "reduce": reduce}
    async with three(place, exchange=exchange) as all_three:
        means = await together(
            *(partial(f.average, filled(v)) for f, v in zip(all_three, (1.0, 2.0, 99.0), strict=True))
        )
        stored = all_three[0].node.workload.mean_bytes(0)
    torch.testing.assert_close(means[0], filled(expected))
    assert all(torch.equal(means[0], mean) for mean in means)
    assert stored == 2 * 256


async def test_what_is_not_fp32_and_lies_elsewhere_is_averaged_and_not_touched(place: Place) -> None:
    tensor = torch.arange(ELEMENTS, dtype=torch.float64).view(SHAPE).T.requires_grad_()
    with trio.fail_after(LIMIT_S):
        async with friend(place, 0) as alone:
            mean = await alone.average(tensor)
    assert torch.equal(mean, tensor.detach().float())
    assert mean.shape == (20, 30)
    assert not mean.requires_grad


async def average_until(friends: Friends, give: float, expected: float) -> Tensor:
    """Give the same again and again until the mean is as expected: a joiner takes part from the start of a round on."""
    mean = await friends.average(filled(give))
    while not torch.equal(mean, filled(expected)):
        mean = await friends.average(filled(give))
    return mean


async def test_a_friend_that_dies_is_left_out_and_when_it_comes_again_it_takes_part(place: Place) -> None:
    """Given three friends, when one dies without a goodbye, then the two others get their mean; then again with it."""
    run: dict[str, Any] = {"failure_timeout_s": 0.5, "min_members": 2}
    with trio.fail_after(LIMIT_S):
        async with friend(place, 0, **run) as first, friend(place, 1, **run) as second:

            def calls(expected: float) -> list[Callable[[], Awaitable[Tensor]]]:
                return [lambda: average_until(first, 1.0, expected), lambda: average_until(second, 3.0, expected)]

            with trio.CancelScope() as life:
                async with friend(place, 2, **run) as third:
                    await together(*calls(4.0), lambda: average_until(third, 8.0, 4.0))
                    life.cancel()
                    await trio.lowlevel.checkpoint()
            await together(*calls(2.0))
            async with friend(place, 2, **run) as third:
                await together(*calls(4.0), lambda: average_until(third, 8.0, 4.0))
                assert third.node.round == first.node.round
            assert place.replayed(0) > 30


async def test_a_call_that_is_cancelled_before_it_was_given_counts_nowhere(place: Place) -> None:
    """Given a friend that waits for others to begin, when its call is cancelled, then its next call counts alone."""
    run: dict[str, Any] = {"min_members": 2}
    with trio.fail_after(LIMIT_S):
        async with friend(place, 0, **run) as first:
            with trio.move_on_after(0.05) as scope:
                await first.average(filled(100.0))
            assert scope.cancelled_caught
            async with friend(place, 1, **run) as second:
                means = await together(lambda: first.average(filled(1.0)), lambda: second.average(filled(3.0)))
            assert all(torch.equal(mean, filled(2.0)) for mean in means)


async def test_a_call_that_is_cancelled_after_it_was_given_counts_and_the_next_one_waits_its_turn(place: Place) -> None:
    """Given a contribution that others may have, when its call is cancelled, then it is in that round's mean."""
    run: dict[str, Any] = {"min_members": 2}
    with trio.fail_after(LIMIT_S):
        async with friend(place, 0, **run) as first, friend(place, 1, **run) as second:
            await together(lambda: first.average(filled(0.0)), lambda: second.average(filled(0.0)))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first.average, filled(1.0))
                while first.workload.offer is None or not first._given:  # noqa: ASYNC110  (nothing tells a user)
                    await trio.sleep(0.001)
                nursery.cancel_scope.cancel()
            assert torch.equal(await second.average(filled(3.0)), filled(2.0))
            means = await together(lambda: first.average(filled(5.0)), lambda: second.average(filled(7.0)))
            assert all(torch.equal(mean, filled(6.0)) for mean in means)


async def test_calls_at_once_come_one_after_the_other(place: Place) -> None:
    with trio.fail_after(LIMIT_S):
        async with friend(place, 0) as alone:
            means = await together(*(lambda n=n: alone.average(filled(float(n))) for n in range(3)))
            assert all(torch.equal(mean, filled(float(n))) for n, mean in enumerate(means))
            assert alone.node.round == 3


async def test_what_cannot_be_averaged_is_told_at_once_and_breaks_nothing(place: Place) -> None:
    nan = filled(1.0)
    nan[3, 4] = torch.nan
    with trio.fail_after(LIMIT_S):
        async with friend(place, 0) as alone:
            with pytest.raises(NonFiniteError, match="NaN"):
                await alone.average(nan)
            with pytest.raises(NonFiniteError, match="fp32 cannot hold"):
                await alone.average(filled(1.0).double() * 1e300)
            with pytest.raises(LocalError, match="the tensor has 599 elements, the exchange 600"):
                await alone.average(torch.zeros(599))
            for weight in (0, -1, 2**36 + 1):
                with pytest.raises(LocalError, match=f"the weight is {weight}: give one from 1"):
                    await alone.average(filled(1.0), weight)
            assert torch.equal(await alone.average(filled(1.0)), filled(1.0))
        with pytest.raises(LocalError, match="left the exchange"):
            await alone.average(filled(1.0))


async def test_a_friend_with_tensors_of_another_size_is_refused(place: Place) -> None:
    with trio.fail_after(LIMIT_S):
        async with friend(place, 0):
            with pytest.raises(RefusedError, match="vector-600"):
                async with friend(place, 1, elements=601) as other:
                    await other.average(torch.zeros(601))


async def test_an_exchange_of_nothing_is_refused(place: Place) -> None:
    with pytest.raises(ConfigError, match="an exchange of 0 elements"):
        async with friend(place, 0, elements=0):
            pass


def test_friends_in_asyncio_get_the_same_mean(place: Place) -> None:
    """Given two friends in one asyncio loop, when both give a tensor, then both get the mean, and nothing is left."""

    async def give(number: int, value: float) -> Tensor:
        run: dict[str, Any] = {"exchange": {"chunk_elements": 256, "codec": "fp32"}, "min_members": 2}
        async with trio_side() as side, side.holding(place.network.open(place.id(number))) as transport:
            config = place.config(number, **run)
            async with prime_async.guest.open_exchange(config, ELEMENTS, transport=transport) as friends:
                mean = await friends.average(filled(value))
                assert friends.node.round == 1
                return mean

    async def main() -> list[Tensor]:
        async with asyncio.timeout(LIMIT_S):
            return list(await asyncio.gather(give(0, 1.0), give(1, 3.0)))

    assert all(torch.equal(mean, filled(2.0)) for mean in asyncio.run(main()))
    with pytest.raises(RuntimeError):
        trio.lowlevel.current_trio_token()
