"""ParaRNN (Danieli et al. 2025, arXiv:2510.21450): nonlinear recurrences trained in parallel by Newton's method."""

from __future__ import annotations

import copy
import statistics
import time
from itertools import product
from typing import Any

import torch

from ..core import layers
from ..core.paper import Paper
from ..layers.parallelized import parallelize
from ..models import LanguageModel
from ..tasks import Text
from ..training import Experiment, Train
from .generation import difference
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader

CELLS = ("para_gru", "para_lstm")
WIDTHS = {"para_gru": 136, "para_lstm": 136, "mamba2": 112, "attention": 128}  # of about 400,000 parameters at depth 2


def speed(seed: int, *, layer: str, lengths: list[int], widths: list[int], batch: int, rounds: int) -> dict[str, float]:
    """Time of a training step by the loop over that by Newton's method, for each length and width; best of `rounds`.

    grows: the speed-up at the longest over that at the shortest, at the first width.
    """
    torch.manual_seed(seed)
    numbers: dict[str, float] = {}
    for steps, width in product(lengths, widths):
        cell = layers[layer].cls(**layers[layer].sized(width))
        x = torch.randn(batch, steps, width)
        ways = {"newton": cell, "loop": parallelize(cell, "loop")}  # the products with x are one for all times in both
        found: dict[str, list[float]] = {"newton": [], "loop": []}
        for turn, (name, way) in product(range(rounds + 1), ways.items()):
            began = time.perf_counter()
            way(x)[0].square().mean().backward()
            if turn:
                found[name].append(time.perf_counter() - began)
        numbers[f"speedup_{steps}_{width}"] = min(found["loop"]) / min(found["newton"])
    first, last = (numbers[f"speedup_{steps}_{widths[0]}"] for steps in (lengths[0], lengths[-1]))
    return {**numbers, "speedup": max(numbers.values()), "grows": last / first, "baseline": 1.0}


def trained_alike(seed: int, *, layer: str, width: int, length: int, steps: int) -> dict[str, float]:
    """Two copies of a cell learn to foresee a noisy wave, one by Newton's method and one by the loop, in float64.

    error: between what they have become, relative to the largest output; loss and loss_loop: of the last step, with the
    loss before training as baseline.
    """
    torch.manual_seed(seed)
    one = layers[layer].cls(**layers[layer].sized(width)).double()
    two = parallelize(copy.deepcopy(one), "loop")
    losses: dict[str, list[float]] = {"newton": [], "loop": []}
    for name, model in (("newton", one), ("loop", two)):
        optimiser, rng = torch.optim.Adam(model.parameters(), lr=1e-2), torch.Generator().manual_seed(seed)
        for _ in range(steps):
            phase = torch.rand(8, 1, width, generator=rng, dtype=torch.float64) * 6.28
            wave = torch.sin(0.2 * torch.arange(length + 1)[:, None] + phase)
            noise = 0.1 * torch.randn(wave.shape, generator=rng, dtype=torch.float64)
            loss = (model((wave + noise)[:, :-1])[0] - wave[:, 1:]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[name].append(loss.item())
    x = torch.randn(4, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        error = difference(one(x)[0], two(x)[0])
    return {
        "error": error,
        "loss": statistics.mean(losses["newton"][-5:]),
        "loss_loop": statistics.mean(losses["loop"][-5:]),
        "baseline": losses["loop"][0],
    }


def runs(scale: Scale) -> dict[str, Run]:
    smoke = scale == "smoke"
    sizes: dict[str, Any] = {
        "smoke": {"lengths": [16, 32], "widths": [4], "batch": 2, "rounds": 1},
        "small": {"lengths": [64, 256, 1024, 4096], "widths": [16, 64, 256], "batch": 1, "rounds": 2},
        "paper": {"lengths": [512, 2048, 8192, 32768], "widths": [64, 256, 1024], "batch": 8, "rounds": 3},
    }[scale]
    made: dict[str, Run] = {}
    for layer in CELLS:
        made[f"speed_{layer}"] = Measure(speed, "speedup", {"layer": layer, **sizes})
        alike = {"width": 4 if smoke else 16, "length": 20 if smoke else 128, "steps": 3 if smoke else 60}
        made[f"alike_{layer}"] = Measure(trained_alike, "error", {"layer": layer, **alike}, higher_is_better=False)
    train = {
        "smoke": Train(steps=2, batch=2),
        "small": Train(steps=250, batch=16, lr=4e-3, warmup=20, evaluate_every=0),
        "paper": Train(steps=100_000, batch=64, lr=3e-3, warmup=1000, evaluate_every=1000),
    }[scale]
    for layer, width in WIDTHS.items():
        size = {"smoke": 8, "small": width, "paper": 8 * width}[scale]
        made[f"text_{layer}"] = Experiment(
            Text(length=64, evaluate=4096) if smoke else Text(length=128),
            LanguageModel(layer, width=size, depth=2),
            train,
        )
    return made


def faster(layer: str) -> Claim:
    def holds(r: Reader) -> bool:
        found = r(f"speed_{layer}")
        return found.mean > 10

    return Claim("fig. 1", f"{layer}: a training step is many times as fast as the loop (here: 10 at best)", holds)


def grows(r: Reader) -> bool:
    found = [r(f"speed_{layer}", "grows") for layer in CELLS]
    return min(f.mean for f in found) > 1


def alike(r: Reader) -> bool:
    found = [(r(f"alike_{layer}"), r(f"alike_{layer}", "loss")) for layer in CELLS]
    learned = [loss.mean < 0.5 * r.baseline(f"alike_{layer}") for layer, (_, loss) in zip(CELLS, found, strict=True)]
    return all(learned) and max(max(error) for error, _ in found) < 1e-6


def rivals(name: str, says: str) -> Claim:
    def holds(r: Reader) -> bool:
        ours, theirs = [r(f"text_{layer}") for layer in CELLS], r(f"text_{name}")
        return min(found.mean for found in ours) < 1.05 * theirs.mean

    return Claim("sec. 4, language models", says, holds)


def over_pairs(r: Reader) -> bool:
    ours = [(r(f"text_{layer}"), r.baseline(f"text_{layer}")) for layer in CELLS]
    return all(found.mean < pairs for found, pairs in ours)


RECIPE = Recipe(
    paper=Paper(
        "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models",
        "Danieli et al.", 2025, "arXiv:2510.21450",
    ),
    runs=runs,
    claims=(
        faster("para_gru"),
        faster("para_lstm"),
        Claim("fig. 1", "the speed-up grows with the length", grows),
        Claim("sec. 3", "what is trained in parallel is what the loop would have trained", alike),
        Claim("sec. 4, language models", "the cells learn text (better than a table of pairs)", over_pairs),
        rivals("mamba2", "at equal size they come within 5 % of Mamba-2's bits per byte"),
        rivals("attention", "and within 5 % of a Transformer's"),
    ),
)  # fmt: skip
