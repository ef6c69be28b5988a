"""Stuffed Mamba (Chen et al. 2024, arXiv:2410.07145): a state that is large for the training length never learns to
forget and fails beyond it; what helps without training; what a state holds by its size."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import RecurrentLayer
from ..core.paper import Paper
from ..interpret import (
    Clipped,
    Followed,
    Forgetful,
    Windowed,
    bounds,
    change,
    fit_curve,
    follow_states,
    forgetting_threshold,
    state_size,
)
from ..layers import Mamba2
from ..models import Stack
from ..tasks import Batch
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader

SYMBOLS, NOISE = 8, 0.2
RISE, GROWTH = 0.05, 2.0  # what counts, as in Followed.collapse
MENDED = {
    "less": "forgetting twice as fast",
    "insert": "inserting half as much",
    "clip": "holding each head's norm at its largest within the training length",
    "window": "a sliding window by the difference of states",
}
Model = RecurrentLayer[Any]


def permuted(rows: int, steps: int, span: int, rng: torch.Generator) -> tuple[Batch, Tensor]:
    """x_{t+1} = pi(x_t) four times of five, else any symbol. pi is a random order of the symbols, and another one after
    every `span` steps in the mean: a shorter row hardly asks for forgetting, a much longer one does.

    Returns the batch and pi(x_t), (B, T).
    """
    orders = torch.rand(rows, steps, SYMBOLS, generator=rng).argsort(-1)
    new = torch.rand(rows, steps, generator=rng) < 1 / span
    since = torch.where(new, torch.arange(steps), 0).cummax(1).values
    orders = orders[torch.arange(rows)[:, None], since]
    noisy = torch.rand(rows, steps, generator=rng) < NOISE
    some = torch.randint(SYMBOLS, (rows, steps + 1), generator=rng)
    x, nexts = [some[:, 0]], []
    for t in range(steps):
        nexts.append(orders[:, t].gather(1, x[-1][:, None])[:, 0])
        x.append(torch.where(noisy[:, t], some[:, t + 1], nexts[-1]))
    text = torch.stack(x, 1)
    return Batch(text[:, :-1], text[:, 1:], torch.ones(rows, steps)), torch.stack(nexts, 1)


def stuffed(
    seed: int,
    *,
    length: int,
    key: int,
    slow: bool,
    mend: bool,
    span: int,
    steps: int,
    tokens: int,
    far: int,
    rows: int,
    width: int,
    depth: int,
) -> dict[str, float]:
    """A Mamba-2 trained on rows of `length`, `tokens` a batch, then followed to `far`; mend: also with what may help.

    slow: decays that at birth forget slowly, A in [0.05, 0.2] and not [1, 16]. Mean losses in nats: `near` in the steps
    from length to 2 length, `beyond` in the last quarter; rise is their difference, both being far enough from the
    empty state for the source to look alike. rise_*, mended: what is then lost beyond, less `near` of the model as it
    is. growth: of the head whose norm grows most, beyond over the largest within. held: of the symbols, how many have
    the right successor in the second half of the training length. floor: the entropy of the source, its order known.
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    args = {"heads": 2, "value": width, "key": key}
    model = Stack("mamba2", width=width, depth=depth, args=args, mlp=0).build(x_vocab=SYMBOLS, y_width=SYMBOLS)
    if slow:
        for layer in model.modules():
            if isinstance(layer, Mamba2):
                layer.a_log.data = (0.05 + 0.15 * torch.rand(layer.heads, generator=rng)).log()
    train(model, steps, max(1, tokens // length), length, span, rng)
    test, nexts = permuted(rows, far, span, rng)
    half = max(1, length // 2)
    plain = follow_states(model, [test], every=half)
    with torch.no_grad():
        right = model(test.x[:, :length])[0][:, half:].argmax(-1) == nexts[:, half:length]
    largest, late = plain.largest(length), plain.steps > 0.75 * far
    near = float(plain.loss[(plain.steps > length) & (plain.steps <= 2 * length)].mean())
    numbers = {
        "near": near, "beyond": float(plain.loss[late].mean()), "rise": float(plain.loss[late].mean()) - near,
        "growth": max(float((norm[late].mean(0) / largest[name]).max()) for name, norm in plain.norm.items()),
        "held": SYMBOLS * float(right.float().mean()), "state": float(state_size(model)),
        "chance": math.log(SYMBOLS), "floor": entropy(),
    }  # fmt: skip
    for name, other in mended(model, plain, length).items() if mend else ():
        numbers[f"rise_{name}"] = float(follow_states(other, [test], every=half).loss[late].mean()) - near
    return numbers


def mended(model: Model, plain: Followed, length: int) -> dict[str, Model]:
    """The window keeps what the last length / 2 to length steps wrote."""
    half, limits = max(1, length // 2), iter(bounds(model, plain, length))
    return {
        "less": change(model, lambda layer: Forgetful(layer, decay=2.0)),
        "insert": change(model, lambda layer: Forgetful(layer, insert=0.5)),
        "clip": change(model, lambda layer: Clipped(layer, bound=next(limits), every=half)),
        "window": change(model, lambda layer: Windowed(layer, window=2 * half, every=half)),
    }


def entropy() -> float:
    """Of the next symbol given the order, in nats."""
    rare = NOISE / SYMBOLS
    usual = 1 - NOISE + rare
    return -usual * math.log(usual) - (SYMBOLS - 1) * rare * math.log(rare)


def train(model: Model, steps: int, rows: int, length: int, span: int, rng: torch.Generator) -> None:
    """AdamW, the learning rate up to 1e-2 in 20 steps, then down to 0 as half a cosine."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for _ in range(steps):
        batch, _ = permuted(rows, length, span, rng)
        loss = F.cross_entropy(model(batch.x)[0].flatten(0, 1), batch.y.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()


SIZES = ("little", "middle", "large")
KEYS: dict[Scale, tuple[int, ...]] = {"smoke": (2, 3, 4), "small": (4, 16, 64), "paper": (16, 64, 128)}
SHORT: dict[Scale, int] = {"smoke": 4, "small": 32, "paper": 256}
TIMES = (1, 2, 4)  # the training lengths, in terms of the shortest


def runs(scale: Scale) -> dict[str, Run]:
    """Three sizes of the state on short, twice and four times as long rows, with decays that forget slowly at birth;
    and the large state on short rows with decays as published. A collapse as sharp as the paper's, of models of 130 M
    parameters and more, is not to be expected at small scale."""
    short = SHORT[scale]
    shared: dict[str, int] = {
        "smoke": dict(steps=2, tokens=32, far=64, rows=2, width=8, depth=1),
        "small": dict(steps=400, tokens=1024, far=2048, rows=32, width=64, depth=1),
        "paper": dict(steps=20_000, tokens=65_536, far=65_536, rows=32, width=256, depth=4),
    }[scale]
    cases = {
        f"{name}_{times}": dict(length=short * times, key=key, slow=True, mend=(name, times) == ("large", 1))
        for name, key in zip(SIZES, KEYS[scale], strict=True)
        for times in TIMES
    }
    cases["published_1"] = dict(length=short, key=KEYS[scale][-1], slow=False, mend=False)
    return {
        name: Measure(stuffed, "beyond", {"span": 2 * short, **shared, **case}, higher_is_better=False)
        for name, case in cases.items()
    }


def collapses(run: str) -> Claim:
    def holds(r: Reader) -> bool:
        rise, growth = r(run, "rise"), r(run, "growth")
        return rise.mean > RISE and growth.mean > GROWTH

    decays = "slow decays" if run == "large_1" else "the decays that Mamba-2 is published with"
    return Claim("sec. 3", f"beyond the training length the loss rises and some head's norm grows, {decays}", holds)


def longer_rows_help(r: Reader) -> bool:
    short, longer, rise = r("large_1"), r("large_4"), r("large_4", "rise")
    return max(longer) < min(short) and rise.mean < RISE


def large_states_are_worse(r: Reader) -> bool:
    little, middle, large = (r(f"{size}_1", "rise").mean for size in SIZES)
    return large > max(little, middle)


def thresholds_grow(r: Reader) -> bool:
    found = []
    for size in SIZES:
        signs = {times: (r(f"{size}_{times}", "rise").mean, r(f"{size}_{times}", "growth").mean) for times in TIMES}
        found.append(forgetting_threshold({t: rise > RISE and growth > GROWTH for t, (rise, growth) in signs.items()}))
    little, middle, large = (math.inf if threshold is None else threshold for threshold in found)
    return little <= middle <= large and little < large


def lowers(name: str) -> Claim:
    def holds(r: Reader) -> bool:
        plain, other = r("large_1", "rise"), r("large_1", f"rise_{name}")
        return all(after < before for before, after in zip(plain, other, strict=True))

    return Claim("sec. 4", f"{MENDED[name]} lowers the loss beyond the training length, by every seed", holds)


def large_states_hold_more(r: Reader) -> bool:
    """Against the logarithm of the size, as what is held ends at the number of symbols."""
    found = [(r(f"{size}_4", "state"), r(f"{size}_4", "held")) for size in SIZES]
    points = [(math.log(n), h) for size, held in found for n, h in zip(size, held, strict=True)]
    return len({size.mean for size, _ in found}) > 1 and fit_curve(points, "linear").slope_interval[0] > 0


RECIPE = Recipe(
    paper=Paper("Stuffed Mamba: State Collapse and State Capacity of RNN-Based Long-Context Modeling", "Chen et al.",
                2024, "arXiv:2410.07145"),
    runs=runs,
    claims=(
        collapses("large_1"),
        collapses("published_1"),
        Claim("sec. 3", "trained on rows four times as long, it does not rise, and is lower at the same places",
              longer_rows_help),
        Claim("sec. 3", "of three sizes of state the largest rises most after short rows", large_states_are_worse),
        Claim("sec. 5", "the training length from which on nothing collapses grows with the state", thresholds_grow),
        *(lowers(name) for name in MENDED),
        Claim("sec. 5", "a larger state holds more", large_states_hold_more),
    ),
)  # fmt: skip
