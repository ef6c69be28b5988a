"""What a recipe is: a paper, the runs that stand for its experiments, and what the paper says of them."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..core import Unknown, UsageError, near
from ..core.paper import Paper
from ..training import Experiment

if TYPE_CHECKING:
    from .verdict import Reader

Scale = Literal["smoke", "small", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)
SEEDS: dict[Scale, int] = {"smoke": 1, "small": 3, "paper": 3}
NAME = re.compile(r"[a-z]+\d{4}_\w+")  # the files that are recipes, not machinery


@dataclass(frozen=True)
class Measure:
    """Numbers that no training of one model gives: function(seed=seed, **arguments) -> {name: finite number}.

    metric: the number that stands for the run. Among the numbers, "chance" and "baseline" are shown as such.
    The configuration is the function's name and the arguments, so a function that comes to measure something else
    takes another name, or another argument.
    """

    function: Callable[..., Mapping[str, float]]
    metric: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    higher_is_better: bool = True
    seed: int = 0

    def record(self) -> dict[str, Any]:
        """Plain values that say what is measured."""
        module = self.function.__module__.rpartition(".")[2]
        record = {"function": f"{module}.{self.function.__qualname__}", "arguments": dict(self.arguments)}
        plain: dict[str, Any] = json.loads(json.dumps({**record, "metric": self.metric, "seed": self.seed}))
        return plain

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that stand for this configuration."""
        return digest(self.record())


Run = Experiment | Measure


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, its place there, and whether measured numbers bear it out.

    holds(r): r("run") are the values of the run's metric over the seeds, r("run", "name") those of another number,
    r.baseline("run") and r.chance("run") single numbers. Whatever is read is what the tables show beside the claim, so
    read everything before the first comparison.
    """

    where: str
    says: str
    holds: Callable[[Reader], bool]


@dataclass(frozen=True)
class Recipe:
    """runs(scale) gives named runs; each is made with the seeds 0, 1, ... of SEEDS[scale].

    scales: smoke takes seconds, small a few minutes on one core, paper is what the paper did or comes near it.
    """

    paper: Paper
    runs: Callable[[Scale], Mapping[str, Run]]
    claims: tuple[Claim, ...]

    def keys(self, scale: Scale) -> dict[str, str]:
        """Run to the key of its configuration without the seed."""
        return {name: seeded(run, 0).key for name, run in self.runs(scale).items()}


def seeded(run: Run, seed: int) -> Run:
    return replace(run, seed=seed)


def digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def names() -> list[str]:
    """Every recipe, by the name of its file."""
    here = str(Path(__file__).parent)
    return sorted(module.name for module in pkgutil.iter_modules([here]) if NAME.fullmatch(module.name))


def find(name: str) -> tuple[str, Recipe]:
    """A recipe by its name or the word at its end: "gu2022_s4" or "s4". Raises Unknown, with the nearest names."""
    known = names()
    full = [n for n in known if n == name] or [n for n in known if n.partition("_")[2] == name]
    if len(full) > 1:
        raise UsageError(f"recipe {name!r} may be {' or '.join(full)}; give the whole name")
    if not full:
        raise Unknown(f"unknown recipe {name!r}; {near(name, [*known, *(n.partition('_')[2] for n in known)])}")
    recipe: Recipe = importlib.import_module(f".{full[0]}", __package__).RECIPE
    return full[0], recipe
