"""Pathfinder, generated (Linsley et al. 2018, arXiv:1805.08315; as a sequence: Tay et al. 2021, arXiv:2011.04006)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, certain, register_task
from .generated import Generated

GAP = 3  # pixels from a dash to the next of its line
CLEAR = 3  # pixels around a line that no other line enters: they are at least 4 apart
BEND = 1.8  # the odds of a turn by d are cos^2(BEND d)
TRIES = 12
RARE = 20_000  # pictures of which fewer than one has room: then the size is a mistake


class Pixels(NamedTuple):
    """The dashes of one line, all images at once."""

    row: np.ndarray  # (B, dashes, points)
    column: np.ndarray
    drawn: np.ndarray  # (B, dashes) bool


@register_task
@dataclass(frozen=True)
class Pathfinder(Generated):
    """. # . . . . . . . .     a picture, pixel by pixel: two dashed lines, two discs at ends of them, and shorter
    # # # # . . # # . .     lines besides
    . # . . . . . . . #     asked at the last pixel: are both discs on the same line?
    . . # . . # . . . #

    length: pixels, a square. `dashes` of `dash` pixels to a line, `others` lines of a third of them. Within a line the
    next dash is 3 pixels away, along either axis; different lines are at least 4 apart, which decides every picture.
    Chance and baseline: accuracy 1/2; models stay there for long before they learn anything.
    """

    length: int = 1024
    dashes: int = 4
    dash: int = 3
    others: int = 3
    name = "pathfinder"
    kind = "classification"
    metric = "accuracy"
    x_width = 1
    y_width = 2

    def __post_init__(self) -> None:
        if self.side**2 != self.length or self.side < 12:
            raise UsageError(f"pathfinder: length is {self.length}; expected a square, at least 144")
        if not (self.dashes >= 2 and 3 <= self.dash <= self.side // 3 and self.others >= 0):
            given = f"{self.dashes}, {self.dash}, {self.others}"
            raise UsageError(f"pathfinder: dashes, dash, others are {given}; expected 2, 3 to side / 3, 0 at least")
        room, need = (self.side - 2) ** 2, 2 * self.dashes * (self.dash + GAP) * (2 + CLEAR)
        if need > 1.2 * room:
            least = math.ceil((need / 1.2) ** 0.5 + 2) ** 2
            raise UsageError(
                f"pathfinder: length is {self.length}; with {self.dashes} dashes expected at least {least}"
            )

    @property
    def side(self) -> int:
        return math.isqrt(self.length)

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        x, y = np.zeros((size, self.side, self.side), np.float32), np.zeros((size, self.length), np.int64)
        have = found = drawn = 0
        while have < size:
            if drawn >= RARE * (found + 1):
                raise UsageError(
                    f"pathfinder: length is {self.length}; of {drawn} pictures {found} had room for two lines of "
                    f"{self.dashes} dashes of {self.dash} pixels; expected a larger length, or fewer or shorter dashes"
                )
            count = 2 * (size - have) + 8
            pictures, same = self.draw(count, rng)
            drawn, found = drawn + count, found + len(pictures)
            some = slice(have, have + len(pictures))
            x[some], y[some, -1] = pictures[: size - have], same[: size - have]
            have += len(pictures)
        weight = torch.zeros(size, self.length)
        weight[:, -1] = 1.0
        return Batch(torch.from_numpy(x.reshape(size, -1, 1)), torch.from_numpy(y), weight)

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (B, side, side) of at most `count`, those in which both lines found room; their answers."""
        taken = np.zeros((count, self.side + 2 * CLEAR, self.side + 2 * CLEAR), bool)
        first, second = (self._line(taken, self.dashes, rng) for _ in range(2))
        good = np.flatnonzero(first.drawn.all(1) & second.drawn.all(1))
        taken = taken[good]
        lines = [Pixels(*(part[good] for part in line)) for line in (first, second)]
        ends = np.array([[(p[:, 0, 0], p[:, -1, -1]) for p in line[:2]] for line in lines])  # (line, axis, end, B)
        lines += [self._line(taken, max(1, self.dashes // 3), rng) for _ in range(self.others)]
        rows = np.arange(len(good))
        pictures = np.zeros((len(good), self.side, self.side), np.float32)
        for row, column, drawn in lines:
            for i in range(drawn.shape[1]):
                on = drawn[:, i]
                pictures[rows[on, None], row[on, i], column[on, i]] = 1
        same, end, line = rng.integers(0, 2, (3, len(good)))
        for which, at in ((line, end), (np.where(same, line, 1 - line), np.where(same, 1 - end, rng.permutation(end)))):
            for d in np.ndindex(3, 3):
                row, column = ends[which, :, at, rows].T
                pictures[rows, row + d[0] - 1, column + d[1] - 1] = 1
        return pictures, same

    def _line(self, taken: np.ndarray, dashes: int, rng: np.random.Generator) -> Pixels:
        """A line into every picture where there is room for it, dash by dash; its surroundings into `taken`."""
        count, points = len(taken), np.arange(self.dash)
        row, column = np.zeros((2, count, dashes, self.dash), np.int64)
        drawn, rows = np.zeros((count, dashes), bool), np.arange(count)
        start = rng.uniform(1, self.side - 2, (count, TRIES, 2))
        angle = rng.uniform(0, 2 * np.pi, (count, TRIES))
        for i in range(dashes):
            place = start[..., None, :] + points[:, None] * direction(angle)[..., None, :]  # (B, tries, points, 2)
            pixel = np.rint(place).astype(np.int64)
            inside = ((pixel >= 1) & (pixel <= self.side - 2)).all((-1, -2))
            pixel = pixel.clip(0, self.side - 1)
            free = ~taken[rows[:, None, None], pixel[..., 0] + CLEAR, pixel[..., 1] + CLEAR].any(-1)
            fits = inside & free
            chosen = fits.argmax(1)
            drawn[:, i] = fits.any(1) & (drawn[:, i - 1] if i else True)
            row[:, i], column[:, i] = pixel[rows, chosen, :, 0], pixel[rows, chosen, :, 1]
            angle = angle[rows, chosen, None] + turns(rng, (count, TRIES))
            start = place[rows, chosen, None, -1] + GAP * direction(angle)
            if i:  # the dash just drawn may be near its own line's next
                surround(taken, row[:, i - 1], column[:, i - 1], drawn[:, i - 1])
        surround(taken, row[:, -1], column[:, -1], drawn[:, -1])
        return Pixels(row, column, drawn)

    def chance(self) -> float:
        return 1 / 2

    def baseline(self) -> float:
        """Always the same answer: both are as frequent."""
        return 1 / 2

    def oracle(self, batch: Batch) -> Tensor:
        """Discs are the only full squares of 3 x 3. Drawn as points they belong to the pixels that steps of at most 3
        lead to."""
        picture = batch.x.view(-1, 1, self.side, self.side)
        disc = F.pad(-F.max_pool2d(-picture, 3, 1), (1, 1, 1, 1))
        around = F.max_pool2d(disc, 3, 1, 1) - disc
        dashes = picture * (1 - around)
        first = torch.zeros_like(disc).flatten(1).scatter_(1, disc.flatten(1).argmax(1, keepdim=True), 1)
        reached, before = first.view_as(disc), torch.zeros_like(disc)
        while not torch.equal(reached, before):
            reached, before = F.max_pool2d(reached, 2 * CLEAR + 1, 1, CLEAR) * dashes, reached
        both = ((reached * disc).sum((1, 2, 3)) >= 2).long()
        return certain(both[:, None].expand(-1, self.length), 2)


def direction(angle: np.ndarray) -> np.ndarray:
    """(..., 2) one pixel along the nearer axis, so that no two points of a dash are the same pixel."""
    found = np.stack([np.sin(angle), np.cos(angle)], -1)
    return found / np.abs(found).max(-1, keepdims=True)


def turns(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Angles with density in proportion to cos^2(BEND d), to where that is 0 first."""
    edge = np.pi / 2 / BEND
    d = np.linspace(-edge, edge, 257)
    share = (d + np.sin(2 * BEND * d) / (2 * BEND) + edge) / (2 * edge)  # its integral
    return np.interp(rng.random(shape), share, d)


def surround(taken: np.ndarray, row: np.ndarray, column: np.ndarray, drawn: np.ndarray) -> None:
    """Mark all pixels within CLEAR of points (B, points)."""
    rows, near = drawn.nonzero()[0], np.arange(2 * CLEAR + 1)
    some = (
        rows[:, None, None, None],
        row[drawn][..., None, None] + near[:, None],
        column[drawn][..., None, None] + near,
    )
    taken[some] = True
