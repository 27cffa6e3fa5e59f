"""Who reaches whom, and how control messages travel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from prime_async.machines.vocabulary import ActorName, ConnectMembers, Heard, Reached
from prime_async.messages import AskView, LedgerMessage, Message, RoundMessage, ViewUpdate, encode
from prime_async.testing.host import SimNode, Traffic
from prime_async.testing.kernel import Kernel
from prime_async.testing.settings import SimulationSettings

REDIAL_S = 1.0
FEW_MEMBERS = 64
"""Above so many only the leader is told whom it reaches: nobody else makes use of it."""


def drops_nothing(_sender: str, _receiver: str, _message: Message) -> bool:
    return False


class Network:
    """The control plane and the state of the links.

    A message needs a connection, which either end has dialled, and nobody can dial a node behind NAT. What is cut, or
    dead on arrival, gets nothing. ``drops`` may lose single messages.
    """

    def __init__(self, kernel: Kernel, nodes: dict[str, SimNode], settings: SimulationSettings) -> None:
        self.kernel = kernel
        self.nodes = nodes
        self.settings = settings
        self.drops: Callable[[str, str, Message], bool] = drops_nothing
        self.cuts: set[tuple[str, str]] = set()  # from, to
        self.islands: dict[str, int] = {}
        self.flaps: dict[tuple[str, str], tuple[float, float]] = {}  # from, to -> period_s, down_s
        self.traffic: dict[str, Traffic] = defaultdict(Traffic)
        self._measured: tuple[Message | None, bytes] = (None, b"")

    # --- links --------------------------------------------------------------------------------------------------

    def passes(self, sender: str, receiver: str) -> bool:
        """Whether the link carries anything now, that way."""
        if self.islands and self.islands.get(sender, 0) != self.islands.get(receiver, 0):
            return False
        if self.cuts and (sender, receiver) in self.cuts:
            return False
        if self.flaps and (sender, receiver) in self.flaps:
            period_s, down_s = self.flaps[sender, receiver]
            return self.kernel.now % period_s >= down_s
        return True

    def is_connected(self, node: SimNode, peer: SimNode) -> bool:
        """Whether one of the two has dialled the other, and could."""
        nat = self.settings.nat
        return (peer.id in node.dialled and peer.id not in nat) or (node.id in peer.dialled and node.id not in nat)

    def reaches(self, node: SimNode, peer: SimNode) -> bool:
        """Whether a get can be made: both ways are open, and both nodes live."""
        return (
            node.running
            and peer.running
            and self.is_connected(node, peer)
            and self.passes(node.id, peer.id)
            and self.passes(peer.id, node.id)
        )

    def latency_s(self) -> float:
        low, high = self.settings.latency_s
        return low + (high - low) * self.kernel.random.random()

    def heal(self) -> None:
        self.cuts.clear()
        self.islands.clear()
        self.flaps.clear()

    # --- connections --------------------------------------------------------------------------------------------

    def connect(self, node: SimNode, effect: ConnectMembers) -> None:
        """Dial the members, whom it has not dialled yet in this incarnation; hang up on the others."""
        before, contacts = node.dialled, effect.contacts
        told = len(effect.view.members) <= FEW_MEMBERS or effect.view.leader == node.id
        node.dialled = {c: before[c] for c in contacts if c in before}
        for member in effect.view.members:
            if member.id == node.id:
                continue
            if told and before.get(member.id) != member.incarnation:
                node.dialled[member.id] = member.incarnation
                self._await_reached(node, member.id)
            else:
                node.dialled[member.id] = before.get(member.id, -1)

    def dial(self, node: SimNode, peer: str) -> None:
        if peer not in node.dialled:
            node.dialled[peer] = 0
            self._await_reached(node, peer)

    def _await_reached(self, node: SimNode, peer: str) -> None:
        if peer in self.settings.nat:
            self.kernel.post(node, "membership", Reached(peer=peer, reachable=False), REDIAL_S)
        else:
            self.kernel.later(2 * self.latency_s(), self._try, node, peer)

    def _try(self, node: SimNode, peer: str) -> None:
        if not node.running or peer not in node.dialled:
            return
        other = self.nodes.get(peer)
        if other is not None and not other.paused and self.reaches(node, other):
            self.kernel.give(node, "membership", Reached(peer=peer, reachable=True))
        else:
            self.kernel.later(REDIAL_S, self._try, node, peer)

    # --- messages -----------------------------------------------------------------------------------------------

    def send(self, node: SimNode, peer: str, message: Message) -> None:
        kernel, settings = self.kernel, self.settings
        size = self._note_sent(node.id, message)
        if settings.loss and kernel.random.random() < settings.loss:
            return
        other = self.nodes.get(peer)
        if other is None or not self.is_connected(node, other) or self.drops(node.id, peer, message):
            return
        kernel.later(self.latency_s(), self._arrive, node.id, peer, message, size)
        if settings.doubled and kernel.random.random() < settings.doubled:
            kernel.later(self.latency_s(), self._arrive, node.id, peer, message, size)

    def _note_sent(self, sender: str, message: Message) -> int:
        """Counts it; its bytes only if the simulation is measured. A message to many is encoded once."""
        kind, traffic = type(message).__name__, self.traffic[sender]
        traffic.sent[kind] += 1
        if not self.settings.measured:
            return 0
        if self._measured[0] is not message:
            self._measured = (message, encode(message))
        size = len(self._measured[1])
        traffic.sent_bytes[kind] += size
        return size

    def _arrive(self, sender: str, peer: str, message: Message, size: int) -> None:
        node = self.nodes.get(peer)
        if node is None or not node.running or not self.passes(sender, peer):
            return
        if self.settings.measured:
            traffic, kind = self.traffic[peer], type(message).__name__
            traffic.received[kind] += 1
            traffic.received_bytes[kind] += size
        heard = Heard(peer=sender, message=message)
        actor: ActorName = "membership"
        if isinstance(message, RoundMessage):
            actor = "exchange"
        elif isinstance(message, LedgerMessage):
            actor = "checkpoint"
        if isinstance(message, ViewUpdate | AskView):
            self.kernel.give(node, "exchange", heard)
        self.kernel.give(node, actor, heard)
