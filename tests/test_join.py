"""Joining with a string: real processes, a real door."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from prime_async.config.contact import Contact
from prime_async.config.invitation import PREFIX, Invitation
from prime_async.config.load import load_config
from prime_async.config.schema import Config, RunSpec
from prime_async.config.spec import flatten, run_id, settings_id
from prime_async.errors import ChunkUnavailableError, ConfigError, ProtocolError, RefusedError
from prime_async.messages import AskRun, ChunkKey, Hello, Member, MemberAddress, Message, RunInfo
from prime_async.node import Node, open_node
from prime_async.node.allow import INVITATIONS, LET_IN
from prime_async.node.invite import Door, checked_run, make_invitation, open_door
from prime_async.transport.base import Received
from prime_async.transport.keys import generate
from tests.commands import LIMIT_S, SMALL, command, lines_of, run, wait_for
from tests.processes import unused_tcp_ports


@asynccontextmanager
async def founder(home: Path, *settings: str) -> AsyncIterator[tuple[Node, Config]]:
    """A node of a run of its own, whose ports are known beforehand."""
    control, bulk = unused_tcp_ports(2)
    run("init", home, *SMALL, f"--set=node.port={control}", f"--set=node.bulk_port={bulk}", *settings)
    config = load_config(home / "node.toml")
    async with open_node(config) as node:
        yield node, config


def soon() -> datetime:
    return datetime.now(UTC) + timedelta(hours=1)


async def next_message(door: Door) -> Message:
    async for notice in door.transport.notices:
        if isinstance(notice, Received):
            return notice.message
    raise AssertionError("the door closed before that")


def test_a_string_and_one_question_lead_to_a_node_that_trains(tmp_path: Path) -> None:
    """Given a run, when somebody joins with the string of a member, then they train together.

    Rounds take longer than with SMALL alone, so that the joiner has not thousands of them to catch up with.
    """
    ports = unused_tcp_ports(2)
    home, guest = tmp_path / "first", tmp_path / "guest"
    doors = (f"--set=node.port={ports[0]}", f"--set=node.bulk_port={ports[1]}")
    run("init", home, *SMALL, *doors, '--set=run.name="ours"', "--set=run.round.inner_steps=30")
    with subprocess.Popen(command("run", home / "node.toml", "--events"), stdout=subprocess.PIPE, text=True) as first:
        told = lines_of(first)
        wait_for(told, "founded")
        # Read while it runs: of what nobody reads, a node drops the oldest.
        seen: list[dict[str, Any]] = []
        reader = threading.Thread(target=lambda: seen.extend(told))
        reader.start()
        string = run("invite", home / "node.toml").stdout.strip()
        with subprocess.Popen(
            command("join", string, guest, "--name", "nina", "--advertise", "127.0.0.1"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as refused:  # fmt: skip
            assert "add --yes" in refused.communicate(timeout=LIMIT_S)[0]
        said = run("join", string, guest, "--name", "nina", "--advertise", "127.0.0.1", "--yes", "--no-run").stdout
        assert "tokens/s" in said
        assert run_id(load_config(guest / "node.toml").run) == run_id(load_config(home / "node.toml").run)
        assert "is there already" in run("join", string, guest, "--yes", code=2).stderr
        with subprocess.Popen(
            command("run", guest / "node.toml", "--events"), stdout=subprocess.PIPE, text=True
        ) as node:
            events = lines_of(node)
            wait_for(events, "round_finished")
            node.send_signal(signal.SIGINT)
            list(events)
            assert node.wait(LIMIT_S) == 0
        first.send_signal(signal.SIGINT)
        reader.join(LIMIT_S)
        assert first.wait(LIMIT_S) == 0
    assert [fact["name"] for fact in seen if fact["type"] == "key_let_in"] == ["nina"]
    assert "nina" in [fact["name"] for fact in seen if fact["type"] == "member_joined"]
    assert "nina" in (home / "state" / LET_IN).read_text()


async def test_whoever_has_the_string_is_told_the_run_and_let_in(tmp_path: Path) -> None:
    async with founder(tmp_path) as (node, config):
        invitation = Invitation.parse(str(make_invitation(config, soon())))
        key = generate()
        async with open_door(invitation, key) as door:
            assert await door.read_run() == config.run
            assert not (config.node.directory / LET_IN).exists()
            assert [c.id for c in await door.let_in("nina")] == [node.id]
        assert key.id in (config.node.directory / LET_IN).read_text()
        async with open_door(Invitation(**{**fields(invitation), "token": None}), key) as door:
            assert await door.read_run() == config.run


async def test_an_invitation_is_good_for_nothing_else(tmp_path: Path) -> None:
    """Given an invitation, when a node says hello with its key, or asks for chunks, then it is not answered."""
    async with founder(tmp_path) as (node, config):
        invitation = make_invitation(config, soon())
        async with open_door(invitation, generate()) as door:
            await door.read_run()
            me = Member(id=door.transport.id, name="x", incarnation=1, control="tcp://127.0.0.1:1", bulk="")
            hello = Hello(protocol=1, run_id=run_id(config.run), settings=flatten(config.run), member=me)
            door.transport.send(node.id, hello)
            door.transport.dial(node.id, *doors_of(config))
            with pytest.raises(ChunkUnavailableError, match="for members"):
                await door.transport.get(node.id, ChunkKey(kind="state", round=0, chunk=0), 10.0)
            door.transport.send(node.id, AskRun())
            # Said after the hello, and answered first.
            assert isinstance(await next_message(door), RunInfo)


async def test_a_string_without_a_token_needs_a_key_that_is_let_in(tmp_path: Path) -> None:
    async with founder(tmp_path) as (_, config):
        key = generate()
        async with open_door(make_invitation(config, None), key) as door:
            with pytest.raises(RefusedError, match=key.id):
                await door.read_run()


async def test_a_string_that_was_taken_back_opens_nothing(tmp_path: Path) -> None:
    async with founder(tmp_path) as (_, config):
        invitation = make_invitation(config, soon())
        async with open_door(invitation, generate()) as door:
            await door.read_run()
            (config.node.directory / INVITATIONS).unlink()
            with pytest.raises(RefusedError, match="taken back"):
                await door.let_in("nina")
        async with open_door(invitation, generate()) as door:
            with pytest.raises(RefusedError, match="taken back"):
                await door.read_run()


def fields(invitation: Invitation) -> dict[str, Any]:
    names = ("name", "run_id", "members", "encrypt", "token")
    return {name: getattr(invitation, name) for name in names}


def doors_of(config: Config) -> tuple[str, str]:
    return f"tcp://127.0.0.1:{config.node.port}", f"tcp://127.0.0.1:{config.node.bulk_port}"


def of_run(spec: RunSpec, settings: dict[str, str] | None = None) -> tuple[Invitation, RunInfo]:
    """An invitation to ``spec``, and what a member answers."""
    members = (Contact("ab" * 32, "127.0.0.1", 7700),)
    info = RunInfo(settings=settings or flatten(spec), members=(MemberAddress(id="ab" * 32, control=""),))
    return Invitation(name="x", run_id=run_id(spec), members=members), info


def test_a_member_that_names_another_run_than_the_string_is_not_believed() -> None:
    spec = RunSpec(name="ours")
    invitation, info = of_run(spec, {**flatten(spec), "run.rounds": "7"})
    with pytest.raises(ProtocolError, match="another run spec"):
        checked_run(invitation, info)


@pytest.mark.parametrize("setting", ["model", "data"])
def test_a_run_spec_cannot_make_a_joiner_run_code(setting: str) -> None:
    values: Any = {setting: "os:system"}
    with pytest.raises(ConfigError, match="is not run because somebody else names it"):
        checked_run(*of_run(RunSpec(name="theirs", **values)))


def test_a_run_spec_that_this_version_does_not_know_is_refused() -> None:
    """Given settings that are not ours, when the string proves them, then the error names what is not known."""
    spec = RunSpec(name="newer")
    invitation, info = of_run(spec)
    settings = {**info.settings, "run.dreams": "true"}
    newer = Invitation(**{**fields(invitation), "run_id": settings_id(settings)})
    with pytest.raises(ConfigError, match=r"run\.dreams"):
        checked_run(newer, replace(info, settings=settings))


def test_a_wrong_string_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    assert "begins with" in run("join", "hello", tmp_path / "x", "--yes", code=2).stderr
    assert "not whole" in run("join", PREFIX + "abc", tmp_path / "x", "--yes", code=2).stderr
    assert not (tmp_path / "x").exists()
