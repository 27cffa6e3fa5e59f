"""A contribution that is exchanged while the next inner steps run: what becomes of the local weights meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from prime_async.config.schema import RunSpec
from prime_async.errors import LocalError, NonFiniteError, ProtocolError
from prime_async.work.diloco import DilocoWorkload
from prime_async.work.workload import Workload
from tests.test_diloco import (
    encoded,
    exchange,
    hand_over,
    ignore,
    local_weights,
    outer_weights,
    run_spec,
    tiny_workload,
)

H = 3


def overlapped() -> RunSpec:
    return run_spec().model_copy(update={"mode": "overlapped"})


def nodes_of(count: int) -> list[DilocoWorkload]:
    return [tiny_workload(overlapped(), stream) for stream in range(count)]


def capture(node: Workload) -> list[memoryview]:
    """The contribution, by chunk, as it is at this boundary."""
    for chunk in range(node.chunk_count):
        node.capture(chunk)
    return [encoded(node, chunk) for chunk in range(node.chunk_count)]


def mean_of(node: Workload, contributions: Sequence[Sequence[memoryview]]) -> list[memoryview]:
    means = []
    for chunk in range(node.chunk_count):
        out = memoryview(bytearray(node.mean_bytes(chunk)))
        assert node.reduce(chunk, [c[chunk] for c in contributions], [1] * len(contributions), out) == []
        means.append(out.toreadonly())
    return means


def apply(node: Workload, means: Sequence[memoryview], included: bool = True) -> bytes:
    for chunk, mean in enumerate(means):
        node.apply_beside(chunk, mean, included)
    return node.end_round()


def merge(node: Workload) -> None:
    for chunk in range(node.chunk_count):
        node.merge(chunk)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-6)


def test_without_a_delay_it_is_the_blocking_form_bit_for_bit() -> None:
    blocking = [tiny_workload(run_spec(), stream) for stream in range(2)]
    nodes = nodes_of(2)
    for _ in range(3):
        for node in (*blocking, *nodes):
            node.train(H, ignore)
        means = mean_of(nodes[0], [capture(node) for node in nodes])
        digests = {apply(node, means) for node in nodes}
        for node in nodes:
            merge(node)
        assert digests == set(exchange(blocking))
        for node, other in zip(nodes, blocking, strict=True):
            assert torch.equal(local_weights(node), local_weights(other))
            assert torch.equal(local_weights(node), outer_weights(node))


def test_a_contribution_is_that_of_the_boundary_whatever_the_local_weights_do_afterwards() -> None:
    one, other = nodes_of(1)[0], nodes_of(1)[0]
    one.train(H, ignore)
    other.train(H, ignore)
    at_once = capture(one)
    for chunk in range(other.chunk_count):
        other.capture(chunk)
    other.train(2, ignore)
    assert [encoded(other, chunk) for chunk in range(other.chunk_count)] == at_once


def test_the_local_weights_move_with_the_outer_ones_and_keep_what_they_did_meanwhile() -> None:
    nodes = nodes_of(2)
    for node in nodes:
        node.train(H, ignore)
    noted = [local_weights(node).clone() for node in nodes]
    means = mean_of(nodes[0], [capture(node) for node in nodes])
    for steps, node in enumerate(nodes, 1):
        node.train(steps, ignore)
    before = [local_weights(node).clone() for node in nodes]
    assert len({apply(node, means) for node in nodes}) == 1
    for node, s, x in zip(nodes, noted, before, strict=True):
        assert torch.equal(local_weights(node), x)  # until they are moved, between two steps
        merge(node)
        assert not torch.equal(x, s)
        assert close(local_weights(node), outer_weights(node) + (x - s))
    again = mean_of(nodes[0], [capture(node) for node in nodes])
    assert len({apply(node, again) for node in nodes}) == 1


def test_a_contribution_that_is_in_no_mean_stays_in_the_local_weights() -> None:
    nodes = nodes_of(2)
    for node in nodes:
        node.train(H, ignore)
    one, other = nodes
    theta = outer_weights(one)
    capture(one)
    means = mean_of(other, [capture(other)])
    one.train(1, ignore)
    x = local_weights(one).clone()
    apply(one, means, included=False)
    merge(one)
    assert close(theta - x, outer_weights(one) - local_weights(one))
    assert not torch.equal(theta, outer_weights(one))


def test_who_did_not_step_has_the_outer_weights_themselves() -> None:
    nodes = nodes_of(2)
    nodes[0].train(H, ignore)
    apply(nodes[1], mean_of(nodes[0], [capture(nodes[0])]), included=False)
    merge(nodes[1])
    assert torch.equal(local_weights(nodes[1]), outer_weights(nodes[1]))


@pytest.mark.parametrize("later_steps", [0, 2])
def test_a_contribution_is_given_up_and_what_came_after_it_stays(later_steps: int) -> None:
    """Others may have counted it in a round whose commit was missed; meanwhile the state was fetched."""
    ahead, node = nodes_of(2)
    for one in (ahead, node):
        one.train(H, ignore)
    s = local_weights(node).clone()
    capture(node)
    if later_steps:
        node.train(later_steps, ignore)
    since = local_weights(node) - s
    apply(ahead, mean_of(ahead, [capture(ahead)]))
    merge(ahead)
    hand_over(ahead, node)
    for chunk in range(node.chunk_count):
        node.give_up(chunk)
    assert close(local_weights(node), outer_weights(node) + since)
    if not later_steps:
        assert torch.equal(local_weights(node), outer_weights(node))
    means = mean_of(node, [capture(node)])
    assert apply(node, means) == apply(ahead, means, included=False)


def test_held_out_loss_is_that_of_the_outer_weights_also_between_boundaries() -> None:
    nodes = nodes_of(2)
    for node in nodes:
        node.train(H, ignore)
    means = mean_of(nodes[0], [capture(node) for node in nodes])
    for node in nodes:
        node.train(2, ignore)
        apply(node, means)
        merge(node)
    assert len({node.evaluate() for node in nodes}) == 1


def test_restore_forgets_what_was_noted() -> None:
    node = nodes_of(1)[0]
    node.train(H, ignore)
    means = mean_of(node, [capture(node)])
    node.train(1, ignore)
    node.restore()
    assert torch.equal(local_weights(node), outer_weights(node))
    with pytest.raises(LocalError, match="capture it first"):
        node.apply_beside(0, means[0], True)
    with pytest.raises(LocalError, match="no contribution to give up"):
        node.give_up(0)


def test_a_mean_that_is_not_valid_changes_nothing() -> None:
    node = nodes_of(1)[0]
    node.train(H, ignore)
    means = mean_of(node, [capture(node)])
    for wrong in (means[0][:-1], memoryview(b"\xff" * means[0].nbytes)):
        with pytest.raises(ProtocolError):
            node.apply_beside(0, wrong, True)
    fine = nodes_of(1)[0]
    fine.train(H, ignore)
    capture(fine)
    assert apply(node, means) == apply(fine, means)


def test_a_chunk_moves_once_for_each_mean() -> None:
    node = nodes_of(1)[0]
    with pytest.raises(LocalError, match="apply it first"):
        node.merge(0)


def test_weights_that_are_not_finite_are_an_error_of_this_node() -> None:
    node = nodes_of(1)[0]
    node.train(1, ignore)
    local_weights(node)[5] = torch.nan
    node.capture(0)
    with pytest.raises(NonFiniteError):
        encoded(node, 0)
