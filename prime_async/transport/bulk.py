"""The bulk plane above the sockets: gets, their answers, and the bounds on both. It is the same on every transport.

* A link carries frames to one peer, both ways: ``[Get]``, ``[Withdraw]``, ``[Missing]`` and ``[Found, payload]``.
* Asking: gets wait in a queue per peer; at most ``window`` of them are under way. Each goes over the link with the
  fewest under way. When a link goes down, its gets return to the queue, under the same number, so nothing is lost.
* A peer that was dialled, and to which no link has stood for ``unreachable_s``, is unreachable: its gets fail, and
  further ones fail at once, until there is a link.
* A get that is given up is withdrawn with a message, so that the server forgets it. An answer that comes in spite
  of it is discarded. An answer to a number that was never given out is a violation.
* Answering: each get has a task of its own, which waits in the provider. A second get of the same number replaces the
  first: the peer lost the connection over which it asked. More than ``max_unanswered`` at once is a violation.
* The payload's digest is verified before anybody sees it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import structlog
import trio
from blake3 import blake3

from prime_async.errors import (
    ChunkUnavailableError,
    DeadlineError,
    LocalError,
    PeerUnreachableError,
    PrimeAsyncError,
    ProtocolError,
)
from prime_async.messages import MAX_HEADER_BYTES, BulkHeader, ChunkKey, Found, Get, Missing, Withdraw, encode
from prime_async.transport.base import Chunk, Provider
from prime_async.transport.inbox import Inbox, decode_frame, is_announcement
from prime_async.transport.links import Link, Sent
from prime_async.transport.reach import UNREACHABLE_S

PLANE: Final = "bulk"
MAX_WAIT_S: Final = 60.0
"""How long one request waits at a server. A get with a later deadline asks again."""
MIN_WAIT_S: Final = 0.05
"""A provider gets at least so long, even for a get that does not want to wait."""
ASK_AGAIN_S: Final = 0.05
INLINE_HASH_BYTES: Final = 2 << 20
"""Up to here hashing takes less than a quarter millisecond, which a change of threads would cost as well."""
UNANSWERED_PER_WINDOW: Final = 16
"""A peer's window may be larger than ours, and one that started again may have asked in its earlier life."""
MAX_TEXT: Final = 1000

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkLimits:
    """The bounds of one node's bulk plane."""

    window: int = 16  # gets under way to one peer
    max_payload_bytes: int = 64 << 20
    hash_in_threads: bool = True  # False: never, for virtual clocks, which do not see threads
    unreachable_s: float = UNREACHABLE_S

    @property
    def max_unanswered(self) -> int:
        """Gets of one peer that wait here."""
        return UNANSWERED_PER_WINDOW * self.window


@dataclass(frozen=True, slots=True)
class _Answer:
    found: Found
    payload: memoryview


_Outcome: TypeAlias = _Answer | Missing | PrimeAsyncError


@dataclass(slots=True, eq=False)
class _Call:
    """One request, from the queue until its answer."""

    key: ChunkKey
    deadline: float  # on trio's clock, seconds
    id: int
    link: Link | None = None
    outcome: _Outcome | None = None
    done: trio.Event = field(default_factory=trio.Event)

    def finish(self, outcome: _Outcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self.done.set()


class _Numbers:
    """The numbers of this node's gets, to whomever. None is used twice."""

    def __init__(self) -> None:
        self._last = 0

    def give(self) -> int:
        self._last += 1
        return self._last

    def given(self, number: int) -> bool:
        return 0 < number <= self._last


class _Client:
    """The gets asked of one peer."""

    def __init__(self, peer: str, nursery: trio.Nursery, limits: BulkLimits, inbox: Inbox, numbers: _Numbers) -> None:
        self.dialled = False
        self.links: dict[Link, int] = {}  # link -> gets under way over it
        self._nursery = nursery
        self.is_lost = False  # no link has been up for so long that nobody waits for one any more
        self._wait: trio.CancelScope | None = None  # until it is
        self._peer = peer
        self._limits = limits
        self._inbox = inbox
        self._numbers = numbers
        self._waiting: deque[_Call] = deque()
        self._under_way: dict[int, _Call] = {}

    async def ask(self, key: ChunkKey, deadline: float) -> _Outcome:
        call = _Call(key, deadline, self._numbers.give())
        self._waiting.append(call)
        self._pump()
        try:
            await call.done.wait()
        finally:
            self._give_up(call)
        assert call.outcome is not None
        return call.outcome

    def dial(self) -> None:
        """There will be links that we dialled: gets wait for them."""
        self.dialled = True
        self._settle()
        self._watch()

    def hang_up(self) -> None:
        """There will be none any more."""
        self.dialled = False
        self._settle()

    def up(self, link: Link) -> None:
        self.links.setdefault(link, 0)
        self._settle()
        self._pump()

    def down(self, link: Link) -> None:
        self._drop(link)
        self._pump()

    def fail(self, why: str, kind: type[PrimeAsyncError] = PeerUnreachableError) -> None:
        """Every get, queued or under way, fails."""
        calls = [*self._waiting, *self._under_way.values()]
        self._waiting.clear()
        self._under_way.clear()
        self.links = dict.fromkeys(self.links, 0)
        for call in calls:
            self._withdraw(call)
            call.finish(kind(why))

    def answered(self, id: int, outcome: _Outcome) -> None:
        """An answer came, wanted or not."""
        call = self._under_way.pop(id, None)
        if call is not None:
            self._release(call)
            call.finish(outcome)
            self._pump()

    def _give_up(self, call: _Call) -> None:
        if call.outcome is not None:
            return
        if self._under_way.pop(call.id, None) is None:
            self._waiting.remove(call)
            return
        self._withdraw(call)
        self._release(call)
        self._pump()

    def _withdraw(self, call: _Call) -> None:
        if call.link is not None:
            _count_sent(self._inbox, call.link, encode(Withdraw(id=call.id)))

    def _release(self, call: _Call) -> None:
        if call.link in self.links:
            self.links[call.link] -= 1

    def _settle(self) -> None:
        self.is_lost = False
        if self._wait is not None:
            self._wait.cancel()
            self._wait = None

    def _watch(self) -> None:
        if self.dialled and not self.links and self._wait is None and not self.is_lost:
            self._wait = trio.CancelScope()
            self._nursery.start_soon(self._lose_patience, self._wait)

    async def _lose_patience(self, wait: trio.CancelScope) -> None:
        with wait:
            await trio.sleep(self._limits.unreachable_s)
            self._wait = None
            self.is_lost = True
            self.fail(self.why_lost)

    @property
    def why_lost(self) -> str:
        lost_s = self._limits.unreachable_s
        return f"no connection to {self._peer} for {lost_s:g} s, whoever dialled: ask another peer, or later"

    def _drop(self, link: Link) -> None:
        self.links.pop(link, None)
        self._watch()
        lost = [call for call in self._under_way.values() if call.link is link]
        for call in reversed(lost):
            del self._under_way[call.id]
            call.link = None
            self._waiting.appendleft(call)

    def _pump(self) -> None:
        while self._waiting and self.links and len(self._under_way) < self._limits.window:
            link = min(self.links, key=lambda candidate: (candidate.inbound, self.links[candidate]))
            sent = self._send_get(self._waiting[0], link)
            if sent is Sent.NO_ROUTE:
                self._drop(link)
            elif sent is Sent.FULL:
                return  # the network has not even taken the withdrawals: the next answer comes back here
            else:
                self._start(self._waiting.popleft(), link)
        if not self.links and not self.dialled:
            self.fail(f"the connection that {self._peer} had opened is gone, and no address to dial is known")

    def _send_get(self, call: _Call, link: Link) -> Sent:
        wait_s = min(max(call.deadline - trio.current_time(), 0.0), MAX_WAIT_S)
        return _count_sent(self._inbox, link, encode(Get(id=call.id, key=call.key, wait_ms=math.ceil(wait_s * 1000))))

    def _start(self, call: _Call, link: Link) -> None:
        call.link = link
        self._under_way[call.id] = call
        self.links[link] += 1


class _Server:
    """The gets that peers ask of this node."""

    def __init__(self, nursery: trio.Nursery, inbox: Inbox, limits: BulkLimits) -> None:
        self._nursery = nursery
        self._inbox = inbox
        self._limits = limits
        self._provider: Provider | None = None
        self._ready = trio.Event()
        self._open: dict[str, dict[int, trio.CancelScope]] = {}

    def serve(self, provider: Provider) -> None:
        self._provider = provider
        self._ready.set()

    def asked(self, peer: str, link: Link, get: Get) -> None:
        scopes = self._open.setdefault(peer, {})
        earlier = scopes.pop(get.id, None)
        if earlier is not None:
            earlier.cancel()
        if len(scopes) >= self._limits.max_unanswered:
            self._inbox.violated(peer, PLANE, f"more than {self._limits.max_unanswered} gets unanswered")
            return
        scopes[get.id] = trio.CancelScope()
        self._nursery.start_soon(self._answer, peer, link, get, scopes[get.id])

    def withdrawn(self, peer: str, id: int) -> None:
        scope = self._open.get(peer, {}).get(id)
        if scope is not None:
            scope.cancel()

    def forget(self, peer: str) -> None:
        for scope in self._open.get(peer, {}).values():
            scope.cancel()

    async def _answer(self, peer: str, link: Link, get: Get, scope: trio.CancelScope) -> None:
        try:
            with scope:
                header, payload = await self._find(peer, get)
                await self._deliver(link, header, payload)
        finally:
            self._close(peer, get.id, scope)

    def _close(self, peer: str, id: int, scope: trio.CancelScope) -> None:
        scopes = self._open.get(peer, {})
        if scopes.get(id) is scope:
            del scopes[id]
            if not scopes:
                del self._open[peer]

    async def _find(self, peer: str, get: Get) -> tuple[bytes, memoryview | None]:
        with trio.move_on_after(min(max(get.wait_ms / 1000, MIN_WAIT_S), MAX_WAIT_S)):
            try:
                chunk = await self._provide(peer, get.key)
            except PrimeAsyncError as error:
                if not isinstance(error, ChunkUnavailableError):
                    log.error("chunk_not_provided", peer=peer, key=str(get.key), reason=str(error))
                return encode(Missing(id=get.id, gone=True, text=str(error)[:MAX_TEXT])), None
            found = Found(id=get.id, info=chunk.info, size=chunk.payload.nbytes)
            return encode(found), chunk.payload
        return encode(Missing(id=get.id, gone=False)), None

    async def _provide(self, peer: str, key: ChunkKey) -> Chunk:
        if self._provider is None:
            await self._ready.wait()
        assert self._provider is not None
        chunk = await self._provider.provide(peer, key)
        if chunk.payload.nbytes > self._limits.max_payload_bytes:
            # Sent nevertheless, it would end the peer's connection.
            raise LocalError(
                f"{key} has {chunk.payload.nbytes} bytes, and the transport was opened for at most "
                f"{self._limits.max_payload_bytes}: raise max_payload_bytes"
            )
        return chunk

    async def _deliver(self, link: Link, header: bytes, payload: memoryview | None) -> None:
        """Hand the answer to the network. Only this task waits for a peer that does not read."""
        pause_s = 0.002
        with trio.move_on_after(MAX_WAIT_S):
            while _count_sent(self._inbox, link, header, payload) is Sent.FULL:
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.1)


class BulkPlane:
    """Both sides of the bulk plane of one node. Tasks that answer gets run in ``nursery``."""

    def __init__(self, nursery: trio.Nursery, inbox: Inbox, limits: BulkLimits) -> None:
        self._inbox = inbox
        self._limits = limits
        self._numbers = _Numbers()
        self._clients: dict[str, _Client] = {}
        self._nursery = nursery
        self._server = _Server(nursery, inbox, limits)
        self.serve = self._server.serve

    def dialled(self, peer: str) -> None:
        """The peer's bulk address is known, so gets wait for a connection instead of failing at once."""
        self._client(peer).dial()

    def hang_up(self, peer: str) -> None:
        """The peer is not dialled any more. Its gets fail. Links that it opened stay."""
        self._fail(peer, f"hung up on {peer}")
        client = self._clients.get(peer)
        if client is not None:
            client.hang_up()
            self._tidy(peer)

    def shut_out(self, peer: str) -> None:
        """The peer broke the protocol too often: gets of it and by it end."""
        client = self._clients.get(peer)
        if client is not None:
            client.fail(_why_shut_out(peer), ProtocolError)
        self._server.forget(peer)

    def link_up(self, peer: str, link: Link) -> None:
        """Frames can be sent over ``link`` from now on."""
        self._client(peer).up(link)

    def link_down(self, peer: str, link: Link) -> None:
        """What was sent over ``link`` and is unanswered is lost."""
        client = self._clients.get(peer)
        if client is not None:
            client.down(link)
            self._tidy(peer)

    def received(self, peer: str, link: Link, frames: Sequence[memoryview]) -> None:
        """One message from ``peer``, as it came."""
        self._inbox.traffic.bulk_received += sum(f.nbytes for f in frames)
        if self._inbox.is_shut_out(peer) or is_announcement(frames):
            return
        try:
            self._handle(peer, link, frames)
        except ProtocolError as error:
            self._inbox.violated(peer, PLANE, str(error))

    async def get(self, peer: str, key: ChunkKey, timeout_s: float) -> Chunk:
        """See :meth:`prime_async.transport.base.Transport.get`."""
        with trio.move_on_after(max(timeout_s, 0.0)) as scope:
            return await self._fetch(peer, key, scope.deadline)
        raise DeadlineError(f"{key} did not come from {peer} within {timeout_s:g} s: ask another peer, or wait longer")

    async def _fetch(self, peer: str, key: ChunkKey, deadline: float) -> Chunk:
        while True:
            match await self._usable(peer).ask(key, deadline):
                case _Answer() as answer:
                    return await self._verified(peer, key, answer)
                case Missing(gone=True, text=text):
                    raise ChunkUnavailableError(f"{peer} does not have {key}, and will not get it: {text}")
                case Missing():
                    # Its wait ended before ours. The pause keeps a peer that never waits from being asked in a loop.
                    await trio.sleep(ASK_AGAIN_S)
                case PrimeAsyncError() as error:
                    raise error

    def _usable(self, peer: str) -> _Client:
        client = self._clients.get(peer)
        if self._inbox.is_shut_out(peer):
            raise ProtocolError(_why_shut_out(peer))  # and not unreachable: no other answer will ever come
        if client is None or not (client.dialled or client.links):
            raise PeerUnreachableError(f"no connection to {peer}: dial its bulk address first")
        if client.is_lost:
            raise PeerUnreachableError(client.why_lost)
        return client

    async def _verified(self, peer: str, key: ChunkKey, answer: _Answer) -> Chunk:
        if await self._digest(answer.payload) != answer.found.info.digest:
            reason = f"the bytes of {key} do not have the digest that came with them"
            self._inbox.violated(peer, PLANE, reason)
            raise ProtocolError(f"{peer}: {reason}")
        return Chunk(answer.found.info, answer.payload)

    async def _digest(self, payload: memoryview) -> bytes:
        if payload.nbytes <= INLINE_HASH_BYTES or not self._limits.hash_in_threads:
            return blake3(payload).digest()
        return await trio.to_thread.run_sync(lambda: blake3(payload).digest())

    def _handle(self, peer: str, link: Link, frames: Sequence[memoryview]) -> None:
        if not frames:
            raise ProtocolError("a message without frames")
        header = decode_frame(frames[0], BulkHeader, MAX_HEADER_BYTES)
        expected = 2 if isinstance(header, Found) else 1
        if len(frames) != expected:
            raise ProtocolError(f"{type(header).__name__} came in {len(frames)} frames instead of {expected}")
        match header:
            case Get():
                self._server.asked(peer, link, header)
            case Withdraw():
                self._server.withdrawn(peer, header.id)
            case Missing():
                self._asker(peer, header.id).answered(header.id, header)
            case Found():
                self._found(peer, header, frames[1])

    def _found(self, peer: str, found: Found, payload: memoryview) -> None:
        client = self._asker(peer, found.id)
        if payload.nbytes == found.size <= self._limits.max_payload_bytes:
            client.answered(found.id, _Answer(found, payload))
            return
        error = ProtocolError(f"{payload.nbytes} bytes came where the header says {found.size}")
        client.answered(found.id, ProtocolError(f"{peer}: {error}"))
        raise error

    def _asker(self, peer: str, id: int) -> _Client:
        if not self._numbers.given(id):
            raise ProtocolError(f"an answer to get {id}, which was never asked")
        return self._client(peer)

    def _client(self, peer: str) -> _Client:
        if peer not in self._clients:
            self._clients[peer] = _Client(peer, self._nursery, self._limits, self._inbox, self._numbers)
        return self._clients[peer]

    def _fail(self, peer: str, why: str) -> None:
        client = self._clients.get(peer)
        if client is not None:
            client.fail(why)

    def _tidy(self, peer: str) -> None:
        """Keep nothing of a peer that is gone: anybody may come and go under many names."""
        client = self._clients[peer]
        if not client.dialled and not client.links:
            del self._clients[peer]


def _why_shut_out(peer: str) -> str:
    return f"{peer} broke the protocol too often and is shut out"


def _count_sent(inbox: Inbox, link: Link, header: bytes, payload: memoryview | None = None) -> Sent:
    sent = link.send(header, payload)
    if sent is Sent.YES:
        inbox.traffic.bulk_sent += len(header) + (0 if payload is None else payload.nbytes)
    return sent
