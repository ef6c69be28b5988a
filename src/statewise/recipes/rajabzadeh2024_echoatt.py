"""EchoAtt (Rajabzadeh et al. 2024, arXiv:2409.14595): inner layers of a trained Transformer see alike, so some take
over another's attention matrix; learning from the model that they were gives back what that costs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from ..core import nbytes
from ..core.paper import Paper
from ..interpret import attention_similarity, followers
from ..models import LanguageModel, Stack, inherit
from ..tasks import Text
from ..training import Experiment, Teacher, Train
from .generation import step_times, test_score, trained, training_times
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader


def pattern(depth: int, echoes: tuple[int, ...], *, window: int, heads: int) -> str:
    """Attention at every depth; at those of `echoes` by the matrix of the last one before."""
    sizes = f"window={window},heads={heads}"
    return ",".join(f"attention({sizes},echo=true)" if d in echoes else f"attention({sizes})" for d in range(depth))


def echoed(
    seed: int,
    *,
    width: int,
    depth: int,
    heads: int,
    length: int,
    batch: int,
    steps: int,
    heal: int,
    echoes: int,
    read: int,
) -> dict[str, float]:
    """A Transformer learns the text; `echoes` of its layers, those most like the one before, take over its matrix.

    bits_NAME, over `read` bytes of the test (0: all): "teacher"; "longer": it after `heal` steps more; "cut": the
    student as it starts; "least": had the least alike layers been chosen; then `heal` steps of it from the text alone
    ("healed"), from text and teacher ("taught"), half of them with the teacher and half without ("stages", the paper's
    way); and of the same shape from scratch ("scratch"). alike_inner, alike_ends: mean cosine of the matrices of two
    inner layers, and of the first or last and an inner one. parameters: of the student over those of the teacher.
    """
    task, whole = Text(length=length, evaluate=read), pattern(depth, (), window=length, heads=heads)
    first = Train(steps=steps, batch=batch, lr=4e-3, warmup=20, evaluate_every=0)
    more = Train(steps=heal, batch=batch, lr=2e-3, warmup=10, evaluate_every=0)
    half = Train(steps=max(1, heal // 2), batch=batch, lr=2e-3, warmup=5, evaluate_every=0)
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)

        def bits(name: str, layer: str, train: Train, teacher: Teacher) -> tuple[float, int]:
            described = LanguageModel(layer, width=width, depth=depth)
            result, _ = trained(Experiment(task, described, train, seed, teacher), runs / name)
            return result.score, result.parameters

        described = LanguageModel(whole, width=width, depth=depth)
        result, model = trained(Experiment(task, described, first, seed), runs / "teacher")
        text = task.text("validation").long()
        rows = text[: len(text) // length * length].view(-1, length)
        alike = attention_similarity(model, rows[:: max(1, len(rows) // 32)])
        inner, ends = range(1, depth - 1), (0, depth - 1)
        numbers = {
            "bits_teacher": result.score,
            "alike_inner": mean(alike[i, j] for i, j in combinations(inner, 2)),
            "alike_ends": mean(alike[i, j] for i in ends for j in inner),
        }
        found = {name: followers(alike, echoes, least=name == "least") for name in ("cut", "least")}
        for name, chosen in found.items():
            layer = pattern(depth, chosen, window=length, heads=heads)
            cut = LanguageModel(layer, width=width, depth=depth).build(x_vocab=256, y_width=256)
            inherit(cut, model)
            numbers[f"bits_{name}"] = test_score(cut, task)
        student = pattern(depth, found["cut"], window=length, heads=heads)
        start, teacher = (Teacher(str(runs / "teacher"), logits=logits, hidden=logits) for logits in (0, 1))
        numbers["bits_longer"], _ = bits("longer", whole, more, start)
        numbers["bits_healed"], size = bits("healed", student, more, start)
        numbers["bits_taught"], _ = bits("taught", student, more, teacher)
        bits("half", student, half, teacher)
        numbers["bits_stages"], _ = bits("stages", student, half, Teacher(str(runs / "half"), logits=0))
        numbers["bits_scratch"], _ = bits("scratch", student, more, Teacher())
    return {**numbers, "parameters": size / result.parameters, "chance": task.chance(), "baseline": task.baseline()}


def mean(values: Iterable[Tensor]) -> float:
    return float(torch.stack(list(values)).mean())


def pace(seed: int, *, width: int, depth: int, heads: int, length: int, batch: int, echoes: int) -> dict[str, float]:
    """Times of a model without sharing over those of one where `echoes` inner layers share, in turn: "training", of a
    step on rows of `length`; "inference", of one more token after so many. state: bytes of the caches, shared over not.
    """
    torch.manual_seed(seed)
    chosen = {"whole": (), "shared": tuple(range(2, 2 + echoes))}
    models = {
        name: Stack(pattern(depth, found, window=length, heads=heads), width=width, depth=depth).build(
            x_width=width, y_width=width
        )
        for name, found in chosen.items()
    }
    training = training_times(models, batch=batch, length=length)
    token = step_times(models, length, steps=64)
    sizes = {name: nbytes(model.initial_state(1)) for name, model in models.items()}
    return {
        "training": training["whole"] / training["shared"],
        "inference": token["whole"] / token["shared"],
        "state": sizes["shared"] / sizes["whole"],
        "baseline": 1.0,
    }


def runs(scale: Scale) -> dict[str, Run]:
    """Of six layers two take over a matrix, of the paper's 22 about as many in proportion."""
    text = {
        "smoke": dict(width=8, depth=4, heads=2, length=128, batch=2, steps=2, heal=2, echoes=1, read=2048),
        "small": dict(width=64, depth=6, heads=4, length=128, batch=8, steps=600, heal=150, echoes=2, read=32_768),
        "paper": dict(width=512, depth=22, heads=8, length=1024, batch=64, steps=50_000, heal=5000, echoes=9, read=0),
    }[scale]
    times = {
        "smoke": dict(width=8, depth=4, heads=2, length=16, batch=2, echoes=1),
        "small": dict(width=256, depth=6, heads=4, length=512, batch=1, echoes=2),
        "paper": dict(width=2048, depth=22, heads=32, length=2048, batch=1, echoes=9),
    }[scale]
    return {
        "text": Measure(echoed, "bits_stages", text, higher_is_better=False),
        "pace": Measure(pace, "inference", times),
    }


def inner_alike(r: Reader) -> bool:
    inner, ends = r("text", "alike_inner"), r("text", "alike_ends")
    return all(a > b for a, b in zip(inner, ends, strict=True))


def below(name: str, other: str) -> Callable[[Reader], bool]:
    """Fewer bits per byte, by every seed."""

    def holds(r: Reader) -> bool:
        ours, theirs = r("text", f"bits_{name}"), r("text", f"bits_{other}")
        return all(a < b for a, b in zip(ours, theirs, strict=True))

    return holds


def faster(number: str) -> Callable[[Reader], bool]:
    def holds(r: Reader) -> bool:
        return r("pace", number).mean > 1.05

    return holds


def smaller(r: Reader) -> bool:
    parameters, state = r("text", "parameters"), r("pace", "state")
    return parameters.mean < 0.97 and state.mean < 1


RECIPE = Recipe(
    paper=Paper(
        "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models", "Rajabzadeh et al.", 2024,
        "arXiv:2409.14595",
    ),
    runs=runs,
    claims=(
        Claim("analysis", "the matrices of inner layers are more like each other than like the first's or last's",
              inner_alike),
        Claim("method", "sharing among the layers most alike costs less than among the least alike",
              below("cut", "least")),
        Claim("method", "learning from the text and the teacher, then from the text, beats the text alone for as long",
              below("stages", "healed")),
        Claim("method", "learning from text and teacher all the time beats the text alone for as long",
              below("taught", "healed")),
        Claim("method", "what is kept of the teacher is worth more than a start from scratch",
              below("healed", "scratch")),
        Claim("abstract", "the student is better than the teacher that it was cut from", below("stages", "teacher")),
        Claim("abstract", "and better than that teacher trained for as long again", below("stages", "longer")),
        Claim("abstract", "a token takes less time (the paper: 15 % more of them; here: 5 % at least)",
              faster("inference")),
        Claim("abstract", "a step of training takes less time (the paper: 25 % more of them; here: 5 % at least)",
              faster("training")),
        Claim("abstract", "fewer parameters (the paper: 4 %; here: 3 % at least), and a smaller cache", smaller),
    ),
)  # fmt: skip
