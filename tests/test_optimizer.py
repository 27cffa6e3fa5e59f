"""The inner optimisers, against torch's own, each on the parameters that it is for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from prime_async.config.schema import InnerSettings
from prime_async.errors import ConfigError
from prime_async.work.llama import LlamaConfig, build_llama
from prime_async.work.optimizer import MUON_MOMENTUM, InnerOptimizer
from tests.processes import ROOT

TINY = LlamaConfig(vocab_size=256, width=32, layers=2, heads=2, kv_heads=1, ffn_width=64, tied_embeddings=False)
RATE = 0.01


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(seed: int = 0) -> nn.Module:
    """With gradients that ``seed`` decides."""
    model = build_llama(TINY, 0)
    set_gradients(model, seed)
    return model


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def optimizer_of(model: nn.Module, kind: str) -> InnerOptimizer:
    return InnerOptimizer(model, InnerSettings.model_validate({"optimizer": kind, "weight_decay": 0.3}), 256)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def is_of_a_layer(parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and parameter.shape[0] != TINY.vocab_size


def test_adamw_is_torchs_to_the_bit_moments_too() -> None:
    """Given a parameter without a gradient, too, which stays as it is."""
    ours, reference = model_of(), model_of()
    for model in (ours, reference):
        model.get_parameter("model.norm.weight").grad = None
    named = dict(reference.named_parameters())
    decayed = [p for p in named.values() if p.ndim > 1]
    plain = [p for p in named.values() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    optimizer = optimizer_of(ours, "adamw")
    for step in range(3):
        for group in adamw.param_groups:
            group["lr"] = RATE / (1 + step)
        adamw.step()
        optimizer.step(RATE / (1 + step))
        for model in (ours, reference):
            set_gradients(model, step)

    assert all(torch.equal(p, named[name]) for name, p in ours.named_parameters())
    moments = {(name, kind): tensor for name, kind, tensor in optimizer.moments()}
    wanted = {(name, kind): tensor for name, p in named.items() for kind, tensor in adamw.state[p].items()}
    assert moments.keys() == wanted.keys()
    assert all(torch.equal(moments[key], tensor) for key, tensor in wanted.items())


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    ours, reference = model_of(), model_of()
    named = dict(reference.named_parameters())
    layers = [p for _, p in sorted(named.items()) if is_of_a_layer(p)]
    rest = [p for p in named.values() if not is_of_a_layer(p)]
    assert len(layers) == 2 * 7
    muon = torch.optim.Muon(layers, lr=RATE, weight_decay=0.3, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw")
    decayed = [p for p in rest if p.ndim > 1]
    plain = [p for p in rest if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    optimizer = optimizer_of(ours, "muon")
    for seed in range(3):
        set_gradients(ours, seed)
        set_gradients(reference, seed)
        optimizer.step(RATE)
        muon.step()  # type: ignore[no-untyped-call]
        adamw.step()
    assert all(torch.equal(p, named[name]) for name, p in ours.named_parameters())


def test_sgd_is_plain() -> None:
    model = model_of()
    before = values(model)
    optimizer_of(model, "sgd").step(RATE)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.detach(), before[name] - RATE * parameter.grad)
    assert list(optimizer_of(model, "sgd").moments()) == []


SLOW_IMPORTS = ["torch._dynamo", "sympy"]
ONE_STEP = """
import sys
import tests.test_inner as inner
inner.trainer_of(inner.run_spec()).train(0, 1, inner.ignore)
print(*[name for name in {} if name in sys.modules])
"""


def test_a_node_that_compiles_nothing_does_not_import_the_compiler() -> None:
    """Its import takes a second of CPU time, and many ways lead to it."""
    command = [sys.executable, "-c", ONE_STEP.format(SLOW_IMPORTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_can_be_handed_over(kind: str) -> None:
    one, other = model_of(), model_of()
    first, second = optimizer_of(one, kind), optimizer_of(other, kind)
    first.step(RATE)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, moment, tensor in first.moments():
        found.setdefault(name, {})[moment] = tensor.clone()
    assert set(found) == set(dict(one.named_parameters()))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(one.get_parameter(name))
    assert second.load(found)
    for model, optimizer in ((one, first), (other, second)):
        set_gradients(model, 9)
        optimizer.step(RATE)
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in one.named_parameters())


def test_moments_of_another_optimiser_are_not_taken() -> None:
    model = model_of()
    muon, adamw = optimizer_of(model, "muon"), optimizer_of(model, "adamw")
    muon.step(RATE)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, moment, tensor in muon.moments():
        found.setdefault(name, {})[moment] = tensor
    assert not adamw.load(found)
    assert list(adamw.moments()) == []
    name = next(iter(found))
    wrong = {kind: torch.zeros(3) for kind in found[name]}
    assert not optimizer_of(model, "muon").load(found | {name: wrong})


def test_a_torch_without_muon_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"install torch 2\.9"):
        optimizer_of(model_of(), "muon")
