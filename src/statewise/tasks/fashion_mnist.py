"""Sequential Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): 70000 pictures of clothes in ten classes."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..core import DataError
from .base import Split, register_task
from .finite import Sequences, stratified, three
from .pictures import Pictures
from .sources import FASHION_MNIST


@dataclass(frozen=True)
class _FashionMnist(Pictures):
    permuted: bool = False
    pixels: ClassVar[bool]
    data = FASHION_MNIST.data

    def load(self) -> dict[Split, Sequences]:
        paths = FASHION_MNIST.paths()
        pictures = read_idx(paths["train-images-idx3-ubyte.gz"])
        y = read_idx(paths["train-labels-idx1-ubyte.gz"])
        train, validation = stratified(y, (55000, 5000), "fashion_mnist")
        test = read_idx(paths["t10k-images-idx3-ubyte.gz"]), read_idx(paths["t10k-labels-idx1-ubyte.gz"])
        return three(
            [
                self.sequences(*part, white=255, pixels=self.pixels, permuted=self.permuted)
                for part in ((pictures[train], y[train]), (pictures[validation], y[validation]), test)
            ]
        )


@register_task
@dataclass(frozen=True)
class FashionMnistRows(_FashionMnist):
    """x       0 0 84 253 ... 0   then the next row of 28 pixels, 28 rows in all
    answer                     9   boot, bag, dress ..., asked at the last step

    55000 training, 5000 validation and 10000 test pictures. Chance 0.1; a linear classifier on all pixels: `baseline`.
    """

    name = "fashion_mnist_rows"
    pixels = False
    x_width = 28


@register_task
@dataclass(frozen=True)
class FashionMnistPixels(_FashionMnist):
    """x       0  0  84  253 ...   784 single pixels
    answer                     9   boot, bag, dress ..., asked at the last step

    permuted: all pictures in one other order of pixels. Split, chance and baseline as in `fashion_mnist_rows`.
    """

    name = "fashion_mnist_pixels"
    pixels = True
    x_width = 1


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file: two zeros, type 8, the rank, the sizes as big-endian int32, the bytes."""
    with gzip.open(path) as file:
        head = file.read(4)
        if head[:3] != b"\0\0\x08":
            raise DataError(f"{path}: not an IDX file of bytes")
        shape = tuple(np.frombuffer(file.read(4 * head[3]), ">i4").tolist())
        values = np.frombuffer(file.read(), np.uint8)
    if values.size != np.prod(shape):
        raise DataError(f"{path}: {values.size} bytes of data; its header says {shape}")
    return values.reshape(shape)
