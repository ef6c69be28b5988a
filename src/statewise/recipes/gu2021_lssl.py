"""LSSL (Gu et al. 2021, arXiv:2110.13985): one layer that is a recurrence, a convolution and a differential equation,
and the long memory of HiPPO's matrices."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..core.paper import Paper
from ..layers import LSSL
from ..models import Stack
from ..tasks import Delay
from ..training import Experiment, Train
from .generation import execution_error
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader

MATRICES = ("legs", "legt", "lagt", "random")


def executions(seed: int, *, length: int, width: int, states: int) -> dict[str, float]:
    """The convolution beside one step after the other."""
    args = {"width": width, "states": states}
    return {
        "error": execution_error("lssl", length, torch.float32, **args),
        "error_float64": execution_error("lssl", length, torch.float64, **args),
    }


@torch.no_grad()
def readout(
    seed: int, *, length: int, delay: int, band: float, states: int, dt: list[float], rows: int
) -> dict[str, float]:
    """How well the best linear readout of the states recalls the signal: mean squared error on other rows, each matrix
    with the best of the steps dt. The signal has variance 1, which is the baseline; chance is another row's signal."""
    task = Delay(length=length, delay=delay, band=band)
    train, test = (task.batch(0, rows, seed=seed, split=split) for split in ("train", "test"))  # type: ignore[arg-type]
    found = {}
    for matrix in MATRICES:
        errors = []
        for step in dt:
            measure: Literal["legs", "legt", "lagt"] = "legs" if matrix == "random" else matrix  # type: ignore[assignment]
            layer = LSSL(1, states, measure=measure, learn="fixed", dt_min=step, dt_max=step)
            if matrix == "random":
                layer.a, layer.b = torch.randn(states, states) / states, torch.randn(states)
            errors.append(recalled(layer.double(), train.x, test.x, delay))
        found[matrix] = min(errors)
    return {**found, "baseline": task.baseline(), "chance": task.chance()}


def recalled(layer: LSSL, train: Tensor, test: Tensor, delay: int) -> float:
    """The error of ridge regression from the states x_t to u_{t - delay}."""
    system = layer.system()
    sides = []
    for u in (train, test):
        x, seen = u.new_zeros(len(u), layer.c.shape[-1], dtype=torch.float64), []
        for u_t in u[..., 0].double().unbind(1):
            x = x @ system.a[0].T + u_t[:, None] * system.b[0]
            seen.append(x)
        sides.append((torch.stack(seen, 1)[:, delay:].flatten(0, 1), u[:, : u.shape[1] - delay, 0].double().flatten()))
    (x, y), (x_test, y_test) = sides
    x, x_test = x / (scale := x.square().mean(0).sqrt().clamp_min(1e-12)), x_test / scale
    weights = torch.linalg.solve(x.T @ x + 1e-6 * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return float((x_test @ weights - y_test).square().mean())


def runs(scale: Scale) -> dict[str, Run]:
    smoke = scale == "smoke"
    length, delay = (40, 15) if smoke else (512, 200)
    made: dict[str, Run] = {
        "executions": Measure(
            executions, "error", {"length": 20 if smoke else 1024, "width": 4, "states": 64}, higher_is_better=False
        ),
        "readout": Measure(
            readout, "legs",
            {"length": length, "delay": delay, "band": 0.1, "states": 64, "dt": [0.003, 0.01, 0.03],
             "rows": 8 if smoke else 32},
            higher_is_better=False,
        ),
    }  # fmt: skip
    train = {
        "smoke": Train(steps=2, batch=4),
        "small": Train(steps=250, batch=16, lr=1e-2, optimizer="adam", weight_decay=0, warmup=10, evaluate_every=125),
        "paper": Train(steps=20_000, batch=64, lr=4e-3, warmup=200, evaluate_every=1000),
    }[scale]
    width = {"smoke": 4, "small": 32, "paper": 256}[scale]
    for layer, args in (("lssl", {"learn": "fixed"}), ("gru", {}), ("lstm", {})):
        stack = Stack(layer, width=width, depth=1, args=args, mlp=0.0)
        made[f"delay_{layer}"] = Experiment(Delay(length=length, delay=delay), stack, train)
    return made


def agree(r: Reader) -> bool:
    rough, fine = r("executions"), r("executions", "error_float64")
    return max(rough) < 1e-4 and max(fine) < 1e-10


def hippo_remembers(r: Reader) -> bool:
    legs, random = r("readout"), r("readout", "random")
    return legs.mean < 0.1 < 0.8 < random.mean


def beats_gates(r: Reader) -> bool:
    lssl, gru, lstm = r("delay_lssl"), r("delay_gru"), r("delay_lstm")
    return max(lssl) < 0.5 * min(*gru, *lstm) and lssl.mean < r.baseline("delay_lssl")


TITLE = "Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers"
RECIPE = Recipe(
    paper=Paper(TITLE, "Gu et al.", 2021, "arXiv:2110.13985"),
    runs=runs,
    claims=(
        Claim("sec. 3.1", "the layer is at once a recurrence and a convolution", agree),
        Claim(
            "sec. 4.1", "HiPPO's matrix remembers far back, where a random one does not (200 steps)", hippo_remembers
        ),
        Claim("sec. 4.1", "trained for as many steps, gated networks do not recall what it does", beats_gates),
    ),
)
