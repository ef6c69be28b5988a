"""Multi-query associative recall (Arora et al. 2024, arXiv:2312.04927, sec. 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, certain, register_task
from .generated import Generated


@register_task
@dataclass(frozen=True)
class Recall(Generated):
    """x       a 3 b 1 . . b . a .     pairs of a key and a value, then each key once more, among blanks
    answer              1   3       the value that stood behind it

    pairs 2, length 10. Id 0 is blank, 1 to `symbols` are keys, the next `symbols` values; a row has no key and no value
    twice, and each key is asked for at a random place. Chance: accuracy 1 / symbols; baseline: any value of the row,
    1 / pairs.
    """

    length: int = 64
    pairs: int = 4
    symbols: int = 64
    name = "recall"
    kind = "classification"
    metric = "accuracy"

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.symbols:
            raise UsageError(f"recall: pairs is {self.pairs}; expected 1 to symbols = {self.symbols}")
        if self.length < 3 * self.pairs:
            raise UsageError(f"recall: length is {self.length}; expected at least 3 x pairs = {3 * self.pairs}")

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return 1 + 2 * self.symbols

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.symbols

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        keys, values = (_distinct(size, self.pairs, self.symbols, rng) for _ in range(2))
        told = 2 * self.pairs
        places = told + _distinct(size, self.pairs, self.length - told, rng)
        x = torch.zeros(size, self.length, dtype=torch.int64)
        y, weight = torch.zeros_like(x), torch.zeros(size, self.length)
        x[:, 0:told:2], x[:, 1:told:2] = 1 + keys, 1 + self.symbols + values
        x.scatter_(1, places, 1 + keys)
        y.scatter_(1, places, values)
        weight.scatter_(1, places, 1.0)
        return Batch(x, y, weight)

    def chance(self) -> float:
        return 1 / self.symbols

    def baseline(self) -> float:
        """One of the row's values, whichever is asked."""
        return 1 / self.pairs

    def oracle(self, batch: Batch) -> Tensor:
        """The value behind the key, wherever a key stands."""
        told = 2 * self.pairs
        keys, values = batch.x[:, 0:told:2], batch.x[:, 1:told:2] - 1 - self.symbols  # (B, pairs)
        same = batch.x[:, :, None] == keys[:, None]  # (B, T, pairs)
        return certain((same * values[:, None]).sum(-1), self.symbols)


def _distinct(size: int, count: int, among: int, rng: np.random.Generator) -> Tensor:
    """(size, count) numbers below `among`, no two in a row the same, in random order."""
    return torch.from_numpy(rng.random((size, among), np.float32).argsort(1)[:, :count])
