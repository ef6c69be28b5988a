"""A stream of events at uneven times: several clocks, each with its own period, heard as one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, certain, register_task
from .generated import Generated

CLOSE = 0.02  # of the time between two strokes of the quickest clock: nearer than this, nothing is asked


@register_task
@dataclass(frozen=True)
class Events(Generated):
    """x       0 a   .3 b   .7 a   .1 c   .9 a   .2 b     time since the last event, and which clock struck
    answer                                b    a ...      which clock strikes next

    Each of `clocks` has a period between 1 and 3 and a first stroke within it. Asked once every clock has struck twice,
    so that all periods are known, and unless two clocks would strike at almost the same time. Chance: accuracy
    1 / clocks; baseline: the clock that was silent for longest.
    """

    length: int = 48
    clocks: int = 4
    name = "events"
    kind = "classification"
    metric = "accuracy"

    def __post_init__(self) -> None:
        if self.clocks < 2:
            raise UsageError(f"events: clocks is {self.clocks}; expected at least 2")
        if self.length < 6 * self.clocks:  # a clock at period 3 needs so many of the others' to strike twice
            raise UsageError(f"events: length is {self.length}; expected at least 6 x clocks = {6 * self.clocks}")

    @property
    def x_width(self) -> int:  # type: ignore[override]
        return 1 + self.clocks

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.clocks

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        period = rng.uniform(1, 3, (size, self.clocks, 1))
        first = period * rng.random((size, self.clocks, 1))
        strokes = (first + period * np.arange(self.length + 2)).reshape(size, -1)  # (B, clocks (T + 2))
        order = strokes.argsort(1)[:, : self.length + 2]
        time, who = np.take_along_axis(strokes, order, 1), torch.from_numpy(order // (self.length + 2))
        ahead = torch.from_numpy(np.diff(time, axis=1))  # from an event to the next
        struck = torch.nn.functional.one_hot(who, self.clocks)
        known = (struck.cumsum(1) >= 2).all(-1)[:, : self.length]
        asked = known & (ahead[:, 1:] > CLOSE) & (ahead[:, :-1] > CLOSE)
        gap = torch.cat([torch.zeros(size, 1), ahead[:, : self.length - 1].float()], 1)
        x = torch.cat([gap[..., None], struck[:, : self.length].float()], -1)
        return Batch(x, who[:, 1 : self.length + 1] * asked, asked.float())

    def chance(self) -> float:
        return 1 / self.clocks

    def baseline(self) -> float:
        """The clock that was silent for longest."""
        found = [self.metrics(-_strokes(batch)[0], batch)["accuracy"] for batch in self.batches("test")]
        return sum(hits for hits, _ in found) / sum(asked for _, asked in found)

    def oracle(self, batch: Batch) -> Tensor:
        """The clock whose last stroke and period add up to the earliest time."""
        last, period = _strokes(batch)
        return certain((last + period).argmin(-1), self.clocks)


def _strokes(batch: Batch) -> tuple[Tensor, Tensor]:
    """When each clock struck last, and its period, (B, T, clocks) each; infinite where not known yet."""
    time, struck = batch.x[..., :1].double().cumsum(1), batch.x[..., 1:] > 0
    last = time.where(struck, -torch.inf).cummax(1).values
    before = torch.cat([torch.full_like(last[:, :1], -torch.inf), last[:, :-1]], 1)  # the last one, an event ago
    previous = before.where(struck, -torch.inf).cummax(1).values
    return last, torch.where(previous.isfinite(), last - previous, torch.inf)
