"""Molecules as strings: the set of the benchmark MOSES (Polykovskiy et al. 2020, arXiv:1811.12823), from molsets."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core import DataError
from .base import Split, register_task
from .sources import SMILES
from .text import Bytes

MOLECULES = {"train.csv.gz": 1584663, "test.csv.gz": 176074, "test_scaffolds.csv.gz": 176225}
HELD_OUT = 5000


@register_task
@dataclass(frozen=True)
class Smiles(Bytes):
    r"""x       \n C C ( = O ) N c 1 c c c c c 1 \n     one molecule behind the other; the state is reset at each \n
    answer     C C ( = O ) N c 1 c c c c c 1 \n       the next character, asked at every step

    To close every bracket and every ring (the digits) asks for a stack and a memory. 1,579,663 molecules of 36
    characters on average are training, the next 5000 of the benchmark's training part validation, the first 5000 of
    its test part the test; no molecule is there twice. scaffolds: 5000 molecules are the test whose ring systems
    occur in no training molecule.

    Scored in bits per character: chance (of all bytes) 8, a table of pairs of characters about 2.3.
    """

    scaffolds: bool = False
    name = "smiles"
    data = SMILES.data
    end = ord("\n")

    def read(self) -> dict[Split, np.ndarray]:
        paths = SMILES.paths()
        training, ends = _lines(paths["train.csv.gz"])
        test, test_ends = _lines(paths["test_scaffolds.csv.gz" if self.scaffolds else "test.csv.gz"])
        cut = ends[-HELD_OUT - 1]
        return {
            "train": training[: cut + 1],
            "validation": training[cut:],
            "test": test[: test_ends[HELD_OUT] + 1],
        }


def _lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The molecules, each between two line ends, and the places of these."""
    with gzip.open(path) as file:
        found = np.frombuffer(bytearray(file.read().removeprefix(b"SMILES")), np.uint8)
    ends = np.flatnonzero(found == ord("\n"))
    if len(ends) != MOLECULES[path.name] + 1 or ends[0] != 0 or ends[-1] != len(found) - 1:
        raise DataError(f"{path}: {len(ends)} lines; expected SMILES and {MOLECULES[path.name]} molecules")
    return found, ends
