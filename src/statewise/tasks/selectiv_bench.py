"""SelectivBench: which state is a random grammar in, with gaps and noise (Bouhadjar et al. 2026, arXiv:2601.12598)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, certain, register_task, rng_of
from .generated import Generated
from .next_symbol import NextSymbol, share

ENTRIES = 4  # states that a string may begin in, of different symbols
ODDS = 0.4  # that a state has an edge of a given ambiguous symbol
END = 0  # the symbol and the state


class Grammar(NamedTuple):
    """State END is left for one of the entries. Of a state and a symbol at most one state follows."""

    symbol: np.ndarray  # (S,) what each state writes
    step: np.ndarray  # (S, V) the state that follows on a symbol; -1: none
    edges: np.ndarray  # (S, V) the states that follow, in front
    degree: np.ndarray  # (S,) how many
    wrong: np.ndarray  # (S, V) the symbols that cannot follow, in front


@register_task
@dataclass(frozen=True)
class SelectivBench(Generated):
    """x       c . a . b . # . a . c .     strings of a random grammar, one after the other, with gaps
    answer  5 5 2 2 7 7 0 0 3 3 5 5     the state that wrote the symbol: a is written by states 2 and 3

    `ambiguous` symbols are written by `depth` states each, `plain` ones by one state; # ends a string and is class 0.
    Symbols are one-hot, blanks zero. After each of the `length` symbols from number `gap_start` on there is, with
    probability `gap`, a gap of shortest_gap to longest_gap steps, blank or (violating) of symbols that cannot follow;
    the answer stays the same. Uniform noise up to `noise` is added to all inputs. `grammar` numbers the grammars.

    accuracy is by symbol: the model's probabilities are summed over its step and its gap. Chance: 1 / states. Baseline:
    the state that writes the symbol most often. The paper's tasks: ambiguous = depth = 40 and length 200; the second
    with longest_gap 10 and noise 0.2; the third with violating, gap 0.1, gap_start 50; the fourth tests the second with
    shortest_gap = longest_gap up to 100.
    """

    length: int = 48
    ambiguous: int = 6
    depth: int = 6
    plain: int = 0
    gap: float = 1.0
    shortest_gap: int = 1
    longest_gap: int = 1
    gap_start: int = 0
    violating: bool = False
    noise: float = 0.0
    grammar: int = 0
    name = "selectiv_bench"
    kind = "classification"
    metric = "accuracy"

    def __post_init__(self) -> None:
        if self.length < 1 or self.ambiguous < 1 or self.depth < 1 or self.plain < 0:
            given = f"{self.length}, {self.ambiguous}, {self.depth}, {self.plain}"
            raise UsageError(
                f"selectiv_bench: length, ambiguous, depth, plain are {given}; expected 1, 1, 1, 0 at least"
            )
        if not (0 <= self.gap <= 1 and 0 <= self.shortest_gap <= self.longest_gap and 0 <= self.noise < 1):
            given = f"{self.gap}, {self.shortest_gap} to {self.longest_gap}, {self.noise}"
            raise UsageError(f"selectiv_bench: gap, its steps, noise are {given}; expected 0 to 1, 0 or more, below 1")

    @property
    def x_width(self) -> int:  # type: ignore[override]
        return 1 + self.ambiguous + self.plain

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return 1 + self.ambiguous * self.depth + self.plain

    @property
    def rules(self) -> Grammar:
        return rules(self.ambiguous, self.depth, self.plain, self.grammar)

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        g, states = self.rules, walk(self.rules, size, self.length, rng)
        gaps = rng.integers(self.shortest_gap, self.longest_gap + 1, states.shape)
        gaps[(rng.random(states.shape) >= self.gap) | (np.arange(self.length) < self.gap_start)] = 0
        ends = (1 + gaps).cumsum(1)
        steps, lengths = self.length * (1 + self.longest_gap), ends[:, -1]
        begins = np.zeros((size, steps), bool)
        np.put_along_axis(begins, ends - 1 - gaps, True, 1)
        y = np.take_along_axis(states, begins.cumsum(1) - 1, 1)
        symbol = np.where(begins, g.symbol[y], -1)
        if self.violating:
            count = (g.wrong[y] >= 0).sum(-1)
            other = g.wrong[y, (rng.random(y.shape) * count).astype(np.int64)]
            symbol = np.where(begins, symbol, other)
        inside = np.arange(steps) < lengths[:, None]
        symbol, y = np.where(inside, symbol, -1), np.where(inside, y, 0)
        x = (symbol[..., None] == np.arange(self.x_width)).astype(np.float32)
        if self.noise:
            x += self.noise * rng.random(x.shape, np.float32)
            x[~inside] = 0
        ragged = torch.from_numpy(lengths) if (self.gap < 1 or self.shortest_gap < self.longest_gap) else None
        if ragged is None:
            end = int(lengths.max(initial=0)) or steps
            x, y, inside = x[:, :end], y[:, :end], inside[:, :end]
        return Batch(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(inside.astype(np.float32)), ragged)

    def symbols(self, batch: Batch) -> np.ndarray:
        """(B, T) the symbol at each step; -1 for none."""
        value, symbol = batch.x.max(-1)
        return np.where(value.numpy() >= 1, symbol.numpy(), -1)  # noise stays below 1

    def identity(self, batch: Batch) -> Tensor:
        """Symbols in order, without blanks and noise."""
        symbol = self.symbols(batch)
        order = (symbol < 0).argsort(1, kind="stable")
        return torch.from_numpy(np.take_along_axis(symbol, order, 1) + 1)

    def chance(self) -> float:
        return 1 / self.y_width

    def baseline(self) -> float:
        """The state that writes the present symbol most often."""
        return _by_symbol(self)

    def states(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The state at each step (B, T), and where a symbol belongs to the string (B, T): it can follow."""
        symbol, step = self.symbols(batch), self.rules.step
        state = np.full(len(symbol), END)
        found, moved = np.empty(symbol.shape, np.int64), np.empty(symbol.shape, bool)
        for t in range(symbol.shape[1]):
            following = np.where(symbol[:, t] >= 0, step[state, symbol[:, t]], -1)
            moved[:, t] = following >= 0
            state = np.where(moved[:, t], following, state)
            found[:, t] = state
        return found, moved

    def oracle(self, batch: Batch) -> Tensor:
        """The grammar, run: there is one state to go to."""
        return certain(torch.from_numpy(self.states(batch)[0]), self.y_width)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """accuracy by symbol; step_accuracy by step."""
        begins = torch.from_numpy(self.states(batch)[1])
        which = begins.long().cumsum(1) - 1  # (B, T) number of the symbol
        share = out.float().softmax(-1) * batch.weight[..., None]
        total = torch.zeros(len(out), self.length, out.shape[-1])
        total.scatter_add_(1, which[..., None].expand_as(share), share)
        right = total.argmax(-1) == batch.y[begins].view(-1, self.length)
        found = super().metrics(out, batch)
        return {**found, "step_accuracy": found["accuracy"], "accuracy": (float(right.sum()), float(right.numel()))}


@register_task
@dataclass(frozen=True)
class SelectivBenchNext(NextSymbol):
    """x       c a b # a c     strings of a random grammar, one after the other
    answer  a b # a c b     the next symbol; after each state, its edges are equally likely

    The grammars of selectiv_bench, without gaps. divergence is from the probabilities of the grammar to those of the
    model, in nats. Chance: all symbols alike. Baseline: each as often as it comes.
    """

    length: int = 48
    ambiguous: int = 6
    depth: int = 6
    plain: int = 0
    grammar: int = 0
    name = "selectiv_bench_next"
    metric = "divergence"
    higher_is_better = False

    def __post_init__(self) -> None:
        if self.length < 1 or self.ambiguous < 1 or self.depth < 1 or self.plain < 0:
            given = f"{self.length}, {self.ambiguous}, {self.depth}, {self.plain}"
            raise UsageError(f"{self.name}: length, ambiguous, depth, plain are {given}; expected 1, 1, 1, 0 at least")

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return 1 + self.ambiguous + self.plain

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.x_vocab

    @property
    def rules(self) -> Grammar:
        return rules(self.ambiguous, self.depth, self.plain, self.grammar)

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        g = self.rules
        states = walk(g, size, self.length + 1, rng)
        symbol = torch.from_numpy(g.symbol[states])
        truth = ((g.step >= 0) / g.degree[:, None]).astype(np.float32)[states[:, :-1]]
        asked = torch.ones(size, self.length)
        return Batch(symbol[:, :-1].contiguous(), symbol[:, 1:], asked, truth=torch.from_numpy(truth))

    def chance(self) -> float:
        return share(self, self.metric, torch.zeros(self.y_width))

    def baseline(self) -> float:
        """Every symbol with the probability with which it comes anywhere."""
        often = torch.stack([b.y.flatten().bincount(minlength=self.y_width) for b in self.batches("test")]).sum(0)
        return share(self, self.metric, (often / often.sum()).log().clamp_min(-40))


def walk(g: Grammar, size: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """States (size, length) along edges, from END."""
    states, state = np.empty((size, length), np.int64), np.full(size, END)
    coin = rng.random((length, size))
    for t in range(length):
        state = g.edges[state, (coin[t] * g.degree[state]).astype(np.int64)]
        states[:, t] = state
    return states


@lru_cache(maxsize=16)
def rules(ambiguous: int, depth: int, plain: int, number: int) -> Grammar:
    """A random grammar. For each state and symbol one state that writes it is drawn; the edge is there with odds 0.4
    for an ambiguous symbol, 0.4 / depth for another. Drawn anew until every state has a way to the end."""
    rng = rng_of("selectiv_bench", ambiguous, depth, plain, number)
    written = np.array([1, *[depth] * ambiguous, *[1] * plain])  # states of each symbol
    symbol = np.repeat(np.arange(len(written)), written)
    first = written.cumsum() - written
    states, v = len(symbol), len(written)
    for _ in range(10_000):
        target = first + rng.integers(0, written, (states, v))
        step = np.where(rng.random((states, v)) < written * ODDS / depth, target, -1)
        step[END] = -1
        entries = 1 + rng.permutation(v - 1)[: min(ENTRIES, v - 1)]
        step[END, entries] = (first + rng.integers(0, written))[entries]
        if _all_end(step):
            break
    else:
        given = f"{ambiguous}, {depth}, {plain}"
        raise UsageError(f"selectiv_bench: ambiguous, depth, plain are {given}; no grammar ends: take more symbols")
    there = step >= 0
    order = (~there).argsort(1, kind="stable")
    edges = np.take_along_axis(step, order, 1)
    wrong = np.where(~there, np.arange(v), -1)
    wrong = np.take_along_axis(wrong, there.argsort(1, kind="stable"), 1)
    return Grammar(symbol, step, edges, there.sum(1), wrong)


def _all_end(step: np.ndarray) -> bool:
    ends = np.arange(len(step)) == END
    while True:
        more = ends | ((step >= 0) & ends[step]).any(1)
        if (more == ends).all():
            return bool(ends.all())
        ends = more


@lru_cache(maxsize=16)
def _by_symbol(task: SelectivBench) -> float:
    seen = np.zeros((task.x_width, task.y_width), np.int64)
    for batch in task.batches("test"):
        begins = task.states(batch)[1]
        np.add.at(seen, (task.symbols(batch)[begins], batch.y.numpy()[begins]), 1)
    return float(seen.max(1).sum() / seen.sum())
