"""The training of a node without tensors: inner steps are numbered, so that each can be followed to where it counts.

A node's progress in a chunk is the inner steps from ``base[chunk]`` on. A contribution holds those up to its making;
once a committed mean counts it, they are used up. What an apply leaves out stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from prime_async.machines.vocabulary import (
    Applied,
    Apply,
    Captured,
    ChunkImported,
    Effect,
    Encode,
    Encoded,
    EndImport,
    Evaluate,
    Evaluated,
    EvaluationStopped,
    Event,
    FetchFailed,
    GiveUp,
    ImportChunk,
    Imported,
    Merge,
    Merged,
    Restore,
    Restored,
    RunSteps,
    Save,
    Saved,
    StepsDone,
    StopEvaluation,
    StopSteps,
    TakeBack,
)
from prime_async.messages import ChunkInfo, ChunkKey
from prime_async.testing.host import SimNode, Snapshot, digest_of
from prime_async.testing.kernel import Kernel
from prime_async.testing.settings import SimulationSettings
from prime_async.testing.store import BrokenModelError, Store

TENSOR_S = 0.05
"""To encode, to apply, to evaluate, to save."""
IMPORT_S = 0.01
TOKENS_PER_STEP = 10


def is_set(bits: bytes, position: int) -> bool:
    """Whether a bitmap has this position; -1 is in none."""
    return 0 <= position < 8 * len(bits) and bool(bits[position // 8] >> position % 8 & 1)


@dataclass(frozen=True, slots=True)
class Contribution:
    """Inner steps ``first`` to ``end`` (not in it) that the process ``incarnation`` of ``node`` did, in a chunk."""

    node: str
    incarnation: int
    chunk: int
    first: int
    end: int


class Work:
    """Performs the effects of training, and those of checkpoint that touch the state."""

    def __init__(self, kernel: Kernel, store: Store, settings: SimulationSettings) -> None:
        self.kernel = kernel
        self.store = store
        self.settings = settings
        self.contributions: dict[bytes, Contribution] = {}  # by digest
        self.garbled_share = 1.0  # of the chunks of a contribution that is garbled

    def perform(self, node: SimNode, effect: Effect) -> None:
        post = self.kernel.post
        match effect:
            case RunSteps(steps=steps):
                self._run_steps(node, steps)
            case StopSteps():
                self._stop_steps(node)
            case Encode():
                self._encode(node, effect)
            case Apply():
                node.serves_state = False
                self.kernel.later(TENSOR_S, self.kernel.on, node, self._apply, node, effect)
            case Merge(round=round):
                post(node, "training", Merged(round=round), TENSOR_S)
            case GiveUp(round=round):
                self._give_up(node, round)
            case TakeBack():
                post(node, "training", Restored(), TENSOR_S)
            case Evaluate():
                node.run_number += 1
                self._end_evaluation_later(node, Evaluated(loss=1.0), TENSOR_S)
            case StopEvaluation():
                self._end_evaluation_later(node, EvaluationStopped(), TENSOR_S / 4)
            case Restore():
                node.base = dict.fromkeys(range(self.settings.chunk_count), node.steps)
                node.not_finite = False
                post(node, "training", Restored(), TENSOR_S)
            case Save():
                self.kernel.later(TENSOR_S, self.kernel.on, node, self._save, node)
            case ImportChunk(peer=peer, key=key):
                self._import_chunk(node, peer, key)
            case EndImport(round=round):
                self._end_import(node, round)
            case _:
                raise TypeError(f"nothing performs {effect!r}")

    # --- inner steps --------------------------------------------------------------------------------------------

    def _run_steps(self, node: SimNode, steps: int) -> None:
        node.run_number += 1
        node.run_began = self.kernel.now
        usual_s = self.settings.step_s_of.get(node.id, self.settings.step_s)
        node.run_step_s = usual_s * self.kernel.random.uniform(0.8, 1.2)
        self.kernel.later(steps * node.run_step_s, self.kernel.on, node, self._end_steps, node, node.run_number, steps)

    def _stop_steps(self, node: SimNode) -> None:
        done = int((self.kernel.now - node.run_began) / node.run_step_s) + 1
        ends_at = node.run_began + done * node.run_step_s
        self.kernel.later(
            max(0.0, ends_at - self.kernel.now),
            self.kernel.on, node, self._end_steps, node, node.run_number, done,
        )  # fmt: skip

    def _end_steps(self, node: SimNode, number: int, steps: int) -> None:
        if number != node.run_number or not node.running:
            return
        node.run_number += 1
        node.steps += steps
        tokens, seconds = steps * TOKENS_PER_STEP, self.kernel.now - node.run_began
        self.kernel.give(node, "training", StepsDone(steps=steps, tokens=tokens, seconds=seconds))

    # --- evaluation ---------------------------------------------------------------------------------------------

    def _end_evaluation_later(self, node: SimNode, outcome: Event, after_s: float) -> None:
        """One that is told to stop may be done before."""
        self.kernel.later(after_s, self.kernel.on, node, self._end_evaluation, node, node.run_number, outcome)

    def _end_evaluation(self, node: SimNode, number: int, outcome: Event) -> None:
        if number == node.run_number and node.running:
            node.run_number += 1
            self.kernel.give(node, "training", outcome)

    # --- the outer step -----------------------------------------------------------------------------------------

    def _encode(self, node: SimNode, effect: Encode) -> None:
        round, finite = effect.round, not node.not_finite
        if finite:
            self._offer(node, round, effect.rejected)
        if effect.beside:
            self.kernel.post(node, "training", Captured(round=round))
        self.kernel.post(node, "training", Encoded(round=round, finite=finite), TENSOR_S)

    def _offer(self, node: SimNode, round: int, rejected: int) -> None:
        node.encoded = (round, node.steps)
        garbles, node.garbles = node.garbles, False
        for chunk in self.settings.chunks(round):
            made = Contribution(node.id, node.start, chunk, node.base.get(chunk, 0), node.steps)
            info = ChunkInfo(digest=digest_of(round, made))
            self.contributions[info.digest] = made
            if garbles and (self.garbled_share == 1.0 or self.kernel.random.random() < self.garbled_share):
                self.store.garble(info.digest)
            self.store.put(node, ChunkKey(kind="contribution", round=round, chunk=chunk, attempt=rejected), info)

    def _give_up(self, node: SimNode, round: int) -> None:
        """What came after the contribution stays."""
        assert node.encoded is not None
        assert node.encoded[0] == round
        node.base |= dict.fromkeys(self.settings.chunks(round), node.encoded[1])
        self.kernel.post(node, "training", Restored(), TENSOR_S)

    def _apply(self, node: SimNode, effect: Apply) -> None:
        if not node.running:
            return
        if node.state[0] != effect.round:
            raise BrokenModelError(f"{node.id} applies round {effect.round} to the state of round {node.state[0]}")
        means = []
        for chunk in self.settings.chunks(effect.round):
            mean = node.chunks[ChunkKey(kind="mean", round=effect.round, chunk=chunk)]
            means.append(mean.digest)
            if is_set(mean.contributors, effect.position):
                assert node.encoded is not None
                node.base[chunk] = node.encoded[1]
                node.counted.setdefault(effect.round, set()).add(chunk)
        node.applied[effect.round] = digest_of(*means)
        assert node.settling is not None
        node.state = (effect.round + 1, digest_of(node.state[1], *means))
        node.tip = node.settling.commit
        node.serves_state = True
        self.kernel.give(node, "training", Applied(round=node.state[0], digest=node.state[1]))

    def _save(self, node: SimNode) -> None:
        if node.running and node.disk.full:
            self.kernel.give(node, "training", Saved(path=""))
        elif node.running:
            node.disk.snapshots[node.state[0]] = Snapshot(node.state[1], node.tip)
            node.disk.damaged.pop(node.state[0], None)
            self.kernel.give(node, "training", Saved(path="state"))

    def _import_chunk(self, node: SimNode, peer: str, key: ChunkKey) -> None:
        """If it is what the manifest says."""
        digest = node.held.pop(("checkpoint", peer, key)).digest
        if node.manifest is None or node.manifest.digest != digest:
            failed = FetchFailed(peer=peer, key=key, fault="invalid")
            self.kernel.post(node, "checkpoint", failed, IMPORT_S)
            return
        node.serves_state = False
        node.incoming[key.chunk] = digest
        self.kernel.post(node, "checkpoint", ChunkImported(key=key), IMPORT_S)

    def _end_import(self, node: SimNode, round: int) -> None:
        """The progress of this node stays: the local weights move with the outer ones."""
        parts, node.incoming = node.incoming, {}
        digests = {parts.get(c, node.state[1]) for c in range(self.settings.chunk_count)}
        digest = digests.pop() if len(digests) == 1 else digest_of("a mixture", *sorted(digests))
        node.state = (round, digest)
        node.serves_state = True
        self.kernel.post(node, "checkpoint", Imported(round=round, digest=digest), IMPORT_S)
