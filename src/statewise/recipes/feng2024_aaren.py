"""Attention as an RNN (Feng et al. 2024, arXiv:2405.13956): softmax attention with one learned query, as a scan."""

from __future__ import annotations

import math

import torch

from ..core import unroll
from ..core.paper import Paper
from ..layers import Aaren
from ..models import Stack
from ..tasks import Adding, Events, Forecast, SpokenDigits, Task
from ..training import Experiment, Train
from .generation import against_transformer, difference
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader


@torch.no_grad()
def equality(seed: int, *, length: int, width: int, heads: int) -> dict[str, float]:
    """Aaren beside attention written out, in float64: every answer as a softmax over all that came before."""
    layer = Aaren(width, heads=heads).double()
    x = torch.randn(2, length, width, dtype=torch.float64)
    q = layer.q(layer.query).view(heads, -1)  # (H, K)
    k, v = (f(x).unflatten(-1, (heads, -1)) for f in (layer.k, layer.v))  # (B, T, H, K)
    score = torch.einsum("hk,bshk->bhs", q, k) / math.sqrt(q.shape[1])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    weights = score[:, :, None].masked_fill(~causal, -torch.inf).softmax(-1)  # (B, H, T, S)
    written_out = layer.out(torch.einsum("bhts,bshv->bthv", weights, v).flatten(-2))
    return {
        "error": difference(layer(x)[0], written_out),
        "step_error": difference(unroll(layer, x)[0], written_out),
    }


def streaming(seed: int, *, contexts: list[int], width: int, depth: int, steps: int) -> dict[str, float]:
    return against_transformer("aaren", contexts, width=width, depth=depth, steps=steps)


def problems(scale: Scale) -> dict[str, tuple[Task, Train]]:
    """One of each of the paper's four kinds; a control problem stands here as a number to be found in a stream."""
    if scale == "smoke":
        train = Train(steps=3, batch=8)
        tasks = {"series": Forecast(length=32), "classes": SpokenDigits(), "events": Events(length=24)}
        return {name: (task, train) for name, task in {**tasks, "regression": Adding(length=8)}.items()}
    more = 20 if scale == "paper" else 1

    def train_for(steps: int, batch: int, lr: float = 4e-3) -> Train:
        return Train(steps=more * steps, batch=batch, lr=lr, warmup=20, evaluate_every=more * steps // 5)

    return {
        "classes": (SpokenDigits(), train_for(250, 32)),
        "series": (Forecast(), train_for(120, 16, 2e-3)),
        "events": (Events(), train_for(400, 32)),
        "regression": (Adding(length=50), train_for(400, 32)),
    }


def runs(scale: Scale) -> dict[str, Run]:
    small = scale == "smoke"
    width, depth = (8, 1) if small else (32, 2) if scale == "small" else (512, 6)
    contexts = [16, 64] if small else [256, 1024, 4096]
    made: dict[str, Run] = {
        "equality": Measure(
            equality, "error", {"length": 32 if small else 512, "width": 32, "heads": 4}, higher_is_better=False
        ),
        "streaming": Measure(
            streaming, "aaren_slowdown", {"contexts": contexts, "width": 64, "depth": 2, "steps": 2 if small else 50},
            higher_is_better=False,
        ),
    }  # fmt: skip
    for problem, (task, train) in problems(scale).items():
        for layer in ("aaren", "attention"):
            made[f"{problem}_{layer}"] = Experiment(task, Stack(layer, width=width, depth=depth), train)
    return made


def equal(r: Reader) -> bool:
    return max(r("equality")) < 1e-10 and max(r("equality", "step_error")) < 1e-10


def constant(r: Reader) -> bool:
    ours, theirs, speedup = r("streaming"), r("streaming", "transformer_slowdown"), r("streaming", "speedup")
    return ours.mean < 1.3 and theirs.mean > 2 * ours.mean and speedup.mean > 1


def same_size(r: Reader) -> bool:
    ours, theirs = r("classes_aaren", "parameters"), r("classes_attention", "parameters")
    return abs(ours.mean / theirs.mean - 1) < 0.05


def comparable(problem: str) -> Claim:
    """Within two points of accuracy or a tenth of the loss, or within the spread over the seeds; above the baseline."""

    def holds(r: Reader) -> bool:
        ours, theirs = r(f"{problem}_aaren"), r(f"{problem}_attention")
        baseline, noise = r.baseline(f"{problem}_aaren"), max(ours.spread, theirs.spread)
        if problem in ("classes", "events"):
            return ours.mean > theirs.mean - max(0.02, noise) and ours.mean > baseline
        return ours.mean < theirs.mean + max(0.1 * theirs.mean, noise) and ours.mean < baseline

    kinds = {
        "classes": ("table 4", "time series classification"), "series": ("table 3", "time series forecasting"),
        "events": ("table 2", "event forecasting"), "regression": ("table 1", "control (here: adding)"),
    }  # fmt: skip
    place, kind = kinds[problem]
    return Claim(place, f"Aaren is comparable to a Transformer at {kind}", holds)


RECIPE = Recipe(
    paper=Paper("Attention as an RNN", "Feng et al.", 2024, "arXiv:2405.13956"),
    runs=runs,
    claims=(
        Claim("sec. 3", "attention with a fixed query is a recurrence: scan, steps and softmax agree", equal),
        Claim(
            "sec. 4, analysis",
            "a new token takes constant time, where a Transformer's grows with the context",
            constant,
        ),
        Claim("sec. 4, analysis", "Aaren has the size of a Transformer to within 5 %", same_size),
        *(comparable(problem) for problem in ("regression", "events", "series", "classes")),
    ),
)
