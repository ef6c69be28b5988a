"""Which experiments a comparison is made of: tasks x layers x points of a grid x seeds, within a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core import UsageError, near, put, put_all
from ..tasks import Task
from ..training import Experiment
from .budget import Budget, often
from .search import Search

MOST_CELLS = 100_000

TRIAL_STEPS = 20  # of the short run by which a layer's pace is measured

Overrides = Mapping[str, Any]  # dotted path -> value


@dataclass(frozen=True)
class Cell:
    """One training run of a comparison.

    overrides: what was varied, as dotted path -> value. tried: the part of it that the first seed tries, for the best
    on validation to be used by the others. trial: its number in a search. fault: why it cannot be trained at all.
    """

    experiment: Experiment
    overrides: Overrides = field(default_factory=dict)
    tried: Overrides = field(default_factory=dict)
    budget: Mapping[str, float] = field(default_factory=dict)
    trial: int | None = None
    fault: str = ""

    @cached_property
    def key(self) -> str:
        return self.experiment.key

    @property
    def layer(self) -> str:
        return str(self.experiment.model.layer)

    @property
    def lr(self) -> float:
        return self.experiment.train.lr

    @property
    def seed(self) -> int:
        return self.experiment.seed

    @cached_property
    def board(self) -> str:
        """The leaderboard that it belongs to: the task and its settings that are not the usual ones."""
        return board_of(self.experiment.task)

    @cached_property
    def label(self) -> str:
        """Its line there: the layer and what the grid varied of model and training."""
        return " ".join([self.layer, *words({p: v for p, v in self.overrides.items() if p not in self.tried})])

    @property
    def name(self) -> str:
        return " ".join([self.label, *words(self.tried), f"seed {self.seed}"])


@dataclass(frozen=True)
class Setting:
    """A line of a leaderboard: one task, one layer, one point of the grid. The first seed tries every candidate."""

    base: Experiment
    layer: str
    point: Overrides
    candidates: tuple[Overrides, ...]


@dataclass(frozen=True)
class Plan:
    """tasks x layers x grid x seeds, where what is to be chosen is tried by the first seed and chosen by validation.

    bases: one experiment for each task, which says everything that is not varied. grid: dotted path -> values; a path
    may begin with the name of a task and a colon, mqar:task.pairs, and then varies that task alone. lrs: learning
    rates, of which every line of a leaderboard takes the one with the best validation score of the first seed. search:
    instead of them, candidates drawn at random and thinned out by successive halving.
    budget: what each run may cost. minutes: what the whole comparison may take, shared out evenly among the tasks.
    paces: seconds per step and of the start of a trial of each model, or why that failed, by its key: see `paced`.

    Raises UsageError for an empty or doubled list, a path that is not there, more than 100,000 cells.
    """

    bases: tuple[Experiment, ...]
    layers: tuple[str, ...]
    seeds: int = 3
    lrs: tuple[float, ...] = ()
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    search: Search | None = None
    budget: Budget = field(default_factory=Budget)
    minutes: float = 0.0
    spread_evaluations: bool = True  # where the number of steps is found here: ten evaluations, or as the bases say
    paces: Mapping[str, tuple[float, float] | str] = field(default_factory=dict)
    workers: int = 1  # at a time, which --minutes reckons with

    def __post_init__(self) -> None:
        told = (("layers", self.layers), ("lr", self.lrs), *((f"grid {path}", v) for path, v in self.grid.items()))
        for name, values in told:
            doubled = [v for i, v in enumerate(values) if v in values[:i]]
            if doubled:
                raise UsageError(f"--{name}: {doubled[0]} is named twice")
            if not values and name.startswith("grid"):
                raise UsageError(f"--{name}: no values; expected some, as in --grid model.width=32,64")
        if not self.layers:
            raise UsageError("--layers is empty; name at least one, as in --layers gru,lru")
        if not self.bases:
            raise UsageError("no task; name at least one")
        boards = [board_of(base.task) for base in self.bases]
        if doubled := [b for i, b in enumerate(boards) if b in boards[:i]]:
            raise UsageError(f"task {doubled[0]} is named twice")
        if self.seeds < 1:
            raise UsageError(f"--seeds {self.seeds}; expected 1 or more")
        self._check_paths()
        if (count := self.count()) > MOST_CELLS:
            raise UsageError(f"{count} runs; at most {MOST_CELLS} fit in one comparison")

    def _check_paths(self) -> None:
        tasks = [base.task.name for base in self.bases]
        paths = [*self.grid, *(self.search.space if self.search else {})]
        for path in paths:
            task, colon, _ = path.rpartition(":")
            if colon and task not in tasks:
                raise UsageError(f"--grid {path}: no task {task!r} in this comparison; {near(task, tasks)}")
        for path, why in (("train.lr", self.lrs), ("model.width", self.budget.parameters)):
            if why and path in {p.rpartition(":")[2] for p in self.grid}:
                flag = "--lr" if path == "train.lr" else "--budget parameters"
                raise UsageError(f"--grid {path} and {flag} say the same thing twice; give one of them")
        if self.search and self.lrs:
            raise UsageError("rates that a search draws belong in its space, as train.lr")
        if self.minutes and (self.budget.tokens or self.budget.seconds):
            raise UsageError("--minutes and --budget both say how long to train; give one of them")

    # ---- what there is to run

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """Every line of every leaderboard, in the order of the command."""
        return tuple(
            Setting(base, layer, point, self._candidates(base))
            for base in self.bases
            for point in self._points(base)
            for layer in self.layers
        )

    def _points(self, base: Experiment) -> list[Overrides]:
        axes = self._axes(base)
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    def _axes(self, base: Experiment) -> dict[str, tuple[Any, ...]]:
        """The part of the grid that concerns a task."""
        return {p.rpartition(":")[2]: v for p, v in self.grid.items() if p.rpartition(":")[0] in ("", base.task.name)}

    def _candidates(self, base: Experiment) -> tuple[Overrides, ...]:
        if self.search:
            return self.search.of(base.task.name).draw()
        return tuple({"train.lr": lr} for lr in self.lrs) or ({},)

    @property
    def adaptive(self) -> bool:
        """Whether the first seed tries several candidates."""
        return self.search is not None or len(self.lrs) > 1

    def first(self) -> list[Cell]:
        """What can be run at once: every seed where nothing is to be chosen, else the first seed of every candidate."""
        seeds = range(1) if self.adaptive else range(self.seeds)
        # by seed first, so that an interrupted comparison has something of every layer
        return [cell for seed in seeds for setting in self.settings for cell in self.tries(setting, seed)]

    def rest(self, rows: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
        """The remaining seeds, with what was chosen for each setting. rows: results of `first` by key."""
        if not self.adaptive:
            return []
        chosen = [self.chosen(setting, rows) for setting in self.settings]
        return [
            self.cell(setting, number, seed)
            for seed in range(1, self.seeds)
            for setting, number in zip(self.settings, chosen, strict=True)
            if number is not None
        ]

    def chosen(self, setting: Setting, rows: Mapping[str, Mapping[str, Any]]) -> int | None:
        """Number of the candidate with the best validation score of the first seed; None if none was finished."""
        if not self.adaptive:
            return 0
        sign = 1 if setting.base.task.higher_is_better else -1
        done = {n: rows.get(cell.key, {}) for n, cell in enumerate(self.tries(setting, 0))}
        scores = {n: sign * row["validation_score"] for n, row in done.items() if row.get("status") == "done"}
        return max(scores, key=lambda n: scores[n]) if scores else None  # the first of equal ones

    def count(self) -> int:
        """How many runs there will be if none fails."""
        found = 0
        for base in self.bases:
            points = math.prod(map(len, self._axes(base).values()))
            found += len(self.layers) * points * (len(self._candidates(base)) - 1 + self.seeds)
        return found

    def tries(self, setting: Setting, seed: int = 0) -> Iterator[Cell]:
        for number in range(len(setting.candidates)):
            yield self.cell(setting, number, seed)

    def cell(self, setting: Setting, number: int, seed: int) -> Cell:
        """The run of a candidate and seed, with width and steps that its budget leaves."""
        tried = setting.candidates[number] if self.adaptive else {}
        overrides = {**setting.point, **tried}
        varied = {**setting.point, **setting.candidates[number]}
        made = self.budget.widened(put_all(setting.base, {"model.layer": setting.layer, "seed": seed, **varied}))
        fault = ""
        if self.timed and isinstance(pace := self.paces.get(short(made).key, (0.0, 0.0)), str):
            fault = f"in a trial of {TRIAL_STEPS} steps: {pace}"
        elif steps := self._steps(setting.base, made):
            made = put(made, "train.steps", steps)
            if self.spread_evaluations:
                made = put(made, "train.evaluate_every", often(steps))
        search = number if self.search else None
        return Cell(made, overrides, tried, self.budget.asked, search if seed == 0 else None, fault)

    def models(self) -> Iterator[Experiment]:
        """One experiment for each different model, to be tried before anything is trained."""
        seen = set()
        for setting in self.settings:
            for cell in self.tries(setting):
                record = cell.experiment.record()
                key = repr((record["task"], record["model"]))
                if key not in seen:
                    seen.add(key)
                    yield cell.experiment

    # ---- how long

    @property
    def timed(self) -> bool:
        """Whether the number of steps follows from measured paces."""
        return bool(self.minutes or self.budget.seconds)

    def trials(self) -> list[Cell]:
        """A short run of each model whose pace is needed: alike but for the learning rate and the seed."""
        if not self.timed:
            return []
        blank = replace(self, minutes=0.0, budget=replace(self.budget, seconds=None))
        found: dict[str, Cell] = {}
        for setting in self.settings:
            for cell in blank.tries(setting):
                made = short(cell.experiment)
                found.setdefault(made.key, Cell(made, cell.overrides))
        return list(found.values())

    def _steps(self, base: Experiment, made: Experiment) -> int | None:
        """The number of steps that budget or minutes leave to an experiment; None where they do not say."""
        found = []
        if self.budget.tokens:
            found.append(self.budget.steps_for_tokens(made))
        if self.budget.seconds and self.paces:
            found.append(max(1, int(self.budget.seconds / float(self.paces[short(made).key][0]))))
        if self.minutes and self.paces:
            found.append(self._minutes_in_steps[board_of(base.task)])
        return min(found) if found else None

    @cached_property
    def _minutes_in_steps(self) -> dict[str, int]:
        """Steps for every run of a task such that all of them together take their share of the minutes; at least 10."""
        blank, found = replace(self, minutes=0.0), {}
        for base in self.bases:
            runs = [
                (self.paces[short(blank.cell(s, n, 0).experiment).key], 1 if n else self.seeds)
                for s in self.settings
                if s.base is base
                for n in range(len(s.candidates))
            ]
            paces = [(pace[0], pace[1], count) for pace, count in runs if not isinstance(pace, str)]
            seconds = 60 * self.minutes / len(self.bases) * SHARE * min(self.workers, self.count())
            left = seconds - sum((STARTING + start) * count for _, start, count in paces)
            found[board_of(base.task)] = max(10, int(left / max(sum(p * count for p, _, count in paces), 1e-9)))
        return found


STARTING = 4.0  # seconds of a run beside its steps: imports, evaluations, checkpoints
SHARE = 0.85  # of the time that is given out; the rest is for evaluations and for measuring


def short(made: Experiment) -> Experiment:
    """A short run whose pace is that of the experiment, one for all rates and seeds."""
    train = replace(made.train, steps=TRIAL_STEPS, evaluate_every=0, lr=1e-3, warmup=0, patience=0, checkpoint_every=0)
    return replace(made, train=train, seed=0)


def board_of(task: Task) -> str:
    """The name of a task and those of its settings that are not the usual ones."""
    own = {}
    for f in fields(task):  # type: ignore[arg-type]
        value = getattr(task, f.name)
        usual = f.default if f.default_factory is MISSING else f.default_factory()
        if f.init and value != usual:
            own[f.name] = Path(value).stem if f.name == "path" else value
    return " ".join([task.name, *words(own)])


def words(overrides: Overrides) -> list[str]:
    """width=32 for model.width = 32. What varies the task is said by the name of the leaderboard."""
    return [f"{p.rpartition('.')[2]}={_word(v)}" for p, v in overrides.items() if not p.startswith("task.")]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(_word, value)) if isinstance(value, list | tuple) else str(value)


def split_names(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Names in a comma-separated list; all stands for every one that is known."""
    if text.strip() == "all":
        return tuple(known)
    return tuple(part.strip() for part in text.split(",") if part.strip())
