"""Two kinds of tasks over strings of symbols: answer with a string, and say whether a string belongs to a language."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, Task, certain
from .generated import Generated


@dataclass(frozen=True)
class _Lengths(Generated):
    """Training and validation lengths are uniform from `shortest` to `length`."""

    shortest: int = 1
    length: int = 40
    kind = "classification"
    metric = "accuracy"
    least: ClassVar[int] = 1  # the shortest string that there is
    spare = 40

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.length or self.length < self.least:
            lengths, least = f"{self.shortest}, {self.length}", self.least
            raise UsageError(f"{self.name}: lengths are {lengths}; expected 1 <= shortest <= length, length >= {least}")

    def draw_lengths(self, size: int, shortest: int, rng: np.random.Generator) -> np.ndarray:
        return self.fitting(rng.integers(max(shortest, self.least), self.length + 1, size))

    def fitting(self, lengths: np.ndarray) -> np.ndarray:
        """The nearest lengths, from below, that a string can have."""
        return lengths

    def baseline(self) -> float:
        """The commonest answer, always."""
        return majority(self)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds sequence_accuracy: the share of rows without a mistake."""
        right = ((out.argmax(-1) == batch.y) | (batch.weight == 0)).all(1)
        return {**super().metrics(out, batch), "sequence_accuracy": (float(right.sum()), float(len(right)))}


class Answers(_Lengths):
    """A string of `symbols` symbols is read, then as many questions are put as the answer can have places.

    Id 0 is padding, a symbol's id is its number + 1, symbols + 1 asks. The answer is of `classes` classes. What stands
    behind the end of an answer is not scored. The test has strings of exactly `length`.
    """

    symbols: int
    classes: int

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return self.symbols + 2

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.classes

    @abc.abstractmethod
    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Strings (B, `length`) of symbols from 0; anything past their ends."""

    @abc.abstractmethod
    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Answers (B, K), anything past their ends, and their lengths (B,). text (B, N): as `draw` made it."""

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        """How many questions are put; increasing."""
        return np.ones_like(lengths)

    def chance(self) -> float:
        return 1 / self.classes

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        lengths = self.draw_lengths(size, self.length if split == "test" else self.shortest, rng)
        longest = int(self.fitting(np.array(self.length)))
        slots = self.slots(lengths)
        time = np.arange(longest + int(self.slots(np.array(longest))))
        x = np.zeros((size, len(time)), np.int64)
        x[:, :longest] = self.draw(lengths, rng)[:, :longest] + 1
        x[time >= lengths[:, None]] = self.symbols + 1
        x[time >= (lengths + slots)[:, None]] = 0
        nothing = torch.zeros(x.shape)
        return Batch(torch.from_numpy(x), nothing.long(), nothing, torch.from_numpy(lengths + slots))

    def finish(self, batch: Batch) -> Batch:
        x = batch.x.numpy()
        lengths = ((x > 0) & (x <= self.symbols)).sum(1)
        slots = (x == self.symbols + 1).sum(1)
        text = np.where(np.arange(x.shape[1]) < lengths[:, None], x - 1, 0)[:, : int(lengths.max(initial=1))]
        answers, ends = self.solve(text, lengths)
        place = np.arange(x.shape[1]) - lengths[:, None]
        asked = (place >= 0) & (place < np.minimum(ends, slots)[:, None])
        y = np.where(asked, np.take_along_axis(answers, place.clip(0, answers.shape[1] - 1), 1), 0)
        return batch._replace(y=torch.from_numpy(y), weight=torch.from_numpy(asked.astype(np.float32)))

    def oracle(self, batch: Batch) -> Tensor:
        """The answer to what stands before the first question."""
        return certain(self.finish(batch).y, self.classes)


class Membership(_Lengths):
    """Does the string belong to the language? Asked at its last symbol. Half the strings do, where both kinds exist.

    Id 0 is padding, a symbol's id is its number + 1. The test has strings of half `length` to `length`.
    """

    symbols: int
    y_width = 2

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return self.symbols + 1

    @abc.abstractmethod
    def draw(self, lengths: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Strings (B, `length`) of symbols from 0; in the language where `wanted` (B,), and there is one."""

    @abc.abstractmethod
    def accepts(self, text: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(B,) bool."""

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        shortest = max(self.shortest, (self.length + 1) // 2) if split == "test" else self.shortest
        lengths = self.draw_lengths(size, shortest, rng)
        text = self.draw(lengths, rng.random(size) < 0.5, rng)
        time = np.arange(self.length)
        x = np.where(time < lengths[:, None], text + 1, 0)
        nothing = torch.zeros(x.shape)
        return Batch(torch.from_numpy(x), nothing.long(), nothing, torch.from_numpy(lengths))

    def finish(self, batch: Batch) -> Batch:
        assert batch.lengths is not None
        inside = torch.from_numpy(self.accepts(batch.x.numpy() - 1, batch.lengths.numpy()))
        asked = torch.arange(batch.x.shape[1]) == batch.lengths[:, None] - 1
        return batch._replace(y=(asked & inside[:, None]).long(), weight=asked.float())

    def chance(self) -> float:
        return 1 / 2

    def oracle(self, batch: Batch) -> Tensor:
        """The language's own rule."""
        return certain(self.finish(batch).y, 2)


@lru_cache(maxsize=64)
def majority(task: Task) -> float:
    """The share of the commonest class in the answers of the test set."""
    counts = torch.zeros(task.y_width, dtype=torch.int64)
    for batch in task.batches("test"):
        counts += batch.y[batch.weight > 0].bincount(minlength=task.y_width)
    return int(counts.max()) / int(counts.sum())
