"""The inner optimisers, over torch's own: one object for those that take different parameters differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from prime_async.config.schema import InnerSettings
from prime_async.errors import ConfigError

MUON_MOMENTUM = 0.95


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
        self._parameters = trained
        self._kinds: dict[str, set[str]] = {}  # what is kept of each parameter
        self._optimizers: list[torch.optim.Optimizer] = []
        if settings.optimizer == "sgd":
            self._kinds = {name: set() for name in trained}
            self._optimizers = [torch.optim.SGD(trained.values(), lr=settings.learning_rate)]
            return
        orthogonal = _of_layers(model, trained, vocab_size) if settings.optimizer == "muon" else {}
        rest = {name: p for name, p in trained.items() if name not in orthogonal}
        if orthogonal:
            self._add(_muon(orthogonal, settings), orthogonal, {"momentum_buffer"})
        if rest:
            self._add(_adamw(rest, settings), rest, {"exp_avg", "exp_avg_sq", "step"})

    def step(self, learning_rate: float) -> None:
        """One step on the gradients that the parameters have."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

    def reset(self) -> None:
        """Forget the moments, as in the first step."""
        for optimizer in self._optimizers:
            optimizer.state.clear()

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """What is kept: a parameter's name, what it is, and the tensor."""
        for optimizer in self._optimizers:
            state = optimizer.state
            for name, parameter in self._parameters.items():
                if parameter in state:
                    for kind, tensor in sorted(state[parameter].items()):
                        yield name, kind, tensor

    def load(self, found: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Take over moments, by the parameter's name and by kind. ``False`` if they do not fit: nothing has changed."""
        if {name: set(kinds) for name, kinds in found.items()} != {n: k for n, k in self._kinds.items() if k}:
            return False
        for name, moments in found.items():
            shape = self._parameters[name].shape
            if any(t.shape not in (shape, torch.Size([])) for t in moments.values()):
                return False
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = next(n for n, p in self._parameters.items() if p is parameter)
                    if name in found:
                        moments = found[name]
                        optimizer.state[parameter] = {
                            kind: tensor.to(parameter.device, torch.float32) for kind, tensor in moments.items()
                        }
        return True

    def _add(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], kinds: set[str]) -> None:
        self._optimizers.append(optimizer)
        self._kinds |= dict.fromkeys(parameters, kinds)


def _of_layers(model: nn.Module, trained: Mapping[str, nn.Parameter], vocab_size: int) -> dict[str, nn.Parameter]:
    """The matrices, but those of tokens: of embeddings, and of the logits."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tokens = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)} | {vocab_size}
    return {
        name: p for name, p in trained.items() if p.ndim == 2 and id(p) not in embedded and p.shape[0] not in tokens
    }


def _adamw(parameters: Mapping[str, nn.Parameter], settings: InnerSettings) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=settings.learning_rate, betas=settings.betas, fused=True)


def _muon(parameters: Mapping[str, nn.Parameter], settings: InnerSettings) -> torch.optim.Optimizer:
    kind = getattr(torch.optim, "Muon", None)
    if kind is None:
        text = f'[run] inner.optimizer = "muon": torch {torch.__version__} has none; install torch 2.9 or newer'
        raise ConfigError([text])
    optimizer: torch.optim.Optimizer = kind(
        list(parameters.values()),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=MUON_MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    return optimizer
