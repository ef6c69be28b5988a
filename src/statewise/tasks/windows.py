"""Long series cut by time: the past trains, the latest steps test. Forecasting, and answers at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core import DataError
from .base import SPLITS, Batch, Split, Task
from .finite import Finite, Sequences


class Track(NamedTuple):
    """One series: its inputs, its answers, and at which steps each split asks."""

    x: np.ndarray  # (T, D)
    y: np.ndarray  # (T, E)
    asked: Mapping[Split, np.ndarray]  # (T,) bool
    y_scale: np.ndarray | None = None  # (E,), where y was divided by it
    span: int = 0  # of `ahead`


def windows(name: str, tracks: Sequence[Track], length: int) -> dict[Split, Sequences]:
    """Windows of at most `length` steps. Training windows overlap by three quarters; validation and test ask every
    step once, each window after up to length / 2 steps of context, which may reach back into an earlier split.

    Inputs are standardised by the training steps. Raises DataError where a split has nothing to ask.
    """
    x, y = (torch.from_numpy(np.concatenate([getattr(t, part) for t in tracks]).astype(np.float32)) for part in "xy")
    offsets = np.cumsum([0, *(len(track.x) for track in tracks)])
    found: dict[Split, Sequences] = {}
    for split in SPLITS:
        asked = torch.from_numpy(np.concatenate([track.asked[split] for track in tracks]))
        cuts = [
            (offset + start, size, quiet)
            for offset, track in zip(offsets.tolist(), tracks)
            for start, size, quiet in _cuts(track.asked[split], length, split)
        ]
        if not cuts:
            steps = [len(track.x) for track in tracks]
            raise DataError(f"{name}: nothing is left to ask in the {split} part of {sum(steps)} steps; give more data")
        starts, lengths, quiet = torch.tensor(cuts).unbind(1)
        found[split] = Sequences(x, starts, lengths, y, torch.zeros(1), torch.ones(1), asked, quiet)
    inputs, y_scale = x[found["train"].asked], tracks[0].y_scale
    scale = torch.ones(1) if y_scale is None else torch.from_numpy(y_scale)
    return {
        split: replace(part.standardised(inputs), y_scale=scale, span=tracks[0].span) for split, part in found.items()
    }


def _cuts(asked: np.ndarray, length: int, split: Split) -> list[tuple[int, int, int]]:
    """(start, steps, quiet steps) of the windows of one series."""
    steps = np.flatnonzero(asked)
    if not len(steps):
        return []
    low, high = int(steps[0]), int(steps[-1]) + 1
    if split == "train":
        last = max(high - length, 0)
        return [(start, min(length, high), 0) for start in (*range(0, last, max(length // 4, 1)), last)]
    cuts, at = [], low  # `at` is the next step to ask
    while at < high:
        start = max(0, at - length // 2)
        end = min(start + length, high)
        cuts.append((start, end - start, at - start))
        at = end
    return cuts


def ahead(
    name: str,
    series: Sequence[np.ndarray],
    ends: Sequence[tuple[int, int]],
    horizon: int,
    span: int,
    columns: Sequence[str] = (),
) -> list[Track]:
    """What is needed to forecast `horizon` steps of every channel of series (T_i, C), where NaN is missing.

    x: each channel's last change, and its height above its own mean over the last `span` steps; both are causal.
    `units.Units.encode` makes the same of one step after the other.
    y: the changes from now to 1, ..., horizon steps ahead, (C * horizon), all leads of a channel together,
    each divided by its root mean square over the training steps: to answer 0 is to say "as now".
    A missing value is carried forward as input and never asked as an answer. ends: (training, validation) ends.
    """
    drafts = []
    for values, (train, validation) in zip(series, ends):
        known = np.isfinite(values)
        filled = np.nan_to_num(carried(values))  # a channel with no value at all is never asked
        change = np.diff(filled, axis=0, prepend=filled[:1])
        sums = np.cumsum(np.concatenate([np.zeros((1, filled.shape[1])), filled]), 0)
        time = np.arange(len(filled))
        first = np.maximum(time - span + 1, 0)
        height = filled - (sums[time + 1] - sums[first]) / (time + 1 - first)[:, None]
        future = np.minimum(time[:, None] + np.arange(1, horizon + 1), len(filled) - 1)  # (T, horizon)
        y = (filled[future] - filled[:, None]).transpose(0, 2, 1).reshape(len(filled), -1)
        whole = known[future].all((1, 2)) & known.all(1)
        asked: dict[Split, np.ndarray] = {}
        for split, low, high in (
            ("train", 0, train),
            ("validation", train, validation),
            ("test", validation, len(filled)),
        ):
            asked[split] = whole & (time + 1 >= low) & (time + horizon < high)  # type: ignore[index]
        drafts.append(Track(np.concatenate([change, height], 1), y, asked))
    train_y = np.concatenate([track.y[track.asked["train"]] for track in drafts])
    if not len(train_y):
        raise DataError(
            f"{name}: no training step has {horizon} known steps ahead; give more data or a smaller horizon"
        )
    size = np.sqrt(np.square(train_y).mean(0))
    if (size == 0).any():
        which = called(columns, int(size.argmin()) // horizon)
        raise DataError(f"{name}: {which} is constant over the training part: there is nothing to learn")
    return [track._replace(y=track.y / size, y_scale=size, span=span) for track in drafts]


def called(columns: Sequence[str], channel: int) -> str:
    """A channel of the user's data in words, with what leaves it out."""
    name = columns[channel] if columns else ""
    return f"column {name!r} (task.ignore={name} leaves it out)" if name else f"channel {channel + 1}"


def carried(values: np.ndarray) -> np.ndarray:
    """(T, C) with each missing value replaced by the last known one; before the first known one, by that."""
    known = np.isfinite(values)
    last = np.maximum.accumulate(np.where(known, np.arange(len(values))[:, None], -1), 0)
    first = known.argmax(0)
    return np.take_along_axis(values, np.where(last < 0, first, last), 0)


class Regress(Finite):
    """Numbers to be predicted, scaled so that 0 is a natural answer: the training mean, or no change."""

    kind = "regression"
    metric = "loss"
    higher_is_better = False

    def chance(self) -> float:
        return random_answer(self)

    def baseline(self) -> float:
        """Test loss of the training mean or of 0, whichever is better on the validation split."""
        return constant(self)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        return with_skill(self, super().metrics(out, batch), batch)


def with_skill(task: Task, found: dict[str, tuple[float, float]], batch: Batch) -> dict[str, tuple[float, float]]:
    """Adds skill: the share of the squared error of answering 0 that is gone; 1 is perfect, 0 no better."""
    loss, count = found["loss"]
    zero = float(task.loss(torch.zeros_like(batch.y), batch)) * count
    return {**found, "skill": (zero - loss, zero)}


def answers(task: Finite, split: Split) -> Tensor:
    """All answers (n, E) that a split asks for."""
    return torch.cat([batch.y[batch.weight > 0] for batch in task.batches(split)])


def random_answer(task: Finite) -> float:
    """The mean squared error on the test set of a training answer drawn at random."""
    train, test = answers(task, "train"), answers(task, "test")
    return float(train.var(0, correction=0).mean() + (test - train.mean(0)).square().mean())


def constant(task: Finite) -> float:
    """The mean squared error on the test set of 0 or of the training mean, whichever is less on the validation set."""
    return best_rule(constants(task))


def constants(task: Finite) -> list[tuple[float, float]]:
    """The mean squared errors on the validation and the test set of 0, and of the training mean."""
    mean = answers(task, "train").mean(0)
    validation, test = ([answers(task, split) - rule for rule in (0, mean)] for split in ("validation", "test"))  # type: ignore[arg-type]
    return [(float(a.square().mean()), float(b.square().mean())) for a, b in zip(validation, test)]


def best_rule(errors: Sequence[tuple[float, float]]) -> float:
    """The test error of the rule with the least error on the validation set."""
    return min(errors, key=lambda error: error[0])[1]
