"""Multi-query associative recall as it was published: gaps by a power law, many symbols, noise (Arora et al. 2024,
arXiv:2312.04927, sec. 3). `recall` is its plainer form, with queries at uniform places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, certain, register_task
from .draws import by_weight, distinct
from .generated import Generated


@register_task
@dataclass(frozen=True)
class Mqar(Generated):
    """x       a 3 b 1 b . . . a .     pairs of a key and a value, then each key once more
    answer          1       3         the value that stood behind it

    pairs 2, length 10. Of the (length - 2 pairs) / 2 places behind the pairs, the j-th is taken by a key with odds
    j ** (power - 1), no place twice: with a small power most keys come back soon, at power 1 anywhere. Ids: 0 blank,
    1 to symbols keys, then as many values, no key and no value twice in a row. fill: "blank", or "values", random
    values that are no answer to anything. Chance: accuracy 1 / symbols; baseline: any value of the row, 1 / pairs.
    """

    length: int = 64
    pairs: int = 4
    symbols: int = 128
    power: float = 0.01
    fill: Literal["blank", "values"] = "blank"
    name = "mqar"
    kind = "classification"
    metric = "accuracy"

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.symbols:
            raise UsageError(f"mqar: pairs is {self.pairs}; expected 1 to symbols = {self.symbols}")
        if self.length < 4 * self.pairs or self.length % 2:
            raise UsageError(f"mqar: length is {self.length}; expected an even number, at least {4 * self.pairs}")
        if self.power <= 0 or self.fill not in ("blank", "values"):
            raise UsageError(
                f"mqar: power, fill are {self.power}, {self.fill!r}; expected above 0, 'blank' or 'values'"
            )

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return 1 + 2 * self.symbols

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.symbols

    @property
    def odds(self) -> np.ndarray:
        """Of the places behind the pairs, not normalised."""
        return np.arange(1, (self.length - 2 * self.pairs) // 2 + 1) ** (self.power - 1)

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        keys, values = (distinct(size, self.pairs, self.symbols, rng) for _ in range(2))
        told = 2 * self.pairs
        places = told + 2 * by_weight(size, self.pairs, np.log(self.odds), rng)
        x, y = np.zeros((2, size, self.length), np.int64)
        if self.fill == "values":
            x[:] = 1 + self.symbols + rng.integers(0, self.symbols, x.shape)
        x[:, 0:told:2], x[:, 1:told:2] = 1 + keys, 1 + self.symbols + values
        np.put_along_axis(x, places, 1 + keys, 1)
        np.put_along_axis(y, places, values, 1)
        weight = torch.zeros(size, self.length).scatter_(1, torch.from_numpy(places), 1.0)
        return Batch(torch.from_numpy(x), torch.from_numpy(y), weight)

    def chance(self) -> float:
        return 1 / self.symbols

    def baseline(self) -> float:
        """One of the row's values, whichever is asked."""
        return 1 / self.pairs

    def oracle(self, batch: Batch) -> Tensor:
        """The value behind the key, wherever a key stands."""
        told = 2 * self.pairs
        behind = torch.zeros(len(batch.x), self.x_vocab, dtype=torch.int64)
        behind.scatter_(1, batch.x[:, 0:told:2], batch.x[:, 1:told:2] - 1 - self.symbols)
        return certain(behind.gather(1, batch.x), self.symbols)
