"""Reber's grammar (Reber 1967), alone and embedded (Hochreiter & Schmidhuber 1997, sec. 5.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .automaton import Automaton
from .base import Batch, Split, register_task
from .next_symbol import NextSymbol

SYMBOLS = "BTSXPVE"
B, T, S, X, P, V, E = range(7)
EDGES = [{B: 1}, {T: 2, P: 3}, {S: 2, X: 4}, {T: 3, V: 5}, {X: 3, S: 6}, {P: 4, V: 6}, {E: 7}, {}]


def _graph() -> Automaton:
    """Of the grammar: every edge out of a state is taken equally often; 7 is the end, 8 is reached by no string."""
    step, weight = np.full((9, 7), 8), np.zeros((9, 7))
    for state, edges in enumerate(EDGES):
        for symbol, following in edges.items():
            step[state, symbol], weight[state, symbol] = following, 1 / len(edges)
    return Automaton(step, np.arange(9) == 7, weight)


GRAPH = _graph()
WEIGHT = np.asarray(GRAPH.weight, np.float32)


@dataclass(frozen=True)
class _Reber(NextSymbol):
    """Training and validation strings follow the grammar's law of lengths up to `length`; the test has all lengths from
    half of it to `length` equally often. truth is of the grammar without that end: 1/2 for each of two edges."""

    length: int = 40
    x_vocab = 7
    y_width = 7

    @property
    def depth(self) -> int:
        return 0

    def __post_init__(self) -> None:
        if self.depth < 0 or self.length < 6 + 4 * self.depth:
            raise UsageError(f"{self.name}: length is {self.length}; expected at least {6 + 4 * self.depth}")

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        d, longest = self.depth, self.length - 4 * self.depth
        share = law(longest)
        if split == "test":
            share = (share > 0) & (np.arange(longest + 1) >= min(longest, self.length // 2 - 4 * d))
        inner = rng.choice(longest + 1, size, p=share / share.sum())
        rows, total = np.arange(size), inner + 4 * d
        x = np.zeros((size, self.length), np.int64)
        text = GRAPH.draw(inner, np.ones(size, bool), rng)  # (B, longest of them)
        x[:, 2 * d : 2 * d + text.shape[1]] = text
        for level, kept in enumerate(rng.choice([T, P], (d, size))):
            last = total - 1 - 2 * level  # of this level's E
            x[:, 2 * level], x[:, 2 * level + 1], x[rows, last - 1], x[rows, last] = B, kept, kept, E
        nothing = torch.zeros(x.shape)
        return Batch(torch.from_numpy(x), nothing.long(), nothing, torch.from_numpy(total))

    def finish(self, batch: Batch) -> Batch:
        assert batch.lengths is not None
        d, x, total = self.depth, batch.x.numpy(), batch.lengths.numpy()
        rows, time, one = np.arange(len(x)), np.arange(x.shape[1]), np.eye(7, dtype=np.float32)
        inside = (time >= 2 * d) & (time < total[:, None] - 2 * d)
        truth = WEIGHT[GRAPH.run(np.where(inside, x, -1))]
        for level in range(d):
            last, kept = total - 1 - 2 * level, x[:, 2 * level + 1]
            truth[:, 2 * level], truth[:, 2 * level + 1] = (one[T] + one[P]) / 2, one[B]
            truth[rows, last - 2], truth[rows, last - 1] = one[kept], one[E]
        asked = time < total[:, None] - 1
        truth[~asked] = 1 / 7
        y = np.where(asked, np.roll(x, -1, 1), 0)
        return batch._replace(
            y=torch.from_numpy(y), weight=torch.from_numpy(asked).float(), truth=torch.from_numpy(truth)
        )

    def chance(self) -> float:
        """Activities in random order."""
        return _chance(self)

    def baseline(self) -> float:
        """The commonest symbols, in the order of how often they come."""
        return _baseline(self)


@register_task
@dataclass(frozen=True)
class Reber(_Reber):
    """x       B T X X V V E
    answer  T X X V V E       the next symbol: after BTX, X or S may come

    exact is the share of steps at which the symbols that may come are the most active ones.
    """

    name = "reber"
    metric = "exact"


@register_task
@dataclass(frozen=True)
class EmbeddedReber(_Reber):
    """x       B P B T X X V V E P E
    answer  P B T X X V V E P E       the next symbol; the second returns at the end

    far is the accuracy where a symbol from before the inner string returns: chance and baseline 1/2 between T and P.
    nested is how many strings are put into one another.
    """

    nested: int = 1
    name = "embedded_reber"
    metric = "far"

    @property
    def depth(self) -> int:
        return self.nested

    def __post_init__(self) -> None:
        if self.nested < 1:
            raise UsageError(f"embedded_reber: nested is {self.nested}; expected at least 1")
        super().__post_init__()

    def chance(self) -> float:
        return 1 / 2

    def baseline(self) -> float:
        """T, always."""
        return 1 / 2

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds far."""
        assert batch.lengths is not None
        rows = torch.arange(len(batch.y))[:, None]
        far = batch.lengths[:, None] - 3 - 2 * torch.arange(self.depth)
        right = out.argmax(-1)[rows, far] == batch.y[rows, far]
        return {**super().metrics(out, batch), "far": (float(right.sum()), float(right.numel()))}


@lru_cache(maxsize=32)
def law(longest: int) -> np.ndarray:
    """(longest + 1,) the law of a string's length, given that it is not above `longest`."""
    share = np.exp(GRAPH.logs(longest)[:, 0])
    return share / share.sum()


@lru_cache(maxsize=32)
def _chance(task: _Reber) -> float:
    total = count = 0.0
    for batch in task.batches("test"):
        assert batch.truth is not None
        can = (batch.truth > 0).sum(-1)[batch.weight > 0]
        total += sum(int(n) / math.comb(7, k) for k, n in enumerate(can.bincount(minlength=8)) if k)
        count += len(can)
    return total / count


@lru_cache(maxsize=32)
def _baseline(task: _Reber) -> float:
    often, total, count = torch.zeros(7), 0.0, 0.0
    for batch in task.batches("test"):
        often += batch.y[batch.weight > 0].bincount(minlength=7)
    for batch in task.batches("test"):
        hits, asked = task.metrics(often.expand(*batch.y.shape, 7), batch)["exact"]
        total, count = total + hits, count + asked
    return total / count
