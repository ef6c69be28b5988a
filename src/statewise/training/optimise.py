"""Optimisers, learning rates, averaged weights, and the check that numbers are still numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..core import NumericError
from .experiment import Train


def make_optimizer(model: nn.Module, train: Train) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD with momentum 0.9; weight decay only where `decays` says so."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if decays(p)], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = not any(p.is_complex() for p in parameters)  # one kernel for all parameters; it knows no complex ones
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=0.9, fused=fused)
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=train.lr, fused=fused)


def decays(parameter: nn.Parameter) -> bool:
    """Matrices decay; biases, norms and other vectors do not, nor what a layer marks `_no_weight_decay = True`."""
    return parameter.ndim > 1 and not getattr(parameter, "_no_weight_decay", False)


def learning_rate(train: Train, step: int) -> float:
    """The rate of step number `step`, counted from 0: a linear rise over the warm-up, then the schedule."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    done = (step - train.warmup) / max(train.steps - train.warmup, 1)
    if train.schedule == "cosine":
        return train.lr * 0.5 * (1 + math.cos(math.pi * done))
    return train.lr * (1 - done) if train.schedule == "linear" else train.lr


class Average:
    """avg <- avg + (1 - d) (w - avg) with d = min(decay, (1 + n) / (10 + n)) at update n, so that it starts quickly."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, count: int) -> None:
        keep = min(self.decay, (1 + count) / (10 + count))
        for name, t in model.state_dict().items():
            if t.is_floating_point() or t.is_complex():
                self.tensors[name].lerp_(t, 1 - keep)
            else:
                self.tensors[name].copy_(t)


def gradient_norm(parameters: Iterable[nn.Parameter], clip: float) -> Tensor:
    """The norm over all gradients; where clip > 0 they are scaled down to it."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if clip > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm, foreach=True)
    return norm


def refuse_nonfinite(loss: float, norm: float, model: nn.Module, step: int, advice: str) -> None:
    """Raise NumericError, naming the step and the parameter with the largest gradient, unless both are finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    sizes = {
        name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None and p.numel()
    }
    name = max(sizes, key=lambda n: (not math.isfinite(sizes[n]), sizes[n]), default="none")
    raise NumericError(
        f"step {step}: the loss is {loss:.6g}, the norm of the gradient {norm:.6g}; largest in {name} "
        f"({sizes.get(name, math.nan):.3g}); {advice}"
    )
