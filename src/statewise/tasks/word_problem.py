"""The word problem of a group: keep the product of everything seen (Liu et al. 2023, arXiv:2210.10749; Siems et al.
2025, arXiv:2502.10297, sec. 5)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, certain, register_task
from .generated import Generated

Group = Literal["Z2", "Z5", "Z60", "S3", "S4", "A5", "S5"]
Moves = Literal["all", "few"]
Permutation = tuple[int, ...]


@register_task
@dataclass(frozen=True)
class WordProblem(Generated):
    """x       a b b a c       elements of a group, drawn evenly; here swaps of three things:
    answer  a ba a 1 c       what they come to, the newest on the left: (0 1), (1 2), (0 2) are a, b, c

    group: "S3", "S4", "S5", all orders of so many things; "A5", the even ones of five; "Z60" and "Z5", turns by
    sixtieths and fifths; "Z2", parity. Elements are numbered in the order of their permutations, the identity first.
    moves: "all" elements are drawn, or a "few": the identity, a cycle of all things, and a swap of two, or in A5 a turn
    of three.
    Training and validation have `length` steps, the test has `test_length`: accuracy_trained and accuracy_beyond part
    its steps there. Chance: accuracy 1 / order; baseline: the newest element, right wherever the product before it was
    the identity.
    """

    group: Group = "S3"
    length: int = 16
    test_length: int = 64
    moves: Moves = "all"
    name = "word_problem"
    kind = "classification"
    metric = "accuracy"

    def __post_init__(self) -> None:
        if self.group not in get_args(Group):
            raise UsageError(f"word_problem: group is {self.group!r}; expected one of {', '.join(get_args(Group))}")
        if self.moves not in get_args(Moves):
            raise UsageError(f"word_problem: moves is {self.moves!r}; expected 'all' or 'few'")
        if not 1 <= self.length <= self.test_length:
            lengths = f"{self.length}, {self.test_length}"
            raise UsageError(f"word_problem: lengths are {lengths}; expected 1 <= length <= test_length")

    @property
    def order(self) -> int:
        return len(table(self.group))

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return self.order

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.order

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        steps = self.test_length if split == "test" else self.length
        drawn = np.arange(self.order) if self.moves == "all" else few(self.group)
        x = drawn[rng.integers(0, len(drawn), (size, steps))]
        y = products(x, table(self.group))
        return Batch(torch.from_numpy(x), torch.from_numpy(y), torch.ones(size, steps))

    def chance(self) -> float:
        return 1 / self.order

    def baseline(self) -> float:
        """The newest element."""
        if self.moves == "all":
            return (1 + (self.test_length - 1) / self.order) / self.test_length
        found = [float((batch.x == batch.y).float().mean()) for batch in self.batches("test")]
        return sum(found) / len(found)

    def oracle(self, batch: Batch) -> Tensor:
        return certain(torch.from_numpy(products(batch.x.numpy(), table(self.group))), self.order)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds sequence_accuracy, the share of rows without a mistake, and the two parts of long rows."""
        right = out.argmax(-1) == batch.y
        found = {**super().metrics(out, batch), "sequence_accuracy": (float(right.all(1).sum()), float(len(right)))}
        if right.shape[1] > self.length:
            near, far = right[:, : self.length], right[:, self.length :]
            found["accuracy_trained"] = float(near.sum()), float(near.numel())
            found["accuracy_beyond"] = float(far.sum()), float(far.numel())
        return found


def products(x: np.ndarray, times: np.ndarray) -> np.ndarray:
    """y_t = x_t ... x_2 x_1 for ids x (B, T), by doubling. times: `table`."""
    y, reach = x.copy(), 1
    while reach < x.shape[1]:
        y[:, reach:] = times[y[:, reach:], y[:, :-reach]]
        reach *= 2
    return y


@lru_cache
def table(group: Group) -> np.ndarray:
    """(order, order): the id of element i after element j."""
    elements = _elements(group)
    place = {element: i for i, element in enumerate(elements)}
    return np.array([[place[_after(p, q)] for q in elements] for p in elements])


@lru_cache
def few(group: Group) -> np.ndarray:
    """Ids of the identity and of a few elements whose products are the whole group."""
    points = tuple(range(int(group[1:])))
    return np.array([_elements(group).index(move) for move in dict.fromkeys([points, *_generators(group)])])


def _elements(group: Group) -> list[Permutation]:
    return sorted(_closed(_generators(group)))


def _generators(group: Group) -> list[Permutation]:
    kind, n = group[0], int(group[1:])
    points = tuple(range(n))
    cycle = points[1:] + points[:1]
    if kind == "Z":
        return [cycle]
    return [cycle, (1, 0, *points[2:]) if kind == "S" else (1, 2, 0, *points[3:])]


def _after(p: Permutation, q: Permutation) -> Permutation:
    """First q, then p."""
    return tuple(p[i] for i in q)


def _closed(generators: list[Permutation]) -> set[Permutation]:
    """Every product of generators."""
    found = {tuple(range(len(generators[0])))}
    while True:
        more = {_after(g, p) for g, p in itertools.product(generators, found)} - found
        if not more:
            return found
        found |= more
