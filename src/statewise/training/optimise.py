"""Optimisers, learning rates, averaged weights, and the check that numbers are still numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from ..core import DataError, NumericError
from .experiment import Train


class Weights(Protocol):
    """What a module knows of its weights, and what `shards` know of those that are here."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...


class Optimizer:
    """AdamW, Adam or SGD with momentum 0.9, on torch's own kernels; weight decay only where `decays` says so.

    `state` maps the name of a parameter to its moments. The classes of torch.optim would import the compiler when first
    used: 4 s and 100 MB for every process of a comparison, and they know parameters by number, not by name.
    """

    def __init__(self, model: Weights, train: Train):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.kind = train.optimizer
        self.groups = [
            (train.weight_decay, {name: p for name, p in named.items() if decays(p)}),
            (0.0, {name: p for name, p in named.items() if not decays(p)}),
        ]
        self.fused = not any(p.is_complex() for p in named.values())  # one kernel for all; it knows no complex numbers
        self.state: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change every parameter that has a gradient."""
        for decay, group in self.groups:
            live = {name: p for name, p in group.items() if p.grad is not None}
            if live:
                update = self._momentum if self.kind == "sgd" else self._adam
                update(live, [p.grad for p in live.values() if p.grad is not None], rate, decay)

    def _adam(self, live: dict[str, Tensor], grads: list[Tensor], rate: float, decay: float) -> None:
        for name, p in live.items():
            if name not in self.state:
                count = torch.zeros((), device=p.device if self.fused else "cpu")
                self.state[name] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        means, squares, counts = ([self.state[name][key] for name in live] for key in ("exp_avg", "exp_avg_sq", "step"))
        rule = adamw if self.kind == "adamw" else adam
        rule(
            list(live.values()),  # type: ignore[arg-type]
            grads,
            means,
            squares,
            [],
            counts,
            foreach=False,
            fused=self.fused,
            has_complex=not self.fused,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=rate,
            weight_decay=decay,
            eps=1e-8,
            maximize=False,
        )

    def _momentum(self, live: dict[str, Tensor], grads: list[Tensor], rate: float, decay: float) -> None:
        buffers = [self.state[name]["momentum"] if name in self.state else None for name in live]
        sgd(
            list(live.values()),  # type: ignore[arg-type]
            grads,
            buffers,
            foreach=False,
            fused=self.fused,
            weight_decay=decay,
            momentum=0.9,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        self.state |= {name: {"momentum": b} for name, b in zip(live, buffers, strict=True) if b is not None}

    def tensors(self) -> dict[str, Tensor]:
        """All moments as PARAMETER.KEY: optimiser state without pickle."""
        return {f"{name}.{key}": t for name, entry in self.state.items() for key, t in entry.items()}

    def restore(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Put `tensors` back. Raises DataError where they are of another model."""
        known = {name: p for _, group in self.groups for name, p in group.items()}
        self.state = {}
        for full, t in tensors.items():
            name, _, key = full.rpartition(".")
            p = known.get(name)
            if p is None or (key != "step" and t.shape != p.shape):
                found = "there is no such parameter" if p is None else f"the parameter is {list(p.shape)}"
                raise DataError(
                    f"{where}: optimiser state {full!r} {list(t.shape)}: {found}: it is another model's; "
                    "statewise.training.load(run) takes the weights alone"
                )
            self.state.setdefault(name, {})[key] = t.to("cpu" if key == "step" and not self.fused else p.device)


def decays(parameter: Tensor) -> bool:
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

    def __init__(self, model: Weights, decay: float):
        self.decay = decay
        self.tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: Weights, count: int) -> None:
        keep = min(self.decay, (1 + count) / (10 + count))
        for name, t in model.state_dict().items():
            if t.is_floating_point() or t.is_complex():
                self.tensors[name].lerp_(t, 1 - keep)
            else:
                self.tensors[name].copy_(t)


def gradient_norm(parameters: Iterable[Tensor], clip: float) -> Tensor:
    """The norm over all gradients; where clip > 0 they are scaled down to it."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if clip > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm, foreach=True)
    return norm


def refuse_nonfinite(loss: float, norm: float, model: Weights, step: int, advice: str) -> None:
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
