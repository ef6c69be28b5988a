"""Tasks whose examples are drawn on the spot."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError, join, tree_map
from .base import SPLITS, Batch, Split, Task, rng_of

LENGTHS = ("length", "test_length", "longest", "test_longest")


class Generated(Task):
    """An endless source: batch i of a split comes from random numbers seeded by (seed, split, i).

    No example can be in two splits, however small the task: a hash of x alone says which split an example belongs
    to (6/8 train, 1/8 validation, 1/8 test), and a split rejects what is not its own. The evaluation set of a split
    is its first `examples` examples under seed 0.
    """

    examples: ClassVar[int] = 1024
    block: ClassVar[int] = 128
    spare: ClassVar[int] = 8  # examples drawn beyond those expected to be needed; part of what fixes the data

    @abc.abstractmethod
    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        """`size` independent examples; T is the same in every call with the same split."""

    def batch(self, index: int, size: int, *, seed: int, split: Split = "train") -> Batch:
        rng, share = rng_of(seed, split, index), 6 / 8 if split == "train" else 1 / 8
        parts: list[Batch] = []
        have = 0
        for _ in range(200):
            drawn = self.sample(int((size - have) / share) + self.spare, rng, split)
            mine = (owner(self.identity(drawn)) == SPLITS.index(split)).nonzero()[: size - have, 0]
            parts.append(tree_map(lambda leaf: leaf[mine], drawn))  # noqa: B023
            have += len(mine)
            if have == size:
                return self.finish(crop(join(parts)))
        raise UsageError(f"{self}: too few different examples to share out among three splits; make it larger")

    def finish(self, batch: Batch) -> Batch:
        """The answers, where `sample` leaves them to be found for those examples only that their split owns."""
        return batch

    def identity(self, batch: Batch) -> Tensor:
        """(B, ...) what makes two examples the same. Where x is noisy: what the noise was laid over."""
        return batch.x

    def at(self, length: int) -> Self:
        """This task, with the same ids and classes, where test examples have that length. Raises UsageError where the
        task cannot have it. What a curve of length generalisation is made of."""
        own: dict[str, Any] = {f.name: length for f in fields(self) if f.name in LENGTHS}  # type: ignore[arg-type]
        if "shortest" in (f.name for f in fields(self)):  # type: ignore[arg-type]
            own["shortest"] = min(self.shortest, length)  # type: ignore[attr-defined]
        return replace(self, **own)  # type: ignore[type-var]

    @property
    def train_length(self) -> int | None:
        """The largest length of training examples, in the unit of `at`; None where the task has none."""
        return next((getattr(self, name) for name in ("length", "longest") if hasattr(self, name)), None)

    def batches(self, split: Split) -> Iterator[Batch]:
        for index in range(self.examples // self.block):
            yield self.batch(index, self.block, seed=0, split=split)


def owner(x: Tensor) -> Tensor:
    """Examples x (B, ...) to the number of the split that owns each. Zeros at the end of x do not count."""
    flat = x.flatten(1).numpy()
    flat = np.ascontiguousarray(flat).view(f"u{flat.itemsize}").astype(np.uint64)
    mixed = (flat * _multipliers(flat.shape[1])).sum(1, dtype=np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    eighth = torch.from_numpy((mixed >> np.uint64(61)).astype(np.int64))  # low bits would see parity
    return torch.where(eighth < 6, 0, eighth - 5)


@lru_cache(maxsize=8)
def _multipliers(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64) | np.uint64(1)


def crop(batch: Batch) -> Batch:
    """Drop the steps that are padding in every row."""
    if batch.lengths is None or not len(batch.lengths):
        return batch
    end, truth = int(batch.lengths.max()), batch.truth
    return batch._replace(
        x=batch.x[:, :end],
        y=batch.y[:, :end],
        weight=batch.weight[:, :end],
        truth=None if truth is None else truth[:, :end],
    )
