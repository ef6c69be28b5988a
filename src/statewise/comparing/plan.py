"""Which experiments a comparison is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..core import UsageError, put
from ..training import Experiment

MOST_CELLS = 100_000


@dataclass(frozen=True)
class Cell:
    """One training run of a comparison."""

    layer: str
    lr: float
    experiment: Experiment

    @cached_property
    def key(self) -> str:
        return self.experiment.key

    @property
    def seed(self) -> int:
        return self.experiment.seed

    @property
    def name(self) -> str:
        return f"{self.layer} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """Layers x seeds over one base experiment; with several learning rates the first seed tries them all and the rate
    with the best validation score is used for the other seeds.

    Raises UsageError for an empty or doubled list, or more than 100,000 cells.
    """

    base: Experiment
    layers: tuple[str, ...]
    seeds: int = 3
    lrs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, values in (("layers", self.layers), ("lr", self.lrs)):
            doubled = [v for i, v in enumerate(values) if v in values[:i]]
            if doubled:
                raise UsageError(f"--{name}: {doubled[0]} is named twice")
        if not self.layers:
            raise UsageError("--layers is empty; name at least one, as in --layers gru,lru")
        if self.seeds < 1:
            raise UsageError(f"--seeds {self.seeds}; expected 1 or more")
        count = len(self.layers) * (self.seeds + max(len(self.lrs) - 1, 0))
        if count > MOST_CELLS:
            raise UsageError(f"{count} runs; at most {MOST_CELLS} fit in one comparison")

    @property
    def rates(self) -> tuple[float, ...]:
        return self.lrs or (self.base.train.lr,)

    def first(self) -> list[Cell]:
        """What can be run at once: every seed if there is one rate, else the first seed at every rate."""
        seeds = range(self.seeds) if len(self.rates) == 1 else range(1)
        # by seed first, so that an interrupted comparison has something of every layer
        return [self._cell(layer, lr, seed) for seed in seeds for layer in self.layers for lr in self.rates]

    def rest(self, rows: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
        """The remaining seeds at the rate chosen for each layer. rows: results of `first` by key."""
        if len(self.rates) == 1:
            return []
        chosen = self.chosen(rows)
        return [self._cell(layer, chosen[layer], seed) for seed in range(1, self.seeds) for layer in chosen]

    def chosen(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """The rate of each layer; layers of which no run of the first seed finished are left out."""
        if len(self.rates) == 1:
            return dict.fromkeys(self.layers, self.rates[0])
        sign = 1 if self.base.task.higher_is_better else -1
        found = {}
        for layer in self.layers:
            scores = {
                lr: sign * row["validation_score"]
                for lr in self.rates
                if (row := rows.get(self._cell(layer, lr, 0).key)) and row["status"] == "done"
            }
            if scores:
                found[layer] = max(scores, key=lambda lr: scores[lr])
        return found

    def cells_of(self, layer: str, lr: float) -> Iterator[Cell]:
        for seed in range(self.seeds):
            yield self._cell(layer, lr, seed)

    def count(self) -> int:
        """How many runs there will be if none fails."""
        return len(self.layers) * (self.seeds + len(self.rates) - 1)

    def _cell(self, layer: str, lr: float, seed: int) -> Cell:
        made = put(put(put(self.base, "model.layer", layer), "train.lr", lr), "seed", seed)
        return Cell(layer, lr, made)


def split_names(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Names in a comma-separated list; all stands for every one that is known."""
    if text.strip() == "all":
        return tuple(known)
    return tuple(part.strip() for part in text.split(",") if part.strip())
