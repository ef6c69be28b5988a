"""Elman's tasks (Elman 1990): what comes next, where only some of it can be known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, register_task
from .next_symbol import NextSymbol, share

LETTERS = "bdgaiu"
FEATURES = torch.tensor(  # consonant, vowel, interrupted, high, back, voiced
    [[1, 0, 1, 0, 0, 1], [1, 0, 1, 1, 0, 1], [1, 0, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1],
     [0, 1, 0, 1, 1, 1]], dtype=torch.float32,
)  # fmt: skip
SYLLABLES = ([0, 3], [1, 4, 4], [2, 5, 5])  # ba, dii, guu


@dataclass(frozen=True)
class _Stream(NextSymbol):
    length: int = 60
    metric = "certain"

    def __post_init__(self) -> None:
        if self.length < 6:
            raise UsageError(f"{self.name}: length is {self.length}; expected at least 6")

    def stream(self, x: np.ndarray, truth: np.ndarray) -> Batch:
        """x (B, length + 1); truth (B, length, E) of the symbol behind each."""
        x = np.ascontiguousarray(x)
        asked = torch.ones(len(x), self.length)
        known = torch.from_numpy(truth.astype(np.float32))
        return Batch(torch.from_numpy(x[:, :-1]), torch.from_numpy(x[:, 1:]), asked, None, None, known)

    def baseline(self) -> float:
        """The symbol that comes most often, always."""
        often = sum(b.y.flatten().bincount(minlength=self.y_width) for b in self.batches("test"))
        assert isinstance(often, Tensor)
        return share(self, self.metric, often)


@register_task
@dataclass(frozen=True)
class ElmanXor(_Stream):
    """x       1 0 1 0 0 0 1 1 0     two random bits and then their exclusive or, without a break
    answer  0 1 0 0 0 1 1 0 .     the next bit

    certain is the accuracy at every third bit, the one that can be known; elsewhere 1/2 is the best answer. Streams
    begin with a first bit. Chance and baseline: 1/2.
    """

    name = "elman_xor"
    x_vocab = 2
    y_width = 2

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        bits = rng.integers(0, 2, (size, self.length // 3 + 1, 3))
        bits[..., 2] = bits[..., 0] ^ bits[..., 1]
        x = bits.reshape(size, -1)[:, : self.length + 1]
        truth = np.full((size, self.length, 2), 0.5, np.float32)
        truth[:, 1::3] = np.eye(2)[x[:, 2::3]]
        return self.stream(x, truth)

    def chance(self) -> float:
        return 1 / 2


@register_task
@dataclass(frozen=True)
class ElmanLetters(_Stream):
    """x       b a g u u d i i b     random consonants, each with its vowels: ba, dii, guu
    answer  a g u u d i i b .     the next letter

    certain is the accuracy at the vowels, which can be known. kind is the accuracy of consonant or vowel, which can be
    known everywhere, though which consonant cannot. The paper's six features of each letter are FEATURES; what a model
    expects of them is its probabilities times these. Chance: 1/6; baseline: the commonest letter.
    """

    name = "elman_letters"
    x_vocab = 6
    y_width = 6

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        count = self.length // 2 + 2
        chosen = rng.integers(0, 3, (size, count))
        sizes = np.array([len(s) for s in SYLLABLES])[chosen]
        starts = sizes.cumsum(1) - sizes
        first = np.zeros((size, 3 * count), bool)
        np.put_along_axis(first, starts, True, 1)
        which = first.cumsum(1) - 1  # (B, T) number of the syllable
        x = np.take_along_axis(chosen, which.clip(0, count - 1), 1) + np.where(first, 0, 3)
        x = x[:, : self.length + 1]
        begins = first[:, 1 : self.length + 1]
        truth = np.eye(6, dtype=np.float32)[x[:, 1:]]
        truth[begins] = np.array([1, 1, 1, 0, 0, 0], np.float32) / 3
        return self.stream(x, truth)

    def chance(self) -> float:
        return 1 / 6

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds kind."""
        right = ((out.argmax(-1) < 3) == (batch.y < 3)) * batch.weight
        return {**super().metrics(out, batch), "kind": (float(right.sum()), float(batch.weight.sum()))}
