"""Finite automata: run over many strings at once, and strings drawn from them by counting."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, eq=False)
class Automaton:
    """State 0 is the first; state s goes to step[s, a] on symbol a.

    weight[s, a], all one if not given, is how often a is taken in s: strings are drawn in proportion to the product of
    their weights. Where it is 0, a cannot be taken. Automata are compared by identity.
    """

    step: np.ndarray  # (S, A)
    accepting: np.ndarray  # (S,) bool
    weight: np.ndarray | None = None  # (S, A)

    def run(self, text: np.ndarray) -> np.ndarray:
        """States (B, T) after each symbol of text (B, T). A symbol below 0 leaves the state as it is."""
        states, state = np.empty(text.shape, np.int64), np.zeros(len(text), np.int64)
        table = np.concatenate([self.step, np.arange(len(self.step))[:, None]], 1)  # the last column stays
        for t in range(text.shape[1]):
            state = table[state, text[:, t]]
            states[:, t] = state
        return states

    def accepts(self, text: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(B,) bool. What stands past the ends is not looked at."""
        inside = np.arange(text.shape[1]) < lengths[:, None]
        last = self.run(np.where(inside, text, -1))[:, -1] if text.shape[1] else np.zeros(len(text), np.int64)
        return self.accepting[last]

    def count(self, length: int) -> int:
        """How many strings of that length are accepted: exact."""
        ways = self.accepting.astype(int).astype(object)
        for _ in range(length):
            ways = ways[self.step].sum(1)
        return int(ways[0])

    def logs(self, longest: int, accept: bool = True) -> np.ndarray:
        """(longest + 1, S): the logarithm of the weight of all strings of each length that lead from s to an end."""
        return _logs(self, longest, accept)

    def draw(self, lengths: np.ndarray, accept: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Strings (B, max(lengths)) of given lengths that are accepted (B,) or not, all with their due probability.

        Where there is none, symbols are drawn evenly. Past their ends strings are 0.
        """
        longest = int(lengths.max(initial=0))
        tables = np.stack([_thresholds(self, longest, wanted) for wanted in (False, True)])  # (2, T + 1, S, A - 1)
        text, state = np.zeros((len(lengths), longest), np.int64), np.zeros(len(lengths), np.int64)
        accept, coin = accept.astype(np.int64), rng.random((longest, len(lengths)))
        for t in range(longest):
            ahead = lengths - t
            symbol = (coin[t][:, None] > tables[accept, ahead.clip(0), state]).sum(1)
            symbol[ahead <= 0] = 0
            text[:, t], state = symbol, self.step[state, symbol]
        return text


@lru_cache(maxsize=32)
def _logs(automaton: Automaton, longest: int, accept: bool) -> np.ndarray:
    weight = np.ones(automaton.step.shape) if automaton.weight is None else automaton.weight
    ends, scale = (automaton.accepting == accept).astype(float), 0.0
    found = np.empty((longest + 1, len(ends)))
    with np.errstate(divide="ignore"):
        for length in range(longest + 1):
            found[length] = np.log(ends) + scale
            ends = (weight * ends[automaton.step]).sum(1)
            most = ends.max() or 1.0
            ends, scale = ends / most, scale + np.log(most)
    return found


@lru_cache(maxsize=32)
def _thresholds(automaton: Automaton, longest: int, accept: bool) -> np.ndarray:
    """(longest + 1, S, A - 1): a uniform number exceeds a of them where symbol a is drawn. [0] is not used."""
    weight = np.ones(automaton.step.shape) if automaton.weight is None else automaton.weight
    logs = _logs(automaton, longest, accept)
    odds = np.exp(logs[:-1] - logs[:-1].max(1, keepdims=True, initial=-1e300))[:, automaton.step] * weight
    total = odds.sum(-1, keepdims=True)
    even = np.full(odds.shape, 1 / odds.shape[-1])
    share = np.divide(odds, total, out=even, where=total > 0)
    edges = share.cumsum(-1)[..., :-1]
    edges[share[..., ::-1].cumsum(-1)[..., ::-1][..., 1:] <= 0] = 2.0  # rounding never lets in what cannot follow
    return np.concatenate([edges[:1], edges])
