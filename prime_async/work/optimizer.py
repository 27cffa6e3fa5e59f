"""The inner optimisers: one object for those that take different parameters differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from prime_async.config.schema import InnerSettings
from prime_async.errors import ConfigError
from prime_async.work.adamw import AdamW, Group, Sgd

MUON_MOMENTUM = 0.95


class _Rule(Protocol):
    """How some parameters are moved."""

    @property
    def state(self) -> MutableMapping[Tensor, dict[str, Tensor]]:
        """Moments of the parameters that have been moved, by their names."""

    def step(self, learning_rate: float) -> None:
        """One step on the gradients that the parameters have."""


class _Share(NamedTuple):
    """A rule and the parameters, by name, that it moves."""

    rule: _Rule
    parameters: Mapping[str, nn.Parameter]
    kinds: frozenset[str]  # the moments that are kept of each


class InnerOptimizer:
    """What moves a model's parameters by their gradients.

    ``adamw``: decoupled weight decay (arXiv 1711.05101), on matrices only. ``muon``: orthogonalised momentum
    (K. Jordan, "Muon", 2024; torch.optim.Muon) on the matrices but those that have a row for each token, which like all
    vectors get AdamW; its updates are scaled to the size of AdamW's (2502.16982), so that one learning rate, and one
    weight decay, do for both. ``sgd``: plain, without momentum and decay.
    """

    def __init__(self, model: nn.Module, settings: InnerSettings, vocab_size: int) -> None:
        """``vocab_size``: of the data; the model may know more tokens.

        Raises :class:`~prime_async.errors.ConfigError` if this torch does not have the optimiser.
        """
        trained = {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}
        self._shares = _share_out(model, trained, settings, vocab_size)

    def step(self, learning_rate: float) -> None:
        """One step on the gradients that the parameters have."""
        for share in self._shares:
            share.rule.step(learning_rate)

    def reset(self) -> None:
        """Forget the moments, as in the first step."""
        for share in self._shares:
            share.rule.state.clear()

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """What is kept: a parameter's name, what it is, and the tensor."""
        for share in self._shares:
            for name, parameter in share.parameters.items():
                for kind, tensor in sorted(share.rule.state.get(parameter, {}).items()):
                    yield name, kind, tensor

    def load(self, found: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Take over moments, by the parameter's name and by kind. ``False`` if they do not fit: nothing has changed."""
        shares = [share for share in self._shares if share.kinds]
        if {n: set(kinds) for n, kinds in found.items()} != {n: set(s.kinds) for s in shares for n in s.parameters}:
            return False
        parameters = [(share, name, p) for share in shares for name, p in share.parameters.items()]
        if any(t.shape not in (p.shape, torch.Size([])) for _, name, p in parameters for t in found[name].values()):
            return False
        for share, name, parameter in parameters:
            moments = {kind: tensor.to(parameter.device, torch.float32) for kind, tensor in found[name].items()}
            share.rule.state[parameter] = moments
        return True


def _share_out(
    model: nn.Module, trained: dict[str, nn.Parameter], settings: InnerSettings, vocab_size: int
) -> list[_Share]:
    """Which rule moves which parameters."""
    if settings.optimizer == "sgd":
        return [_Share(Sgd(list(trained.values())), trained, frozenset())]
    orthogonal = _of_layers(model, trained, vocab_size) if settings.optimizer == "muon" else {}
    rest = {name: p for name, p in trained.items() if name not in orthogonal}
    shares: list[_Share] = []
    if orthogonal:
        shares.append(_Share(_Muon(orthogonal, settings), orthogonal, frozenset({"momentum_buffer"})))
    if rest:
        shares.append(_Share(_adamw(rest, settings), rest, frozenset({"exp_avg", "exp_avg_sq", "step"})))
    return shares


def _of_layers(model: nn.Module, trained: Mapping[str, nn.Parameter], vocab_size: int) -> dict[str, nn.Parameter]:
    """The matrices, but those of tokens: of embeddings, and of the logits."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tokens = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)} | {vocab_size}
    return {
        name: p for name, p in trained.items() if p.ndim == 2 and id(p) not in embedded and p.shape[0] not in tokens
    }


def _adamw(parameters: Mapping[str, nn.Parameter], settings: InnerSettings) -> AdamW:
    matrices = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim <= 1]
    return AdamW([Group(matrices, settings.weight_decay), Group(others, 0.0)], settings.betas)


class _Muon:
    """torch's, with the learning rate as an argument."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: InnerSettings) -> None:
        kind = getattr(torch.optim, "Muon", None)
        if kind is None:
            text = f'[run] inner.optimizer = "muon": torch {torch.__version__} has none; install torch 2.9 or newer'
            raise ConfigError([text])
        self._optimizer: torch.optim.Optimizer = kind(
            list(parameters.values()),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            momentum=MUON_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )

    @property
    def state(self) -> MutableMapping[Tensor, dict[str, Tensor]]:
        return self._optimizer.state

    def step(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
