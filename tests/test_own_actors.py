"""Actors of users beside ours: what they are given and answer, what peers may say to them, logs and their replay."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
import trio
from msgspec import Struct

from prime_async.cli.replay import load_actor
from prime_async.errors import ConfigError, LocalError, LogFormatError, ReplayMismatchError
from prime_async.log import read_log, replay
from prime_async.machines import vocabulary as v
from prime_async.machines.own import Hosted, OwnActor, write
from prime_async.machines.vocabulary import Perform, Tick, Told, ViewChanged, WakeAt
from prime_async.messages import MAX_OWN_BYTES, Own, encode
from prime_async.node import Node, open_node
from prime_async.testing.plugin import ReplayLog, replay_log
from tests.greeter import Count, Greet, Greeter, Greeting, Say, greeter, heard
from tests.machine_harness import full_member, view
from tests.memory_nodes import LIMIT_S, Place, Walker

__all__ = ["replay_log"]


# --- the machine ----------------------------------------------------------------------------------------------------


def test_a_users_machine_is_given_and_answers_its_own_kinds_and_others_see_bytes() -> None:
    hosted = Hosted(greeter(), "n0")
    assert hosted.handle(0.0, ViewChanged(view=view(1, full_member("n0"), full_member("n1")))) == []
    assert hosted.handle(1.0, Told(body=encode(Greet(text="hello")))) == [
        v.Send(peer="n1", message=Own(actor="greeter", body=encode(Greeting(text="hello")))),
        WakeAt(at=1.05),
    ]
    assert hosted.handle(2.0, heard(Greeting(text="hi"))) == [Perform(body=encode(Say(who="n1", text="hi")))]
    assert len(hosted.handle(2.0, Tick())) == 2


def test_only_members_are_heard() -> None:
    hosted = Hosted(greeter(), "n0")
    assert hosted.handle(0.0, heard(Greeting(text="early"))) == []
    hosted.handle(0.0, ViewChanged(view=view(1, full_member("n0"), full_member("n1"))))
    assert hosted.handle(0.0, heard(Greeting(text="who?"), peer="n9")) == []
    assert hosted.handle(0.0, heard(Greeting(text="hi"))) != []


@pytest.mark.parametrize("name", ["", "Greeter", "9", "a b", "a" * 33, "a\n"])
def test_a_name_that_is_not_one_is_refused(name: str) -> None:
    with pytest.raises(LocalError, match="the name of an actor is"):
        OwnActor(name=name, machine=Greeter)


def test_kinds_that_cannot_be_told_apart_are_refused() -> None:
    class Untagged(Struct):
        x: int

    for wrong in (Untagged, Greeting | Untagged, int, Greeting | int):
        with pytest.raises(LocalError, match="in messages is not a tagged"):
            OwnActor(name="x", machine=Greeter, messages=wrong)


def test_what_nobody_would_take_is_not_sent() -> None:
    """Given values that are not declared, out of bounds, or too large, when they are sent, then an error names them."""

    class Big(Struct, frozen=True, tag=True):
        data: bytes

    actor = OwnActor(name="x", machine=Greeter, messages=Greeting | Big)
    with pytest.raises(LocalError, match="is none of its messages"):
        write(actor, "messages", Count(seen=1))
    with pytest.raises(LocalError, match="nobody would take this Greeting"):
        write(actor, "messages", Greeting(text="x" * 17))
    with pytest.raises(LocalError, match=r"nobody would take this Big: \d+ bytes where at most 65536"):
        write(actor, "messages", Big(data=bytes(MAX_OWN_BYTES)))
    assert len(write(actor, "messages", Big(data=bytes(MAX_OWN_BYTES - 64)))) <= MAX_OWN_BYTES


# --- nodes ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def node(place: Place, name: int, *actors: OwnActor) -> AsyncIterator[Node]:
    async with (
        place.network.open(place.id(name)) as transport,
        open_node(place.config(name), transport=transport, workload=Walker(), actors=actors) as opened,
    ):
        yield opened


@dataclass
class Hall:
    """What greeters said to their program."""

    said: list[Say] = field(default_factory=list)
    changed: trio.Event = field(default_factory=trio.Event)

    def say(self, effect: Say) -> None:
        self.said.append(effect)
        self.changed.set()


async def test_actors_of_two_nodes_talk_and_their_logs_replay_with_them(place: Place, replay_log: ReplayLog) -> None:
    """Given two nodes with an actor, when one is told to greet, then the other's program learns it; the logs replay.

    Without the actor, or with another, the replay says so.
    """
    hall = Hall()
    with trio.fail_after(LIMIT_S):
        async with node(place, 0, greeter()) as first, node(place, 1, greeter(hall.say)):
            first.tell("greeter", Greet(text="hello"))
            await hall.changed.wait()
    assert hall.said == [Say(who=place.id(0), text="hello")]

    log = read_log(place.directory / "n1.log")
    assert log.header.actors == ("greeter",)
    steps = [step for step in replay(log, [greeter()]) if step.record.actor == "own/greeter"]
    assert Perform(body=encode(hall.said[0])) in [effect for step in steps for effect in step.effects]
    with pytest.raises(LogFormatError, match=r"the actor greeter, .*--own module:function"):
        list(replay(log))
    assert len(replay_log(place.directory / "n1.log", [greeter()])) == len(log.records)
    with pytest.raises(pytest.fail.Exception, match="the actor greeter"):
        replay_log(place.directory / "n1.log")
    other = OwnActor(name="greeter", machine=lambda me: Greeter(me, heard=1), messages=Greeting | Count, effects=Say)
    with pytest.raises(ReplayMismatchError, match="own/greeter"):
        list(replay(log, [other]))


async def test_messages_to_an_actor_that_is_not_here_are_counted_and_no_offence(place: Place) -> None:
    with trio.fail_after(LIMIT_S):
        async with node(place, 0, greeter()) as first, node(place, 1) as second:
            first.tell("greeter", Greet(text="hello"))
            while second.ignored_messages < 5:  # noqa: ASYNC110  (nothing is told of what is ignored)
                await trio.sleep(0.01)
            assert second.traffic.violations == {}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        encode(Greeting(text="x" * 17)),
        encode(Greeting(text="x")) + b"\x00",
        encode(Say(who="x", text="x")),
        encode({"type": "Greeting", "text": "x", "more": [[[[[[[[[]]]]]]]]]}),
    ],
    ids=["nothing", "no_cbor", "out_of_bounds", "trailing_byte", "another_kind", "too_deep"],
)
async def test_what_is_no_message_of_the_actor_is_a_violation_and_does_not_reach_it(place: Place, body: bytes) -> None:
    hall = Hall()
    with trio.fail_after(LIMIT_S):
        async with node(place, 0, greeter(hall.say)) as first, node(place, 1) as second:
            peer = place.id(1)
            while not second._transport.send(place.id(0), Own(actor="greeter", body=body)):  # noqa: ASYNC110
                await trio.sleep(0.01)
            while not first.traffic.violations:  # noqa: ASYNC110  (the counter is what is tested)
                await trio.sleep(0.01)
            assert first.traffic.violations == {peer: 1}
    assert hall.said == []


async def test_what_cannot_be_told_is_refused(place: Place) -> None:
    with trio.fail_after(LIMIT_S):
        async with node(place, 0, greeter()) as alone:
            with pytest.raises(LocalError, match="no actor other, it has greeter"):
                alone.tell("other", Greet(text="x"))
            with pytest.raises(LocalError, match="is none of its events"):
                alone.tell("greeter", Greeting(text="x"))
        with pytest.raises(LocalError, match="two actors have one name: greeter, greeter"):
            async with node(place, 0, greeter(), greeter()):
                pass


# --- for a replay ---------------------------------------------------------------------------------------------------


def not_an_actor() -> str:
    return "hello"


def wants_something(_name: str) -> OwnActor:
    return greeter()


def fails() -> OwnActor:
    raise ValueError("for a reason of its own")


def test_an_actor_for_a_replay_is_what_the_function_makes() -> None:
    assert load_actor(f"{__name__}:greeter").name == "greeter"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("greeter", "give it as module:function"),
        ("no_such_module:greeter", "No module named 'no_such_module'"),
        (f"{__name__}:nothing", "has no attribute 'nothing'"),
        (f"{__name__}:LIMIT_S", "is no function"),
        (f"{__name__}:wants_something", "without arguments"),
        (f"{__name__}:not_an_actor", "the function gives 'hello', and not an OwnActor"),
    ],
)
def test_what_makes_no_actor_for_a_replay_is_refused_with_what_is_wrong(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        load_actor(name)
    assert f"--own {name}: " in str(refused.value)


def test_an_error_of_the_function_comes_out_as_it_is() -> None:
    """Defect: it was taken for a function that is not there."""
    with pytest.raises(ValueError, match="of its own"):
        load_actor(f"{__name__}:fails")


def test_a_body_that_is_too_large_is_no_message_at_all() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"t": "own", "actor": "x", "body": bytes(MAX_OWN_BYTES + 1)}, Own, builtin_types=(bytes,))
