"""Zoology (Arora et al. 2024, arXiv:2312.04927): how many pairs of a key and a value a layer can look up, by its kind
and by the size of its state; beside it what the papers on linear attention and on the delta rule say of the same."""

from __future__ import annotations

from itertools import pairwise

from ..core.paper import Paper
from ..models import Stack
from ..tasks import Mqar
from ..training import Experiment, Train
from .recipe import Claim, Recipe, Run, Scale
from .verdict import Reader

PAIRS, KEYS = ("few", "some", "many"), ("small", "middle", "large")
MEMORIES = ("linear", "gla", "delta")  # their state is a matrix, key by value; linear alone forgets nothing
AFTER_BASED, AFTER_DELTA = "after Arora et al. 2024, arXiv:2402.18668", "after Yang et al. 2024, arXiv:2406.06484"

# steps and learning rate at small scale, chosen on one seed; the paper shows the best of several rates as well
TRAIN = {
    "attention": (200, 1e-2),
    "s4d": (500, 1e-2),
    "linear": (1000, 5e-3),
    "gla": (1000, 3e-3),
    "delta": (1000, 3e-3),
}


def runs(scale: Scale) -> dict[str, Run]:
    """Two layers without MLP, as published: a short convolution, which brings a key to its value, and the mixer.

    Attention and a gated convolution (S4D and a gated linear unit) of one width meet few, some and many pairs; three
    sizes of each memory meet some. The state of the convolution has as many numbers as those of middle size. DeltaNet
    has its own short convolutions besides, as published. Rows have four steps for each pair, the fewest possible.
    """
    pairs = {"smoke": (1, 2, 3), "small": (4, 8, 16), "paper": (16, 32, 64)}[scale]
    keys = {"smoke": (1, 2, 3), "small": (4, 8, 16), "paper": (16, 32, 64)}[scale]
    width = {"smoke": 8, "small": 32, "paper": 64}[scale]
    convolution = f"s4d(states={keys[1]})"
    made: dict[str, Run] = {}
    for name, count in zip(PAIRS, pairs, strict=True):
        attention = f"attention(heads=1,window={4 * count})"
        made[f"attention_{name}"] = experiment(scale, "attention", attention, count, width)
        made[f"s4d_{name}"] = experiment(scale, "s4d", convolution, count, width)
    made["s4d_wide"] = experiment(scale, "s4d", convolution, pairs[0], 4 * width)
    for name, key in zip(KEYS, keys, strict=True):
        shape = f"heads=1,key={key},value={width}"
        mixers = {
            "linear": f"linear_attention({shape},feature=identity,normaliser=rms)",
            "gla": f"gla({shape})",
            "delta": f"delta_net({shape})",
        }
        for layer in MEMORIES:
            made[f"{layer}_{name}"] = experiment(scale, layer, mixers[layer], pairs[1], width)
    return made


def experiment(scale: Scale, layer: str, mixer: str, pairs: int, width: int) -> Experiment:
    steps, rate = TRAIN[layer]
    train = {
        "smoke": Train(steps=2, batch=4),
        "small": Train(steps=steps, batch=32, lr=rate, warmup=20, evaluate_every=steps // 2),
        "paper": Train(steps=50_000, batch=128, lr=1e-3, weight_decay=0.1, warmup=5000, evaluate_every=1000),
    }[scale]
    task = Mqar(length=4 * pairs, pairs=pairs, symbols={"smoke": 8, "small": 32, "paper": 4096}[scale])
    return Experiment(task, Stack(f"short_conv(taps=2),{mixer}", width=width, depth=2, mlp=0.0), train)


def attention_recalls(r: Reader) -> bool:
    found = [r(f"attention_{name}") for name in PAIRS]
    return min(v.mean for v in found) > 0.95


def convolution_does_not(r: Reader) -> bool:
    """Least of many pairs, and far from attention with any."""
    attention, convolution = ([r(f"{layer}_{name}").mean for name in PAIRS] for layer in ("attention", "s4d"))
    falls = all(more < fewer for fewer, more in pairwise(convolution))
    return falls and all(a > c + 0.2 for a, c in zip(attention, convolution, strict=True))


def width_helps(r: Reader) -> bool:
    narrow, wide = r("s4d_few"), r("s4d_wide")
    return wide.mean > narrow.mean + max(narrow.spread, wide.spread)


def grows(layer: str, what: str) -> Claim:
    def holds(r: Reader) -> bool:
        found = [r(f"{layer}_{name}") for name in KEYS]
        return all(large.mean > small.mean for small, large in pairwise(found)) and found[-1].mean > found[0].mean + 0.1

    return Claim(
        AFTER_BASED, f"{what} recalls more the larger its state, at least 10 points from the small to the large", holds
    )


def dependence_on_input(r: Reader) -> bool:
    convolution, memories = r("s4d_some"), [r(f"{layer}_middle") for layer in MEMORIES]
    return min(v.mean for v in memories) > convolution.mean + 0.2


def delta_recalls_more(r: Reader) -> bool:
    linear, delta = ([r(f"{layer}_{name}").mean for name in KEYS] for layer in ("linear", "delta"))
    return all(d > a for a, d in zip(linear, delta, strict=True))


RECIPE = Recipe(
    paper=Paper(
        "Zoology: Measuring and Improving Recall in Efficient Language Models",
        "Arora et al.",
        2024,
        "arXiv:2312.04927",
    ),
    runs=runs,
    claims=(
        Claim("sec. 4, fig. 2", "attention recalls at one small width, however many pairs", attention_recalls),
        Claim(
            "sec. 4, fig. 2",
            "a gated convolution of that width does not, and the less the more pairs",
            convolution_does_not,
        ),
        Claim("sec. 4, fig. 2", "it recalls more when it is wider (here: four times)", width_helps),
        Claim(
            "sec. 4",
            "of equal states, those that depend on the input recall more than a convolution's",
            dependence_on_input,
        ),
        grows("linear", "linear attention"),
        grows("gla", "gated linear attention"),
        grows("delta", "the delta rule"),
        Claim(
            AFTER_DELTA,
            "of equal states, that of the delta rule recalls more than that of linear attention",
            delta_recalls_more,
        ),
    ),
)
