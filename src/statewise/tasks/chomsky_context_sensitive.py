"""Context-sensitive tasks of the Chomsky hierarchy (Delétang et al. 2023, arXiv:2207.02098): a tape as long as the
input is enough. Multiplication as in Kaiser & Sutskever 2015, arXiv:1511.08228."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .asked import Answers
from .base import Batch, register_task


@dataclass(frozen=True)
class _OfLetters(Answers):
    """Strings of `letters` different symbols, uniform."""

    letters: int = 2

    @property
    def symbols(self) -> int:  # type: ignore[override]
        return self.letters

    @property
    def classes(self) -> int:  # type: ignore[override]
        return self.letters

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, self.letters, (len(lengths), self.length))


@register_task
@dataclass(frozen=True)
class Duplicate(_OfLetters):
    """x       0 1 1 ? ? ? ? ? ?
    answer        0 1 1 0 1 1     the string twice

    Chance and baseline: accuracy 1 / letters.
    """

    name = "duplicate"

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        return 2 * lengths

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place = np.arange(2 * text.shape[1]) % lengths[:, None]
        return np.take_along_axis(text, place, 1), 2 * lengths


@register_task
@dataclass(frozen=True)
class MissingDuplicate(_OfLetters):
    """x       0 1 1 0 . 1 ?     a string twice, with one symbol gone
    answer              1     the one that is gone

    Symbol number `letters` stands for the gap; lengths are even. Chance and baseline: accuracy 1 / letters.
    """

    name = "missing_duplicate"
    least = 2

    @property
    def symbols(self) -> int:  # type: ignore[override]
        return self.letters + 1

    def fitting(self, lengths: np.ndarray) -> np.ndarray:
        return lengths // 2 * 2

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        half = super().draw(lengths, rng)
        text = np.take_along_axis(half, np.arange(self.length) % (lengths // 2)[:, None], 1)
        text[np.arange(len(text)), rng.integers(0, lengths)] = self.letters
        return text

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gap = (text == self.letters).argmax(1)
        other = (gap + lengths // 2) % lengths
        return np.take_along_axis(text, other[:, None], 1), np.ones_like(lengths)


@register_task
@dataclass(frozen=True)
class OddsFirst(_OfLetters):
    """x       a b c d e ? ? ? ? ?
    answer            b d a c e     places 1, 3, ... (counted from 0), then places 0, 2, ...

    Chance and baseline: accuracy 1 / letters.
    """

    name = "odds_first"

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        return lengths

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        time, odds = np.arange(text.shape[1]), (lengths // 2)[:, None]
        place = np.where(time < odds, 2 * time + 1, 2 * (time - odds))
        return np.take_along_axis(text, place.clip(0, text.shape[1] - 1), 1), lengths


@register_task
@dataclass(frozen=True)
class BucketSort(_OfLetters):
    """x       3 1 4 1 ? ? ? ?
    answer          1 1 3 4     the symbols in order

    Chance and baseline: accuracy 1 / letters.
    """

    letters: int = 5
    name = "bucket_sort"

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        return lengths

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inside = np.arange(text.shape[1]) < lengths[:, None]
        return np.sort(np.where(inside, text, self.letters), 1).clip(0, self.letters - 1), lengths


class _Numbers(Answers):
    """Answers are numbers in binary, without zeros at their heads, then an end (class 2). Numbers of any size are
    exact: they are Python's own."""

    classes = 3

    def answers(self, numbers: list[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Lowest bit first (B, steps + 1), the end behind the highest; lengths with the end."""
        ends = np.array([max(1, number.bit_length()) for number in numbers], np.int64)
        bits = _bits(numbers, steps)
        place = np.arange(steps + 1)
        return np.where(place < ends[:, None], np.pad(bits, ((0, 0), (0, 1))), 2), ends + 1


@dataclass(frozen=True)
class _Operation(_Numbers):
    """Two numbers, lowest bit first, with the operator (symbol 2) between. Their lengths: uniform, and what is left."""

    symbols = 3
    least = 3

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        text = rng.integers(0, 2, (len(lengths), self.length))
        text[np.arange(len(text)), rng.integers(1, lengths - 1)] = 2
        return text

    def operands(self, text: np.ndarray, lengths: np.ndarray) -> tuple[list[int], list[int]]:
        operator, time = (text == 2).argmax(1)[:, None], np.arange(text.shape[1])
        bit = np.where(time < lengths[:, None], text, 0)
        second = np.take_along_axis(bit, (operator + 1 + time).clip(0, text.shape[1] - 1), 1)
        second[operator + 1 + time >= text.shape[1]] = 0
        return _numbers(np.where(time < operator, bit, 0)), _numbers(second)


@register_task
@dataclass(frozen=True)
class BinaryAddition(_Operation):
    """x       0 1 + 1 1 ? ? ? ? ? ?     2 + 3, the lowest bit first
    answer            1 0 1 $           5, then its end ($); what stands behind the end is not asked

    Chance: accuracy 1/3; baseline: always the commonest class.
    """

    name = "binary_addition"

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        return lengths  # of 1 + n - 2 bits and the end, at most

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, b = self.operands(text, lengths)
        return self.answers([m + n for m, n in zip(a, b)], text.shape[1])


@register_task
@dataclass(frozen=True)
class BinaryMultiplication(_Operation):
    """x       0 1 * 1 1 ? ? ? ? ?     2 times 3, the lowest bit first
    answer            0 1 1 $         6, then its end ($); what stands behind the end is not asked

    With a factor of one bit it is hardly a product: accuracy_long is of rows whose factors both have more. Chance:
    accuracy 1/3; baseline: always the commonest class.
    """

    name = "binary_multiplication"

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        return lengths

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, b = self.operands(text, lengths)
        return self.answers([m * n for m, n in zip(a, b)], text.shape[1])

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds accuracy_long."""
        operator, asks = (batch.x == 3).long().argmax(1), (batch.x == 4).long().argmax(1)
        asked = batch.weight * ((operator > 1) & (asks - operator > 2))[:, None]
        right = (out.argmax(-1) == batch.y) * asked
        return {**super().metrics(out, batch), "accuracy_long": (float(right.sum()), float(asked.sum()))}


@register_task
@dataclass(frozen=True)
class ComputeSqrt(_Numbers):
    """x       1 0 1 0 ? ? ? ?     10, the highest bit first
    answer          1 1 $       its root, rounded down: 3, the lowest bit first, then its end ($)

    Chance: accuracy 1/3; baseline: always the commonest class.
    """

    name = "compute_sqrt"
    symbols = 2

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        return (lengths + 1) // 2 + 1

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, 2, (len(lengths), self.length))

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place = lengths[:, None] - 1 - np.arange(text.shape[1])
        bits = np.where(place >= 0, np.take_along_axis(text, place.clip(0), 1), 0)
        return self.answers(list(map(math.isqrt, _numbers(bits))), (text.shape[1] + 1) // 2)


def _numbers(bits: np.ndarray) -> list[int]:
    """Rows of bits (B, N), lowest first."""
    packed = np.packbits(bits.astype(np.uint8), axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _bits(numbers: list[int], steps: int) -> np.ndarray:
    count = (steps + 7) // 8
    packed = np.frombuffer(b"".join(n.to_bytes(count, "little") for n in numbers), np.uint8).reshape(-1, count)
    return np.unpackbits(packed, axis=1, bitorder="little")[:, :steps].astype(np.int64)
