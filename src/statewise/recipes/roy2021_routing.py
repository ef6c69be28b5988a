"""Routing Transformers (Roy et al. 2021, arXiv:2003.05997): attention that is sparse by content finds what is long past
at the cost of a short window."""

from __future__ import annotations

from ..core.paper import Paper
from ..models import Stack
from ..tasks import Recall
from ..training import Experiment, Train
from .recipe import Claim, Recipe, Run, Scale
from .verdict import Reader


def runs(scale: Scale) -> dict[str, Run]:
    """Pairs at the start of a row, asked for anywhere behind them; blocks of local attention and a routed one on top.

    local: two windows so wide that a step compares its query with as many keys and centroids as in `routed`; full: two
    windows over all. At small scale the rows are ones that full attention learns in the time: with eight pairs in 96
    steps it had not begun to, and the three were alike.
    """
    sizes = {"smoke": (12, 2, 3, 2), "small": (32, 4, 5, 6), "paper": (4096, 64, 64, 64)}
    length, pairs, window, clusters = sizes[scale]
    width, heads = {"smoke": (8, 1), "small": (64, 4), "paper": (256, 8)}[scale]
    train = {
        "smoke": Train(steps=2, batch=4),
        "small": Train(steps=600, batch=64, lr=4e-3, warmup=20, evaluate_every=0),
        "paper": Train(steps=50_000, batch=32, lr=1e-3, warmup=1000, evaluate_every=1000),
    }[scale]
    task = Recall(length=length, pairs=pairs, symbols={"smoke": 4, "small": 16, "paper": 256}[scale])
    arms = {
        "local": f"window_attention(window={window + clusters // 2})",
        "routed": f"window_attention(window={window}),routing_attention(clusters={clusters},window={window})",
        "full": f"attention(window={length})",
    }
    return {
        name: Experiment(task, Stack(layer, width=width, depth=2, args={"heads": heads}), train)
        for name, layer in arms.items()
    }


def routed_beats_local(r: Reader) -> bool:
    local, routed = r("local"), r("routed")
    return min(routed) > max(local) + 0.1


def routed_is_near_full(r: Reader) -> bool:
    routed, full = r("routed"), r("full")
    return full.mean > 0.9 and routed.mean > full.mean - 0.05


TITLE = "Efficient Content-Based Sparse Attention with Routing Transformers"
RECIPE = Recipe(
    paper=Paper(TITLE, "Roy et al.", 2021, "arXiv:2003.05997"),
    runs=runs,
    claims=(
        Claim(
            "sec. 5",
            "routed attention on local attention recalls what local attention of the same cost does not (the paper: of "
            "long texts it has the lower perplexity)",
            routed_beats_local,
        ),
        Claim("sec. 5", "and nearly as well as full attention, whose cost grows as the square", routed_is_near_full),
    ),
)
