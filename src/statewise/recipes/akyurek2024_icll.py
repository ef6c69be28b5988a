"""In-context language learning (Akyürek et al. 2024, arXiv:2401.12973): which layers learn the language of a random
automaton from strings of it, and what n-gram heads add to them."""

from __future__ import annotations

from ..core.paper import Paper
from ..models import Stack
from ..tasks import InContextLanguages
from ..training import Experiment, Train
from .recipe import Claim, Recipe, Run, Scale
from .verdict import Reader

RECURRENT = ("lstm", "gla", "mamba")
HELPED = ("lstm", "gla", "attention")
BOTH = ("accuracy", "overlap")  # the most likely letter can follow; 1 - total variation to the automaton


def runs(scale: Scale) -> dict[str, Run]:
    """Two blocks of a layer, alone and behind 1-, 2- and 3-gram heads."""
    length = task(scale).length
    called = {"attention": f"attention(window={length})"}
    made = {name: experiment(scale, called.get(name, name), 2) for name in (*RECURRENT, "attention")}
    for name in HELPED:
        pattern = f"ngram_heads(window={length}, n=3, mlp=0),{called.get(name, name)}*2"
        made[f"{name}_ngram"] = experiment(scale, pattern, 3)
    return made


def task(scale: Scale) -> InContextLanguages:
    """The paper's languages are of 4 to 12 states and up to 18 letters; rows of 10 to 19 strings are some 375 long."""
    return {
        "smoke": InContextLanguages(length=16, states=4, letters=4, string=8),
        "small": InContextLanguages(length=64, states=4, letters=4, string=10),
        "paper": InContextLanguages(length=375, states=12, letters=18, string=49),
    }[scale]


def experiment(scale: Scale, pattern: str, depth: int) -> Run:
    width, mlp = {"smoke": (8, 0.0), "small": (64, 0.0), "paper": (128, 4.0)}[scale]
    train = {
        "smoke": Train(steps=2, batch=4),
        "small": Train(steps=700, batch=16, lr=3e-3, warmup=20, evaluate_every=700),
        "paper": Train(steps=31_250, batch=32, lr=5e-4, weight_decay=0.1, warmup=3125, evaluate_every=1000),
    }[scale]
    return Experiment(task(scale), Stack(pattern, width=width, depth=depth, mlp=mlp), train)


def attention_leads(r: Reader) -> bool:
    found = {name: [r(layer, name).mean for layer in (*RECURRENT, "attention")] for name in BOTH}
    return all(values[-1] > max(values[:-1]) for values in found.values())


def learnt_in_context(r: Reader) -> bool:
    return r("attention").mean > r.baseline("attention")


def helped(layer: str) -> Claim:
    def holds(r: Reader) -> bool:
        found = [(r(layer, name), r(f"{layer}_ngram", name)) for name in BOTH]
        return all(min(new) > max(old) for old, new in found)

    return Claim("sec. 6", f"n-gram heads in front of {layer} bring it nearer to the languages, by every seed", holds)


def closes_the_gap(r: Reader) -> bool:
    found = [(r("attention", name), r("lstm_ngram", name), r("gla_ngram", name)) for name in BOTH]
    return all(min(lstm.mean, gla.mean) > plain.mean for plain, lstm, gla in found)


RECIPE = Recipe(
    paper=Paper("In-Context Language Learning: Architectures and Algorithms", "Akyürek et al.", 2024,
                "arXiv:2401.12973"),
    runs=runs,
    claims=(
        Claim("sec. 4", "attention learns the languages better than every recurrent layer does", attention_leads),
        Claim("sec. 5", "attention does better than the in-context bigram", learnt_in_context),
        *(helped(layer) for layer in HELPED),
        Claim("sec. 6", "recurrent layers with n-gram heads do better than attention without", closes_the_gap),
    ),
)  # fmt: skip
