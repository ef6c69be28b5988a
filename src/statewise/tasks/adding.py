"""The adding problem (Hochreiter & Schmidhuber 1997, sec. 5.4, in the form of Le et al. 2015, arXiv:1504.00941)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, register_task
from .generated import Generated


@register_task
@dataclass(frozen=True)
class Adding(Generated):
    """value   .3 .9 .5 .1 .7 .2
    mark      0  1  0  0  1  0     one mark in each half
    answer                  1.6    the sum of the marked values, asked at the last step only

    Chance (another example's answer): squared error 1/3. Baseline (always 1): 1/6, the variance of a sum of two
    uniform numbers. Solved is below 0.001.
    """

    length: int = 100
    name = "adding"
    kind = "regression"
    metric = "loss"
    higher_is_better = False
    x_width = 2
    y_width = 1

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UsageError(f"adding: length {self.length}; expected at least 2, one mark for each half")

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        half = self.length // 2
        value = torch.from_numpy(rng.random((size, self.length), dtype=np.float32))
        marks = np.stack([rng.integers(0, half, size), rng.integers(half, self.length, size)], 1)
        mark = torch.zeros(size, self.length).scatter(1, torch.from_numpy(marks), 1.0)
        y, weight = torch.zeros(size, self.length, 1), torch.zeros(size, self.length)
        y[:, -1, 0], weight[:, -1] = (value * mark).sum(1), 1.0
        return Batch(torch.stack([value, mark], -1), y, weight)

    def chance(self) -> float:
        return 1 / 3

    def baseline(self) -> float:
        return 1 / 6

    def oracle(self, batch: Batch) -> Tensor:
        """What has been marked so far."""
        return batch.x.prod(-1, keepdim=True).cumsum(1)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds skill: the share of the baseline's squared error that is gone; 1 is perfect, 0 no better."""
        found = super().metrics(out, batch)
        loss, count = found["loss"]
        return {**found, "skill": (count - loss / self.baseline(), count)}
