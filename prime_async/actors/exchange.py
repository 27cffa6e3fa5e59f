"""The exchange actor: fetches chunks, reduces those that this node owns, and holds the means."""

from __future__ import annotations

from collections.abc import Callable

import trio
from blake3 import blake3

from prime_async.actors.fetcher import Fetcher
from prime_async.actors.store import ChunkStore
from prime_async.actors.tensors import Tensors
from prime_async.machines.vocabulary import (
    CancelFetches,
    Effect,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Reduce,
    Reduced,
    Send,
)
from prime_async.messages import ChunkInfo, ChunkKey, bitmap
from prime_async.transport.base import Chunk, Transport


class ExchangeActor:
    """Performs the effects of an exchange machine."""

    def __init__(
        self,
        transport: Transport,
        tensors: Tensors,
        store: ChunkStore,
        nursery: trio.Nursery,
        post: Callable[[Event], None],
        retract: Callable[[tuple[type[Event], ...]], None],
    ) -> None:
        self._transport = transport
        self._tensors = tensors
        self._store = store
        self._nursery = nursery
        self._post = post
        self._fetcher = Fetcher(transport, nursery, self._on_outcome, retract)

    def perform(self, effect: Effect) -> None:
        match effect:
            case Send(peer=peer, message=message):
                self._transport.send(peer, message)
            case Fetch():
                self._fetcher.start(effect)
            case CancelFetches():
                self._fetcher.cancel_all()
            case Reduce():
                self._nursery.start_soon(self._reduce, effect, self._inputs(effect))
            case Forget(means_before=means, contributions_before=contributions):
                self._store.forget(means, contributions)
            case _:
                raise TypeError(f"exchange does not perform {type(effect).__name__}")

    def _on_outcome(self, event: Event) -> None:
        """A mean is held where peers can get it, before the machine counts it as held."""
        if isinstance(event, Fetched) and event.key.kind == "mean":
            mean = self._fetcher.take(event.peer, event.key)
            if mean.payload.nbytes == self._tensors.workload.payload_bytes(event.key.chunk):
                self._store.put(event.key, mean)
            else:
                event = FetchFailed(peer=event.peer, key=event.key, fault="invalid")
        self._post(event)

    def _inputs(self, reduce: Reduce) -> list[memoryview]:
        """The contributions, in the order of the plan: our own from the store, the others' as they came."""
        key = ChunkKey(kind="contribution", round=reduce.key.round, chunk=reduce.key.chunk)
        payloads = []
        for peer in reduce.contributors:
            chunk = self._store.find(key) if peer == self._transport.id else self._fetcher.take(peer, key)
            if chunk is None:
                raise RuntimeError(f"our own {key} is in a plan and is not here")
            payloads.append(chunk.payload)
        return payloads

    async def _reduce(self, reduce: Reduce, payloads: list[memoryview]) -> None:
        out, info, left_out = await self._tensors.run(self._reduce_now, reduce, payloads)
        self._store.put(reduce.key, Chunk(info=info, payload=out))
        self._post(Reduced(key=reduce.key, info=info, left_out=left_out))

    def _reduce_now(self, reduce: Reduce, payloads: list[memoryview]) -> tuple[memoryview, ChunkInfo, tuple[str, ...]]:
        workload, chunk = self._tensors.workload, reduce.key.chunk
        out = self._tensors.buffers.take()[: workload.payload_bytes(chunk)]
        rejected = workload.reduce(chunk, payloads, reduce.weights, out)
        counted = [i for i in range(len(payloads)) if i not in rejected]
        place = {member: i for i, member in enumerate(reduce.members)}
        info = ChunkInfo(
            digest=blake3(out).digest(),
            contributors=bitmap([place[reduce.contributors[i]] for i in counted]),
            total_weight=sum(reduce.weights[i] for i in counted),
        )
        return out, info, tuple(reduce.contributors[i] for i in rejected)
