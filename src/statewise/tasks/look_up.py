"""Copy a string and look up what follows in it (Jelassi et al. 2024, arXiv:2402.01032); induction (Fu et al. 2023,
arXiv:2212.14052; Gu & Dao 2023, arXiv:2312.00752, sec. 4.1.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .asked import Answers
from .base import Batch, Split, certain, register_task
from .generated import Generated


@register_task
@dataclass(frozen=True)
class StringCopy(Answers):
    """x       c a b | c a b     a string, a bar, and the string again
    answer        c a b $     the next symbol, from the bar on, and then the end

    The model is given what it should have said so far, so that looking up the last few symbols is enough. `letters`
    different symbols, uniform. Ids: 0 padding, 1 to letters symbols, letters + 1 the bar. Chance: accuracy
    1 / (letters + 1); baseline: always the end, or always a symbol.
    """

    letters: int = 26
    name = "string_copy"

    @property
    def symbols(self) -> int:  # type: ignore[override]
        return self.letters

    @property
    def classes(self) -> int:  # type: ignore[override]
        return self.letters + 1

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        return lengths + 1

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, self.letters, (len(lengths), self.length))

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        text = np.pad(text, ((0, 0), (0, 1)))
        text[np.arange(len(text)), lengths] = self.letters
        return text, lengths + 1

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        batch = super().sample(size, rng, split)
        assert batch.lengths is not None
        half = batch.lengths[:, None] // 2  # of 2 n + 1 steps
        place = torch.arange(batch.x.shape[1]) - half - 1
        again = (place >= 0) & (place < half)
        return batch._replace(x=torch.where(again, batch.x.gather(1, place.clamp_min(0)), batch.x))

    def finish(self, batch: Batch) -> Batch:
        assert batch.lengths is not None
        asks, half = self.letters + 1, batch.lengths[:, None] // 2
        time = torch.arange(batch.x.shape[1])
        put = (time >= half) & (time < batch.lengths[:, None])
        return super().finish(batch._replace(x=batch.x.masked_fill(put, asks)))._replace(x=batch.x)


@register_task
@dataclass(frozen=True)
class NgramLookup(Generated):
    """x       b a c a d c | a d     a string, a bar, and some `n` neighbours of it
    answer                    c     the symbol behind them

    length 6, n 2. given "before": the neighbours come first (a d | b a c a d c |), the answer at the end still. They
    stand in the string once. Ids: 0 the bar, 1 to `letters` symbols. Chance and baseline: accuracy 1 / letters.
    """

    length: int = 40
    n: int = 2
    given: Literal["after", "before"] = "after"
    letters: int = 26
    name = "ngram_lookup"
    kind = "classification"
    metric = "accuracy"

    def __post_init__(self) -> None:
        if self.letters < 2 or not 1 <= self.n < self.length:
            given = f"{self.letters}, {self.n}"
            raise UsageError(f"ngram_lookup: letters, n are {given}; expected at least 2, 1 to below {self.length}")
        if self.given not in ("after", "before"):
            raise UsageError(f"ngram_lookup: given is {self.given!r}; expected 'after' or 'before'")
        once = (1 - self.letters**-self.n) ** (self.length - self.n)
        if once < 0.01:
            raise UsageError(f"ngram_lookup: n is {self.n}; in {self.length} symbols none stands once: make n larger")

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return 1 + self.letters

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.letters

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        text = np.empty((size, self.length), np.int64)
        start, todo = np.empty(size, np.int64), np.arange(size)
        while len(todo):  # until they stand once
            text[todo] = rng.integers(1, self.letters + 1, (len(todo), self.length))
            start[todo] = rng.integers(0, self.length - self.n, len(todo))
            todo = todo[matches(text[todo], self.wanted(text[todo], start[todo])).sum(1) != 1]
        key, bar = self.wanted(text, start), np.zeros((size, 1), np.int64)
        x = np.concatenate([key, bar, text, bar] if self.given == "before" else [text, bar, key], 1)
        y, weight = np.zeros_like(x), torch.zeros(x.shape)
        y[:, -1], weight[:, -1] = text[np.arange(size), start + self.n] - 1, 1.0
        return Batch(torch.from_numpy(x), torch.from_numpy(y), weight)

    def wanted(self, text: np.ndarray, start: np.ndarray) -> np.ndarray:
        return np.take_along_axis(text, start[:, None] + np.arange(self.n), 1)

    def chance(self) -> float:
        return 1 / self.letters

    def baseline(self) -> float:
        """Any symbol: they are uniform."""
        return 1 / self.letters

    def oracle(self, batch: Batch) -> Tensor:
        """What stands behind the neighbours."""
        x, n, end = batch.x.numpy(), self.n, self.length
        key, text = (x[:, :n], x[:, n + 1 : -1]) if self.given == "before" else (x[:, -n:], x[:, :end])
        start = matches(text, key).argmax(1)
        y = torch.zeros_like(batch.x)
        y[:, -1] = torch.from_numpy(text[np.arange(len(x)), start + n] - 1)
        return certain(y, self.letters)


def matches(text: np.ndarray, key: np.ndarray) -> np.ndarray:
    """(B, T - n + 1): where the neighbours key (B, n) begin in text (B, T)."""
    n = key.shape[1]
    found = np.ones((len(text), text.shape[1] - n + 1), bool)
    for i in range(n):
        found &= text[:, i : i + found.shape[1]] == key[:, i, None]
    return found


@register_task
@dataclass(frozen=True)
class Induction(Generated):
    """x       3 1 > 4 0 2 1 >     random symbols, somewhere a sign; at the end the sign again
    answer                  4     the symbol that stood behind the sign

    length 7. The sign stands nowhere else; its place is uniform. Ids: 0 the sign, 1 to `symbols` symbols. Chance and
    baseline: accuracy 1 / symbols.
    """

    length: int = 64  # of what comes before the last sign
    symbols: int = 16
    name = "induction"
    kind = "classification"
    metric = "accuracy"

    def __post_init__(self) -> None:
        if self.length < 2 or self.symbols < 2:
            raise UsageError(f"induction: length, symbols are {self.length}, {self.symbols}; expected at least 2, 2")

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return 1 + self.symbols

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.symbols

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        x = rng.integers(1, self.symbols + 1, (size, self.length + 1))
        place, rows = rng.integers(0, self.length - 1, size), np.arange(size)
        x[rows, place] = x[:, -1] = 0
        y, weight = np.zeros_like(x), torch.zeros(x.shape)
        y[:, -1], weight[:, -1] = x[rows, place + 1] - 1, 1.0
        return Batch(torch.from_numpy(x), torch.from_numpy(y), weight)

    def chance(self) -> float:
        return 1 / self.symbols

    def baseline(self) -> float:
        """Any symbol: they are uniform."""
        return 1 / self.symbols

    def oracle(self, batch: Batch) -> Tensor:
        """What stands behind the first sign."""
        behind = (batch.x == 0).long().argmax(1, keepdim=True) + 1
        y = torch.zeros_like(batch.x)
        y[:, -1:] = batch.x.gather(1, behind) - 1
        return certain(y, self.symbols)
