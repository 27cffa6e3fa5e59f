"""An agreed list of members: real nodes, over the network in memory; README's program over the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

import prime_async.guest
from prime_async.comparison import compare
from prime_async.config.schema import Config
from prime_async.errors import ConfigError, LocalError, RefusedError
from prime_async.guest.side import trio_side
from prime_async.log import read_log
from prime_async.machines.facts import LeaderElected, ViewAdopted
from prime_async.machines.own import Heard, OwnActor, OwnEffect, OwnEvent, Send
from prime_async.machines.vocabulary import Tick, ViewChanged, WakeAt
from prime_async.messages import Ready
from prime_async.node import Change, Group, open_membership, open_node
from prime_async.node.changes import Changes
from tests.memory_nodes import LIMIT_S, Place, Walker
from tests.programs import block, program, replayed
from tests.zeromq_nodes import allow, configuration, key_of

pytestmark = pytest.mark.xdist_group("real time")
TIMES = {"heartbeat_s": 0.05, "failure_timeout_s": 1.0}
MARGIN_S = 2.0
"""A view is decided, and a leader elected, so soon after that, also on a busy machine."""


@asynccontextmanager
async def member(place: Place, name: int, actors: Sequence[OwnActor] = ()) -> AsyncIterator[Group]:
    async with (
        place.network.open(place.id(name)) as transport,
        open_membership(place.config(name, **TIMES), transport=transport, actors=actors) as group,
    ):
        yield group


@asynccontextmanager
async def some(place: Place, count: int) -> AsyncIterator[list[Group]]:
    with trio.fail_after(LIMIT_S):
        async with AsyncExitStack() as stack:
            groups = [await stack.enter_async_context(member(place, n)) for n in range(count)]
            for group in groups:
                await has(group, *range(count))
                await all_vote(group)
            yield groups


def called(name: str, config: Config) -> Config:
    """Of a group of that name."""
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def names(change: Change) -> tuple[list[str], list[str], list[str]]:
    """Of those that are here, have come, and have gone."""
    return [m.name for m in change.view.members], [m.name for m in change.joined], [m.name for m in change.left]


async def has(group: Group, *members: int) -> Change:
    """The first change after which these, and no others, are here."""
    async for change in group.changes():
        if [m.name for m in change.view.members] == [f"n{n}" for n in members]:
            return change
    raise AssertionError("the changes have ended")


async def all_vote(group: Group) -> None:
    while not all(m.voter for m in group.view.members):  # noqa: ASYNC110  (no change to a program)
        await trio.sleep(0.001)


async def test_members_that_come_and_go_are_told_one_by_one_and_the_logs_replay(place: Place) -> None:
    """Given a founder, when a second joins and says goodbye, then its changes say so; and both logs replay."""
    with trio.fail_after(LIMIT_S):
        async with member(place, 0) as first:
            changes = first.changes()
            assert names(await anext(changes)) == (["n0"], ["n0"], [])
            assert first.leads
            async with member(place, 1) as second:
                assert [m.name for m in second.view.members] == ["n0", "n1"]
                assert second.view.leader == first.id
                assert (second.leads, second.in_touch) == (False, True)
                assert names(await anext(changes)) == (["n0", "n1"], ["n1"], [])
                of_second = second.changes()
                assert names(await anext(of_second)) == (["n0", "n1"], ["n0", "n1"], [])
            assert names(await anext(changes)) == (["n0"], [], ["n1"])
            assert [change async for change in of_second] == []
        assert [change async for change in changes] == []
    assert place.replayed(0) > 10
    assert place.replayed(1) > 5


async def test_a_member_that_dies_is_gone_within_the_failure_timeout_and_comes_back_as_another_start(
    place: Place,
) -> None:
    """Given three members, when one dies without a goodbye, then the others' views are without it, in time."""
    async with some(place, 2) as [first, second], AsyncExitStack() as stack:
        with trio.CancelScope() as life:
            third = await stack.enter_async_context(member(place, 2))
            await has(second, 0, 1, 2)
            changes = first.changes()
            await anext(changes)
            life.cancel()
            await stack.aclose()
        died_at = trio.current_time()

        assert names(await anext(changes)) == (["n0", "n1"], [], ["n2"])
        assert trio.current_time() - died_at < TIMES["failure_timeout_s"] + MARGIN_S
        await has(second, 0, 1)
        assert not third.leads
        async with member(place, 2):
            assert names(await anext(changes)) == (["n0", "n1", "n2"], ["n2"], [])


async def test_a_leader_that_dies_is_replaced_under_a_higher_epoch(place: Place) -> None:
    """Given three members, when the leader is cut off, then another leads the rest, and the first knows it does not."""
    async with some(place, 3) as [first, second, third]:
        epoch = second.view.epoch
        place.network.cut(first.id)

        change = await has(third, 1, 2)
        assert change.view.leader == second.id
        assert change.view.epoch > epoch
        await has(second, 1, 2)
        assert second.leads
        while first.in_touch:  # noqa: ASYNC110  (nothing tells a user)
            await trio.sleep(0.001)
        assert not first.leads
        assert [m.name for m in first.view.members] == ["n0", "n1", "n2"]
        assert any([isinstance(fact, LeaderElected) async for fact in until_elected(second)])

        place.network.heal()
        for group in (first, second, third):
            await has(group, 1, 2, 0)
        while not first.in_touch:  # noqa: ASYNC110  (at first it may be in the view as who it was when it was refused)
            await trio.sleep(0.001)
    assert all(place.replayed(n) > 30 for n in range(3))
    found = compare(*(read_log(place.directory / f"n{n}.log") for n in (1, 2)))
    assert not found.part
    assert "views" in found.verdict


async def until_elected(group: Group) -> AsyncIterator[object]:
    async for fact in group.events:
        yield fact
        if isinstance(fact, LeaderElected):
            return


async def test_a_member_started_again_with_its_ballot_is_in_a_later_view(place: Place) -> None:
    """Given two members that stopped, when both start again, then they are of one lineage, and the numbers go on."""
    async with some(place, 2) as [first, _]:
        number, lineage = first.view.number, first.view.lineage
    async with some(place, 2) as [first, second]:
        assert first.view.lineage == second.view.lineage == lineage
        assert first.view.number > number


async def test_who_is_of_another_group_or_of_a_run_is_refused(place: Place) -> None:
    with trio.fail_after(LIMIT_S):
        async with member(place, 0) as first:
            with pytest.raises(RefusedError, match=r'run\.name: "x" in the run, "y" at the node'):
                async with (
                    place.network.open(place.id(1)) as transport,
                    open_membership(called("y", place.config(1, **TIMES)), transport=transport),
                ):
                    pass
            with pytest.raises(RefusedError, match='"members"'):
                async with (
                    place.network.open(place.id(2)) as transport,
                    open_node(place.config(2, **TIMES), transport=transport, workload=Walker()) as node,
                ):
                    await node.wait()
            assert [m.name for m in first.view.members] == ["n0"]


async def test_what_a_group_has_no_machine_for_is_ignored_and_counted(place: Place) -> None:
    async with some(place, 2) as [first, second]:
        second._transport.send(first.id, Ready(round=0, weight=1, incarnation=1))
        while first.ignored_messages == 0:  # noqa: ASYNC110
            await trio.sleep(0.001)
        assert first.in_touch
        with pytest.raises(LocalError, match="no actor greeter, it has none: open it with actors"):
            first.tell("greeter", 1)


async def test_a_member_that_cannot_be_written_to_disk_is_not_one(place: Place) -> None:
    """Given a directory that holds the ballot of another group, then the error says so, and the block never begins."""
    async with some(place, 1):
        pass
    with pytest.raises(ConfigError, match="the ballot of another run"):
        async with (
            place.network.open(place.id(0)) as transport,
            open_membership(called("other", place.config(0, **TIMES)), transport=transport),
        ):
            raise AssertionError("it began")


async def test_waiting_for_a_member_to_answer_can_be_given_up(place: Place) -> None:
    with trio.move_on_after(0.1) as scope:
        async with member(place, 1):
            raise AssertionError("nobody is there")
    assert scope.cancelled_caught


# --- changes --------------------------------------------------------------------------------------------------------


async def test_a_slow_reader_is_told_several_changes_as_one(place: Place) -> None:
    """Given a reader that sleeps while one comes and goes and another comes, then it is told of the other alone."""
    with trio.fail_after(LIMIT_S):
        async with member(place, 0) as first:
            changes = first.changes()
            await anext(changes)
            async with member(place, 1):
                pass
            async with member(place, 2):
                assert names(await anext(changes)) == (["n0", "n2"], ["n2"], [])


async def test_a_view_without_a_difference_is_no_change(place: Place) -> None:
    """Given that a vote was given alone, then nothing is told; who waits for the end learns it."""
    async with some(place, 2) as [first, _]:
        seen = [fact async for fact in views(first)]
        assert len(seen) > 2
        changes = first.changes()
        assert names(await anext(changes))[0] == ["n0", "n1"]
        assert changes.take() is None


async def views(group: Group) -> AsyncIterator[ViewAdopted]:
    while (fact := group.events.take()) is not None:
        if isinstance(fact, ViewAdopted):
            yield fact
    await trio.lowlevel.checkpoint()


async def test_a_stream_that_was_closed_meanwhile_still_tells_the_last_change(place: Place) -> None:
    async with some(place, 1) as [first]:
        changes = Changes(first.view)
        changes.close()
        assert [names(change) async for change in changes] == [(["n0"], ["n0"], [])]


# --- actors of the user's own ---------------------------------------------------------------------------------------


class Hi(msgspec.Struct, frozen=True, tag=True):
    text: str


class Greeter:
    """Greets the others, again and again, since a message may be lost; and hands over what is said."""

    def __init__(self, me: str) -> None:
        self._me = me
        self._others: list[str] = []

    def handle(self, now: float, event: OwnEvent) -> Sequence[OwnEffect]:
        match event:
            case ViewChanged(view=view):
                self._others = [m.id for m in view.members if m.id != self._me]
                return [WakeAt(at=now)]
            case Tick():
                greetings = [Send(peer=id, message=Hi(text="welcome")) for id in self._others]
                return [*greetings, WakeAt(at=now + 0.02)]
            case Heard(message=Hi() as hi):
                return [hi]
        return []


async def test_a_users_own_actor_hears_the_views_and_its_like(place: Place) -> None:
    said: set[str] = set()

    def greeter(name: str) -> OwnActor:
        return OwnActor(
            name="greeter",
            machine=Greeter,
            messages=Hi,
            effects=Hi,
            perform=lambda hi: said.add(f"{name} {hi.text}"),
        )

    with trio.fail_after(LIMIT_S):
        async with member(place, 0, [greeter("first")]), member(place, 1, [greeter("second")]):
            while len(said) < 2:  # noqa: ASYNC110
                await trio.sleep(0.001)
    assert said == {"first welcome", "second welcome"}


# --- asyncio --------------------------------------------------------------------------------------------------------


def test_members_in_asyncio_are_told_the_same(place: Place) -> None:
    """Given two members in one asyncio loop, when one leaves, then the other is told; and nothing is left behind."""

    @asynccontextmanager
    async def guest(number: int) -> AsyncIterator[prime_async.guest.GuestGroup]:
        async with trio_side() as side, side.holding(place.network.open(place.id(number))) as transport:
            config = place.config(number, **TIMES)
            async with prime_async.guest.open_membership(config, transport=transport) as group:
                yield group

    async def main() -> None:
        async with asyncio.timeout(LIMIT_S), guest(0) as first:
            changes = first.changes()
            assert names(await anext(changes)) == (["n0"], ["n0"], [])
            async with guest(1) as second:
                assert (second.leads, second.in_touch, first.leads) == (False, True, True)
                assert second.view.leader == first.id
                assert names(await anext(changes)) == (["n0", "n1"], ["n1"], [])
                second.stop()
                await second.wait()
                assert [names(c) async for c in second.changes()] == [(["n0", "n1"], ["n0", "n1"], [])]
            assert names(await anext(changes)) == (["n0"], [], ["n1"])

    asyncio.run(main())
    with pytest.raises(RuntimeError):
        trio.lowlevel.current_trio_token()


# --- processes ------------------------------------------------------------------------------------------------------


async def until_here(changes: Changes, *members: str) -> Change:
    async for change in changes:
        if {m.name for m in change.view.members} == set(members):
            return change
    raise AssertionError("the changes have ended")


async def test_members_in_processes_that_are_killed_are_gone_within_the_failure_timeout(tmp_path: Path) -> None:
    """Given README's program in three processes and a member here, over the real network.

    When one process is killed, and then the one that leads, then each is gone from the view within the failure timeout,
    and what an election takes.
    """
    times: dict[str, Any] = {"heartbeat_s": 0.2, "failure_timeout_s": 1.5}
    (tmp_path / "members.py").write_text(block("python", "open_membership"))
    configs = [configuration(tmp_path, name, **times) for name in ("leader", "here", "one", "two")]
    allow(tmp_path, "leader", *(key_of(tmp_path, config.node.name) for config in configs[1:]))

    with trio.fail_after(100):
        async with AsyncExitStack() as stack:
            leader = await stack.enter_async_context(program(tmp_path, configs[0], "members.py"))
            contact = await leader.until("I am ")
            at_leader = [
                config.model_copy(update={"node": config.node.model_copy(update={"join": (contact,)})})
                for config in configs[1:]
            ]
            here = await stack.enter_async_context(open_membership(at_leader[0]))
            one, two = [
                await stack.enter_async_context(program(tmp_path, config, "members.py")) for config in at_leader[1:]
            ]
            changes = here.changes()
            await until_here(changes, "leader", "here", "one", "two")
            await all_vote(here)

            one.process.kill()
            killed_at = trio.current_time()
            change = await until_here(changes, "leader", "here", "two")
            assert trio.current_time() - killed_at < times["failure_timeout_s"] + MARGIN_S
            assert [m.name for m in change.left] == ["one"]
            await two.until("one is gone")

            leader.process.kill()
            killed_at = trio.current_time()
            change = await until_here(changes, "here", "two")
            assert trio.current_time() - killed_at < times["failure_timeout_s"] + MARGIN_S
            assert change.view.leader == here.id
            await two.until("leader is gone")
    assert replayed(tmp_path / "here" / "messages.log") > 50
