"""How much a state holds, and from which training length on a model forgets as it must (Chen et al. 2024,
arXiv:2410.07145): curves, and fits against the size of the state with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..core import RecurrentLayer, UsageError, leaves
from ..tasks.base import Task
from ..training import LengthScore, score_lengths

Kind = Literal["linear", "exponential"]


def state_size(model: RecurrentLayer[Any]) -> int:
    """Numbers in the state of one stream, over all layers; a complex number counts twice."""
    floats = [leaf for leaf in leaves(model.initial_state(1)) if leaf.is_floating_point() or leaf.is_complex()]
    return sum(leaf.numel() * (2 if leaf.is_complex() else 1) for leaf in floats)


def recall_length(
    model: RecurrentLayer[Any], task: Task, lengths: Sequence[int], *, least: float = 0.95, metric: str | None = None
) -> tuple[int, list[LengthScore]]:
    """The longest of the lengths up to which every score is at least `least`, 0 where none is; and the whole curve.

    task: such as Passkey() or Mqar(); metric: the task's own, or another of its numbers, as "sequence_accuracy".
    """
    curve = score_lengths(model, task, lengths)
    reached = 0
    for score in curve:
        value = score.score if metric is None else score.metrics.get(metric)
        if value is None or not value >= least:
            break
        reached = score.length
    return reached, curve


def forgetting_threshold(collapsed: Mapping[int, bool]) -> int | None:
    """Training length to whether the state collapsed beyond it -> the smallest from which on none did; None: the
    longest did too."""
    threshold = None
    for length in sorted(collapsed, reverse=True):
        if collapsed[length]:
            break
        threshold = length
    return threshold


@dataclass(frozen=True)
class Fit:
    """y = intercept + slope x ("linear") or y = exp(intercept + slope x) ("exponential"), with 95 % intervals."""

    kind: Kind
    slope: float
    intercept: float
    slope_interval: tuple[float, float]
    intercept_interval: tuple[float, float]
    points: int

    def __call__(self, x: float) -> float:
        line = self.intercept + self.slope * x
        return math.exp(line) if self.kind == "exponential" else line


def fit_curve(points: Iterable[tuple[float, float]], kind: Kind, *, draws: int = 2000, seed: int = 0) -> Fit:
    """Least squares of thresholds or capacities y against sizes x, of log y where the curve is exponential.

    points: (x, y), one for each seed and size. The intervals are percentiles over bootstrap samples, drawn within each
    size where all sizes have two points or more, else from all points.
    Raises UsageError for fewer than three points, a single size, numbers that are not finite, y <= 0 for a logarithm.
    """
    x, y = np.array([*points], float).reshape(-1, 2).T
    if kind not in ("linear", "exponential"):
        raise UsageError(f"fit_curve: kind {kind!r}; expected 'linear' or 'exponential'")
    if len(x) < 3 or len(np.unique(x)) < 2:
        raise UsageError(f"fit_curve: {len(x)} points at {len(np.unique(x))} sizes; expected at least 3 at 2")
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or (kind == "exponential" and y.min() <= 0):
        raise UsageError("fit_curve: a number is not finite, or not above 0 where its logarithm is taken")
    y = np.log(y) if kind == "exponential" else y
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(x == size) for size in np.unique(x)]
    if min(map(len, groups)) < 2:
        groups = [np.arange(len(x))]
    found: list[tuple[float, float]] = []
    while len(found) < draws:
        drawn = np.concatenate([rng.choice(group, len(group)) for group in groups])
        if np.ptp(x[drawn]) > 0:  # one size alone has no slope
            found.append(_line(x[drawn], y[drawn]))
    low, high = np.percentile(found, [2.5, 97.5], axis=0)
    intercept, slope = _line(x, y)
    return Fit(
        kind, slope, intercept, (float(low[1]), float(high[1])), (float(low[0]), float(high[0])), len(x)
    )  # fmt: skip


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    centred = x - x.mean()
    slope = float((centred * y).sum() / (centred**2).sum())
    return float(y.mean() - slope * x.mean()), slope
