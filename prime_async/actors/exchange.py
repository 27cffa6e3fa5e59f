"""The exchange actor: fetches chunks, reduces those that this node owns, and holds the means."""

from __future__ import annotations

from collections.abc import Callable

import trio
from blake3 import blake3

from prime_async.actors.auditor import Auditor
from prime_async.actors.fetcher import Fetcher
from prime_async.actors.ledger import LedgerKeeper
from prime_async.actors.store import ChunkStore
from prime_async.machines.attempt import SETTLED, mean_key, number_of
from prime_async.machines.vocabulary import (
    AdoptMean,
    CancelFetch,
    CancelFetches,
    Effect,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    MeansStored,
    Reduce,
    Reduced,
    Send,
    Settle,
    StoreMeans,
)
from prime_async.messages import ChunkInfo, ChunkKey, bitmap
from prime_async.transport.base import Chunk, Transport


class ExchangeActor:
    """Performs the effects of an exchange machine.

    Means that came as settled are held back from peers until the machine has compared all of them with the commit.
    """

    def __init__(
        self,
        transport: Transport,
        keeper: LedgerKeeper,
        store: ChunkStore,
        nursery: trio.Nursery,
        post: Callable[[Event], None],
        retract: Callable[[Callable[[Event], bool]], None],
        auditor: Auditor | None = None,
    ) -> None:
        self._transport = transport
        self._keeper = keeper
        self._tensors = keeper.tensors
        self._store = store
        self._nursery = nursery
        self._post = post
        self._fetcher = Fetcher(transport, nursery, self._on_outcome, retract, keeper.set_exchanging)
        self._auditor = auditor
        self._unsettled: dict[ChunkKey, Chunk] = {}

    def perform(self, effect: Effect) -> None:
        match effect:
            case Send(peer=peer, message=message):
                self._transport.send(peer, message)
            case Fetch() | CancelFetch() | CancelFetches():
                self._fetcher.perform(effect)
            case Reduce():
                self._nursery.start_soon(self._reduce, effect, self._inputs(effect))
            case AdoptMean(found=found, key=key):
                self._store.put(key, self._mean(found))
            case StoreMeans():
                self._nursery.start_soon(self._store_means, effect, self._means(effect))
            case Settle():
                self._settle(effect)
            case Forget(means_before=means, contributions_before=contributions):
                self._unsettled.clear()
                self._store.forget(means, contributions)
            case _:
                raise TypeError(f"exchange does not perform {type(effect).__name__}")

    def _on_outcome(self, event: Event) -> None:
        if isinstance(event, Fetched) and event.key.kind == "mean":
            self._nursery.start_soon(self._take_mean, event, self._fetcher.take(event.peer, event.key))
        else:
            self._post(event)

    async def _take_mean(self, event: Fetched, mean: Chunk) -> None:
        """A mean is held where peers can get it, before the machine counts it as held."""
        key = event.key
        if not await self._tensors.run(self._check_now, key, mean):
            self._post(FetchFailed(peer=event.peer, key=key, fault="invalid"))
            return
        if number_of(key) == SETTLED:
            self._unsettled[key] = mean
        else:
            self._store.put(key, mean)
        self._post(event)

    def _check_now(self, key: ChunkKey, mean: Chunk) -> bool:
        """Whether it is one. If so it goes to disk at once, where it has to be before it counts as held."""
        valid = self._tensors.workload.check(key.chunk, mean.payload)
        if valid:
            self._keeper.put_now(key, mean.payload, mean.info.digest)
        return valid

    async def _store_means(self, effect: StoreMeans, means: dict[int, Chunk]) -> None:
        safe = await self._keeper.store_means(effect, means)
        if safe is not None:
            self._post(MeansStored(round=effect.round, epoch=effect.epoch, attempt=effect.attempt, safe=safe))

    def _means(self, effect: StoreMeans | Settle) -> dict[int, Chunk]:
        """By chunk."""
        others = {key.chunk: key for key in effect.exceptions}
        number = effect.epoch, effect.attempt
        chunks = self._tensors.workload.fragments.chunks(effect.round)
        return {c: self._mean(others.get(c, mean_key(effect.round, c, number))) for c in chunks}

    def _mean(self, key: ChunkKey) -> Chunk:
        mean = self._unsettled.get(key) or self._store.find(key)
        if mean is None:
            raise RuntimeError(f"{key} is wanted under another name and is not here")
        return mean

    def _settle(self, settle: Settle) -> None:
        means = self._means(settle)
        for chunk, mean in means.items():
            self._store.put(mean_key(settle.round, chunk, SETTLED), mean)
        self._unsettled.clear()
        self._keeper.note_commit(settle.commit)
        self._nursery.start_soon(self._keeper.settle, settle, means)
        if self._auditor is not None:
            others = {key.chunk: key for key in settle.exceptions}
            usual = settle.epoch, settle.attempt
            named = {others.get(c, mean_key(settle.round, c, usual)): mean for c, mean in means.items()}
            self._nursery.start_soon(self._auditor.write_means, settle, named)

    def _inputs(self, reduce: Reduce) -> dict[str, memoryview]:
        """The contributions, in the order of the plan: our own from the store, the others' as they came.

        Our own may be gone: given up between the machine's decision and now.
        """
        payloads = {}
        for peer, key in reduce.inputs.items():
            chunk = self._store.use(key) if peer == self._transport.id else self._fetcher.take(peer, key)
            if chunk is not None:
                payloads[peer] = chunk.payload
        return payloads

    async def _reduce(self, reduce: Reduce, payloads: dict[str, memoryview]) -> None:
        """A mean of nothing is not held: peers that wait for it are to get a later one."""
        out, info, left_out = await self._tensors.run(self._reduce_now, reduce, payloads)
        if set(reduce.contributors) - set(left_out):
            self._store.put(reduce.key, Chunk(info=info, payload=out))
        self._post(Reduced(key=reduce.key, info=info, left_out=left_out))

    def _reduce_now(
        self, reduce: Reduce, payloads: dict[str, memoryview]
    ) -> tuple[memoryview, ChunkInfo, tuple[str, ...]]:
        workload, chunk = self._tensors.workload, reduce.key.chunk
        out = self._tensors.buffers.take()[: workload.mean_bytes(chunk)]
        weights = dict(zip(reduce.contributors, reduce.weights, strict=True))
        given = tuple(payloads)
        made = workload.reduce(chunk, list(payloads.values()), [weights[p] for p in given], out, reduce.key.round)
        out = out[: made.size]
        counted = [p for i, p in enumerate(given) if i not in made.left_out]
        place = {member: i for i, member in enumerate(reduce.members)}
        info = ChunkInfo(
            digest=blake3(out).digest(),
            contributors=bitmap([place[p] for p in counted]),
            total_weight=sum(weights[p] for p in counted),
        )
        if counted:
            self._keeper.put_now(reduce.key, out, info.digest)
        return out, info, tuple(p for p in reduce.contributors if p not in counted)
