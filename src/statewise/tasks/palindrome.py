"""Palindromes: a language that a stack decides, and without a marked middle none that runs once from left to right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import UsageError
from .asked import Membership
from .base import register_task


@register_task
@dataclass(frozen=True)
class Palindrome(Membership):
    """x       a c b b c a
    answer              1     is it the same from its end?

    `letters` different symbols; with `marker`, symbol number `letters` stands in the middle and lengths are odd. In the
    strings that are not, one pair is broken. Chance and baseline: accuracy 1/2.
    """

    letters: int = 8
    marker: bool = False
    name = "palindrome"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.letters < 2:
            raise UsageError(f"palindrome: letters is {self.letters}; expected at least 2")

    @property
    def least(self) -> int:  # type: ignore[override]
        return 3 if self.marker else 2

    @property
    def symbols(self) -> int:  # type: ignore[override]
        return self.letters + self.marker

    def fitting(self, lengths: np.ndarray) -> np.ndarray:
        return lengths - (lengths % 2 == 0) if self.marker else lengths

    def draw(self, lengths: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        text = rng.integers(0, self.letters, (len(lengths), self.length))
        time, end = np.arange(self.length), lengths[:, None] - 1
        text = np.take_along_axis(text, np.minimum(time, (end - time).clip(0)), 1)
        broken = (~wanted).nonzero()[0]
        pair = rng.integers(0, lengths // 2)
        side = np.where(rng.random(len(lengths)) < 0.5, pair, lengths - 1 - pair)[broken]
        text[broken, side] = (text[broken, side] + rng.integers(1, self.letters, len(broken))) % self.letters
        if self.marker:
            text[np.arange(len(text)), lengths // 2] = self.letters
        return text

    def accepts(self, text: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        time = np.arange(text.shape[1])
        mirrored = np.take_along_axis(text, (lengths[:, None] - 1 - time).clip(0), 1)
        return ((text == mirrored) | (time >= lengths[:, None])).all(1)
