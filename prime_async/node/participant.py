"""What a node of a run and a member of a group have in common: a place on the network, own actors, and an end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from typing import Any, Final

import structlog
import trio

from prime_async.actors.groups import single_errors
from prime_async.actors.membership import MembershipActor
from prime_async.config.schema import Config
from prime_async.config.spec import run_id
from prime_async.errors import PrimeAsyncError
from prime_async.ledger import BallotFile
from prime_async.log import LogWriter, MachineSettings
from prime_async.machines.own import OwnActor
from prime_async.machines.vocabulary import Fail
from prime_async.messages import View
from prime_async.node.allow import AllowList
from prime_async.node.build import record_path
from prime_async.node.events import EventStream
from prime_async.node.switchboard import Switchboard, failure_of
from prime_async.transport.base import Traffic, Transport

log = structlog.get_logger(__name__)

GOODBYE_S: Final = 5.0
"""How long one that is closed by its user waits for the others to let it go."""


class Participant:
    """One of those that agree on views, whatever else it does. A base, and no part, since users of both see it."""

    def __init__(
        self,
        config: Config,
        transport: Transport,
        allow: AllowList,
        actors: Sequence[OwnActor],
        on_view: Callable[[View], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.events = EventStream()
        """What happened, and what goes wrong, in detail."""
        self._transport = transport
        self._allow = allow
        self._log = log.bind(node=config.node.name or transport.id[:8])
        self._switchboard = Switchboard(transport, allow, self._log, actors, on_view)
        self._finished = trio.Event()
        self._failure: PrimeAsyncError | None = None
        self._scope = trio.CancelScope()
        self._ballots = BallotFile(config.node.directory, run_id(config.run))

    @property
    def id(self) -> str:
        """Its public key, 64 hexadecimal digits."""
        return self._transport.id

    @property
    def contact(self) -> str:
        """What others put into ``node.join`` to reach it: ``KEY@HOST:PORT``."""
        return f"{self.id}@{self._transport.control_address.removeprefix('tcp://')}"

    @property
    def traffic(self) -> Traffic:
        """Bytes handed to, and taken from, the sockets so far."""
        return self._transport.traffic

    @property
    def ignored_messages(self) -> int:
        """Those to actors that are not here."""
        return self._switchboard.ignored_messages

    async def wait(self) -> None:
        """Until it has left: it was stopped, or all rounds are done."""
        await self._finished.wait()

    def tell(self, actor: str, event: Any) -> None:
        """Give one of the user's own actors an event of its own kinds. It is handled soon.

        Raises :class:`LocalError` for an actor that is not here, and an event that is none of its kinds.
        """
        self._switchboard.tell_own(actor, event)

    # --- for what it is made of ---------------------------------------------------------------------------------

    def _membership_actor(self, nursery: trio.Nursery, finish: Callable[[], None]) -> MembershipActor:
        """``finish`` is called when it has left."""
        return MembershipActor(
            self._transport,
            nursery,
            self._switchboard.runners["membership"].post,
            store=self._ballots.save,
            admit=self._admit,
            let_in=self._allow.let_in,
            fail=self._fail,
            finish=finish,
        )

    def _admit(self, members: frozenset[str]) -> None:
        self._allow.members = members

    def _fail(self, fail: Fail) -> None:
        self._failure = failure_of(fail)
        self._scope.cancel()

    def _open_recorder(self, stack: AsyncExitStack, settings: MachineSettings) -> LogWriter | None:
        """Of its messages, if they are to be recorded."""
        path = record_path(self.config, self.id)
        if path is None:
            return None
        return stack.enter_context(closing(LogWriter(path, self.id, settings, list(self._switchboard.own))))

    @asynccontextmanager
    async def _running(self, stop: Callable[[], None]) -> AsyncIterator[trio.Nursery]:
        """Its tasks end with the block, which is cancelled if it fails. Left otherwise, it says goodbye: ``stop``."""
        with single_errors(), self._scope:
            async with trio.open_nursery() as nursery:
                yield nursery
                if not self._finished.is_set():
                    stop()
                    with trio.move_on_after(GOODBYE_S):
                        await self._finished.wait()
                nursery.cancel_scope.cancel()

    def _raise_failure(self) -> None:
        """What the block was cancelled for, if it was."""
        if self._failure is not None:
            raise self._failure
