"""LightNet, "You Only Scan Once" (Qin et al. 2024, arXiv:2405.21022): an additive recurrence, whose memory of all that
was seen does not depend on the order, so that data of several dimensions take one scan where decay takes two."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..core import RecurrentLayer, layers
from ..core.paper import Paper
from ..layers import GLA, Bidirectional, LightNet
from ..models import Stack
from ..tasks import Digits
from ..training import Experiment, Train
from .generation import difference
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader


@torch.no_grad()
def order(seed: int, *, length: int, width: int) -> dict[str, float]:
    """The memory after a row beside the memory after the same row in another order, in float64; GLA's too.

    softmax: every answer beside its closed form, sum_s softmax_s(k)_s v_s for each key channel, read by q.
    """
    x, other = torch.randn(2, length, width, dtype=torch.float64), torch.randperm(length)
    found = {}
    for name in ("lightnet", "gla"):
        layer: RecurrentLayer = layers[name].cls(**layers[name].sized(width)).double()
        memories = [memory(layer(row)[1]) for row in (x[:, other], x)]
        found[name] = difference(*memories)
    layer = LightNet(**layers["lightnet"].sized(width)).double()
    u = layer.encode(x)  # q, k (B, T, H, K), v (B, T, H, V)
    causal = torch.ones(length, length, dtype=torch.bool).tril()[..., None, None]
    weights = u.k[:, None].masked_fill(~causal, -torch.inf).softmax(2)  # (B, T, S, H, K)
    wanted = torch.einsum("bthk,btshk,bshv->bthv", u.q, weights, u.v)
    answers, _ = layer.scan(u, layer.initial_state(2), None, None)
    return {"error": found["lightnet"], "gla_error": found["gla"], "softmax": difference(answers, wanted)}


def memory(state: object) -> Tensor:
    """The matrix memory, which is the whole state or its first leaf."""
    return state if isinstance(state, Tensor) else state[0]  # type: ignore[index]


@torch.no_grad()
def scans(seed: int, *, sides: list[int], batch: int, width: int, rounds: int) -> dict[str, float]:
    """Seconds for flattened pictures: one scan of LightNet, one of GLA, and GLA in both directions."""
    one, gla = (layers[name].cls(**layers[name].sized(width)) for name in ("lightnet", "gla"))
    two = Bidirectional(gla, GLA(**layers["gla"].sized(width)))
    numbers: dict[str, float] = {}
    for side in sides:
        x = torch.randn(batch, side * side, width)
        took: dict[str, list[float]] = {"one": [], "gla": [], "two": []}
        for turn in range(rounds + 1):
            for name, model in (("one", one), ("gla", gla), ("two", two)):
                began = time.perf_counter()
                model(x)
                if turn:  # the first turn fills caches
                    took[name].append(time.perf_counter() - began)
        numbers |= {f"{name}_{side}": statistics.median(times) for name, times in took.items()}
    last = sides[-1]
    return {
        **numbers,
        "ratio": numbers[f"one_{last}"] / numbers[f"two_{last}"],
        "second_scan": numbers[f"two_{last}"] / numbers[f"gla_{last}"],
    }


def runs(scale: Scale) -> dict[str, Run]:
    smoke = scale == "smoke"
    sizes = {
        "sides": [4, 8] if smoke else [16, 32],
        "batch": 2,
        "width": 16 if smoke else 128,
        "rounds": 2 if smoke else 9,
    }
    made: dict[str, Run] = {
        "order": Measure(
            order, "error", {"length": 12 if smoke else 64, "width": 8 if smoke else 32}, higher_is_better=False
        ),
        "scans": Measure(scans, "ratio", sizes, higher_is_better=False),
    }
    train = {
        "smoke": Train(steps=2, batch=8),
        "small": Train(steps=600, batch=32, lr=4e-3, warmup=20, evaluate_every=100),
        "paper": Train(steps=50_000, batch=128, lr=1e-3, warmup=500, evaluate_every=2000),
    }[scale]
    stack = {"smoke": {"width": 8, "depth": 1}, "small": {"width": 32, "depth": 2}, "paper": {"width": 192, "depth": 6}}
    for kind, task in (("rows", Digits()), ("digits", Digits(pixels=True))):
        for layer in ("lightnet", "gla"):
            made[f"{kind}_{layer}"] = Experiment(task, Stack(layer, **stack[scale]), train)  # type: ignore[arg-type]
    return made


def any_order(r: Reader) -> bool:
    ours, theirs = r("order"), r("order", "gla_error")
    return max(ours) < 1e-12 and min(theirs) > 1e-3


def half_the_time(r: Reader) -> bool:
    ratio, second = r("scans"), r("scans", "second_scan")
    return ratio.mean < 0.75 and second.mean > 1.6


def comparable(kind: str) -> Callable[[Reader], bool]:
    """Within two points of accuracy, or within the spread over the seeds."""

    def holds(r: Reader) -> bool:
        ours, theirs = r(f"{kind}_lightnet"), r(f"{kind}_gla")
        noise, guess = max(0.02, ours.spread, theirs.spread), r.chance(f"{kind}_lightnet")
        return ours.mean > theirs.mean - noise and ours.mean > 2 * guess

    return holds


TITLE = "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet"
RECIPE = Recipe(
    paper=Paper(TITLE, "Qin et al.", 2024, "arXiv:2405.21022"),
    runs=runs,
    claims=(
        Claim("method", "the memory of a whole row is the same in any order, where one that decays is not", any_order),
        Claim(
            "method",
            "the recurrence is a softmax over time for each key channel",
            lambda r: max(r("order", "softmax")) < 1e-10,
        ),
        Claim(
            "experiments, speed",
            "one scan over a flattened picture takes well less than a decaying recurrence's two",
            half_the_time,
        ),
        Claim(
            "experiments, images",
            "one scan classifies small pictures row by row as well as GLA (without the paper's position encodings)",
            comparable("rows"),
        ),
        Claim(
            "experiments, images",
            "and pixel by pixel (without position encodings, which an additive memory needs to tell pixels apart)",
            comparable("digits"),
        ),
    ),
)
