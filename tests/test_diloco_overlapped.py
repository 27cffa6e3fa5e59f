"""A contribution that is exchanged while the next inner steps run: what becomes of the local weights meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from prime_async.config.schema import ExchangeSettings, RunSpec
from prime_async.errors import ConfigError, LocalError, NonFiniteError
from prime_async.work.codec import make_codec
from prime_async.work.diloco import DilocoWorkload
from prime_async.work.workload import Workload
from tests.tiny_models import (
    CHUNK,
    encoded,
    exchange,
    hand_over,
    ignore,
    kept,
    local_weights,
    outer_weights,
    run_spec,
    tiny_workload,
)

H = 3


def overlapped(mode: str = "overlapped", fragments: int = 1) -> RunSpec:
    return run_spec().model_copy(update={"mode": mode, "fragments": fragments})


def nodes_of(count: int, mode: str = "overlapped", fragments: int = 1) -> list[DilocoWorkload]:
    return [tiny_workload(overlapped(mode, fragments), stream) for stream in range(count)]


def chunks(node: Workload, round: int | None = None) -> range:
    """Those of the round, by default the one that is open."""
    return node.fragments.chunks(node.round if round is None else round)


def capture(node: Workload) -> list[memoryview]:
    """The contribution, by chunk, as it is at this boundary."""
    for chunk in chunks(node):
        node.capture(chunk)
    return [encoded(node, chunk) for chunk in chunks(node)]


def mean_of(node: Workload, contributions: Sequence[Sequence[memoryview]]) -> list[memoryview]:
    means = []
    for place, chunk in enumerate(chunks(node)):
        out = memoryview(bytearray(node.mean_bytes(chunk)))
        made = node.reduce(chunk, [c[place] for c in contributions], [1] * len(contributions), out, node.round)
        assert made.left_out == []
        means.append(out[: made.size].toreadonly())
    return means


def apply(node: Workload, means: Sequence[memoryview], included: bool = True, share: float = 0.5) -> bytes:
    for chunk, mean in zip(chunks(node), means, strict=True):
        node.apply_beside(chunk, mean, included, share)
    return node.end_round()


def merge(node: Workload) -> None:
    """With the means of the round that was applied last."""
    for chunk in chunks(node, node.round - 1):
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
        node.apply_beside(0, means[0], True, 1.0)
    with pytest.raises(LocalError, match="no contribution to give up"):
        node.give_up(0)


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


# --- fragments ------------------------------------------------------------------------------------------------------


def test_one_fragment_without_a_delay_is_the_blocking_form_bit_for_bit() -> None:
    blocking = [tiny_workload(run_spec(), stream) for stream in range(2)]
    nodes = nodes_of(2, "streaming", 1)
    for _ in range(2):
        for node in (*blocking, *nodes):
            node.train(H, ignore)
        means = mean_of(nodes[0], [capture(node) for node in nodes])
        assert {apply(node, means) for node in nodes} == set(exchange(blocking))
        for node, other in zip(nodes, blocking, strict=True):
            merge(node)
            assert torch.equal(local_weights(node), local_weights(other))


def test_a_round_moves_one_fragment_and_the_others_keep_their_progress() -> None:
    nodes = nodes_of(2, "streaming", 3)
    elements = local_weights(nodes[0]).numel()
    moved = torch.zeros(elements, dtype=torch.bool)
    for round in range(4):
        for node in nodes:
            node.train(1, ignore)
        before = [local_weights(node).clone() for node in nodes]
        theta = outer_weights(nodes[0])
        means = mean_of(nodes[0], [capture(node) for node in nodes])
        for node in nodes:
            node.train(1, ignore)
        assert len({apply(node, means) for node in nodes}) == 1
        between = [local_weights(node).clone() for node in nodes]
        for node in nodes:
            merge(node)
        inside = torch.zeros(elements, dtype=torch.bool)
        for chunk in chunks(nodes[0], round):
            inside[chunk * CHUNK : (chunk + 1) * CHUNK] = True
        after = outer_weights(nodes[0])
        assert torch.equal(after[~inside], theta[~inside])
        assert not torch.equal(after[inside], theta[inside])
        for node, s, x in zip(nodes, before, between, strict=True):
            assert torch.equal(local_weights(node)[~inside], x[~inside])
            assert close(local_weights(node)[inside], (after + (x - s))[inside])
        moved |= inside
    assert moved.all()


def test_a_contribution_is_all_that_its_fragment_moved_since_it_was_exchanged_last() -> None:
    node = nodes_of(1, "streaming", 2)[0]
    first, second = chunks(node, 0), chunks(node, 1)
    theta = outer_weights(node)
    node.train(1, ignore)
    apply(node, mean_of(node, [capture(node)]))
    merge(node)
    node.train(1, ignore)
    at = slice(second[0] * CHUNK, None)
    out = torch.empty(local_weights(node)[at].numel())
    for chunk in second:
        node.capture(chunk)
        payload = torch.frombuffer(bytearray(encoded(node, chunk)), dtype=torch.uint8)
        start = (chunk - second[0]) * CHUNK
        make_codec("int8").decode(payload, out[start : start + CHUNK])
    torch.testing.assert_close(out, (theta - local_weights(node))[at], rtol=0.02, atol=1e-4)
    assert set(first).isdisjoint(second)


def test_a_state_is_handed_over_between_rounds_of_any_fragment() -> None:
    ahead, behind = nodes_of(2, "streaming", 3)
    for _ in range(4):
        ahead.train(1, ignore)
        apply(ahead, mean_of(ahead, [capture(ahead)]))
        merge(ahead)
    assert hand_over(ahead, behind) == ahead.state_digest()
    assert torch.equal(local_weights(behind), outer_weights(ahead))
    means = mean_of(ahead, [capture(ahead)])
    assert apply(ahead, means) == apply(behind, means, included=False)


def test_a_note_is_as_long_as_the_largest_fragment() -> None:
    whole, parts, blocking = nodes_of(1)[0], nodes_of(1, "streaming", 3)[0], tiny_workload(run_spec(), 0)
    sizes = [n.note_elements for n in (whole, parts, blocking)]
    assert sizes[0] == whole.elements
    assert sizes[0] / 3 <= sizes[1] <= sizes[0] / 3 + 2 * CHUNK
    assert sizes[2] == 0


def test_there_are_no_more_fragments_than_chunks() -> None:
    with pytest.raises(ConfigError, match=r"fragments = 99: the model has \d+ chunks"):
        nodes_of(1, "streaming", 99)


# --- error feedback -------------------------------------------------------------------------------------------------


def feeding_back(mode: str, codec: str = "int4") -> RunSpec:
    exchange = ExchangeSettings.model_validate({"codec": codec, "chunk_elements": CHUNK, "error_feedback": True})
    return run_spec().model_copy(update={"mode": mode, "exchange": exchange})


def decoded(node: Workload, payloads: Sequence[memoryview], codec: str = "int4") -> torch.Tensor:
    """The chunks of the round, one after the other."""
    parts = []
    for chunk, payload in zip(chunks(node), payloads, strict=True):
        part = torch.empty(min(CHUNK, node.elements - chunk * CHUNK))
        make_codec(codec).decode(torch.frombuffer(bytearray(payload), dtype=torch.uint8), part)  # type: ignore[arg-type]
        parts.append(part)
    return torch.cat(parts)


@pytest.mark.parametrize("mode", ["blocking", "overlapped", "streaming", "eager"])
def test_what_the_codec_drops_stays_in_the_local_weights_and_enters_the_next_contribution(mode: str) -> None:
    node = tiny_workload(feeding_back(mode), 0)
    for _ in range(2):
        node.train(H, ignore)
        parts = chunks(node)
        progress = outer_weights(node) - local_weights(node)
        own = capture(node) if mode in ("overlapped", "streaming") else [encoded(node, chunk) for chunk in parts]
        span = slice(parts.start * CHUNK, min(parts.stop * CHUNK, node.elements))
        dropped = progress.clone()
        dropped[span] -= decoded(node, own)
        assert dropped[span].abs().max() > 1e-4
        if mode == "eager":
            for chunk in parts:
                node.jump(chunk, own[chunk])
        for chunk, mean, payload in zip(parts, mean_of(node, [own]), own, strict=True):
            if mode == "blocking":
                node.apply(chunk, mean, True, payload)
            else:
                node.apply_beside(chunk, mean, True, 1.0)
        node.end_round()
        if mode != "blocking":
            for chunk in parts:
                node.merge(chunk)
        torch.testing.assert_close(outer_weights(node) - local_weights(node), dropped, rtol=0, atol=1e-6)


def contribute(node: DilocoWorkload, mode: str) -> list[memoryview]:
    """As a node does in this mode at a boundary."""
    if mode in ("overlapped", "streaming"):
        return capture(node)
    return jump(node) if mode == "eager" else [encoded(node, chunk) for chunk in chunks(node)]


def take(node: DilocoWorkload, mode: str, means: Sequence[memoryview], own: Sequence[memoryview], inside: bool) -> None:
    parts = chunks(node)
    for chunk, mean, payload in zip(parts, means, own, strict=True):
        if mode == "blocking":
            node.apply(chunk, mean, inside, payload)
        else:
            node.apply_beside(chunk, mean, inside, 1.0)
    node.end_round()
    for chunk in parts if mode != "blocking" else ():
        node.merge(chunk)


def topk_of(node: DilocoWorkload, values: torch.Tensor, first: int) -> torch.Tensor:
    """What topk keeps of ``values``, which begin at chunk ``first``."""
    kept = torch.empty_like(values)
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        out = torch.empty(node.payload_bytes(first + start // CHUNK), dtype=torch.uint8)
        make_codec("topk").encode(part, out, part)
        make_codec("topk").decode(out, kept[start : start + CHUNK])
    return kept


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("mode", ["blocking", "overlapped", "streaming", "eager"])
def test_what_topk_drops_is_kept_apart_and_fades_and_the_local_weights_have_what_was_contributed(
    mode: str, inside: bool
) -> None:
    """Given two contributions of the same chunks, the first in its mean or not, then no progress is lost or doubled."""
    node, other = tiny_workload(feeding_back(mode, "topk"), 0), tiny_workload(feeding_back(mode, "topk"), 1)
    node.train(H, ignore)
    other.train(H, ignore)
    first = chunks(node)
    span = slice(first.start * CHUNK, min(first.stop * CHUNK, node.elements))
    progress = (outer_weights(node) - local_weights(node))[span].clone()
    own = contribute(node, mode)
    sent = decoded(node, own, "topk")
    torch.testing.assert_close(sent, topk_of(node, progress, first.start), rtol=0, atol=0)
    take(node, mode, mean_of(node, [own if inside else contribute(other, mode)]), own, inside)
    left = (outer_weights(node) - local_weights(node))[span].clone()
    torch.testing.assert_close(left, torch.zeros_like(sent) if inside else sent, rtol=0, atol=1e-6)
    if inside:
        assert torch.equal(local_weights(node)[span], outer_weights(node)[span])
    for _ in range(node.fragments.count - 1):
        between = contribute(node, mode)
        take(node, mode, mean_of(node, [between]), between, True)
    again = decoded(node, contribute(node, mode), "topk")
    expected = 0.95 * (progress - sent) + left
    torch.testing.assert_close(again, topk_of(node, expected, first.start), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_what_topk_dropped_is_there_again_after_a_restart(tmp_path: Path, mode: str) -> None:
    """Given a node that starts again from its disk, then its next contribution is that of one that never stopped."""
    node, back, without = (tiny_workload(feeding_back(mode, "topk"), 0) for _ in range(3))
    for _ in range(2):
        node.train(H, ignore)
        own = contribute(node, mode)
        take(node, mode, mean_of(node, [own]), own, True)
    job = kept(tmp_path, node).begin_snapshot(None)
    for chunk in range(node.chunk_count):
        job.before_change(chunk)
    job.finish()
    kept(tmp_path, node).inner.save(1, bytes(32), node.inner_state())

    for one in (back, without):
        kept(tmp_path, one).restore()
        one.restore()
        saved = kept(tmp_path, one).inner.load(1, bytes(32))
        assert saved is not None
        assert one.load_inner_state(saved)
    assert without._residual is not None
    without._residual.zero_()
    contributions = []
    for one in (node, back, without):
        one.train(H, ignore)
        contributions.append(contribute(one, mode))
    assert contributions[0] == contributions[1] != contributions[2]


def test_an_inner_state_with_a_residual_fits_only_who_has_one() -> None:
    plain, feeding = tiny_workload(feeding_back("blocking"), 0), tiny_workload(feeding_back("blocking", "topk"), 0)
    for one in (plain, feeding):
        one.train(1, ignore)
    assert not plain.load_inner_state(dict(feeding.inner_state()))
    assert not feeding.load_inner_state(dict(plain.inner_state()))


def test_a_topk_contribution_that_came_to_nothing_is_contributed_once() -> None:
    """Its progress is still in the local weights: the residual must not have it too."""
    node = tiny_workload(feeding_back("overlapped", "topk"), 0)
    node.train(H, ignore)
    first = decoded(node, capture(node), "topk")
    torch.testing.assert_close(decoded(node, capture(node), "topk"), first, rtol=1e-5, atol=1e-7)


def test_without_what_was_contributed_it_is_not_known_what_was_dropped() -> None:
    node = tiny_workload(feeding_back("blocking"), 0)
    node.train(1, ignore)
    with pytest.raises(LocalError, match="is not here"):
        node.apply(0, encoded(node, 0), True)


# --- eager ----------------------------------------------------------------------------------------------------------


def jump(node: Workload) -> list[memoryview]:
    """The contribution; the local weights have moved by an estimate."""
    payloads = [encoded(node, chunk) for chunk in chunks(node)]
    for chunk, payload in zip(chunks(node), payloads, strict=True):
        node.jump(chunk, payload)
    return payloads


def test_alone_the_estimate_is_the_outer_step_itself() -> None:
    """There is nobody whose contribution could be stale; the first round, and one with momentum."""
    node = tiny_workload(overlapped("eager").model_copy(update={"exchange": ExchangeSettings(codec="fp32")}), 0)
    for _ in range(2):
        node.train(H, ignore)
        own = jump(node)
        estimate = local_weights(node).clone()
        apply(node, mean_of(node, [own]), share=1.0)
        assert close(estimate, outer_weights(node))
        merge(node)
        assert torch.equal(local_weights(node), outer_weights(node))


def test_the_estimate_has_the_fresh_contribution_of_this_node_and_the_stale_ones_of_the_others() -> None:
    run = overlapped("eager").model_copy(update={"exchange": ExchangeSettings(codec="fp32", chunk_elements=CHUNK)})
    nodes = [tiny_workload(run, stream) for stream in range(2)]
    first: list[list[memoryview]] = []
    for node in nodes:
        node.train(H, ignore)
        first.append(jump(node))
    means = mean_of(nodes[0], first)
    for node in nodes:
        apply(node, means)
        merge(node)
        node.train(H, ignore)
    one, reference = nodes[0], tiny_workload(run, 0)
    hand_over(one, reference)
    fresh = [encoded(one, chunk) for chunk in chunks(one)]
    parts = [decoded(one, payloads, "fp32") for payloads in (means, fresh, first[0])]
    gradient = parts[0] + 0.5 * (parts[1] - parts[2])
    jump(one)
    for chunk in chunks(reference):
        piece = gradient[chunk * CHUNK : (chunk + 1) * CHUNK].numpy().tobytes()
        reference.apply_beside(chunk, memoryview(piece), False, 0.0)
    reference.end_round()
    torch.testing.assert_close(local_weights(one), outer_weights(reference), rtol=0, atol=2e-6)


def test_an_estimate_is_put_right_when_the_mean_comes_and_later_steps_stay() -> None:
    nodes = nodes_of(2, "eager")
    for _ in range(2):
        for node in nodes:
            node.train(H, ignore)
        means = mean_of(nodes[0], [jump(node) for node in nodes])
        starts = [local_weights(node).clone() for node in nodes]
        for node in nodes:
            node.train(2, ignore)
        ends = [local_weights(node).clone() for node in nodes]
        assert len({apply(node, means) for node in nodes}) == 1
        for node, start, end in zip(nodes, starts, ends, strict=True):
            merge(node)
            assert close(local_weights(node), outer_weights(node) + (end - start))


def fp32_eager(count: int) -> list[DilocoWorkload]:
    run = overlapped("eager").model_copy(update={"exchange": ExchangeSettings(codec="fp32", chunk_elements=CHUNK)})
    return [tiny_workload(run, stream) for stream in range(count)]


def test_a_contribution_that_is_in_no_mean_is_progress_again() -> None:
    one, other = fp32_eager(2)
    for node in (one, other):
        node.train(H, ignore)
    progress = outer_weights(one) - local_weights(one)
    jump(one)
    start = local_weights(one).clone()
    one.train(1, ignore)
    later = start - local_weights(one)
    apply(one, mean_of(other, [jump(other)]), included=False)
    merge(one)
    assert close(outer_weights(one) - local_weights(one), progress + later)


@pytest.mark.parametrize("counted", [True, False])
def test_after_a_missed_commit_a_contribution_is_given_up_or_taken_back(counted: bool) -> None:
    ahead, node = fp32_eager(2)
    for one in (ahead, node):
        one.train(H, ignore)
    progress = outer_weights(node) - local_weights(node)
    jump(node)
    start = local_weights(node).clone()
    node.train(2, ignore)
    later = start - local_weights(node)
    apply(ahead, mean_of(ahead, [jump(ahead)]))
    merge(ahead)
    hand_over(ahead, node)
    for chunk in chunks(node):
        (node.give_up if counted else node.take_back)(chunk)
    expected = later if counted else progress + later
    assert close(outer_weights(node) - local_weights(node), expected)


def test_what_was_not_contributed_cannot_be_taken_back() -> None:
    with pytest.raises(LocalError, match="no contribution to take back"):
        nodes_of(1, "eager")[0].take_back(0)


def test_after_a_jump_the_local_weights_are_not_taken_for_the_outer_ones_though_no_step_was_done() -> None:
    """Defect: a mean without this node, or a fetched state, would have set the local weights to the outer ones."""
    node, other = fp32_eager(2)
    for one in (node, other):
        one.train(H, ignore)
    means = mean_of(node, [jump(node)])
    apply(node, means, share=1.0)
    merge(node)
    jump(node)  # of no progress; with momentum the estimate is elsewhere
    assert not torch.equal(local_weights(node), outer_weights(node))
    held_out = node.evaluate()
    hand_over(node, other)
    other.restore()
    assert held_out == other.evaluate()
