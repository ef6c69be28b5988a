"""Mamba (Gu & Dao 2023, arXiv:2312.00752): what selection is for, on the two synthetic tasks of the paper, and how far
beyond the rows that it was trained on it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core.paper import Paper
from ..models import Stack
from ..tasks import Copy, Induction, SelectiveCopy
from ..training import Experiment, Train, score_lengths
from .generation import trained
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader

FAR = (1, 2, 4, 8)  # times the trained length


def induction(
    seed: int, *, layer: str, width: int, length: int, symbols: int, steps: int, batch: int, lr: float
) -> dict[str, float]:
    """accuracy on rows of the trained length, accuracy_2x, _4x, _8x on longer ones."""
    task = Induction(length=length, symbols=symbols)
    pattern = f"attention(window={FAR[-1] * length + 1})" if layer == "attention" else layer
    train = Train(steps=steps, batch=batch, lr=lr, warmup=20)
    result, model = trained(Experiment(task, Stack(pattern, width=width), train, seed))
    found = score_lengths(model, task, [times * length for times in FAR])
    numbers = {f"accuracy_{times}x": float(score.score or 0.0) for times, score in zip(FAR, found, strict=True)}
    return {
        "accuracy": numbers.pop("accuracy_1x"), **numbers, "parameters": float(result.parameters),
        "chance": task.chance(), "baseline": task.baseline(),
    }  # fmt: skip


def copying(
    selective: Sequence[str], fixed: Sequence[str], sizes: Mapping[str, int], width: int, train: Train
) -> dict[str, Run]:
    """selective_LAYER: symbols at places that differ from row to row; fixed_LAYER: at the same places in each."""
    tasks = {"selective": (SelectiveCopy(**sizes), selective), "fixed": (Copy(**sizes), fixed)}
    return {
        f"{kind}_{layer}": Experiment(task, Stack(layer, width=width), train)
        for kind, (task, tried) in tasks.items()
        for layer in tried
    }


def runs(scale: Scale) -> dict[str, Run]:
    """Two layers each. The paper's Transformer has positions of several kinds; here they are rotary."""
    sizes = {
        "smoke": {"length": 8, "copied": 2, "symbols": 4},
        "small": {"length": 16, "copied": 3, "symbols": 6},
        "paper": {"length": 4096, "copied": 16, "symbols": 14},
    }[scale]
    train = {
        "smoke": Train(steps=2, batch=4),
        "small": Train(steps=400, batch=32, lr=5e-3, warmup=20, evaluate_every=200),
        "paper": Train(steps=400_000, batch=64, lr=1e-4, warmup=1000, evaluate_every=10_000),
    }[scale]
    width = {"smoke": 8, "small": 32, "paper": 64}[scale]
    made = copying(("mamba", "s4d"), ("s4d",), sizes, width, train)
    heads = {
        "smoke": {"length": 8, "symbols": 4, "steps": 2, "batch": 4, "lr": 5e-3},
        "small": {"length": 32, "symbols": 8, "steps": 400, "batch": 64, "lr": 5e-3},
        "paper": {"length": 256, "symbols": 16, "steps": 200_000, "batch": 8, "lr": 1e-3},
    }[scale]
    for layer in ("mamba", "attention", "s4d"):
        made[f"induction_{layer}"] = Measure(induction, "accuracy", {"layer": layer, "width": width, **heads})
    return made


def selection_decides(r: Reader) -> bool:
    mamba, fixed = r("selective_mamba"), r("selective_s4d")
    return mamba.mean > 0.95 and fixed.mean < mamba.mean - 0.1


def invariant_copies(r: Reader) -> bool:
    fixed, scattered = r("fixed_s4d"), r("selective_s4d")
    return fixed.mean > 0.95 and fixed.mean > scattered.mean + 0.1


def mamba_goes_on(r: Reader) -> bool:
    found = [r("induction_mamba"), *(r("induction_mamba", f"accuracy_{times}x") for times in FAR[1:])]
    return min(v.mean for v in found) > 0.95


def attention_does_not(r: Reader) -> bool:
    near, far = r("induction_attention"), [r("induction_attention", f"accuracy_{times}x") for times in FAR[1:]]
    return near.mean > 0.95 and max(v.mean for v in far[1:]) < 0.5


def invariant_does_not_find(r: Reader) -> bool:
    mamba, fixed = r("induction_mamba"), r("induction_s4d")
    return fixed.mean < mamba.mean - 0.3


RECIPE = Recipe(
    paper=Paper(
        "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", "Gu & Dao", 2023, "arXiv:2312.00752"
    ),
    runs=runs,
    claims=(
        Claim(
            "sec. 4.1.1, table 1",
            "selection solves selective copying; a time-invariant layer does not",
            selection_decides,
        ),
        Claim("sec. 3.1, fig. 2", "a time-invariant layer does copy what stands at fixed places", invariant_copies),
        Claim("sec. 4.1.2, table 2", "a time-invariant layer does not solve induction", invariant_does_not_find),
        Claim(
            "sec. 4.1.2, table 2", "Mamba does, and in rows up to 8 times as long as those of training", mamba_goes_on
        ),
        Claim(
            "sec. 4.1.2, table 2",
            "a Transformer does in rows of the trained length, not of 4 and 8 times it",
            attention_does_not,
        ),
    ),
)
