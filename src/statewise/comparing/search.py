"""Hyperparameters drawn at random and thinned out by successive halving (Li et al. 2020, arXiv:1810.05934), by Optuna.

Optuna draws the candidates and says which of them stop; the runs themselves are cells like any others. What it is told,
it is told in an order that does not depend on which run was faster, so that a comparison gives the same candidates,
stops and scores with any number of workers and after any kill.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import UsageError

if TYPE_CHECKING:
    from .plan import Cell

REDUCTION = 3  # of how many candidates one goes on at each rung
DRAWS = 20  # for each candidate wanted, where a space is so small that the same come again


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, drawn evenly in their logarithms where they span a factor of ten."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UsageError(f"range {self.low:g}..{self.high:g}; expected the smaller number first")

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high / self.low >= 10

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Search:
    """space: dotted path -> Range or values; trials: candidates of each layer on each task; seed: of their drawing."""

    space: Mapping[str, Range | tuple[Any, ...]] = field(default_factory=lambda: {"train.lr": Range(3e-4, 3e-2)})
    trials: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise UsageError(f"--trials {self.trials}; expected 1 or more")
        if not self.space:
            raise UsageError("--tune: nothing to vary; name it with --grid, as in --grid train.lr=1e-4..1e-2")

    def of(self, task: str) -> Search:
        """With the part of the space that concerns a task: `mqar:task.pairs` for mqar alone."""
        mine = {p.rpartition(":")[2]: v for p, v in self.space.items() if p.rpartition(":")[0] in ("", task)}
        return replace(self, space=mine)

    def draw(self) -> tuple[dict[str, Any], ...]:
        """The candidates, all different; fewer than `trials` where the space has no more."""
        return tuple(dict(one) for one in _draw(tuple(self.space.items()), self.trials, self.seed))


@lru_cache(maxsize=256)
def _draw(space: tuple[tuple[str, Any], ...], trials: int, seed: int) -> tuple[tuple[tuple[str, Any], ...], ...]:
    optuna = load()
    study = optuna.create_study()
    found: dict[tuple[tuple[str, Any], ...], None] = {}
    for number in range(DRAWS * trials):
        study.sampler = optuna.samplers.RandomSampler(seed=_mixed(seed, number))  # so each draw stands for itself
        asked = study.ask({path: _distribution(optuna, values) for path, values in space})
        one = tuple((path, _rounded(asked.params[path], values)) for path, values in space)
        found.setdefault(one, None)
        if len(found) == trials:
            break
    return tuple(found)


def _distribution(optuna: Any, values: Range | tuple[Any, ...]) -> Any:
    kinds = optuna.distributions
    if not isinstance(values, Range):
        return kinds.CategoricalDistribution(values)
    if values.whole:
        return kinds.IntDistribution(int(values.low), int(values.high), log=values.log)
    return kinds.FloatDistribution(values.low, values.high, log=values.log)


def _rounded(value: Any, values: Range | tuple[Any, ...]) -> Any:
    """Four figures of a drawn number say enough, and can be typed."""
    if not isinstance(values, Range) or values.whole:
        return value
    return min(max(float(f"{value:.4g}"), values.low), values.high)


def _mixed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "little")


def load() -> Any:
    """Optuna. Raises UsageError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UsageError("--tune optuna needs Optuna: pip install 'statewise[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Halving:
    """Successive halving over the candidates of each setting, told of validation scores as they come.

    A candidate's score at a step counts once every candidate before it has passed that step or has ended: then what is
    decided is what one worker, taking them one after another, would have decided. Optuna's journal in `path` is made
    anew from the runs at every start, since a kill between two of its writes could change a decision.
    """

    def __init__(self, groups: Mapping[str, Sequence[Cell]], search: Search, path: Path):
        optuna = load()
        for old in path.parent.glob(f"{path.name}*"):  # the lock of a process that was killed among them
            old.unlink()
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
        self.groups = [_Group(optuna, storage, name, search, cells) for name, cells in groups.items()]
        self.at = {cell.key: (group, n) for group in self.groups for n, cell in enumerate(group.cells)}

    def hear(self, key: str, step: int, score: float) -> None:
        """A validation score of a run; those of one run in order, a step that was heard before counts once."""
        group, n = self.at[key]
        if not group.curves[n] or step > group.curves[n][-1][0]:
            group.curves[n].append((step, score))
            group.advance()

    def end(self, key: str, *, done: bool) -> None:
        """The run has ended, by itself or by a fault; nothing more will be heard of it."""
        group, n = self.at[key]
        group.over[n] = "done" if done else "failed"
        group.advance()

    def settled(self, key: str) -> bool:
        """Whether all is decided about a run that has ended."""
        if key not in self.at:
            return True
        group, n = self.at[key]
        return group.decided[n]

    def stopped(self, key: str) -> int | None:
        """The step at which the run is stopped; None while it is not."""
        group, n = self.at.get(key, (None, 0))
        return group.stops.get(n) if group else None


class _Group:
    """The candidates of one setting, as one study."""

    def __init__(self, optuna: Any, storage: Any, name: str, search: Search, cells: Sequence[Cell]):
        task, train = cells[0].experiment.task, cells[0].experiment.train
        self.states, self.cells, self.higher = optuna.trial.TrialState, cells, task.higher_is_better
        self.study = optuna.create_study(
            storage=storage, study_name=name, direction="maximize" if self.higher else "minimize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=train.evaluate_every or train.steps, reduction_factor=REDUCTION
            ),
        )  # fmt: skip
        self.trials = []
        space = {path: _distribution(optuna, values) for path, values in search.of(task.name).space.items()}
        for cell in cells:
            self.study.enqueue_trial(dict(cell.tried), user_attrs={"key": cell.key})
            self.trials.append(self.study.ask(space))
        self.curves: list[list[tuple[int, float]]] = [[] for _ in cells]
        self.passed = [0] * len(cells)  # scores that Optuna was told
        self.over: dict[int, str] = {}
        self.decided = [False] * len(cells)
        self.stops: dict[int, int] = {}

    def advance(self) -> None:
        """Tell Optuna what can be told by now."""
        moved = True
        while moved:
            moved = False
            for n in range(len(self.cells)):
                moved |= not self.decided[n] and (self._report(n) or self._finish(n))

    def _report(self, n: int) -> bool:
        at = self.passed[n]
        if at >= len(self.curves[n]) or any(not self.decided[j] and self.passed[j] <= at for j in range(n)):
            return False
        step, score = self.curves[n][at]
        self.trials[n].report(score, step)
        self.passed[n] += 1
        if self.trials[n].should_prune() and step < self.cells[n].experiment.train.steps:
            self.study.tell(self.trials[n], state=self.states.PRUNED)
            self.decided[n], self.stops[n] = True, step
        return True

    def _finish(self, n: int) -> bool:
        if n not in self.over or self.passed[n] < len(self.curves[n]):
            return False
        scores = [score for _, score in self.curves[n]]
        if self.over[n] == "done" and scores:
            self.study.tell(self.trials[n], max(scores) if self.higher else min(scores))
        else:
            self.study.tell(self.trials[n], state=self.states.FAIL)
        self.decided[n] = True
        return True
