"""Deterministic context-free tasks of the Chomsky hierarchy (Delétang et al. 2023, arXiv:2207.02098): a stack is
enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..core import UsageError
from .asked import Answers
from .base import register_task
from .chomsky_regular import MINUS, PLUS, TIMES, check_modulus


@register_task
@dataclass(frozen=True)
class Reverse(Answers):
    """x       0 1 1 ? ? ?
    answer        1 1 0     the string backwards

    `letters` different symbols. Chance and baseline: accuracy 1 / letters.
    """

    letters: int = 2
    name = "reverse"

    @property
    def symbols(self) -> int:  # type: ignore[override]
        return self.letters

    @property
    def classes(self) -> int:  # type: ignore[override]
        return self.letters

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        return lengths

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, self.letters, (len(lengths), self.length))

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place = lengths[:, None] - 1 - np.arange(text.shape[1])
        return np.take_along_axis(text, place.clip(0), 1), lengths


@register_task
@dataclass(frozen=True)
class StackManipulation(Answers):
    """x       0 1 pop push1 push0 ? ? ? ? ? ?     a stack, its top last, then what is done to it
    answer                         0 1 0 $         the stack from its top, then its end ($)

    Symbols 0, 1; 2 pops, 3 pushes 0, 4 pushes 1. The first stack is of 1 to length - 1 bits, evenly; popping nothing
    is allowed. Classes 0, 1, 2 for the end. Chance: accuracy 1/3; baseline: always the commonest class.
    """

    name = "stack_manipulation"
    symbols = 5
    classes = 3
    least = 2

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        return lengths + 1

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        first = rng.integers(1, lengths)[:, None]
        shape = len(lengths), self.length
        return np.where(np.arange(self.length) < first, rng.integers(0, 2, shape), rng.integers(2, 5, shape))

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, steps = np.arange(len(text)), text.shape[1]
        stack, height = np.zeros((len(text), steps + 1), np.int64), np.zeros(len(text), np.int64)
        for t in range(steps):
            symbol, inside = text[:, t], t < lengths
            pop = symbol == 2
            stack[rows, height] = np.where(symbol >= 3, symbol - 3, symbol)  # above the top: of no account
            height = np.where(inside, np.where(pop, (height - 1).clip(0), height + 1), height)
        place = height[:, None] - 1 - np.arange(steps + 1)
        return np.where(place >= 0, np.take_along_axis(stack, place.clip(0), 1), 2), height + 1


class Span(NamedTuple):
    """A level of the trees of many expressions: where each part stands, and which part of the level above it is in."""

    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    operator: np.ndarray  # of the parts with two operands; -1 for others
    left: np.ndarray  # place of the first operand in the next level; -1 where there is none


@dataclass(frozen=True)
class _Brackets(Answers):
    """Symbols: digits 0 to modulus - 1, then + - * ( )."""

    modulus: int = 5
    products: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_modulus(self.name, self.modulus)

    @property
    def classes(self) -> int:  # type: ignore[override]
        return self.modulus

    def expressions(self, lengths: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Texts (B, length) and their values (B,): every expression is split at a uniform place, level by level."""
        m = self.modulus
        opening, closing = m + 3, m + 4
        text = rng.integers(0, m, (len(lengths), self.length))
        row, start, length = np.arange(len(lengths)), np.zeros(len(lengths), np.int64), lengths
        levels = []
        while len(row):
            wrapped = length >= 3
            text[row[wrapped], start[wrapped]] = opening
            text[row[wrapped], (start + length)[wrapped] - 1] = closing
            signed = (length == 2) | (length == 4)
            text[row[signed], (start + (length == 4))[signed]] = m + MINUS
            two = length >= 5
            where = two.nonzero()[0]
            operator = np.full(len(row), -1)
            operator[two] = rng.integers(PLUS, (TIMES if self.products else MINUS) + 1, len(where))
            first = np.ones(len(where), np.int64) if not len(where) else rng.integers(1, length[two] - 3)
            text[row[two], start[two] + 1 + first] = m + operator[two]
            left = np.full(len(row), -1)
            left[two] = np.arange(len(where))
            levels.append(Span(row, start, length, operator, left))
            row = np.tile(row[two], 2)
            start, length = (
                np.concatenate([start[two] + 1, start[two] + 2 + first]),
                np.concatenate([first, length[two] - 3 - first]),
            )
        return text, self._value(text, levels)

    def _value(self, text: np.ndarray, levels: list[Span]) -> np.ndarray:
        below = np.zeros(0, np.int64)
        for row, start, length, operator, left in reversed(levels):
            digit = start + np.array([0, 0, 1, 1, 2])[length.clip(0, 4)]
            value = text[row, digit.clip(0, text.shape[1] - 1)]
            value = np.where((length == 2) | (length == 4), -value, value)
            two = left >= 0
            a, b = below[left[two]], below[left[two] + len(below) // 2]
            value[two] = np.where(operator[two] == TIMES, a * b, np.where(operator[two] == MINUS, a - b, a + b))
            below = value % self.modulus
        return below

    def value_of(self, text: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(B,) values of expressions in brackets, read once from left to right with a stack of what stands open.

        An open bracket keeps the operand before its operator and the operator; an operator where an operand should
        be is a sign.
        """
        m, (size, steps) = self.modulus, text.shape
        rows, height = np.arange(size), np.zeros(size, np.int64)
        value = np.zeros((size, steps + 2), np.int64)
        operator = np.zeros((size, steps + 2), np.int64)  # what is done with the next operand; at first it is added
        due, sign = np.ones(size, bool), np.ones(size, np.int64)
        for t in range(int(lengths.max(initial=0))):
            s = np.where(t < lengths, text[:, t], -1)
            digit, opens, closes = (s >= 0) & (s < m), s == m + 3, s == m + 4
            operates = (s >= m) & (s < m + 3)
            sign[operates & due] = -1
            operator[rows, height] = np.where(operates & ~due, s - m, operator[rows, height])
            operand = np.where(closes, value[rows, height], sign * s)
            height = height + opens - closes
            value[rows[opens], height[opens]] = operator[rows[opens], height[opens]] = 0
            given = digit | closes
            known, does = value[rows, height], operator[rows, height]
            made = np.where(does == TIMES, known * operand, np.where(does == MINUS, known - operand, known + operand))
            value[rows, height] = np.where(given, made % m, known)
            due = np.where(given, False, opens | operates)
            sign[given] = 1
        return value[:, 0]


@register_task
@dataclass(frozen=True)
class ModularBrackets(_Brackets):
    """x       ( ( - 2 ) + ( 3 - 1 ) ) ?
    answer                          0      the value modulo 5

    Symbols: digits 0 to modulus - 1, then + - * ( ); * only with products. An expression of length n is d, -d, (d),
    (-d), or (L op R) with L of uniform length 1 to n - 4. Chance: accuracy 1 / modulus, and so the baseline without
    products.
    """

    name = "modular_brackets"

    @property
    def symbols(self) -> int:  # type: ignore[override]
        return self.modulus + 5

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.expressions(lengths, rng)[0]

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.value_of(text, lengths)[:, None], np.ones_like(lengths)


@register_task
@dataclass(frozen=True)
class SolveEquation(_Brackets):
    """x       ( z - ( 3 + 1 ) ) = 2 ?
    answer                        1      the digit that z stands for, modulo 5

    An expression as in modular_brackets, without products, so that there is one answer. Symbols: digits 0 to modulus -
    1, then + - * ( ) z =. Chance and baseline: accuracy 1 / modulus.
    """

    name = "solve_equation"
    least = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.products:
            raise UsageError("solve_equation: products is True; expected False, for there to be one answer")

    @property
    def symbols(self) -> int:  # type: ignore[override]
        return self.modulus + 7

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        text, value = self.expressions(lengths - 2, rng)
        time, rows = np.arange(self.length), np.arange(len(lengths))
        digit = (text < self.modulus) & (time < lengths[:, None] - 2)
        text[rows, np.where(digit, rng.random(text.shape), -1).argmax(1)] = self.modulus + 5
        text[rows, lengths - 2], text[rows, lengths - 1] = self.modulus + 6, value
        return text

    def solve(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The unknown counts once, added or taken away: two values of the left side tell which."""
        unknown = text == self.modulus + 5
        at = [self.value_of(np.where(unknown, digit, text), lengths - 2) for digit in (0, 1)]
        wanted = np.take_along_axis(text, lengths[:, None] - 1, 1)[:, 0]
        return ((wanted - at[0]) * (at[1] - at[0]) % self.modulus)[:, None], np.ones_like(lengths)
