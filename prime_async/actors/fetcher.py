"""Performs a machine's ``Fetch`` effects, and keeps what came until the machine says what to do with it."""

from __future__ import annotations

from collections.abc import Callable

import trio

from prime_async.errors import ChunkUnavailableError, DeadlineError, PeerUnreachableError, ProtocolError
from prime_async.machines.vocabulary import Event, Fetch, Fetched, FetchFailed
from prime_async.messages import ChunkKey
from prime_async.transport.base import Chunk, Transport


class Fetcher:
    """The fetches of one actor. Their outcomes are posted as events; what ``cancel_all`` abandons has none.

    So ``cancel_all`` also takes back (``retract``) the outcomes that wait in the machine's inbox. The machine could not
    tell them from those of the fetches that it begins next: a contribution has the same key in every attempt.
    """

    def __init__(
        self,
        transport: Transport,
        nursery: trio.Nursery,
        post: Callable[[Event], None],
        retract: Callable[[tuple[type[Event], ...]], None],
    ) -> None:
        self._transport = transport
        self._nursery = nursery
        self._post = post
        self._retract = retract
        self._held: dict[tuple[str, ChunkKey], Chunk] = {}
        self._scopes: set[trio.CancelScope] = set()

    def start(self, fetch: Fetch) -> None:
        """Begin to fetch."""
        scope = trio.CancelScope()
        self._scopes.add(scope)
        self._nursery.start_soon(self._fetch, fetch, scope)

    def take(self, peer: str, key: ChunkKey) -> Chunk:
        """What came, once."""
        return self._held.pop((peer, key))

    def cancel_all(self) -> None:
        """Abandon all fetches, and what they brought."""
        for scope in self._scopes:
            scope.cancel()
        self._scopes.clear()
        self._retract((Fetched, FetchFailed))
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
                self._held[fetch.peer, fetch.key] = chunk
                event = Fetched(peer=fetch.peer, key=fetch.key, info=chunk.info)
        if scope.cancel_called:
            self._held.pop((fetch.peer, fetch.key), None)
        else:
            self._scopes.discard(scope)
            self._post(event)
