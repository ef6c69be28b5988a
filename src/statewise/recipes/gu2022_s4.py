"""S4 (Gu, Goel & Re 2022, arXiv:2111.00396): the state space whose kernel is cheap, read pixel by pixel and generating
in constant time."""

from __future__ import annotations

import torch

from ..core.paper import Paper
from ..models import Stack
from ..tasks import Digits
from ..training import Experiment, Train
from .generation import against_transformer, execution_error
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader


def executions(seed: int, *, length: int, width: int, states: int) -> dict[str, float]:
    """The convolution beside one step after the other."""
    args = {"width": width, "states": states}
    return {
        "error": execution_error("s4", length, torch.float32, **args),
        "error_float64": execution_error("s4", length, torch.float64, **args),
    }


def generation(seed: int, *, contexts: list[int], width: int, depth: int, steps: int) -> dict[str, float]:
    return against_transformer("s4", contexts, width=width, depth=depth, steps=steps)


def runs(scale: Scale) -> dict[str, Run]:
    smoke = scale == "smoke"
    sizes = {
        "smoke": {"contexts": [16, 64], "width": 16, "depth": 1, "steps": 2},
        "small": {"contexts": [256, 1024, 4096, 8192], "width": 128, "depth": 2, "steps": 20},
        "paper": {"contexts": [256, 1024, 4096, 8192], "width": 512, "depth": 8, "steps": 100},
    }[scale]
    made: dict[str, Run] = {
        "executions": Measure(
            executions, "error", {"length": 20 if smoke else 1024, "width": 4 if smoke else 32, "states": 64},
            higher_is_better=False,
        ),
        "generation": Measure(generation, "speedup", sizes),
    }  # fmt: skip
    train = {
        "smoke": Train(steps=2, batch=4),
        "small": Train(steps=600, batch=32, lr=4e-3, warmup=20, evaluate_every=100),
        "paper": Train(steps=40_000, batch=50, lr=1e-3, warmup=1000, evaluate_every=1000),
    }[scale]
    stack = {"smoke": {"width": 4, "depth": 1}, "small": {"width": 32, "depth": 2}, "paper": {"width": 512, "depth": 6}}
    for layer in ("s4", "gru", "lstm", "attention"):
        made[f"digits_{layer}"] = Experiment(Digits(pixels=True), Stack(layer, **stack[scale]), train)  # type: ignore[arg-type]
    return made


def agree(r: Reader) -> bool:
    rough, fine = r("executions"), r("executions", "error_float64")
    return max(rough) < 1e-4 and max(fine) < 1e-10


def sees_long_rows(r: Reader) -> bool:
    s4, gru, lstm = r("digits_s4"), r("digits_gru"), r("digits_lstm")
    return s4.mean > r.baseline("digits_s4") and s4.mean > max(gru.mean, lstm.mean)


def beats_attention(r: Reader) -> bool:
    s4, attention = r("digits_s4"), r("digits_attention")
    return s4.mean > attention.mean


def constant_time(r: Reader) -> bool:
    ours, theirs = r("generation", "s4_slowdown"), r("generation", "transformer_slowdown")
    return ours.mean < 1.3 < 2 < theirs.mean


def faster(r: Reader) -> bool:
    speedup, ours, theirs = r("generation"), r("generation", "s4_parameters"), r("generation", "transformer_parameters")
    return speedup.mean > 2 and abs(ours.mean / theirs.mean - 1) < 0.25


RECIPE = Recipe(
    paper=Paper(
        "Efficiently Modeling Long Sequences with Structured State Spaces", "Gu et al.", 2022, "arXiv:2111.00396"
    ),
    runs=runs,
    claims=(
        Claim("sec. 2", "the layer is at once a convolution and a recurrence", agree),
        Claim("sec. 4.3", "pictures read pixel by pixel are classified better than by gated networks", sees_long_rows),
        Claim("sec. 4.3", "and better than by a Transformer of the same width", beats_attention),
        Claim(
            "sec. 4.3", "a generated token takes the same time after any context, unlike a Transformer's", constant_time
        ),
        Claim(
            "sec. 4.3", "so it generates many times as fast as a Transformer of its size (here: 8192 tokens)", faster
        ),
    ),
)
