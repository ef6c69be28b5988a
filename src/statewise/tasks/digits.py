"""Pictures read as sequences, pixel by pixel (Le et al. 2015, arXiv:1504.00941, sec. 4.2) or row by row."""

from __future__ import annotations

import gzip
from dataclasses import dataclass

import numpy as np
import torch

from ..core import DataError
from .base import Split, register_task, stream
from .finite import Classify, Sequences, stratified, three
from .sources import DIGITS


@dataclass(frozen=True)
class Pictures(Classify):
    """Square pictures as sequences of rows or of single pixels, top left to bottom right; values scaled to 0 .. 1."""

    y_width = 10

    def sequences(self, pictures: np.ndarray, y: np.ndarray, *, white: int, pixels: bool, permuted: bool) -> Sequences:
        """pictures (N, side, side) uint8 with values up to `white`."""
        count, side = pictures.shape[:2]
        flat = pictures.reshape(count, side * side)
        if permuted:
            flat = flat[:, stream("permuted", side).permutation(side * side)]  # one order for all splits and runs
        values = torch.from_numpy(np.ascontiguousarray(flat)).view(-1, 1 if pixels else side)
        lengths = torch.full((count,), side * side if pixels else side)
        scale = torch.tensor([1 / white])
        return Sequences(values, lengths, torch.from_numpy(y.astype(np.int64)), torch.zeros(1), scale)


@register_task
@dataclass(frozen=True)
class Digits(Pictures):
    """x       0 0 5 13 9 1 0 0   then the next row of pixels, 8 rows in all (or 64 single pixels)
    answer                     0   which digit, asked at the last step

    1200 training, 297 validation and 300 test pictures, classes in equal shares; the split never changes. With 300
    test pictures an accuracy of 0.9 has a standard error of 0.017. Chance about 0.1; a linear classifier that sees
    all pixels at once reaches about 0.95.
    """

    pixels: bool = False
    permuted: bool = False
    name = "digits"
    data = DIGITS.data

    @property
    def x_width(self) -> int:  # type: ignore[override]
        return 1 if self.pixels else 8

    def load(self) -> dict[Split, Sequences]:
        path = DIGITS.paths()["digits.csv.gz"]
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        if table.shape != (1797, 65):
            raise DataError(f"{path}: a table of {table.shape}; expected (1797, 65)")
        pictures, y = table[:, :64].reshape(-1, 8, 8), table[:, 64]
        return three(
            [
                self.sequences(pictures[rows], y[rows], white=16, pixels=self.pixels, permuted=self.permuted)
                for rows in stratified(y, (1200, 297, 300), "digits")
            ]
        )
