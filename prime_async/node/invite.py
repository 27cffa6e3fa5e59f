"""Both ends of an invitation: making one beside a node, and asking with one what the run is."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final

import trio

from prime_async.actors.groups import single_errors
from prime_async.config.contact import Contact
from prime_async.config.invitation import Invitation
from prime_async.config.load import parse_run
from prime_async.config.schema import Config, RunSpec
from prime_async.config.spec import run_id, settings_id
from prime_async.errors import ConfigError, PeerUnreachableError, ProtocolError, RefusedError
from prime_async.messages import AskRun, Refuse, RunInfo
from prime_async.node.address import advertised_host, contacts_of
from prime_async.node.allow import INVITATIONS, TIME_FORMAT
from prime_async.node.files import append_line
from prime_async.transport.base import Denied, Received, Transport
from prime_async.transport.keys import KeyPair, generate, key_from_secret, read_key_file
from prime_async.transport.zeromq import ZmqSettings, open_zmq

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ASK_AGAIN_S: Final = 1.0
TIMEOUT_S: Final = 20.0
MAX_CONTACTS: Final = 16


def make_invitation(config: Config, until: datetime | None) -> Invitation:
    """The invitation to the run of a node, to be answered by that node, or by those that it asks itself.

    ``until``: with a token, which this node, or the one that runs with the same ``node.directory``, takes until then;
    ``None``: without one. Raises :class:`ConfigError` without a usable key, or a port that others could dial.
    """
    node = config.node
    if node.port == 0:
        raise ConfigError(["node.port: 0 is any free port, which nobody else can know: set it to a number"])
    token = None
    if until is not None:
        token = generate()
        line = f"{token.id} {until.strftime(TIME_FORMAT)}  # made by `prime-async invite`; delete the line to end it"
        append_line(node.directory / INVITATIONS, line)
    me = Contact(read_key_file(node.key).id, advertised_host(node), node.port)
    return Invitation(
        name=config.run.name,
        run_id=run_id(config.run),
        members=(me, *contacts_of(node))[:MAX_CONTACTS],
        encrypt=node.encrypt,
        token=token.secret if token else None,
    )


@dataclass(frozen=True, slots=True)
class Door:
    """A run that can be asked. Made by :func:`open_door`."""

    invitation: Invitation
    transport: Transport
    key: KeyPair

    async def read_run(self) -> RunSpec:
        """The run spec, checked against the invitation. Raises as :func:`open_door` says."""
        info, _ = await self._ask(AskRun(key=""))
        return checked_run(self.invitation, info)

    async def let_in(self, name: str) -> tuple[Contact, ...]:
        """Have this node's key put on the list of those that may connect. Returns members to ask.

        Who let us in comes first.
        """
        info, peer = await self._ask(AskRun(key=self.key.id, name=name))
        found = {m.id: _contact(m.id, m.control) for m in info.members}
        found |= {c.id: c for c in self.invitation.members if c.id == peer}  # the address that worked for us
        contacts = [c for c in found.values() if c is not None]
        return tuple(sorted(contacts, key=lambda c: c.id != peer)[:MAX_CONTACTS])

    async def _ask(self, question: AskRun) -> tuple[RunInfo, str]:
        """The first answer, and whose it is."""
        members = {m.id: m for m in self.invitation.members}
        denied: set[str] = set()
        with trio.move_on_after(TIMEOUT_S), single_errors():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._repeat, question)
                async for notice in self.transport.notices:
                    match notice:
                        case Received(peer=peer, message=RunInfo() as info) if peer in members:
                            if info.key == question.key:
                                nursery.cancel_scope.cancel()
                                return info, peer
                        case Received(peer=peer, message=Refuse(reason=reason, text=text)) if peer in members:
                            raise RefusedError(reason, text)
                        case Denied(peer=peer):
                            denied.add(peer)
                            if denied >= members.keys():
                                raise RefusedError("key_not_allowed", self._denied_text())
        places = ", ".join(f"{m.host}:{m.port}" for m in members.values())
        raise PeerUnreachableError(
            f"nobody answered at {places} in {TIMEOUT_S:g} s: see that a member runs there, and that its firewall lets "
            f"TCP port {self.invitation.members[0].port} and the bulk port in"
        )

    async def _repeat(self, question: AskRun) -> None:
        while True:
            for member in self.invitation.members:
                self.transport.send(member.id, question)
            await trio.sleep(ASK_AGAIN_S)

    def _denied_text(self) -> str:
        if self.invitation.token is not None:
            return "the members do not take this join string: it has expired, or was taken back; ask for a new one"
        return (
            f"the members do not let this key in: {self.key.id}. Ask the operator of one to add it to their allowed "
            "keys, or for a join string with a token (`prime-async invite`)"
        )


@asynccontextmanager
async def open_door(invitation: Invitation, key: KeyPair) -> AsyncIterator[Door]:
    """Ask the members that an ``invitation`` names, on behalf of the node that has ``key``.

    What is asked raises :class:`RefusedError` if they do not let us in, :class:`PeerUnreachableError` if none answers,
    and :class:`ProtocolError` if one answers with another run than the invitation's.
    """
    identity = key if invitation.token is None else key_from_secret(invitation.token)
    known = frozenset(m.id for m in invitation.members)
    settings = ZmqSettings(
        key=identity, advertise="127.0.0.1", allow=known.__contains__, host="127.0.0.1", encrypt=invitation.encrypt
    )
    async with open_zmq(settings) as transport:
        for member in invitation.members:
            transport.dial(member.id, transport.locate(member.id, member.host, member.port), "")
        yield Door(invitation, transport, key)


def checked_run(invitation: Invitation, info: RunInfo) -> RunSpec:
    """The run spec of ``info``. Nothing of it is believed that the run id of the ``invitation`` does not prove.

    Raises :class:`ProtocolError` if it is another run's, :class:`ConfigError` if this program cannot take part in it.
    """
    if settings_id(info.settings) != invitation.run_id:
        raise ProtocolError("a member answered with another run spec than that of the join string: ask for a new one")
    text = "".join(f"{key} = {value}\n" for key, value in info.settings.items())
    run = parse_run(text, "the run's spec")
    if run_id(run) != invitation.run_id:
        raise ConfigError(
            ["the run's spec means something else to this version of prime-async: install the one the members have"]
        )
    for name, value in (("model", run.model), ("data", run.data)):
        if ":" in value:
            raise ConfigError(
                [
                    f'run.{name} = "{value}" is code of its owner, which is not run because somebody else names it: if '
                    f"you have it and trust it, write the file with `prime-async init --join {invitation.members[0]}` "
                    "and the members' [run] table"
                ]
            )
    return run


def _contact(id: str, control: str) -> Contact | None:
    """What a member says its address is; ``None`` if that is nothing to dial."""
    try:
        return Contact.parse(f"{id}@{control.removeprefix('tcp://')}")
    except ConfigError:
        return None
