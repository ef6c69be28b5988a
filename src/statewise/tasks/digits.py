"""Sequential digits that come with scikit-learn: the data set for a quick run."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Split, register_task
from .finite import Sequences, stratified, three
from .pictures import Pictures, read_table
from .sources import DIGITS


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
        pictures, y = read_table(DIGITS.paths()["digits.csv.gz"], 1797, 8)
        return three(
            [
                self.sequences(pictures[rows], y[rows], white=16, pixels=self.pixels, permuted=self.permuted)
                for rows in stratified(y, (1200, 297, 300), "digits")
            ]
        )
