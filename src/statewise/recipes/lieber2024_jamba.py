"""Jamba (Lieber et al. 2024, arXiv:2403.19887): a few attention layers among many of Mamba, without position encodings;
here without its mixtures of experts."""

from __future__ import annotations

from ..core.paper import Paper
from ..models import LanguageModel, Stack
from ..tasks import Recall, Text
from ..training import Experiment, Train
from .recipe import Claim, Recipe, Run, Scale
from .verdict import Reader

# width of each model, so that all have the same number of parameters to within 2 %
TEXT = {"mamba": 46, "attention": 54, "hybrid": 48, "rotary": 48}
RECALL = {"mamba": 44, "attention": 52, "hybrid": 48}


def pattern(model: str, before: int, after: int, window: int) -> str:
    """How many Mamba layers stand before and after each of attention; "rotary" is a hybrid that knows positions."""
    mamba, rotary = "mamba(inner_norm=true)", f"attention(window={window})"
    plain = f"attention(window={window},rotary=0)"
    if model in ("mamba", "attention"):
        return mamba if model == "mamba" else rotary
    layers = [f"{mamba}*{before}", rotary if model == "rotary" else plain, *([f"{mamba}*{after}"] if after else [])]
    return ",".join(layers)


def runs(scale: Scale) -> dict[str, Run]:
    """Text, whose attention sees a window of bytes beyond the batch, and recall of as many values as keys are told.

    Of eight layers one is attention at paper scale, else one of four, and in the small models of recall one of two.
    """
    smoke, paper = scale == "smoke", scale == "paper"
    text = {
        "smoke": Train(steps=2, batch=2),
        "small": Train(steps=100, batch=8, lr=4e-3, warmup=10, evaluate_every=0),
        "paper": Train(steps=250_000, batch=256, lr=3e-4, warmup=2000, evaluate_every=5000),
    }[scale]
    recall = {
        "smoke": Train(steps=2, batch=4),
        "small": Train(steps=600, batch=32, lr=4e-3, warmup=20, evaluate_every=0),  # after 200 one hybrid had begun
        "paper": Train(steps=50_000, batch=256, lr=1e-3, warmup=500, evaluate_every=1000),
    }[scale]
    length, window = {"smoke": (64, 16), "small": (256, 256), "paper": (4096, 4096)}[scale]
    pairs = {"smoke": 2, "small": 16, "paper": 64}[scale]
    made: dict[str, Run] = {}
    for model, width in TEXT.items():
        layers = pattern(model, *((4, 3) if paper else (3, 0)), window)
        size = 4 if smoke else 32 * width if paper else width
        described = LanguageModel(layers, width=size, depth=24 if paper else 4)
        made[f"text_{model}"] = Experiment(Text(length=length, evaluate=4096 if smoke else 0), described, text)
    for model, width in RECALL.items():
        layers = pattern(model, *((4, 3) if paper else (1, 0)), 4 * pairs)
        stack = Stack(layers, width=4 if smoke else 4 * width if paper else width, depth=8 if paper else 2)
        made[f"recall_{model}"] = Experiment(Recall(length=4 * pairs, pairs=pairs, symbols=2 * pairs), stack, recall)
    return made


def same_size(r: Reader) -> bool:
    found = [
        [r(f"{task}_{m}", "parameters").mean for m in sizes] for task, sizes in (("text", TEXT), ("recall", RECALL))
    ]
    return all(max(sizes) < 1.05 * min(sizes) for sizes in found)


def at_least_as_good(rival: str, says: str) -> Claim:
    """No more bits per byte than the rival, up to the spread over the seeds."""

    def holds(r: Reader) -> bool:
        ours, theirs = r("text_hybrid"), r(f"text_{rival}")
        pairs = r.baseline("text_hybrid")
        return ours.mean < theirs.mean + max(ours.spread, theirs.spread) and ours.mean < pairs

    return Claim("sec. 6.1", says, holds)


def recalls(r: Reader) -> bool:
    hybrid, mamba = r("recall_hybrid"), r("recall_mamba")
    return hybrid.mean > 0.9 and hybrid.mean > mamba.mean + 0.1


def as_attention(r: Reader) -> bool:
    hybrid, attention = r("recall_hybrid"), r("recall_attention")
    return hybrid.mean > attention.mean - 0.02


def no_positions(r: Reader) -> bool:
    without, with_them = r("text_hybrid"), r("text_rotary")
    return without.mean < 1.01 * with_them.mean


RECIPE = Recipe(
    paper=Paper("Jamba: A Hybrid Transformer-Mamba Language Model", "Lieber et al.", 2024, "arXiv:2403.19887"),
    runs=runs,
    claims=(
        Claim("sec. 6.1", "the models compared have the same size (here to within 5 %)", same_size),
        at_least_as_good("attention", "the hybrid's bits per byte are at least as good as pure attention's"),
        at_least_as_good("mamba", "and at least as good as pure Mamba's"),
        Claim("sec. 6.2", "the hybrid finds again what stood in its context, where pure Mamba does worse", recalls),
        Claim("sec. 6.2", "as well as pure attention does", as_attention),
        Claim(
            "sec. 6.5",
            "it needs no position encoding: bits per byte within 1 % of those with rotary ones",
            no_positions,
        ),
    ),
)
