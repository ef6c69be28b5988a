"""Copying from memory: data at the start (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016, arXiv:1511.06464, sec.
5.1) or scattered in noise (Gu & Dao 2023, arXiv:2312.00752, sec. 4.1.1)."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, certain, register_task
from .generated import Generated


@dataclass(frozen=True)
class _Copying(Generated):
    """Id 0 is blank, 1 to `symbols` are data, symbols + 1 asks. The answer is the datum's id - 1."""

    length: int = 40  # of what comes before the first question
    copied: int = 5
    symbols: int = 8
    kind = "classification"
    metric = "accuracy"

    def __post_init__(self) -> None:
        if not 1 <= self.copied <= self.length:
            raise UsageError(f"{self.name}: copied is {self.copied}; expected 1 to length = {self.length}")
        if self.symbols < 2:
            raise UsageError(f"{self.name}: symbols is {self.symbols}; expected at least 2")

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return self.symbols + 2

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.symbols

    @abc.abstractmethod
    def places(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """(B, copied) increasing: where the data stand."""

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        data = torch.from_numpy(rng.integers(0, self.symbols, (size, self.copied)))
        before = torch.zeros(size, self.length, dtype=torch.int64)
        before.scatter_(1, torch.from_numpy(self.places(size, rng)), data + 1)
        ask = torch.full((size, self.copied), self.symbols + 1)
        silence = torch.zeros_like(before)
        return Batch(
            x=torch.cat([before, ask], 1),
            y=torch.cat([silence, data], 1),
            weight=torch.cat([silence, torch.ones_like(data)], 1).float(),
        )

    def chance(self) -> float:
        return 1 / self.symbols

    def baseline(self) -> float:
        """Any constant answer: the data are uniform."""
        return 1 / self.symbols

    def oracle(self, batch: Batch) -> Tensor:
        """The data in order of appearance."""
        before = batch.x[:, : self.length]
        data = before.gather(1, (before == 0).sort(dim=1, stable=True).indices[:, : self.copied]) - 1
        return certain(torch.cat([torch.zeros_like(before), data], 1), self.symbols)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds sequence_accuracy: the share of rows without a mistake."""
        right = ((out.argmax(-1) == batch.y) | (batch.weight == 0)).all(1)
        return {**super().metrics(out, batch), "sequence_accuracy": (float(right.sum()), float(len(right)))}


@register_task
@dataclass(frozen=True)
class Copy(_Copying):
    """x       3 1 4 . . . . ? ? ?     data at the start, a long silence, then questions
    answer                2 0 3     the data in order, as classes from 0

    length 7, copied 3. A linear time-invariant layer can solve it. Chance and baseline: accuracy 1 / symbols.
    """

    name = "copy"

    def places(self, size: int, rng: np.random.Generator) -> np.ndarray:
        return np.tile(np.arange(self.copied), (size, 1))


@register_task
@dataclass(frozen=True)
class SelectiveCopy(_Copying):
    """x       . 3 . . 1 . 4 ? ? ?     data at random places in the silence, then questions
    answer                2 0 3     the data in order, as classes from 0

    length 7, copied 3. What to remember depends on the input. Chance and baseline: accuracy 1 / symbols.
    """

    name = "selective_copy"

    def places(self, size: int, rng: np.random.Generator) -> np.ndarray:
        return np.sort(rng.random((size, self.length)).argsort(1)[:, : self.copied], 1)
