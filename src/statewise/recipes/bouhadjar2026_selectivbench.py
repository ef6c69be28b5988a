"""Dissecting linear recurrent models (Bouhadjar et al. 2026, arXiv:2601.12598): SelectivBench, which layers find the
states of a grammar among gaps, noise and symbols that do not belong, and in gaps longer than those trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..core.paper import Paper
from ..models import Stack
from ..tasks import SelectivBench
from ..tasks.base import Batch
from ..training import Experiment, Train
from ..training.evaluate import evaluate
from .generation import trained
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader

DIAGONAL, DELTA = ("gla", "mamba", "mamba2"), ("delta_net", "gated_delta_net")  # the delta rules mix within the state
LAYERS = ("attention", *DIAGONAL, *DELTA)
TASKS = ("plain", "gaps", "wrong")
Plain = Mapping[str, Any]


def gaps(
    seed: int, *, task: Plain, stack: Plain, train: Plain, longer: int, longest: int, batches: int
) -> dict[str, float]:
    """The second task and the fourth: a model trained on irregular gaps, then given gaps all of one, greater length.

    accuracy: on gaps as trained; accuracy_longer, accuracy_longest: on the first `batches` of the test examples.
    """
    bench = SelectivBench(**task)
    result, model = trained(Experiment(bench, Stack(**stack), Train(**train), seed))

    def run(batch: Batch, state: Any) -> tuple[Tensor, Any]:
        found: tuple[Tensor, Any] = model(batch.x, state, lengths=batch.lengths)
        return found

    numbers = {"accuracy": result.score, "parameters": float(result.parameters)}
    for name, steps in (("longer", longer), ("longest", longest)):
        other = replace(bench, shortest_gap=steps, longest_gap=steps)
        with torch.no_grad():
            found = evaluate(other, islice(other.batches("test"), batches), run, torch.device("cpu"))
        numbers[f"accuracy_{name}"] = found["accuracy"]
    return {**numbers, "chance": bench.chance(), "baseline": bench.baseline()}


def runs(scale: Scale) -> dict[str, Run]:
    """Every layer on the first three tasks, and on the fourth what the second left: with equal sizes of key and value,
    or of Mamba's state, on one grammar of each task.

    plain: one blank after each symbol. gaps: irregular ones, and noise. wrong: symbols that cannot follow.
    """
    smoke, paper = scale == "smoke", scale == "paper"
    grammar: dict[str, Any] = {
        "smoke": {"ambiguous": 3, "depth": 3, "length": 6},
        "small": {"ambiguous": 6, "depth": 6, "length": 24},
        "paper": {"ambiguous": 40, "depth": 40, "length": 200},
    }[scale]
    plain = grammar if smoke or paper else {**grammar, "ambiguous": 8, "depth": 8}
    irregular = {**grammar, "longest_gap": 10 if paper else 3, "noise": 0.2}
    wrong = {**grammar, "violating": True, "gap": 0.2, "gap_start": 6, "longest_gap": 3}
    if paper:
        wrong |= {"gap": 0.1, "gap_start": 50, "longest_gap": 10}
    longer, longest = {"smoke": (4, 5), "small": (5, 10), "paper": (20, 100)}[scale]
    trains: dict[Scale, dict[str, Any]] = {
        "smoke": {"steps": 2, "batch": 4},
        "small": {"steps": 200, "batch": 32, "lr": 1e-2, "warmup": 20},
        "paper": {"steps": 3125, "batch": 64, "lr": 1e-3, "warmup": 476},
    }
    train = trains[scale]
    made: dict[str, Run] = {}
    for layer in LAYERS:
        model = stack(scale, layer, grammar["length"] * (1 + longest))
        given = {"task": irregular, "stack": model, "train": train, "longer": longer, "longest": longest}
        made[f"gaps_{layer}"] = Measure(gaps, "accuracy", {**given, "batches": 1 if smoke else 2})
        for name, task in (("plain", SelectivBench(**plain)), ("wrong", SelectivBench(**wrong))):
            model = stack(scale, layer, task.length * (1 + task.longest_gap))
            made[f"{name}_{layer}"] = Experiment(task, Stack(**model), Train(**train))
    return made


def stack(scale: Scale, layer: str, steps: int) -> dict[str, Any]:
    """A Stack's fields. Attention looks back over all `steps` of a row."""
    width, states, depth = {"smoke": (8, 4, 1), "small": (32, 16, 2), "paper": (256, 128, 8)}[scale]
    heads = width // states
    if layer == "attention":
        mixer = f"attention(heads={heads},window={steps})"
    elif layer == "mamba":
        mixer = f"mamba(states={min(states, 64)})"
    else:
        mixer = f"{layer}(heads={2 * heads if layer == 'mamba2' else heads},key={states},value={states})"
    return {"layer": mixer, "width": width, "depth": depth, "dropout": 0.2 if scale == "paper" else 0.0}


def attention_leads(r: Reader) -> bool:
    mean = {layer: sum(r(f"{task}_{layer}").mean for task in TASKS) for layer in LAYERS}
    return max(mean, key=mean.__getitem__) == "attention"


def forgetting_helps(r: Reader) -> bool:
    found = [(r(f"{task}_delta_net"), r(f"{task}_gated_delta_net")) for task in TASKS]
    return all(gated.mean > plain.mean for plain, gated in found)


def mixing_is_not_needed(r: Reader) -> bool:
    found = [([r(f"{task}_{layer}").mean for layer in group] for group in (DIAGONAL, DELTA)) for task in TASKS]
    return all(max(diagonal) > max(delta) - 0.02 for diagonal, delta in found)


def beyond(r: Reader, layer: str) -> float:
    """Mean over the two lengths of gaps."""
    return (r(f"gaps_{layer}", "accuracy_longer").mean + r(f"gaps_{layer}", "accuracy_longest").mean) / 2


def mixing_generalises(r: Reader) -> bool:
    diagonal, delta = ([beyond(r, layer) for layer in group] for group in (DIAGONAL, DELTA))
    return min(delta) > max(diagonal)


RECIPE = Recipe(
    paper=Paper(
        "Dissecting Linear Recurrent Models: How Different Gating Strategies Drive Selectivity and Generalization",
        "Bouhadjar et al.",
        2026,
        "arXiv:2601.12598",
    ),
    runs=runs,
    claims=(
        Claim("abstract", "softmax attention leads (over the first three tasks)", attention_leads),
        Claim("abstract", "forgetting helps: a gated DeltaNet finds more states, in each task", forgetting_helps),
        Claim(
            "abstract",
            "to select, channels need not mix in the state: of GLA, Mamba and Mamba-2 one comes within 2 points of the "
            "delta rules, in each task",
            mixing_is_not_needed,
        ),
        Claim(
            "abstract",
            "to generalise they must: in longer gaps each delta rule finds more states than each of those",
            mixing_generalises,
        ),
    ),
)
