"""The illusion of state (Merrill, Petty & Sabharwal 2024, arXiv:2404.08819): what one layer of a nonlinear recurrence
follows, and one layer of a linear one with positive or diagonal transitions does not."""

from __future__ import annotations

from ..core.paper import Paper
from ..models import Stack
from ..tasks import WordProblem
from ..training import Experiment, Train
from .recipe import Claim, Recipe, Run, Scale
from .verdict import Reader

RATES = {"elman": 2e-3, "gru": 5e-3, "lstm": 1e-2, "s4d": 5e-3, "gla": 5e-3}
NONLINEAR, LINEAR = ("elman", "gru", "lstm"), ("s4d", "gla")


# group, length of words, batches at small scale, which elements are drawn
WORDS = {"parity": ("Z2", 32, 800, "all"), "mod5": ("Z5", 40, 1500, "all"), "s5": ("S5", 16, 1500, "few")}


def runs(scale: Scale) -> dict[str, Run]:
    """One layer on one group, tested on words four times as long: parity, sums modulo 5, the orders of five things.

    The five things are moved in three ways only, and words of them are short, so that the small scale can learn them.
    """
    return {
        f"{name}_{layer}": experiment(scale, layer, *words)
        for name, words in WORDS.items()
        for layer in NONLINEAR + LINEAR
    }


def experiment(scale: Scale, layer: str, group: str, words: int, steps: int, moves: str) -> Experiment:
    length = {"smoke": 4, "small": words, "paper": 64}[scale]
    train = {
        "smoke": Train(steps=2, batch=4),
        "small": Train(steps=steps, batch=64, lr=RATES[layer], warmup=20, evaluate_every=steps // 4),
        "paper": Train(steps=50_000, batch=512, lr=1e-4, weight_decay=0.01, warmup=500, evaluate_every=1000),
    }[scale]
    moves = "all" if scale == "paper" else moves
    task = WordProblem(group, length=length, test_length=4 * length, moves=moves)  # type: ignore[arg-type]
    return Experiment(task, Stack(layer, width={"smoke": 8, "small": 64, "paper": 512}[scale], depth=1), train)


def parity_is_followed(r: Reader) -> bool:
    gated = [r(f"parity_{layer}", "accuracy_beyond") for layer in ("gru", "lstm")]
    return min(found.mean for found in gated) > 0.95


def parity_is_not(r: Reader) -> bool:
    linear = [r(f"parity_{layer}", "accuracy_beyond") for layer in LINEAR]
    return max(found.mean for found in linear) < 0.65


def best_nonlinear_beyond(name: str, least: float, gap: float) -> Claim:
    def holds(r: Reader) -> bool:
        nonlinear = [r(f"{name}_{layer}", "accuracy_beyond").mean for layer in NONLINEAR]
        linear = [r(f"{name}_{layer}", "accuracy_beyond").mean for layer in LINEAR]
        return max(nonlinear) > least and max(nonlinear) > max(linear) + gap

    what = {"mod5": "sums modulo 5", "s5": "the orders of five things"}[name]
    return Claim("sec. 5", f"one nonlinear layer carries {what} beyond the lengths seen; no linear one does", holds)


def short_words(r: Reader) -> bool:
    nonlinear = [r(f"s5_{layer}", "accuracy_trained").mean for layer in NONLINEAR]
    linear = [r(f"s5_{layer}", "accuracy_trained").mean for layer in LINEAR]
    return max(nonlinear) > 0.95 and max(nonlinear) > max(linear)


RECIPE = Recipe(
    paper=Paper("The Illusion of State in State-Space Models", "Merrill et al.", 2024, "arXiv:2404.08819"),
    runs=runs,
    claims=(
        Claim("sec. 4", "gated nonlinear cells follow parity on words four times as long", parity_is_followed),
        Claim("sec. 4", "linear layers whose transitions have no negative eigenvalues do not", parity_is_not),
        best_nonlinear_beyond("mod5", 0.6, 0.2),
        best_nonlinear_beyond("s5", 0.25, 0.1),
        Claim("sec. 5", "words of the length seen: a nonlinear layer follows the orders of five things", short_words),
    ),
)
