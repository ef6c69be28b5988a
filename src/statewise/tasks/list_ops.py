"""ListOps (Nangia & Bowman 2018, arXiv:1804.06028), long as in the Long Range Arena (Tay et al. 2021,
arXiv:2011.04006)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .asked import majority
from .base import Batch, Split, certain, register_task
from .generated import Generated

MIN, MAX, MED, SUM = range(4)  # ids 10 to 13; 14 closes, 15 is padding
CLOSE = 14
DIGIT = 0.75  # the odds of a digit where a list could be


class Level(NamedTuple):
    """The nodes of one depth of many trees, children of one parent side by side and in the order of their parents."""

    tree: np.ndarray
    parent: np.ndarray  # place in the level above
    value: np.ndarray  # a digit, or 10 + the operator
    children: np.ndarray  # how many; 0 for a digit


@register_task
@dataclass(frozen=True)
class ListOps(Generated):
    """x       [MAX 2 9 [MIN 4 7 ] 0 ]     lists that hold digits and lists
    answer                           9     the value, a digit

    MIN, MAX, MED (the median, rounded down), SM (the sum modulo 10), each with 2 to `args` arguments; an argument is a
    digit with probability 3/4, nothing is deeper than `depth`. Trees are drawn so and kept where they have more than
    length / 4 and less than `length` tokens (the paper's: 500 to 2000). Ids 0 to 9 are digits, 10 to 13 opening
    brackets with their operator, 14 the closing one, 15 padding. Short strings are mostly flat lists. Chance: accuracy
    1/10; baseline: the commonest value, about 0.17 by reason of MIN and MAX.
    """

    length: int = 100
    depth: int = 10
    args: int = 10
    name = "list_ops"
    spare = 40
    kind = "classification"
    metric = "accuracy"
    x_vocab = 16
    y_width = 10

    def __post_init__(self) -> None:
        if self.args < 2 or self.depth < 2 or self.length < 16:
            given = f"{self.length}, {self.depth}, {self.args}"
            raise UsageError(f"list_ops: length, depth, args are {given}; expected at least 16, 2, 2")

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        x, lengths = np.full((size, self.length), 15), np.zeros(size, np.int64)
        y, have, rate = np.zeros(size, np.int64), 0, 0.15
        while have < size:
            count = min(int((size - have) / rate) + 32, 1 << 14)
            levels, total = grow(count, self.depth, self.args, rng, self.length)
            good = (4 * total > self.length) & (total < self.length)
            rate = max(float(good.mean()), 0.01)
            good &= good.cumsum() <= size - have
            if levels := prune(levels, good):
                end = have + int(good.sum())
                lengths[have:end], y[have:end] = write(levels, x[have:end]), values(levels)[0]
                have = end
        asked = np.arange(self.length) == lengths[:, None] - 1
        answers = np.where(asked, y[:, None], 0)
        return Batch(*map(torch.from_numpy, (x, answers, asked.astype(np.float32), lengths)))

    def identity(self, batch: Batch) -> Tensor:
        return torch.where(batch.x == 15, 0, batch.x + 1)

    def chance(self) -> float:
        return 1 / 10

    def baseline(self) -> float:
        """The commonest value."""
        return majority(self)

    def oracle(self, batch: Batch) -> Tensor:
        """The value, by a stack of open lists."""
        y = torch.zeros_like(batch.x)
        for row, (ids, end) in enumerate(zip(batch.x.tolist(), batch.lengths.tolist())):  # type: ignore[union-attr]
            y[row, end - 1] = evaluate(ids[:end])
        return certain(y, 10)


def evaluate(ids: list[int]) -> int:
    """The value of one string of tokens."""
    open_lists: list[list[int]] = [[]]
    for token in ids:
        if token == CLOSE:
            operator, *digits = open_lists.pop()
            digits.sort()
            half = len(digits) // 2
            middle = digits[half] if len(digits) % 2 else (digits[half - 1] + digits[half]) // 2
            open_lists[-1].append((digits[0], digits[-1], middle, sum(digits) % 10)[operator - 10])
        elif token < 10:
            open_lists[-1].append(token)
        else:
            open_lists.append([token])
    return open_lists[0][0]


def grow(count: int, depth: int, args: int, rng: np.random.Generator, most: int) -> tuple[list[Level], np.ndarray]:
    """Trees whose root is a list, level by level, and their tokens (count,).

    One that has more than `most` tokens is not grown on.
    """
    tree, parent, total = np.arange(count), np.zeros(count, np.int64), np.zeros(count, np.int64)
    levels: list[Level] = []
    while len(tree):
        lists = np.arange(count)
        if levels:
            lists = (rng.random(len(tree), np.float32) >= DIGIT).nonzero()[0] if len(levels) < depth - 1 else lists[:0]
        value, children = rng.integers(0, 10, len(tree)), np.zeros(len(tree), np.int64)
        value[lists], children[lists] = rng.integers(10, 14, len(lists)), rng.integers(2, args + 1, len(lists))
        total += np.bincount(tree, minlength=count) + np.bincount(tree[lists], minlength=count)
        children[(total > most)[tree]] = 0
        levels.append(Level(tree, parent, value, children))
        parent = np.repeat(np.arange(len(tree)), children)
        tree = tree[parent]
    return levels, total


def prune(levels: list[Level], trees: np.ndarray) -> list[Level]:
    """Some of the trees (count,) bool, numbered anew."""
    found: list[Level] = []
    number = trees.cumsum() - 1
    place = np.zeros(1, np.int64)
    for level in levels:
        kept = trees[level.tree].nonzero()[0]
        if not len(kept):
            break
        found.append(
            Level(number[level.tree[kept]], place[level.parent[kept]], level.value[kept], level.children[kept])
        )
        place = np.zeros(len(level.tree), np.int64)
        place[kept] = np.arange(len(kept))
    return found


def sizes(levels: list[Level]) -> list[np.ndarray]:
    """Tokens of every node with all below it, level by level."""
    found: list[np.ndarray] = []
    for i in reversed(range(len(levels))):
        own = np.where(levels[i].value < 10, 1, 2)
        if found:
            own = own + np.bincount(levels[i + 1].parent, found[0], len(own)).astype(np.int64)
        found.insert(0, own)
    return found


def values(levels: list[Level]) -> list[np.ndarray]:
    """The value of every node, level by level."""
    found: list[np.ndarray] = []
    for i in reversed(range(len(levels))):
        value = levels[i].value.copy()
        lists = levels[i].children.nonzero()[0]
        if len(lists):
            counts = np.bincount(levels[i + 1].parent * 10 + found[0], minlength=10 * len(value))
            below = counts.reshape(-1, 10)[lists].cumsum(1)  # arguments up to each digit
            n, operator = below[:, 9], value[lists] - 10
            rank = np.where(operator == MAX, n - 1, np.where(operator == MED, (n - 1) // 2, 0))
            lower = _at(below, rank)
            middle = (lower + _at(below, n // 2)) // 2
            total = 10 * n - below.sum(1)  # the sum: nine for each argument, less one for each digit above it
            result = np.where(operator == SUM, total % 10, np.where(operator == MED, middle, lower))
            value[lists] = result
        found.insert(0, value)
    return found


def _at(below: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The argument at a place of the ordered ones."""
    return (below <= place[:, None]).sum(1)


def write(levels: list[Level], x: np.ndarray) -> np.ndarray:
    """The tokens of the trees into the rows of x; their numbers are returned."""
    tokens, start = sizes(levels), np.zeros(1, np.int64)
    for i, level in enumerate(levels):
        if i:  # behind the parent's bracket and what stands before in the same list
            before = tokens[i].cumsum() - tokens[i]
            first = np.ones(len(before), bool)
            first[1:] = level.parent[1:] != level.parent[:-1]
            start = start[level.parent] + 1 + before - np.maximum.accumulate(np.where(first, before, 0))
        else:
            start = np.zeros(len(level.tree), np.int64)
        x[level.tree, start] = level.value
        lists = level.children.nonzero()[0]
        x[level.tree[lists], start[lists] + tokens[i][lists] - 1] = CLOSE
    return tokens[0]
