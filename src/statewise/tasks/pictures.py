"""Pictures read as sequences, pixel by pixel (Le et al. 2015, arXiv:1504.00941, sec. 4.2) or row by row."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..core import DataError
from .base import rng_of
from .finite import Classify, Sequences


def read_table(path: Path, count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, side, side) and classes of a gzipped CSV: in a row the pixels of one, then its class.

    Raises DataError for a table of another shape.
    """
    with gzip.open(path, "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    expected = count, side * side + 1
    if table.shape != expected:
        raise DataError(f"{path}: a table of {table.shape}; expected {expected}")
    return table[:, :-1].reshape(-1, side, side), table[:, -1]


@dataclass(frozen=True)
class Pictures(Classify):
    """Square pictures as sequences of rows or of single pixels, top left to bottom right; values scaled to 0 .. 1."""

    y_width = 10

    def sequences(self, pictures: np.ndarray, y: np.ndarray, *, white: int, pixels: bool, permuted: bool) -> Sequences:
        """pictures (N, side, side) uint8 with values up to `white`."""
        count, side = pictures.shape[:2]
        flat = pictures.reshape(count, side * side)
        if permuted:
            flat = flat[:, rng_of("permuted", side).permutation(side * side)]  # one order for all splits and runs
        values = torch.from_numpy(flat.copy()).view(-1, 1 if pixels else side)
        steps = side * side if pixels else side
        starts, lengths = torch.arange(count) * steps, torch.full((count,), steps)
        classes, scale = torch.from_numpy(y.astype(np.int64)), torch.tensor([1 / white])
        return Sequences(values, starts, lengths, classes, torch.zeros(1), scale)
