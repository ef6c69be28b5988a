"""Universal Transformers (Dehghani et al. 2019, arXiv:1807.03819): one block applied again and again in depth, as often
as each place asks for, against a Transformer of as many layers and as many parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import RecurrentLayer, costs
from ..core.paper import Paper
from ..models import Stack
from ..tasks import Batch, BinaryAddition, Generated, Reverse, StringCopy
from ..training import Experiment, Train, score_lengths
from .generation import trained
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader

TASKS: dict[str, Callable[[int], Generated]] = {
    "copy": lambda length: StringCopy(length=length, letters=8),
    "reverse": lambda length: Reverse(length=length, letters=8),
    "addition": lambda length: BinaryAddition(length=length),
}
PONDER = 0.01


def algorithm(
    seed: int, *, task: str, arm: str, length: int, beyond: int, width: int, depth: int, train: Mapping[str, Any]
) -> dict[str, float]:
    """A model trained on strings up to `length` that answers strings of that length and strings `beyond`.

    arm: "universal", one block at all depths; "adaptive", that too, each place as deep as it asks for; "plain", another
    block at each depth, narrower, so that there are about as many parameters. Of "adaptive" also how many depths
    (and the last one's weight) places use where an answer is asked, and where a string is read.
    """
    wide = Stack("attention@one", width=width, depth=depth, args={"heads": 2, "window": 2 * beyond + 2})
    models = {
        "universal": Stack(wide.layer, width, depth, wide.args, depth_embedding=True),
        "adaptive": Stack(wide.layer, width, depth, wide.args, depth_embedding=True, ponder=PONDER),
        "plain": Stack("attention", 2 * round(width * depth**-0.5 / 2), depth, wide.args),
    }
    made = TASKS[task](length)
    _, model = trained(Experiment(made, models[arm], Train(**train), seed))
    near, far = score_lengths(model, made, [length, beyond])
    numbers = {"within": near.score or 0.0, "beyond": far.score or 0.0, "chance": near.chance, "baseline": far.baseline}
    numbers["parameters"] = sum(p.numel() for p in model.parameters())
    return numbers | (pondered(model, made) if arm == "adaptive" else {})


@torch.no_grad()
def pondered(model: RecurrentLayer[tuple[object, ...]], task: Generated) -> dict[str, float]:
    """How many depths are used where an answer is asked, and where nothing is, over some test examples."""
    batch = task.batch(0, 128, seed=0, split="test")
    used = by_place(model, batch)
    inside = torch.ones_like(batch.weight)
    if batch.lengths is not None:
        inside = (torch.arange(batch.x.shape[1]) < batch.lengths[:, None]).float()
    asked, read = batch.weight * inside, (batch.weight == 0) * inside
    return {"asked": float((used * asked).sum() / asked.sum()), "read": float((used * read).sum() / read.sum())}


def by_place(model: RecurrentLayer[tuple[object, ...]], batch: Batch) -> Tensor:
    """N + w_N of every place (B, T): what each step of the stream adds to the cost."""
    state, totals = model.initial_state(len(batch.x)), [torch.zeros(len(batch.x))]
    for x in batch.x.unbind(1):
        _, state = model.step(x, state)
        totals += costs(state)
    return torch.stack(totals, 1).diff(dim=1) / PONDER


def runs(scale: Scale) -> dict[str, Run]:
    """Train on strings up to a length, test on twice that; the paper: on up to 40, test on 400.

    What so few steps teach holds for the lengths trained on: at small scale, beyond them, no model is far from the
    simplest rule. (The paper's absolute positions begin at random numbers; here attention sees distances.)
    """
    sizes = {
        "smoke": dict(length=6, beyond=12, width=8, depth=2),
        "small": dict(length=8, beyond=16, width=32, depth=4),
        "paper": dict(length=40, beyond=400, width=512, depth=6),
    }[scale]
    train = {
        "smoke": dict(steps=2, batch=4),
        "small": dict(steps=400, batch=64, lr=1e-2, warmup=40, evaluate_every=200),
        "paper": dict(steps=100_000, batch=256, lr=3e-4, warmup=4000, evaluate_every=1000),
    }[scale]
    return {
        f"{task}_{arm}": Measure(algorithm, "beyond", {"task": task, "arm": arm, **sizes, "train": train})
        for task in TASKS
        for arm in ("universal", "adaptive", "plain")
    }


def longer(task: str) -> Claim:
    def holds(r: Reader) -> bool:
        r(f"{task}_universal", "within"), r(f"{task}_plain", "within")
        universal, plain = r(f"{task}_universal"), r(f"{task}_plain")
        return universal.mean > plain.mean + max(universal.spread, plain.spread)

    said = f"{task}, beyond the lengths trained on: better than a Transformer of as many layers and parameters"
    return Claim("sec. 3, algorithmic tasks", said, holds)


def as_trained(r: Reader) -> bool:
    pairs = [(r(f"{task}_universal", "within"), r(f"{task}_plain", "within")) for task in TASKS]
    return all(universal.mean > plain.mean for universal, plain in pairs)


def harder_is_deeper(r: Reader) -> bool:
    pairs = [(r(f"{task}_adaptive", "asked"), r(f"{task}_adaptive", "read")) for task in TASKS]
    return all(min(asked) > max(read) for asked, read in pairs)


def halting_helps(r: Reader) -> bool:
    pairs = [(r(f"{task}_adaptive"), r(f"{task}_universal")) for task in TASKS]
    return all(adaptive.mean > fixed.mean for adaptive, fixed in pairs)


RECIPE = Recipe(
    paper=Paper("Universal Transformers", "Dehghani et al.", 2019, "arXiv:1807.03819"),
    runs=runs,
    claims=(
        *(longer(task) for task in TASKS),
        Claim("sec. 3, algorithmic tasks", "and better at the lengths trained on, in every task", as_trained),
        Claim(
            "sec. 3, ponder times",
            "places that have more to do think deeper: where an answer is asked more depths are used than where the "
            "string is read",
            harder_is_deeper,
        ),
        Claim("sec. 3, adaptive", "deciding the depth at each place does better than a fixed depth", halting_helps),
    ),
)
