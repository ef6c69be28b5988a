"""A critical review of recurrent networks (Lipton, Berkowitz & Elkan 2015, arXiv:1506.00019): what they learn in time,
how their gradients vanish, and what back-propagation cut short still learns."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import detach, layers
from ..core.paper import Paper
from ..models import Stack
from ..ops import elman_loop, lstm_loop
from ..tasks import Adding, ElmanLetters, ElmanXor
from ..training import Experiment, Train
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader


def vanishing(seed: int, *, weight: float, lags: list[int]) -> dict[str, float]:
    """d h_T / d h_0 of one linear unit with that recurrent weight, and d c_T / d c_0 of an LSTM's cell kept open.

    slope: of the log of the first over T, which is log |w|; carousel: the second after the longest lag.
    """
    one, gates = torch.ones(1, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    found = []
    for lag in lags:
        h0 = one.clone().requires_grad_()
        x = torch.zeros(1, lag, 1, dtype=torch.float64)
        _, last = elman_loop(x, h0, one, weight * one, nonlinearity="relu")  # positive throughout, and so linear
        found.append(math.log(float(torch.autograd.grad(last.sum(), h0)[0])))
    slopes = [(b - a) / (n - m) for (a, b), (m, n) in zip(pairwise(found), pairwise(lags), strict=True)]
    c0 = one.clone().requires_grad_()
    bias = torch.tensor([0.0, 50.0, 0.0, 0.0], dtype=torch.float64)  # the forget gate alone is open
    *_, c = lstm_loop(x, one, c0, gates, gates, bias)
    return {
        "slope": sum(slopes) / len(slopes),
        "expected": math.log(weight),
        "carousel": float(torch.autograd.grad(c.sum(), c0)[0]),
    }


def truncated(seed: int, *, window: int, lag: int, hidden: int, steps: int, lr: float) -> dict[str, float]:
    """An LSTM that is to repeat, `lag` steps later, bits of an endless stream, trained on `window` steps at a time.

    The state goes on from window to window, its past does not: accuracy over the last tenth of the stream, and the
    gradient of a window's last answer by the inputs before the window (reach, which is 0) and inside it (inside).
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    layer = layers["lstm"].cls(width=1, hidden=hidden)
    head = torch.nn.Linear(hidden, 1)
    parameters = [*layer.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=lr)
    rows = 32
    past, state = torch.zeros(rows, lag, 1), layer.initial_state(rows)
    right: list[float] = []
    for step in range(steps):
        x = torch.randint(0, 2, (rows, window, 1), generator=rng).float() * 2 - 1
        whole = torch.cat([past, x], 1)
        y, past = whole[:, :window], whole[:, -lag:]
        o, state = layer(x, state)
        out = head(o)
        loss = F.binary_cross_entropy_with_logits(out, (y > 0).float())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        state = detach(state)
        if step >= steps - steps // 10:
            right.append(float(((out > 0) == (y > 0)).float().mean()))
    reach, inside = _reach(layer, head, window, rng)
    return {"accuracy": sum(right) / len(right), "reach": reach, "inside": inside, "chance": 0.5}


def _reach(layer: torch.nn.Module, head: torch.nn.Module, window: int, rng: torch.Generator) -> tuple[float, float]:
    def bits() -> Tensor:
        return (torch.randint(0, 2, (4, window, 1), generator=rng).float() * 2 - 1).requires_grad_()

    before, inside = bits(), bits()
    _, state = layer(before)
    o, _ = layer(inside, detach(state))
    early, late = torch.autograd.grad(head(o)[:, -1].sum(), [before, inside], allow_unused=True)
    return 0.0 if early is None else float(early.abs().sum()), float(late.abs().sum())


def runs(scale: Scale) -> dict[str, Run]:
    smoke = scale == "smoke"
    lags = {"smoke": [1, 10], "small": [1, 10, 50, 100], "paper": [1, 10, 100, 1000]}[scale]
    made: dict[str, Run] = {
        f"vanishing_{name}": Measure(vanishing, "slope", {"weight": weight, "lags": lags})
        for name, weight in (("small", 0.9), ("large", 1.1))
    }
    steps = {"smoke": 10, "small": 2000, "paper": 20_000}[scale]
    cut = {"lag": 10, "hidden": 8 if smoke else 32, "steps": steps, "lr": 1e-2}
    for window in (5, 20):
        made[f"truncated_{window}"] = Measure(truncated, "accuracy", {"window": window, **cut})
    length, steps = {"smoke": (8, 2), "small": (50, 1500), "paper": (400, 20_000)}[scale]
    train = Train(steps=steps, batch=4 if smoke else 64, lr=3e-3, warmup=0 if smoke else 20)
    for layer in ("lstm", "elman"):
        made[f"adding_{layer}"] = Experiment(
            Adding(length=length), Stack(layer, width=8 if smoke else 64, depth=1), train
        )
    steps = {"smoke": 2, "small": 600, "paper": 6000}[scale]
    letters = Train(steps=steps, batch=4 if smoke else 16, lr=1e-2)
    for name, task in (("xor", ElmanXor(length=60)), ("letters", ElmanLetters(length=60))):
        made[name] = Experiment(task, Stack("elman", width=20, depth=1), letters)
    return made


def xor_dips(r: Reader) -> bool:
    known, overlap = r("xor", "certain"), r("xor", "overlap")
    return known.mean > 0.95 and overlap.mean > 0.9  # and near one half where one half is the truth


def letters_dip(r: Reader) -> bool:
    vowels, kind, overlap = r("letters", "certain"), r("letters", "kind"), r("letters", "overlap")
    return min(vowels.mean, kind.mean) > 0.98 and overlap.mean > 0.9


def gradients_vanish(r: Reader) -> bool:
    pairs = [(r(run, "slope"), r(run, "expected")) for run in ("vanishing_small", "vanishing_large")]
    return all(abs(slope.mean - expected.mean) < 1e-9 for slope, expected in pairs)


def carousel(r: Reader) -> bool:
    kept = r("vanishing_small", "carousel")
    return abs(kept.mean - 1) < 1e-9


def long_terms(r: Reader) -> bool:
    lstm, elman = r("adding_lstm"), r("adding_elman")
    baseline = r.baseline("adding_lstm")
    return lstm.mean < 0.1 * baseline and elman.mean > 0.5 * baseline


def nothing_past_the_window(r: Reader) -> bool:
    found = [(r(run, "reach"), r(run, "inside")) for run in ("truncated_5", "truncated_20")]
    return all(max(reach) == 0 < min(inside) for reach, inside in found)


def windows_must_span(r: Reader) -> bool:
    short, long = r("truncated_5"), r("truncated_20")
    return short.mean < 0.7 and long.mean > 0.95


TITLE = "A Critical Review of Recurrent Neural Networks for Sequence Learning"
RECIPE = Recipe(
    paper=Paper(
        "A Critical Review of Recurrent Neural Networks for Sequence Learning",
        "Lipton et al.",
        2015,
        "arXiv:1506.00019",
    ),
    runs=runs,
    claims=(
        Claim("Elman 1990, exclusive or", "an Elman network knows every third bit, and that others are even", xor_dips),
        Claim("Elman 1990, letters", "vowels are foreseen, and when a consonant comes, though not which", letters_dip),
        Claim("training, vanishing gradients", "the gradient of a linear unit goes as |w|^T", gradients_vanish),
        Claim("LSTM, constant error carousel", "an open forget gate hands the gradient on unchanged", carousel),
        Claim("long-term dependencies", "an LSTM adds numbers 50 steps apart, an Elman network does not", long_terms),
        Claim("truncated back-propagation", "no gradient passes the border of a window", nothing_past_the_window),
        Claim("truncated back-propagation", "so what is further back than a window is not learned", windows_must_span),
    ),
)
