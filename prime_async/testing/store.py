"""The bulk plane: gets of chunks, and what a node holds. A chunk is its header; its bytes have no content here."""

from __future__ import annotations

from collections.abc import Callable

from prime_async.machines.attempt import SETTLED, number_of
from prime_async.machines.vocabulary import (
    ActorName,
    AdoptMean,
    CancelFetch,
    ContributionTaken,
    Fetch,
    Fetched,
    FetchFailed,
    FetchFault,
    Forget,
    Reduce,
    Reduced,
    Settle,
)
from prime_async.messages import ChunkInfo, ChunkKey, bitmap
from prime_async.testing.host import SimNode, Transfer, digest_of
from prime_async.testing.kernel import Kernel
from prime_async.testing.network import Network

RESEND_S = 0.5
"""Chunks come over TCP: what a cut holds up arrives after it."""
NOTICE_S = 0.01
"""Until a connection that cannot be made has failed."""
REDUCE_S = 0.02


class BrokenModelError(AssertionError):
    """A machine asked for what a real node could not do."""


def tells_no_lies(_server: SimNode, _key: ChunkKey, info: ChunkInfo) -> ChunkInfo:
    return info


class Store:
    """The chunks of all nodes, and the gets between them. ``lies`` may put something else in the place of an answer."""

    def __init__(self, kernel: Kernel, network: Network) -> None:
        self.kernel = kernel
        self.network = network
        self.observers: list[Callable[[SimNode, ChunkKey, ChunkInfo], None]] = []
        self.read_disk: Callable[[SimNode, ChunkKey], ChunkInfo | None]
        self.lies: Callable[[SimNode, ChunkKey, ChunkInfo], ChunkInfo] = tells_no_lies
        self.parts: dict[bytes, tuple[bytes, ...]] = {}  # digest of a mean -> those of the contributions in it
        self.garbled: set[bytes] = set()  # digests of contributions that no mean can be made of
        self.torn: set[bytes] = set()  # of those that do not even arrive

    # --- what a node holds --------------------------------------------------------------------------------------

    def put(self, node: SimNode, key: ChunkKey, info: ChunkInfo) -> None:
        """Hold a chunk, and answer those who wait for it."""
        if key.round < node.oldest[key.kind]:
            return
        node.chunks[key] = info
        for observer in self.observers:
            observer(node, key, info)
        for transfer in node.waiting.pop(key, ()):
            self._answer(transfer, self._use(node, key))

    def garble(self, digest: bytes) -> None:
        """A contribution is of no use: for the codec, or, as chance has it, for the transport already."""
        self.garbled.add(digest)
        if self.kernel.random.random() < 0.3:
            self.torn.add(digest)

    def answer_waiting(self, node: SimNode, key: ChunkKey) -> None:
        """What is on disk now, to those who wait for it."""
        for transfer in node.waiting.pop(key, ()):
            self._answer(transfer, self.read_disk(node, key))

    def adopt(self, node: SimNode, effect: AdoptMean) -> None:
        if effect.found not in node.chunks:
            raise BrokenModelError(f"{node.id} adopts {effect.found}, which is not here")
        self.put(node, effect.key, node.chunks[effect.found])

    def settle(self, node: SimNode, effect: Settle, chunks: range) -> None:
        exceptions = {k.chunk: k for k in effect.exceptions}
        for chunk in chunks:
            settled = ChunkKey(kind="mean", round=effect.round, chunk=chunk)
            usual = ChunkKey(kind="mean", round=effect.round, chunk=chunk, epoch=effect.epoch, attempt=effect.attempt)
            key = exceptions.get(chunk, usual)
            if key not in node.chunks:
                raise BrokenModelError(f"{node.id} settles {key}, which is not here")
            self.put(node, settled, node.chunks[key])

    def forget(self, node: SimNode, effect: Forget) -> None:
        oldest = node.oldest = {"contribution": effect.contributions_before, "mean": effect.means_before}
        node.chunks = {k: v for k, v in node.chunks.items() if k.round >= oldest[k.kind]}
        over = [k for k in node.waiting if k.round < oldest.get(k.kind, 0)]
        for key in over:
            for transfer in node.waiting.pop(key):
                self._answer(transfer, None)

    def reduce(self, node: SimNode, effect: Reduce) -> None:
        """Our own contribution may be missing: then it is left out, as one whose bytes are not valid."""
        inputs: list[tuple[str, int, ChunkInfo]] = []
        left_out: list[str] = []
        for (peer, key), weight in zip(effect.inputs.items(), effect.weights, strict=True):
            info = self._use(node, key) if peer == node.id else node.held.pop(("exchange", peer, key), None)
            if info is not None and info.digest not in self.garbled:
                inputs.append((peer, weight, info))
            elif info is not None or peer == node.id:
                left_out.append(peer)
            else:
                raise BrokenModelError(f"{node.id} reduces {effect.key} with the {key} of {peer}, which is not here")
        place = {member: i for i, member in enumerate(effect.members)}
        info = ChunkInfo(
            digest=digest_of(effect.key.chunk, [(i.digest, w) for _, w, i in inputs]),
            contributors=bitmap([place[p] for p, _, _ in inputs]),
            total_weight=sum(w for _, w, _ in inputs),
        )
        self.parts[info.digest] = tuple(i.digest for _, _, i in inputs)
        reduced = Reduced(key=effect.key, info=info, left_out=tuple(left_out))
        self.kernel.later(REDUCE_S, self.kernel.on, node, self._end_reduce, node, reduced, bool(inputs))

    def _use(self, node: SimNode, key: ChunkKey) -> ChunkInfo | None:
        """A chunk that is here, for a mean or a peer."""
        info = node.chunks.get(key)
        if info is not None and key.kind == "contribution" and key.round > node.taken:
            node.taken = key.round
            self.kernel.post(node, "training", ContributionTaken(round=key.round))
        return info

    def _end_reduce(self, node: SimNode, reduced: Reduced, made: bool) -> None:
        """A mean of nothing is not held."""
        if node.running:
            if made:
                self.put(node, reduced.key, reduced.info)
            self.kernel.give(node, "exchange", reduced)

    # --- gets: the client ---------------------------------------------------------------------------------------

    def fetch(self, node: SimNode, actor: ActorName, fetch: Fetch) -> None:
        server = self.network.nodes.get(fetch.peer)
        transfer = Transfer(actor=actor, client=node, server=server, peer=fetch.peer, key=fetch.key)
        known = node.asking.get((actor, fetch.peer, fetch.key))
        if known is not None and not known.over:
            raise BrokenModelError(f"{actor} of {node.id} asks {fetch.peer} twice at once for {fetch.key}")
        node.asking[actor, fetch.peer, fetch.key] = transfer
        self.network.traffic[node.id].gets += 1
        if self._is_refused(node, server):
            self.kernel.later(NOTICE_S, self._fail_at, transfer, "unreachable")
        else:
            self._ask(transfer)
        self.kernel.later(fetch.timeout_s, self._fail_at, transfer, "late")

    def _is_refused(self, node: SimNode, server: SimNode | None) -> bool:
        """A cut may be noticed, or not."""
        if server is None or not server.running or not self.network.is_connected(node, server):
            return True
        return not self.network.reaches(node, server) and self.kernel.random.random() < 0.5

    def _ask(self, transfer: Transfer) -> None:
        """Once the way is open."""
        client, server = transfer.client, transfer.server
        assert server is not None
        if transfer.over or not client.running or not server.running:
            return
        if self.network.reaches(client, server):
            self.kernel.later(self.network.latency_s(), self.kernel.on, server, self._serve, transfer)
        else:
            self.kernel.later(RESEND_S, self._ask, transfer)

    def cancel_all(self, node: SimNode, actor: ActorName) -> None:
        for key in [k for k in node.asking if k[0] == actor]:
            node.asking.pop(key).over = True
        for key in [k for k in node.held if k[0] == actor]:
            del node.held[key]

    def cancel(self, node: SimNode, actor: ActorName, effect: CancelFetch) -> None:
        transfer = node.asking.pop((actor, effect.peer, effect.key), None)
        if transfer is not None:
            transfer.over = True
        node.held.pop((actor, effect.peer, effect.key), None)

    def lose_server(self, server: SimNode) -> None:
        """Its process ends: the connections of those who wait for it break, or (its host is gone too) stay silent."""
        if self.kernel.random.random() < 0.5:
            return
        for node in self.network.nodes.values():
            for transfer in node.asking.values():
                if transfer.server is server:
                    self.kernel.later(self.network.latency_s(), self._fail_at, transfer, "unreachable")

    def _fail_at(self, transfer: Transfer, fault: FetchFault) -> None:
        if not transfer.over:
            self.kernel.on(transfer.client, self._end, transfer, None, fault)

    def _end(self, transfer: Transfer, info: ChunkInfo | None, fault: FetchFault) -> None:
        """The outcome is at the client, which runs."""
        node, key = transfer.client, transfer.key
        if transfer.over or not node.running:
            return
        transfer.over = True
        node.asking.pop((transfer.actor, transfer.peer, key), None)
        if info is not None and info.digest in self.torn:
            info, fault = None, "invalid"
        if info is None:
            self.kernel.give(node, transfer.actor, FetchFailed(peer=transfer.peer, key=key, fault=fault))
            return
        size = self.network.settings.chunk_bytes
        if key.kind == "mean" and transfer.actor == "exchange":
            self.put(node, key, info)
        else:
            node.held[transfer.actor, transfer.peer, key] = info
        self.network.traffic[node.id].chunk_bytes_in += size
        self.kernel.give(node, transfer.actor, Fetched(peer=transfer.peer, key=key, info=info, size=size))

    # --- gets: the server ---------------------------------------------------------------------------------------

    def _serve(self, transfer: Transfer) -> None:
        server, key = transfer.server, transfer.key
        assert server is not None
        if not server.running or transfer.over:
            return
        if key.kind in ("state", "manifest"):
            self._answer(transfer, self.read_disk(server, key))
        elif key.kind == "record" or (number_of(key) == SETTLED and self._is_on_disk(server, key)):
            info, means = self.read_disk(server, key), server.disk.means.get(key.round)
            to_come = means is None or means.commit is None
            if info is None and to_come and key.round >= server.state[0] - 1:
                server.waiting.setdefault(key, []).append(transfer)
            else:
                self._answer(transfer, info)
        elif (info := self._use(server, key)) is not None:
            self._answer(transfer, info)
        elif key.round < server.oldest[key.kind]:
            self._answer(transfer, None)
        else:
            server.waiting.setdefault(key, []).append(transfer)

    def _is_on_disk(self, server: SimNode, key: ChunkKey) -> bool:
        if key.round < server.oldest[key.kind]:
            return True
        return key.kind == "mean" and key not in server.chunks and self.read_disk(server, key) is not None

    def _answer(self, transfer: Transfer, info: ChunkInfo | None) -> None:
        if transfer.over:
            return
        if info is None:
            self.kernel.later(self.network.latency_s(), self._arrive, transfer, info)
            return
        server, settings = transfer.server, self.network.settings
        assert server is not None
        info = self.lies(server, transfer.key, info)
        self.network.traffic[server.id].chunk_bytes_out += settings.chunk_bytes
        server.up_free_at = self._passed_on(server.up_free_at, server.id)
        wait_s = server.up_free_at - self.kernel.now + self.network.latency_s()
        self.kernel.later(wait_s, self._at_client, transfer, info)

    def _at_client(self, transfer: Transfer, info: ChunkInfo) -> None:
        client = transfer.client
        if transfer.over or client.id not in self.network.settings.bytes_per_s_of:
            self._arrive(transfer, info)
            return
        client.down_free_at = self._passed_on(client.down_free_at, client.id)
        self.kernel.later(client.down_free_at - self.kernel.now, self._arrive, transfer, info)

    def _passed_on(self, free_at: float, name: str) -> float:
        """When a link that is free then has passed a chunk on: one after the other, at the node's bandwidth."""
        bytes_per_s = self.network.settings.bytes_per_s_of.get(name)
        return max(self.kernel.now, free_at) + (self.network.settings.chunk_bytes / bytes_per_s if bytes_per_s else 0.0)

    def _arrive(self, transfer: Transfer, info: ChunkInfo | None) -> None:
        client, server = transfer.client, transfer.server
        assert server is not None
        if transfer.over or not client.alive or not server.alive:
            return
        if self.network.passes(server.id, client.id) and self.network.passes(client.id, server.id):
            self.kernel.on(client, self._end, transfer, info, "gone")
        else:
            self.kernel.later(RESEND_S, self._arrive, transfer, info)
