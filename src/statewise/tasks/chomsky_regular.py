"""Regular tasks of the Chomsky hierarchy (Delétang et al. 2023, arXiv:2207.02098): finite memory is enough. Their
parity is `parity`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import UsageError
from .asked import Answers
from .base import register_task

PLUS, MINUS, TIMES = 0, 1, 2  # operators, counted from the first symbol after the digits


@register_task
@dataclass(frozen=True)
class EvenPairs(Answers):
    """x       0 1 1 0 1 ?
    answer            1      are neighbours that differ odd in number? that is, do the first and the last differ

    Chance and baseline: accuracy 1/2.
    """

    name = "even_pairs"
    symbols = 2
    classes = 2

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, 2, (len(lengths), self.length))

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        last = np.take_along_axis(text, lengths[:, None] - 1, 1)
        return text[:, :1] ^ last, np.ones_like(lengths)


@register_task
@dataclass(frozen=True)
class CycleNavigation(Answers):
    """x       + + . - + ?     one step on, none, one back, on a circle of `modulus` places
    answer            2      the place reached from 0

    Symbols 0, 1, 2: stay, on, back. Chance and baseline: accuracy 1 / modulus.
    """

    modulus: int = 5
    name = "cycle_navigation"
    symbols = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_modulus(self.name, self.modulus)

    @property
    def classes(self) -> int:  # type: ignore[override]
        return self.modulus

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, 3, (len(lengths), self.length))

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moves = np.array([0, 1, -1])[text]
        moves[np.arange(text.shape[1]) >= lengths[:, None]] = 0
        return moves.sum(1, keepdims=True) % self.modulus, np.ones_like(lengths)


@register_task
@dataclass(frozen=True)
class ModularArithmetic(Answers):
    """x       2 + 3 * 4 ?
    answer            4      the value modulo 5; products before sums

    Digits 0 to modulus - 1 and +, -, * in turn, all uniform; lengths are odd. Chance: accuracy 1 / modulus; baseline:
    always 0, which products make a little commoner.
    """

    modulus: int = 5
    name = "modular_arithmetic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_modulus(self.name, self.modulus)

    @property
    def symbols(self) -> int:  # type: ignore[override]
        return self.modulus + 3

    @property
    def classes(self) -> int:  # type: ignore[override]
        return self.modulus

    def fitting(self, lengths: np.ndarray) -> np.ndarray:
        return lengths - (lengths % 2 == 0)

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        text = rng.integers(0, self.modulus, (len(lengths), self.length))
        text[:, 1::2] = rng.integers(self.modulus, self.modulus + 3, text[:, 1::2].shape)
        return text

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total, term = np.zeros(len(text), np.int64), text[:, 0].copy()
        for t in range(2, text.shape[1], 2):
            operator, digit, inside = text[:, t - 1] - self.modulus, text[:, t], t < lengths
            times = operator == TIMES
            total += np.where(inside & ~times, term, 0)
            following = np.where(times, term * digit, np.where(operator == MINUS, -digit, digit)) % self.modulus
            term = np.where(inside, following, term)
        return ((total + term) % self.modulus)[:, None], np.ones_like(lengths)


def check_modulus(name: str, modulus: int) -> None:
    if modulus < 2:
        raise UsageError(f"{name}: modulus is {modulus}; expected at least 2")
