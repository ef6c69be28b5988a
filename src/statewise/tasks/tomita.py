"""Tomita's seven regular languages (Tomita 1982; in the form of Weiss et al. 2018, arXiv:1711.09576)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import UsageError
from .asked import Membership
from .automaton import Automaton
from .base import register_task

# The smallest complete automata: for each state, where 0 and 1 lead, and whether it accepts.
STEPS: dict[int, tuple[list[tuple[int, int]], str]] = {
    1: ([(1, 0), (1, 1)], "+-"),
    2: ([(2, 1), (0, 2), (2, 2)], "+--"),
    3: ([(0, 1), (2, 0), (3, 4), (2, 3), (4, 4)], "++-+-"),
    4: ([(1, 0), (2, 0), (3, 0), (3, 3)], "+++-"),
    5: ([(1, 2), (0, 3), (3, 0), (2, 1)], "+---"),
    6: ([(1, 2), (2, 0), (0, 1)], "+--"),
    7: ([(0, 1), (2, 1), (2, 3), (4, 3), (4, 4)], "++++-"),
}
TOMITA = {
    number: Automaton(np.array(steps), np.array([sign == "+" for sign in signs]))
    for number, (steps, signs) in STEPS.items()
}


@register_task
@dataclass(frozen=True)
class Tomita(Membership):
    """x       1 0 0 1 0 0 1
    answer              1     is it in the language? here grammar 4: no three zeros in a row

    grammar 1: only ones. 2: (10)*. 3: no odd run of ones with an odd run of zeros anywhere behind it. 4: no 000.
    5: zeros and ones even in number. 6: zeros less ones a multiple of three. 7: 0*1*0*1*. Lengths are uniform, half the
    strings of each length are members, drawn evenly by counting; so is half of the others, and the rest are one symbol
    away from a member. Grammars 1 and 2 have one member at most of a length, and it falls to one split. Chance and
    baseline: accuracy 1/2.
    """

    grammar: int = 4
    name = "tomita"
    symbols = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grammar not in TOMITA:
            raise UsageError(f"tomita: grammar is {self.grammar}; expected 1 to 7")

    @property
    def automaton(self) -> Automaton:
        return TOMITA[self.grammar]

    def draw(self, lengths: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        near = ~wanted & (rng.random(len(lengths)) < 0.5)
        text = np.zeros((len(lengths), self.length), np.int64)
        some = self.automaton.draw(lengths, wanted | near, rng)
        text[:, : some.shape[1]] = some
        rows = near.nonzero()[0]
        text[rows, rng.integers(0, lengths[rows])] ^= 1
        still = rows[self.accepts(text[rows], lengths[rows])]
        other = self.automaton.draw(lengths[still], np.zeros(len(still), bool), rng)
        text[still, : other.shape[1]] = other
        return text

    def accepts(self, text: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self.automaton.accepts(text, lengths)
