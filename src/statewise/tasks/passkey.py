"""A key hidden in a long text, asked for at its end (Mohtashami & Jaggi 2023, arXiv:2305.16300; as a measure of what a
state holds: Chen et al. 2024, arXiv:2410.07145)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, certain, register_task
from .generated import Generated


@register_task
@dataclass(frozen=True)
class Passkey(Generated):
    """x       w1 w2 w3 w1 * 5 0 7 * w2 w3 w1 w2 ? ? ?     words that mean nothing, a key between marks, questions
    answer                                     5 0 7     the key

    length 13, digits 3: the key is at a place drawn evenly, so that recency is no help. words: "repeat", the same few
    over and over; "random". Ids 0 to 9 are digits, 10 the mark, 11 the question, then `vocabulary` words. Chance and
    baseline: accuracy 1/10; exact match is sequence_accuracy, 10 ** -digits by chance.
    """

    length: int = 128  # of what comes before the questions
    digits: int = 5
    words: Literal["repeat", "random"] = "repeat"
    vocabulary: int = 16
    name = "passkey"
    kind = "classification"
    metric = "accuracy"
    y_width = 10

    def __post_init__(self) -> None:
        if self.digits < 1 or self.vocabulary < 1:
            raise UsageError(f"passkey: digits, vocabulary are {self.digits}, {self.vocabulary}; expected at least 1")
        if self.length < self.digits + 2:
            raise UsageError(f"passkey: length is {self.length}; expected at least digits + 2 = {self.digits + 2}")
        if self.words not in ("repeat", "random"):
            raise UsageError(f"passkey: words is {self.words!r}; expected 'repeat' or 'random'")

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return 12 + self.vocabulary

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        time = np.arange(self.length)
        start = rng.integers(0, self.length - self.digits - 1, size)[:, None]  # of the first mark
        if self.words == "random":
            before = 12 + rng.integers(0, self.vocabulary, (size, self.length))
        else:
            spoken = time - np.where(time > start, self.digits + 2, 0)  # the text goes on behind the key
            before = 12 + spoken % self.vocabulary
        key = rng.integers(0, 10, (size, self.digits))
        np.put_along_axis(
            before, start + np.arange(self.digits + 2), np.pad(key, ((0, 0), (1, 1)), constant_values=10), 1
        )
        x = np.concatenate([before, np.full_like(key, 11)], 1)
        y = np.concatenate([np.zeros_like(before), key], 1)
        weight = np.broadcast_to(np.arange(x.shape[1]) >= self.length, x.shape).astype(np.float32)
        return Batch(*map(torch.from_numpy, (x, y, weight)))

    def chance(self) -> float:
        return 1 / 10

    def baseline(self) -> float:
        """Any digit: they are uniform."""
        return 1 / 10

    def oracle(self, batch: Batch) -> Tensor:
        """What stands behind the first mark."""
        start = (batch.x == 10).long().argmax(1, keepdim=True)
        key = batch.x.gather(1, start + 1 + torch.arange(self.digits))
        return certain(torch.cat([torch.zeros_like(batch.x[:, : self.length]), key], 1), 10)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds sequence_accuracy: the share of keys without a mistake."""
        right = ((out.argmax(-1) == batch.y) | (batch.weight == 0)).all(1)
        return {**super().metrics(out, batch), "sequence_accuracy": (float(right.sum()), float(len(right)))}
