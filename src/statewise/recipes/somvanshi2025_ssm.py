"""From S4 to Mamba, a survey (Somvanshi et al. 2025, arXiv:2503.18970): S4D, S5, Mamba and Mamba-2, each in all its
executions, and what selection is for."""

from __future__ import annotations

import torch

from ..core import layers
from ..core.paper import Paper
from ..training import Train
from .generation import execution_error
from .gu2023_mamba import copying
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader

INVARIANT, SELECTIVE = ("s4d", "s5"), ("mamba", "mamba2")


def executions(seed: int, *, layer: str, length: int, width: int) -> dict[str, float]:
    """forward beside one step after the other, in float32 and in float64."""
    args = layers[layer].sized(width)
    return {
        "error": execution_error(layer, length, torch.float32, **args),
        "error_float64": execution_error(layer, length, torch.float64, **args),
    }


def runs(scale: Scale) -> dict[str, Run]:
    smoke = scale == "smoke"
    made: dict[str, Run] = {
        f"executions_{layer}": Measure(
            executions, "error", {"layer": layer, "length": 20 if smoke else 1024, "width": 8 if smoke else 64},
            higher_is_better=False,
        )
        for layer in (*INVARIANT, *SELECTIVE)
    }  # fmt: skip
    sizes = {
        "smoke": {"length": 8, "copied": 2, "symbols": 4},
        "small": {"length": 32, "copied": 4, "symbols": 8},
        "paper": {"length": 4096, "copied": 16, "symbols": 16},
    }[scale]
    train = {
        "smoke": Train(steps=2, batch=4),
        "small": Train(steps=900, batch=32, lr=2e-3, warmup=20, evaluate_every=225),
        "paper": Train(steps=400_000, batch=64, lr=1e-4, warmup=1000, evaluate_every=10_000),
    }[scale]
    width = {"smoke": 8, "small": 64, "paper": 64}[scale]
    return made | copying((*INVARIANT, *SELECTIVE), INVARIANT[:1], sizes, width, train)


def agree(r: Reader) -> bool:
    rough = [r(f"executions_{layer}") for layer in (*INVARIANT, *SELECTIVE)]
    fine = [r(f"executions_{layer}", "error_float64") for layer in (*INVARIANT, *SELECTIVE)]
    return all(max(v) < 1e-4 for v in rough) and all(max(v) < 1e-10 for v in fine)


def selection_decides(r: Reader) -> bool:
    """Nine in ten answers right counts as solved."""
    fixed, chosen = ([r(f"selective_{layer}") for layer in group] for group in (INVARIANT, SELECTIVE))
    worst, best = min(v.mean for v in chosen), max(v.mean for v in fixed)
    return worst > 0.9 and best < worst - 0.1


def invariant_copies(r: Reader) -> bool:
    fixed, scattered = r("fixed_s4d"), r("selective_s4d")
    return fixed.mean > scattered.mean + 0.1 and fixed.mean > r.baseline("fixed_s4d")


def second_is_no_worse(r: Reader) -> bool:
    first, second = r("selective_mamba"), r("selective_mamba2")
    return second.mean > first.mean - max(0.02, first.spread, second.spread)


RECIPE = Recipe(
    paper=Paper(
        "From S4 to Mamba: A Comprehensive Survey on Structured State Space Models",
        "Somvanshi et al.",
        2025,
        "arXiv:2503.18970",
    ),
    runs=runs,
    claims=(
        Claim("of S4D, S5, Mamba and Mamba-2", "trained in parallel and streamed step by step they agree", agree),
        Claim("of Mamba", "selection solves selective copying, and time-invariant layers do not", selection_decides),
        Claim("of S4D", "a time-invariant layer does copy what stands at fixed places", invariant_copies),
        Claim("of Mamba-2", "one decay a head in place of one a state costs no accuracy", second_is_no_worse),
    ),
)
