"""FlashRNN (Pöppel, Beck & Hochreiter 2024, arXiv:2412.07752): nonlinear cells with block-diagonal heads, fused over
time."""

from __future__ import annotations

import statistics
import time
from itertools import product

import torch

from ..core import layers
from ..core.paper import Paper
from ..models import Stack
from ..ops import use_backend
from ..tasks import WordProblem
from ..training import Experiment, Train
from .generation import difference
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader

CELLS = ("elman", "gru", "lstm", "slstm")


def fused(
    seed: int, *, layer: str, sizes: list[int], hidden: int, batch: int, steps: int, rounds: int
) -> dict[str, float]:
    """A training step fused over time beside the loop of torch operations, for each size of a head.

    speedup_d: the loop's time over ours, medians; speedup: the least of them, speedup_smallest that of the smallest
    heads; error: between their outputs and
    gradients in float32, relative to the largest.
    """
    torch.manual_seed(seed)
    numbers, errors = {}, []
    for size in sizes:
        made = layers[layer].cls(**{**layers[layer].sized(hidden), "heads": hidden // size})
        x = torch.randn(batch, steps, hidden, requires_grad=True)
        seconds: dict[str, list[float]] = {"ours": [], "reference": []}
        outs = {}
        for turn, way in product(range(rounds + 1), seconds):
            began = time.perf_counter()
            with use_backend(None if way == "ours" else way):
                y, _ = made(x)
                outs[way] = [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *made.parameters()])]
            if turn:
                seconds[way].append(time.perf_counter() - began)
        numbers[f"speedup_{size}"] = statistics.median(seconds["reference"]) / statistics.median(seconds["ours"])
        errors += [difference(a, b) for a, b in zip(outs["ours"], outs["reference"], strict=True) if b.any()]
    least, smallest = min(numbers.values()), numbers[f"speedup_{min(sizes)}"]
    return {**numbers, "speedup": least, "speedup_smallest": smallest, "error": max(errors), "baseline": 1.0}


def runs(scale: Scale) -> dict[str, Run]:
    sizes = {
        "smoke": {"sizes": [2, 4], "hidden": 4, "batch": 2, "steps": 5, "rounds": 1},
        "small": {"sizes": [32, 64, 128, 256], "hidden": 256, "batch": 16, "steps": 256, "rounds": 2},
        "paper": {"sizes": [64, 128, 256, 768], "hidden": 768, "batch": 16, "steps": 1024, "rounds": 5},
    }[scale]
    made: dict[str, Run] = {
        f"fused_{layer}": Measure(fused, "speedup", {"layer": layer, **sizes})  # type: ignore[dict-item]
        for layer in CELLS
    }
    train = {
        "smoke": Train(steps=2, batch=4),
        "small": Train(steps=800, batch=64, lr=1e-2, warmup=20, evaluate_every=200),
        "paper": Train(steps=20_000, batch=256, lr=1e-3, warmup=1000, evaluate_every=1000),
    }[scale]
    length = {"smoke": 4, "small": 32, "paper": 128}[scale]
    for layer in ("lstm", "attention"):
        lr = {"lstm": 1e-2, "attention": 1e-3}[layer]
        made[f"parity_{layer}"] = Experiment(
            WordProblem("Z2", length=length, test_length=4 * length),
            Stack(layer, width=8 if scale == "smoke" else 64, depth=1 if layer == "lstm" else 2),
            train if scale == "smoke" else Train(**{**vars(train), "lr": lr}),
        )
    return made


def faster(r: Reader) -> bool:
    found = [r(f"fused_{layer}") for layer in CELLS]
    return min(f.mean for f in found) > 1


def many_times(r: Reader) -> bool:
    found = [r(f"fused_{layer}", "speedup_smallest") for layer in CELLS]
    return max(f.mean for f in found) > 10


def exact(r: Reader) -> bool:
    found = [r(f"fused_{layer}", "error") for layer in CELLS]
    return max(max(f) for f in found) < 1e-4


def tracks(r: Reader) -> bool:
    lstm, attention = r("parity_lstm", "accuracy_beyond"), r("parity_attention", "accuracy_beyond")
    return lstm.mean > 0.95 and attention.mean < 0.65


RECIPE = Recipe(
    paper=Paper(
        "FlashRNN: I/O-Aware Optimization of Traditional RNNs on modern hardware",
        "Pöppel et al.", 2024, "arXiv:2412.07752",
    ),
    runs=runs,
    claims=(
        Claim("fig. 3", "fused cells are faster than the loop at every head size", faster),
        Claim("abstract", "many times as fast (there 50 on a GPU; here 10 on a CPU with heads of 32)", many_times),
        Claim("sec. 3", "and exact: outputs and gradients are the loop's", exact),
        Claim("sec. 1", "traditional cells track state, which Transformers do not (here: parity)", tracks),
    ),
)  # fmt: skip
