"""The user's own series: a CSV, Parquet, NPZ or NPY file, or a folder of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..core import DataError, UsageError
from .base import Batch, Split, register_task
from .finite import Finite, Sequences, linear_rule, majority, stratified, three
from .series_files import Found, Names, is_number, read
from .windows import Track, ahead, called, carried, constant, random_answer, windows, with_skill

FEWEST = 10  # series, where whole series are shared out among the splits
SPAN = 32  # steps over which a forecast's input is compared with its own mean


class Ready(NamedTuple):
    kind: str
    rows: dict[Split, Sequences]
    classes: tuple[str, ...] = ()


class _Either:
    """An attribute that the data decides; on the class, the words that describe it."""

    def __init__(self, words: Any, of: Any):
        self.words, self.of = words, of

    def __get__(self, task: Any, owner: type) -> Any:
        return self.words if task is None else self.of(_ready(task))


@register_task
@dataclass(frozen=True)
class Series(Finite):
    """series  time  temperature  load   label        one row a step; columns in any order, only numbers are needed
    a           1         20.1    0.3    calm
    a           2         20.4    0.2    calm         label: which class the series is, asked at its last step
    b           1         18.9    0.9    storm

    What is asked follows from the columns. `label`: the class of a series. `target`, or columns whose names begin with
    it: these numbers at every step. Neither: all columns, 1 to `horizon` steps ahead, at every step. `series` tells
    series apart (absent: one series), `time` orders the steps (absent: as they stand); all other columns are input.

    An NPZ holds X (N, T, D), (N, T) or (steps, D) with `lengths` (N,), and y (N,) of classes (integers or texts) or
    y (N,), (N, E), (N, T, E) of floats. An NPY is one series (T, D) or (T,). A folder holds one folder of CSV or NPY
    files per class; or files beside a labels.csv with the columns file and label (or target); or CSV or NPY files,
    one series each.

    Series with a label, or one target, are shared out 70 : 15 : 15; else each series is cut in time, the last 15 %
    being the test. Inputs and targets are standardised by the training part. A missing input is carried forward, a
    missing answer is not asked. Chance and baseline: the commonest class and a linear classifier on summaries; or a
    random training answer, and the mean or "as now", chosen on validation.
    """

    path: str = ""
    horizon: int = 1
    length: int = 256  # of windows, where series are cut in time
    series_column: str = "series"
    time_column: str = "time"
    label_column: str = "label"
    target_column: str = "target"
    ignore: str = ""  # columns apart by commas
    name = "series"
    data = "your own file or folder: set path"
    kind = _Either("classification or regression", lambda ready: ready.kind)
    metric = _Either("accuracy or loss", lambda ready: "accuracy" if ready.kind == "classification" else "loss")
    higher_is_better = _Either(True, lambda ready: ready.kind == "classification")

    def __post_init__(self) -> None:
        for field, value, least in (("horizon", self.horizon, 1), ("length", self.length, 2)):
            if value < least:
                raise UsageError(f"series: {field} is {value}; expected at least {least}")

    @property
    def x_width(self) -> int:  # type: ignore[override]
        return int(_ready(self).rows["train"].values.shape[1])

    @property
    def y_width(self) -> int:  # type: ignore[override]
        ready = _ready(self)
        return len(ready.classes) or int(ready.rows["train"].y.shape[-1])

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels in the order of class ids; empty where numbers are asked."""
        return _ready(self).classes

    def load(self) -> dict[Split, Sequences]:
        return _ready(self).rows

    def chance(self) -> float:
        return majority(self) if self.classes else random_answer(self)

    def baseline(self) -> float:
        """A linear classifier on summaries; or the training mean or "as now", whichever is better on validation."""
        return linear_rule(self) if self.classes else constant(self)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        found = super().metrics(out, batch)
        return found if self.classes else with_skill(self, found, batch)


@lru_cache(maxsize=4)
def _ready(task: Series) -> Ready:
    if not task.path:
        raise UsageError("series: path is not set; expected a CSV, Parquet, NPZ or NPY file, or a folder of them")
    path = Path(task.path).expanduser()
    ignore = tuple(name.strip() for name in task.ignore.split(",") if name.strip())
    names = Names(task.series_column, task.time_column, task.label_column, task.target_column, ignore)
    found = read(path, names)
    if found.labels is not None:
        return _labelled(path, found)
    if found.targets is not None and found.targets[0].ndim == 1:
        return _one_target(path, found)
    ends = [(len(steps) * 70 // 100, len(steps) * 85 // 100) for steps in found.series]
    if found.targets is not None:
        return Ready("regression", _stepwise(path, found, ends, task.length))
    _filled(path, found.series, found.columns)
    tracks = ahead(str(path), found.series, ends, task.horizon, SPAN, found.columns)
    return Ready("regression", windows(str(path), tracks, task.length))


def _labelled(path: Path, found: Found) -> Ready:
    series, labels = found.series, found.labels or []
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2:
        raise DataError(f"{path}: every label is {str(names[0])!r}; expected at least two classes")
    if len(series) < FEWEST or counts.min() < 2:
        rare = f"{int(counts.min())} of class {str(names[counts.argmin()])!r}"
        raise DataError(f"{path}: {len(series)} series, {rare}; expected at least {FEWEST}, and 2 of each class")
    order = sorted(names.tolist(), key=lambda name: (0, float(name), "") if is_number(name) else (1, 0.0, name))
    y = np.array([order.index(label) for label in labels])
    parts = _shared_out(path, series, y, y, found.columns)
    return Ready("classification", three(parts), tuple(order))


def _one_target(path: Path, found: Found) -> Ready:
    y = np.stack(found.targets or [])
    known = np.isfinite(y).all(1)
    series, y = [steps for steps, ok in zip(found.series, known) if ok], y[known]
    if len(series) < FEWEST:
        raise DataError(f"{path}: {len(series)} series with a target; expected at least {FEWEST}")
    train, validation, test = _shared_out(path, series, y, np.zeros(len(y)), found.columns)
    answers = train.y.double()
    return Ready("regression", three([_scaled(path, part, answers) for part in (train, validation, test)]))


def _shared_out(
    path: Path, series: list[np.ndarray], y: np.ndarray, classes: np.ndarray, columns: tuple[str, ...]
) -> list[Sequences]:
    count = len(series)
    held = max(1, round(0.15 * count))
    series = _filled(path, series, columns)
    parts = [
        Sequences.of([series[row] for row in rows], y[rows])
        for rows in stratified(classes, (count - 2 * held, held, held), "series")
    ]
    return [part.standardised(parts[0].values) for part in parts]


def _stepwise(path: Path, found: Found, ends: list[tuple[int, int]], length: int) -> dict[Split, Sequences]:
    tracks = []
    for x, y, (train, validation) in zip(_filled(path, found.series, found.columns), found.targets or [], ends):
        time, known = np.arange(len(x)), np.isfinite(y).all(1)
        asked: dict[Split, np.ndarray] = {
            "train": known & (time < train),
            "validation": known & (time >= train) & (time < validation),
            "test": known & (time >= validation),
        }
        tracks.append(Track(x, np.nan_to_num(y), asked))
    rows = windows(str(path), tracks, length)
    answers = rows["train"].y[rows["train"].asked].double()
    return {split: _scaled(path, part, answers) for split, part in rows.items()}


def _scaled(path: Path, part: Sequences, train: Tensor) -> Sequences:
    """Targets to mean 0 and variance 1 over the training answers (n, E)."""
    spread = train.std(0, correction=0)
    if (spread == 0).any():
        where = int(spread.argmin()) + 1
        raise DataError(f"{path}: target {where} of {len(spread)} is constant: there is nothing to learn")
    y = ((part.y.double() - train.mean(0)) / spread).float()
    return replace(part, y=y, y_shift=train.mean(0), y_scale=spread)


def _filled(path: Path, series: list[np.ndarray], columns: tuple[str, ...]) -> list[np.ndarray]:
    """Missing inputs carried forward; a channel that one series lacks gets its mean over the others."""
    whole = np.concatenate(series)
    known = np.isfinite(whole)
    if not known.any(0).all():
        raise DataError(f"{path}: {called(columns, int(known.any(0).argmin()))} holds no number at all")
    mean = np.where(known, whole, 0).sum(0) / known.sum(0)
    return [np.where(np.isfinite(filled := carried(steps)), filled, mean) for steps in series]
