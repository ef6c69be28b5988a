"""What was measured: one JSON file per recipe and scale, with every number of every seed and what it was made on."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import DataError, read_json, write_json
from ..core.files import shown
from .recipe import Scale, digest

FORMAT = 1


@dataclass(frozen=True)
class Values:
    """A number over the seeds."""

    values: tuple[float, ...]

    def __iter__(self) -> Iterator[float]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Sample standard deviation; 0 for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass
class Results:
    """The content of a results file. Keys of configurations say which rows are of today's recipe and which are stale.

    runs: name -> {"key", "record", "metric", "higher_is_better", "chance", "baseline", "seeds": {"0": row}}, a row
    being {"numbers", "seconds", "finished", "environment"} or {"failed", ...}. environments: machines and versions, to
    which rows refer by their place.
    """

    recipe: str
    scale: Scale
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    environments: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Stands for the configuration of all runs."""
        return digest({name: run["key"] for name, run in self.runs.items()})

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for run in self.runs.values() for row in run["seeds"].values())

    def seconds_of(self, run: str) -> float:
        """Mean over the seeds."""
        return statistics.fmean(row["seconds"] for row in self.runs[run]["seeds"].values())

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The finished rows of a run, by seed."""
        seeds = self.runs[run]["seeds"]
        return [seeds[seed] for seed in sorted(seeds, key=int) if "numbers" in seeds[seed]]

    def values(self, run: str, name: str) -> Values:
        return Values(tuple(row["numbers"][name] for row in self.rows(run)))

    def fixed(self, run: str, name: str) -> float | None:
        """The chance or the baseline of a run: of its task, or what a measurement found on the way, over the seeds."""
        rows = self.rows(run)
        if rows and name in rows[0]["numbers"]:
            return self.values(run, name).mean
        found = self.runs[run][name]
        return None if found is None else float(found)

    def stale(self, keys: Mapping[str, str]) -> list[str]:
        """Runs whose configuration is no longer the recipe's."""
        return [name for name, run in self.runs.items() if keys.get(name) != run["key"]]

    def write(self, folder: Path) -> Path:
        """Replace the file of this recipe and scale."""
        path = path_of(folder, self.recipe, self.scale)
        write_json(path, {"format": FORMAT, "key": self.key, "seconds": round(self.seconds, 1), **vars(self)})
        return path


def path_of(folder: Path, recipe: str, scale: Scale) -> Path:
    return folder / f"{recipe}-{scale}.json"


def read_results(folder: Path, recipe: str, scale: Scale) -> Results:
    """What a results folder holds of a recipe; nothing where there is no file. Raises DataError for another format."""
    path = path_of(folder, recipe, scale)
    if not path.exists():
        return Results(recipe, scale)
    found = read_json(path, limit=1 << 26)
    if found.get("format") != FORMAT or not isinstance(found.get("runs"), dict):
        raise DataError(f"{shown(path)}: format {found.get('format')!r}; expected results of format {FORMAT}")
    return Results(recipe, scale, found["runs"], found["environments"])
