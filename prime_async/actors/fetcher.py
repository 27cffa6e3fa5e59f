"""Performs what a machine says of its fetches, and keeps what came until the machine says what to do with it."""

from __future__ import annotations

from collections.abc import Callable

import trio

from prime_async.errors import ChunkUnavailableError, DeadlineError, PeerUnreachableError, ProtocolError
from prime_async.machines.vocabulary import CancelFetch, CancelFetches, Event, Fetch, Fetched, FetchFailed
from prime_async.messages import ChunkKey
from prime_async.transport.base import Chunk, Transport


class Fetcher:
    """The fetches of one actor. Their outcomes are posted as events; what is cancelled has none.

    So a cancellation also takes back (``retract``) the outcomes that wait in the machine's inbox. The machine could not
    tell them from those of the fetches that it begins next: a contribution has the same key in every attempt.
    """

    def __init__(
        self,
        transport: Transport,
        nursery: trio.Nursery,
        post: Callable[[Event], None],
        retract: Callable[[Callable[[Event], bool]], None],
        on_busy: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """``on_busy`` is told whether anything is under way."""
        self._transport = transport
        self._nursery = nursery
        self._post = post
        self._retract = retract
        self._held: dict[tuple[str, ChunkKey], Chunk] = {}
        self._scopes: dict[tuple[str, ChunkKey], trio.CancelScope] = {}
        self._on_busy = on_busy

    def perform(self, effect: Fetch | CancelFetch | CancelFetches) -> None:
        match effect:
            case Fetch():
                self._start(effect)
            case CancelFetch(peer=peer, key=key):
                self._cancel(peer, key)
            case CancelFetches():
                self._cancel_all()

    def take(self, peer: str, key: ChunkKey) -> Chunk:
        """What came, once."""
        return self._held.pop((peer, key))

    def _start(self, fetch: Fetch) -> None:
        scope = self._scopes[fetch.peer, fetch.key] = trio.CancelScope()
        self._nursery.start_soon(self._fetch, fetch, scope)
        self._on_busy(True)

    def _cancel(self, peer: str, key: ChunkKey) -> None:
        """Abandon one fetch, and what it brought, if that was not taken yet."""
        scope = self._scopes.pop((peer, key), None)
        if scope is not None:
            scope.cancel()
            self._on_busy(bool(self._scopes))
        self._retract(lambda e: isinstance(e, Fetched | FetchFailed) and (e.peer, e.key) == (peer, key))
        self._held.pop((peer, key), None)

    def _cancel_all(self) -> None:
        """Abandon all fetches, and what they brought."""
        for scope in self._scopes.values():
            scope.cancel()
        self._scopes.clear()
        self._on_busy(False)
        self._retract(lambda e: isinstance(e, Fetched | FetchFailed))
        self._held.clear()

    async def _fetch(self, fetch: Fetch, scope: trio.CancelScope) -> None:
        event: Event
        with scope:
            try:
                chunk = await self._transport.get(fetch.peer, fetch.key, fetch.timeout_s)
            except ChunkUnavailableError:
                event = FetchFailed(peer=fetch.peer, key=fetch.key, fault="gone")
            except DeadlineError:
                event = FetchFailed(peer=fetch.peer, key=fetch.key, fault="late")
            except PeerUnreachableError:
                event = FetchFailed(peer=fetch.peer, key=fetch.key, fault="unreachable")
            except ProtocolError:
                event = FetchFailed(peer=fetch.peer, key=fetch.key, fault="invalid")
            else:
                event = Fetched(peer=fetch.peer, key=fetch.key, info=chunk.info, size=chunk.payload.nbytes)
        if not scope.cancel_called:
            del self._scopes[fetch.peer, fetch.key]
            self._on_busy(bool(self._scopes))
            if isinstance(event, Fetched):
                self._held[fetch.peer, fetch.key] = chunk
            self._post(event)
