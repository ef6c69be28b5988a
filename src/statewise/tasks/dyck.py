"""Balanced brackets: Dyck's languages, of bounded depth (form of Wang & Niepert 2019, arXiv:1901.08817)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..core import UsageError
from .asked import Membership
from .automaton import Automaton
from .base import register_task


@register_task
@dataclass(frozen=True)
class Dyck(Membership):
    """x       ( a [ ] b ( ) )
    answer                   1     do the brackets close as they open, nowhere deeper than `depth`?

    `kinds` of brackets, `letters` that mean nothing. Symbols: opening brackets, closing ones, letters. The number of
    brackets is even and uniform from 2; balanced strings are drawn evenly among those of their number of brackets. The
    others are made of balanced ones, so that counting is not enough: two brackets of different direction turn
    around, or (with several kinds) one changes its kind; where that is balanced still, the two brackets of a pair that
    nothing encloses turn around. depth bounds training and test alike. Chance and baseline: accuracy 1/2.
    """

    length: int = 40
    shortest: int = 2
    kinds: int = 2
    depth: int = 5
    letters: int = 0
    name = "dyck"
    least = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kinds < 1 or self.depth < 1 or self.letters < 0:
            given = f"{self.kinds}, {self.depth}, {self.letters}"
            raise UsageError(f"dyck: kinds, depth, letters are {given}; expected at least 1, 1, 0")

    @property
    def symbols(self) -> int:  # type: ignore[override]
        return 2 * self.kinds + self.letters

    def fitting(self, lengths: np.ndarray) -> np.ndarray:
        return lengths if self.letters else lengths // 2 * 2

    def draw(self, lengths: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        size = len(lengths)
        count = 2 * rng.integers(1, lengths // 2 + 1) if self.letters else lengths
        closes = mountains(self.depth).draw(count, np.ones(size, bool), rng)  # (B, most brackets) 0 up, 1 down
        time = np.arange(closes.shape[1])
        inside, rows = time < count[:, None], np.arange(size)
        opens_at = partners(closes, inside)
        kind = np.take_along_axis(rng.integers(0, self.kinds, closes.shape), opens_at, 1)
        wrong = ~wanted
        turned = wrong & (rng.random(size) < 0.5) if self.kinds > 1 else np.zeros(size, bool)
        where = rng.integers(0, count)
        kind[rows[turned], where[turned]] += rng.integers(1, self.kinds, int(turned.sum())) if turned.any() else 0
        kind %= self.kinds
        swapped = wrong & ~turned
        plain = closes * self.kinds + kind
        odds = np.where(inside, rng.random(closes.shape), -1.0)
        up, down = np.where(closes == 0, odds, -1.0).argmax(1), np.where(closes == 1, odds, -1.0).argmax(1)
        closes[rows[swapped], up[swapped]], closes[rows[swapped], down[swapped]] = 1, 0
        brackets = closes * self.kinds + kind
        fine = np.flatnonzero(swapped & self.balanced(brackets, count))
        brackets[fine] = plain[fine]
        height = (1 - 2 * (plain[fine] >= self.kinds)).cumsum(1)
        up = np.where((plain[fine] < self.kinds) & (height == 1), odds[fine], -1.0).argmax(1)[:, None]
        down = ((opens_at[fine] == up) & (plain[fine] >= self.kinds)).argmax(1)[:, None]
        both = np.take_along_axis(plain[fine], np.concatenate([down, up], 1), 1)
        brackets[fine[:, None], np.concatenate([up, down], 1)] = both
        text = np.zeros((size, self.length), np.int64)
        if not self.letters:
            text[:, : brackets.shape[1]] = brackets
            return text
        whole = np.arange(self.length) < lengths[:, None]
        text += rng.integers(2 * self.kinds, self.symbols, text.shape)
        chance = np.where(whole, rng.random(text.shape), 2.0)
        chosen = chance.argsort(1).argsort(1) < count[:, None]  # so many places, all sets equally likely
        text[chosen] = brackets[inside]
        return text

    def accepts(self, text: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self.balanced(text, lengths)

    def balanced(self, text: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(B,) by a stack of open brackets."""
        size, k = len(text), self.kinds
        stack, height = np.zeros((size, self.depth + 2), np.int64), np.zeros(size, np.int64)
        good, rows = np.ones(size, bool), np.arange(size)
        for t in range(text.shape[1]):
            s = text[:, t]
            bracket = (t < lengths) & (s < 2 * k)
            opens, closes = bracket & (s < k), bracket & (s >= k)
            good &= ~closes | ((height > 0) & (stack[rows, height] == s - k))
            height = (height + opens - closes).clip(0, self.depth + 1)
            good &= height <= self.depth
            stack[rows[opens], height[opens]] = s[opens]
        return good & (height == 0)


@lru_cache(maxsize=32)
def mountains(depth: int) -> Automaton:
    """Steps up (0) and down (1) that end where they begin, never below it and never above `depth`."""
    up, down = np.arange(1, depth + 2), np.arange(-1, depth)
    up[depth] = down[0] = depth + 1  # no way back from there
    step = np.concatenate([np.stack([up, down], 1), [[depth + 1, depth + 1]]])
    return Automaton(step, np.arange(depth + 2) == 0)


def partners(closes: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """For each bracket (B, T) the place of the bracket that opens its pair; its own, if it opens."""
    size, steps = closes.shape
    open_at, height = np.zeros((size, steps + 2), np.int64), np.zeros(size, np.int64)
    found, rows = np.tile(np.arange(steps), (size, 1)), np.arange(size)
    for t in range(steps):
        opens, shuts = inside[:, t] & (closes[:, t] == 0), inside[:, t] & (closes[:, t] == 1)
        height += opens
        open_at[rows[opens], height[opens]] = t
        found[shuts, t] = open_at[rows[shuts], height[shuts]]
        height -= shuts
    return found
