"""MaTVLM (Li et al. 2025, arXiv:2503.13440), the text part: some attention layers of a trained Transformer become
Mamba-2 layers that start as they were, and learn from the whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..core import nbytes
from ..core.paper import Paper
from ..models import LanguageModel, Stack
from ..tasks import Text
from ..training import Experiment, Teacher, Train
from .generation import step_times, trained
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader

# name: every which layer is Mamba-2, and how it learns
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "made": (2, {"truth": 0, "layers": 1}),
    "born": (2, {"truth": 0, "layers": 1, "inherit": "same"}),
    "by_logits": (2, {"truth": 0}),
    "by_text": (2, {"logits": 0}),
    "few": (4, {"truth": 0, "layers": 1}),
}


def pattern(depth: int, every: int, *, width: int, window: int, heads: int) -> str:
    """Attention; at each `every`-th depth from the first on (0: none) Mamba-2 with as many heads of the same size."""
    size = width // heads
    attention = f"attention(window={window},heads={heads})"
    mamba = f"mamba2(heads={heads},groups={heads},key={size},value={size})"
    return ",".join(mamba if every and depth % every == 0 else attention for depth in range(depth))


def hybrids(
    seed: int,
    *,
    width: int,
    depth: int,
    heads: int,
    length: int,
    batch: int,
    steps: int,
    heal: int,
    looks: int,
    read: int,
) -> dict[str, float]:
    """A Transformer learns the text; Mamba-2 layers take the places of some of its attention, and they alone learn on.

    bits_NAME, over `read` bytes of the test (0: all), and early_NAME, of the validation after the first of `looks`
    parts of `heal` steps: "teacher"; "made": half the layers are Mamba-2 made of attention, and learn by its logits and
    layer by layer (the paper's way); "born": they start as Mamba-2 is born; "by_logits": made, by logits alone;
    "by_text": made, from the text without a teacher; "few": as "made", every fourth layer.
    """
    task = Text(length=length, evaluate=read)
    first = Train(steps=steps, batch=batch, lr=4e-3, warmup=20, evaluate_every=0)
    more = Train(steps=heal, batch=batch, lr=4e-3, warmup=10, evaluate_every=max(1, heal // looks))
    numbers: dict[str, float] = {"chance": task.chance(), "baseline": task.baseline()}
    with tempfile.TemporaryDirectory() as folder:

        def bits(name: str, every: int, train: Train, teacher: Teacher) -> None:
            def look(event: dict[str, Any]) -> None:
                if event["event"] == "evaluate":
                    numbers.setdefault(f"early_{name}", event["score"])

            layer = pattern(depth, every, width=width, window=length, heads=heads)
            made = Experiment(task, LanguageModel(layer, width=width, depth=depth), train, seed, teacher)
            numbers[f"bits_{name}"] = trained(made, Path(folder, name), look)[0].score

        bits("teacher", 0, first, Teacher())
        for name, (every, how) in ARMS.items():
            bits(name, every, more, Teacher(str(Path(folder, "teacher")), only_new=True, **how))
    return numbers


def pace(seed: int, *, width: int, depth: int, heads: int, contexts: list[int]) -> dict[str, float]:
    """Of the Transformer over the hybrid with half its layers Mamba-2: speedup_n, the time of one more token after n;
    speedup, after the longest context. state: bytes of the hybrid's state over the Transformer's there."""
    torch.manual_seed(seed)
    numbers: dict[str, float] = {"baseline": 1.0}
    for context in contexts:
        layers = {
            n: pattern(depth, e, width=width, window=context, heads=heads) for n, e in (("whole", 0), ("half", 2))
        }
        models = {
            name: Stack(layer, width=width, depth=depth).build(x_width=width, y_width=width)
            for name, layer in layers.items()
        }
        took = step_times(models, context, steps=32)
        sizes = {name: nbytes(model.initial_state(1)) for name, model in models.items()}
        numbers[f"speedup_{context}"] = numbers["speedup"] = took["whole"] / took["half"]
        numbers["state"] = sizes["half"] / sizes["whole"]
    return numbers


def runs(scale: Scale) -> dict[str, Run]:
    """Of six layers three or two become Mamba-2; of the paper's 32 it is 16, 8 or 4."""
    text: dict[str, int] = {
        "smoke": dict(width=8, depth=4, heads=2, length=128, batch=2, steps=2, heal=2, looks=2, read=2048),
        "small": dict(width=64, depth=6, heads=4, length=128, batch=8, steps=600, heal=120, looks=3, read=32_768),
        "paper": dict(width=512, depth=12, heads=8, length=1024, batch=64, steps=50_000, heal=2000, looks=10, read=0),
    }[scale]
    times: dict[str, Any] = {
        "smoke": dict(width=8, depth=4, heads=2, contexts=[8, 16]),
        "small": dict(width=256, depth=6, heads=4, contexts=[128, 1024, 4096]),
        "paper": dict(width=2048, depth=32, heads=32, contexts=[1024, 4096, 16_384]),
    }[scale]
    return {
        "text": Measure(hybrids, "bits_made", text, higher_is_better=False),
        "pace": Measure(pace, "speedup", times),
    }


def below(ours: str, theirs: str) -> Callable[[Reader], bool]:
    """The one number less than the other, by every seed."""

    def holds(r: Reader) -> bool:
        pairs = zip(r("text", ours), r("text", theirs), strict=True)
        return all(a < b for a, b in pairs)

    return holds


def near_teacher(r: Reader) -> bool:
    hybrid, teacher = r("text"), r("text", "bits_teacher")
    return hybrid.mean < 1.03 * teacher.mean


def fewer_are_nearer(r: Reader) -> bool:
    few, half = r("text", "bits_few"), r("text")
    return all(a < b for a, b in zip(few, half, strict=True))


def faster(r: Reader) -> bool:
    return r("pace").mean > 1.2


def smaller(r: Reader) -> bool:
    return r("pace", "state").mean < 1 - 0.275


RECIPE = Recipe(
    paper=Paper(
        "MaTVLM: Hybrid Mamba-Transformer for Efficient Vision-Language Modeling", "Li et al.", 2025,
        "arXiv:2503.13440",
    ),
    runs=runs,
    claims=(
        Claim("abstract", "Mamba-2 made of attention converges faster than as it is born: fewer bits at the first look",
              below("early_made", "early_born")),
        Claim("abstract", "and at the end", below("bits_made", "bits_born")),
        Claim("method", "it helps to learn layer by layer as well: fewer bits at the first look than by logits alone",
              below("early_made", "early_by_logits")),
        Claim("method", "and at the end", below("bits_made", "bits_by_logits")),
        Claim("method", "the teacher teaches better than the text does for as long",
              below("bits_made", "bits_by_text")),
        Claim("abstract", "the hybrid with half its layers Mamba-2 is competitive (here: within 3 % of the bits)",
              near_teacher),
        Claim("experiments", "the fewer layers are replaced, the nearer to the teacher", fewer_are_nearer),
        Claim("abstract", "one more token takes less time after a long context (the paper: up to 3.6 times as fast; "
              "here: 1.2 at least)", faster),
        Claim("abstract", "in less memory (the paper: 27.5 % of a GPU's; here: of the state)", smaller),
    ),
)  # fmt: skip
