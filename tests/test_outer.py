"""The outer state: torch's Nesterov step, the same bits on every node, never half of one."""

from __future__ import annotations

import threading

import blake3
import numpy as np
import pytest
import torch
from torch import Tensor

from prime_async.config.schema import OuterSettings
from prime_async.errors import LocalError, ProtocolError
from prime_async.work.chunks import Chunks
from prime_async.work.outer import OuterState
from prime_async.work.outer import learning_rate as outer_learning_rate

N, CHUNK = 1000, 256


def normal(n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def outer_state(theta: Tensor, learning_rate: float = 0.7, momentum: float = 0.9) -> OuterState:
    return OuterState(theta, CHUNK, OuterSettings(learning_rate=learning_rate, momentum=momentum))


def step(state: OuterState, gradient: Tensor) -> bytes:
    for chunk in range(state.chunks.count):
        g = gradient[state.chunks.span(chunk)]
        state.step(chunk, g, torch.empty_like(g))
    return state.end_round()


def theta_of(state: OuterState) -> Tensor:
    return torch.cat([state.theta(chunk) for chunk in range(state.chunks.count)])


def copy_state(source: OuterState, target: OuterState) -> bytes:
    for chunk in range(source.chunks.count):
        target.import_chunk(chunk, memoryview(source.export_chunk(chunk)))
    return target.end_import(source.round)


def torch_sgd(theta: Tensor, gradients: list[Tensor], learning_rate: float, momentum: float) -> Tensor:
    parameter = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.SGD([parameter], lr=learning_rate, momentum=momentum, nesterov=True)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_step_is_torch_sgd_bit_for_bit_where_fusing_cannot_round_differently() -> None:
    """With powers of two as rates all products are exact, so one rounding or two make no difference."""
    gradients = [normal(seed=s) for s in range(1, 6)]
    state = outer_state(normal(), learning_rate=0.5, momentum=0.5)
    for gradient in gradients:
        step(state, gradient)
    assert torch.equal(theta_of(state), torch_sgd(normal(), gradients, 0.5, 0.5))


def test_step_is_torch_sgd_but_for_the_roundings_that_torch_fuses() -> None:
    """Per step three roundings, each of a term that is not larger than 32 here, may differ by half a unit."""
    gradients = [normal(seed=s) for s in range(1, 6)]
    state = outer_state(normal())
    for gradient in gradients:
        step(state, gradient)
    difference = (theta_of(state) - torch_sgd(normal(), gradients, 0.7, 0.9)).abs().max()
    assert float(difference) <= 5 * 3 * float(np.spacing(np.float32(32))) / 2


def test_step_is_the_documented_sequence_of_fp32_operations() -> None:
    theta, m, g = normal().numpy(), np.zeros(N, np.float32), normal(seed=1).numpy()
    lr, mu = np.float32(0.7), np.float32(0.9)
    state = outer_state(normal())
    for _ in range(3):
        step(state, torch.from_numpy(g))
        m = m * mu + g
        theta = theta - lr * (g + mu * m)
    assert theta_of(state).numpy().tobytes() == theta.tobytes()
    assert b"".join(state.export_chunk(c)[state.state_bytes(c) // 2 :] for c in range(4)) == m.tobytes()


def test_chunks_divide_the_vector_and_the_last_one_is_shorter() -> None:
    chunks = Chunks(N, CHUNK)
    assert [chunks.size(c) for c in range(chunks.count)] == [256, 256, 256, 232]
    assert [chunks.span(c).start for c in range(chunks.count)] == [0, 256, 512, 768]
    assert Chunks(512, 256).count == 2
    assert Chunks(0, 256).count == 0
    for chunk in (-1, 4):
        with pytest.raises(IndexError):
            chunks.span(chunk)


def test_digest_is_over_the_round_and_the_exported_chunks() -> None:
    state = outer_state(normal())
    step(state, normal(seed=1))
    chunks = [blake3.blake3(state.export_chunk(c)).digest() for c in range(state.chunks.count)]
    assert state.chunk_digests == b"".join(chunks)
    assert state.digest == blake3.blake3((1).to_bytes(8, "little") + b"".join(chunks)).digest()


def test_one_bit_of_weights_momentum_or_round_changes_the_digest() -> None:
    state, other = outer_state(normal()), outer_state(normal())
    digests = {copy_state(state, other)}
    for position in (0, 4 * CHUNK, 8 * CHUNK - 1):
        data = bytearray(state.export_chunk(0))
        data[position] ^= 1
        other.import_chunk(0, memoryview(data))
        for chunk in range(1, state.chunks.count):
            other.import_chunk(chunk, memoryview(state.export_chunk(chunk)))
        digests.add(other.end_import(0))
    step(state, torch.zeros(N))  # moves nothing but the round
    digests.add(state.digest)
    assert len(digests) == 5


def test_imported_state_goes_on_bit_for_bit_like_the_one_it_came_from() -> None:
    state, joiner = outer_state(normal()), outer_state(torch.zeros(N))
    step(state, normal(seed=1))
    assert copy_state(state, joiner) == state.digest
    assert joiner.round == 1
    assert step(joiner, normal(seed=2)) == step(state, normal(seed=2))


def test_digest_of_a_round_stands_while_the_next_one_is_applied() -> None:
    state = outer_state(normal())
    before = state.digest
    state.step(0, normal(CHUNK), torch.empty(CHUNK))
    assert (state.digest, state.round) == (before, 0)


def test_chunk_is_moved_once_per_round() -> None:
    state = outer_state(normal())
    state.step(0, normal(CHUNK), torch.empty(CHUNK))
    once = state.export_chunk(0)
    with pytest.raises(LocalError, match="twice"):
        state.step(0, normal(CHUNK), torch.empty(CHUNK))
    assert state.export_chunk(0) == once


def test_round_ends_only_when_every_chunk_was_moved() -> None:
    state = outer_state(normal())
    state.step(0, normal(CHUNK), torch.empty(CHUNK))
    with pytest.raises(LocalError, match="3 of 4 chunks"):
        state.end_round()
    with pytest.raises(LocalError, match="3 of 4 chunks"):
        state.end_import(5)
    assert state.round == 0


def test_state_of_the_wrong_size_is_refused_and_changes_nothing() -> None:
    state = outer_state(normal())
    before = state.export_chunk(3)
    with pytest.raises(ProtocolError, match="instead of 1856"):
        state.import_chunk(3, memoryview(before + b"\0"))
    assert state.export_chunk(3) == before


def test_export_beside_a_step_is_never_a_mixture() -> None:
    """Every export must be a state that some whole number of steps gives: its bytes have that state's digest."""
    n = 2**16
    state = OuterState(normal(n), n, OuterSettings())
    gradient = normal(n, seed=1)
    whole, exports, done = {state.chunk_digests}, set[bytes](), threading.Event()
    exported = threading.Semaphore(0)

    def export() -> None:
        while not done.is_set():
            exports.add(blake3.blake3(state.export_chunk(0)).digest())
            exported.release()

    thread = threading.Thread(target=export)
    thread.start()
    scratch = torch.empty(n)
    for _ in range(25):
        state.step(0, gradient, scratch)
        whole.add(state.chunk_digests)
        state.end_round()
        while exported.acquire(blocking=False):
            pass
        assert exported.acquire(timeout=60)  # an export ends between any two steps
    done.set()
    thread.join()
    assert len(exports) > 1
    assert exports <= whole


# --- the learning rate ----------------------------------------------------------------------------------------------


def rates(rounds: int, **settings: object) -> list[float]:
    chosen = OuterSettings.model_validate({"learning_rate": 0.8, **settings})
    return [outer_learning_rate(round, chosen, rounds) for round in range(rounds)]


def test_the_learning_rate_stays_at_its_peak_unless_it_is_told_otherwise() -> None:
    assert rates(5) == [0.8] * 5
    assert rates(5, warmup_rounds=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert outer_learning_rate(1000, OuterSettings(learning_rate=0.8, schedule="linear"), 0) == 0.8


def test_a_linear_schedule_goes_down_to_its_end() -> None:
    found = rates(6, schedule="linear", warmup_rounds=2, min_learning_rate_ratio=0.5)
    assert found == pytest.approx([0.4, 0.8, 0.8, 0.7, 0.6, 0.5])
    assert outer_learning_rate(99, OuterSettings(learning_rate=0.8, schedule="linear"), 6) == pytest.approx(0.08)


def test_a_step_has_the_rate_of_its_round() -> None:
    settings = OuterSettings(learning_rate=1.0, momentum=0.0, warmup_rounds=2)
    state = OuterState(torch.zeros(CHUNK), CHUNK, settings)
    for expected in (-0.5, -1.5, -2.5):
        state.step(0, torch.ones(CHUNK), torch.empty(CHUNK))
        state.end_round()
        assert torch.equal(state.theta(0), torch.full((CHUNK,), expected))


# --- synchronous rounds ---------------------------------------------------------------------------------------------


def test_in_synchronous_rounds_the_weights_become_the_mean_and_nothing_of_them_is_left_in_the_momentum() -> None:
    """Also if the run begins with a momentum; the schedule of the rate begins with the first usual round."""
    settings = OuterSettings(learning_rate=0.5, momentum=0.5, warmup_rounds=2, schedule="linear")
    theta, scratch = normal(CHUNK), torch.empty(CHUNK)
    state = OuterState(theta.clone(), CHUNK, settings, 1, 6, 2)
    state.import_chunk(0, memoryview(theta.numpy().tobytes() + normal(CHUNK, seed=9).numpy().tobytes()))
    state.end_import(0)
    for round in range(2):
        expected = state.theta(0) - normal(CHUNK, seed=round)
        preview = normal(CHUNK, seed=round)
        state.preview(0, preview, scratch)
        state.step(0, normal(CHUNK, seed=round), scratch)
        state.end_round()
        assert torch.equal(state.theta(0), expected)
        assert torch.equal(preview, expected)
        assert state.export_chunk(0)[4 * CHUNK :] == bytes(4 * CHUNK)
    usual = OuterState(state.theta(0).clone(), CHUNK, settings, 1, 4)
    for round in range(4):
        for one in (state, usual):
            one.step(0, normal(CHUNK, seed=round), scratch)
            one.end_round()
    assert state.chunk_digests == usual.chunk_digests
