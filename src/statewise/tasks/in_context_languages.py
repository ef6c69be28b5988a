"""In-context language learning: every row is in a language of its own (Akyürek et al. 2024, arXiv:2401.12973)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, register_task
from .next_symbol import NextSymbol

LEAST, EDGES = 4, 3  # states and letters at least; edges out of a state at most
BAR = 0


class Languages(NamedTuple):
    """B random automata. Every state has 1 to EDGES edges, of different letters, to different other states."""

    degree: np.ndarray  # (B, S) edges, all equally likely
    letter: np.ndarray  # (B, S, EDGES)
    target: np.ndarray  # (B, S, EDGES)


@register_task
@dataclass(frozen=True)
class InContextLanguages(NextSymbol):
    """x       | a c a b | c a c | a b a c a     strings of a random automaton, each from its first state
    answer  a c a b . c a c . a b a c a .     the next letter; it is not asked where a string ends

    The automaton has 4 to `states` states and 4 to `letters` of so many letters; a state has 1 to 3 edges to other
    states, all equally likely. Strings have 1 to `string` letters. Ids: 0 the bar, 1 to letters; classes from 0.
    accuracy is the share of steps where the answer can follow; overlap 1 - the total variation to what the automaton
    would write. Chance: a letter at random. Baseline: the letter that came most often in the row after the present one.
    (The paper's: states 12, letters 18, string 49, 10 to 19 strings, which is a length of about 375.)
    """

    length: int = 128
    states: int = 6
    letters: int = 8
    string: int = 15
    name = "in_context_languages"

    def __post_init__(self) -> None:
        if self.states < LEAST or self.letters < LEAST or self.length < 2 or self.string < 1:
            given = f"{self.length}, {self.states}, {self.letters}, {self.string}"
            raise UsageError(f"{self.name}: length, states, letters, string are {given}; expected at least 2, 4, 4, 1")

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return 1 + self.letters

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.letters

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        text, truth = self.write(languages(size, self.states, self.letters, rng), rng)
        asked = text[:, 1:] != BAR
        y = np.where(asked, text[:, 1:] - 1, 0)
        x, weight = torch.from_numpy(text[:, :-1].copy()), torch.from_numpy(asked.astype(np.float32))
        return Batch(x, torch.from_numpy(y), weight, truth=truth)

    def write(self, made: Languages, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
        """Texts (B, length + 1); the probabilities (B, length, letters) of the letter behind each, as it would be if
        no bar came."""
        size = len(made.degree)
        rows, state = np.arange(size), np.zeros(size, np.int64)
        text = np.zeros((size, self.length + 1), np.int64)
        where = np.empty((size, self.length), np.int64)
        left = rng.integers(1, self.string + 1, size)
        coin = rng.random((self.length, size))
        fresh = rng.integers(1, self.string + 1, (self.length, size))
        for t in range(self.length):
            where[:, t] = state
            edge = (coin[t] * made.degree[rows, state]).astype(np.int64)
            ends = left == 0
            text[:, t + 1] = np.where(ends, BAR, 1 + made.letter[rows, state, edge])
            state = np.where(ends, 0, made.target[rows, state, edge])
            left = np.where(ends, fresh[t], left - 1)
        share = probabilities(made, self.letters)
        return text, torch.from_numpy(share[rows[:, None], where])

    def chance(self) -> float:
        """A letter at random."""
        return _chance(self)

    def baseline(self) -> float:
        """The letter that came most often in the row after the present one; a random one if none did."""
        return _bigram(self)


def languages(size: int, states: int, letters: int, rng: np.random.Generator) -> Languages:
    count = rng.integers(LEAST, states + 1, size)[:, None]
    known = rng.integers(LEAST, letters + 1, size)[:, None]
    alphabet = rng.random((size, letters)).argsort(1)
    shape = (size, states)
    letter = different([], np.broadcast_to(known, shape), EDGES, rng)
    letter = np.take_along_axis(alphabet[:, None], letter, 2)
    here = np.broadcast_to(np.arange(states), shape)
    target = different([here], np.broadcast_to(count, shape), EDGES, rng)
    return Languages(rng.integers(1, EDGES + 1, shape), letter, target)


def different(taken: list[np.ndarray], among: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(..., count) numbers below `among` (...), different from one another and from those taken, in random order."""
    taken, found = list(taken), []
    for _ in range(count):
        number = rng.integers(0, np.maximum(among - len(taken), 1))
        for other in np.sort(np.stack(taken, -1), -1).transpose(-1, *range(among.ndim)) if taken else ():
            number = number + (number >= other)
        taken.append(number)
        found.append(number)
    return np.stack(found, -1)


def probabilities(made: Languages, letters: int) -> np.ndarray:
    """(B, S, letters) of the next letter in each state."""
    share = np.zeros((*made.degree.shape, letters), np.float32)
    edge = np.where(np.arange(EDGES) < made.degree[..., None], 1 / made.degree[..., None], 0).astype(np.float32)
    np.put_along_axis(share, made.letter, edge, -1)
    return share


def after_one(x: Tensor, vocabulary: int) -> Tensor:
    """How often each id came after the present one so far: x (B, T) to (B, T, vocabulary)."""
    one = F.one_hot(x, vocabulary).float()
    counts, found, rows = torch.zeros(len(x), vocabulary, vocabulary), [], torch.arange(len(x))
    for t in range(x.shape[1]):
        if t:
            counts[rows, x[:, t - 1]] += one[:, t]
        found.append(counts[rows, x[:, t]])
    return torch.stack(found, 1)


@lru_cache(maxsize=16)
def _chance(task: InContextLanguages) -> float:
    total = count = 0.0
    for batch in task.batches("test"):
        assert batch.truth is not None
        can = (batch.truth > 0).float().mean(-1)
        total, count = total + float((can * batch.weight).sum()), count + float(batch.weight.sum())
    return total / count


@lru_cache(maxsize=16)
def _bigram(task: InContextLanguages) -> float:
    total = count = 0.0
    ties = torch.rand(task.letters, generator=torch.Generator().manual_seed(0)) / 2
    for batch in task.batches("test"):
        guess = after_one(batch.x, task.x_vocab)[..., 1:] + ties
        hits, asked = task.metrics(guess, batch)["accuracy"]
        total, count = total + hits, count + asked
    return total / count
