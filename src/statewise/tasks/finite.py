"""Tasks over a finite set of labelled sequences, of equal or unequal length."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import UsageError
from .base import SPLITS, Batch, Split, Task, rng_of


@dataclass(frozen=True, eq=False)
class Sequences:
    """N sequences of D channels cut out of one long table of steps. Two sequences may share steps: windows do.

    Each has one answer, asked at its last step; or, where `asked` is given, one at every step with `asked`, but for
    the first `quiet` steps of a sequence, which are there as context.
    """

    values: Tensor  # (steps, D), of any real dtype
    starts: Tensor  # (N,)
    lengths: Tensor  # (N,)
    y: Tensor  # class ids (N,), or numbers (N, E); where `asked` is given, (steps,) or (steps, E)
    shift: Tensor  # (D,) or (1,); x = (values - shift) * scale
    scale: Tensor
    asked: Tensor | None = None  # (steps,) bool
    quiet: Tensor | None = None  # (N,)
    y_shift: Tensor = field(default_factory=lambda: torch.zeros(1))  # (E,) or (1,)
    y_scale: Tensor = field(default_factory=lambda: torch.ones(1))  # y * y_scale + y_shift is in the data's units
    span: int = 0  # of `windows.ahead`, where the values are its features

    def __len__(self) -> int:
        return len(self.lengths)

    @staticmethod
    def of(rows: Sequence[np.ndarray], y: np.ndarray) -> Sequences:
        """rows of (T_i, D), one answer each."""
        lengths = torch.tensor([len(row) for row in rows])
        values = torch.from_numpy(np.concatenate(rows).astype(np.float32))
        starts = lengths.cumsum(0) - lengths
        return Sequences(values, starts, lengths, torch.from_numpy(y), torch.zeros(1), torch.ones(1))

    def standardised(self, train: Tensor) -> Sequences:
        """Each channel to mean 0 and variance 1 over the steps (steps, D) of `train`. A constant channel becomes 0."""
        spread = train.double().std(0, correction=0)
        scale = torch.where(spread > 0, 1 / spread, 0).float()
        return replace(self, shift=train.double().mean(0).float(), scale=scale)

    def select(self, rows: Tensor) -> Batch:
        """The rows (B,) as one batch, padded with zeros."""
        lengths = self.lengths[rows]
        time = torch.arange(int(lengths.max()) if len(rows) else 0)
        ended = time >= lengths[:, None]
        place = (self.starts[rows, None] + time).masked_fill(ended, 0)
        x = ((self.values[place].float() - self.shift) * self.scale).masked_fill(ended[..., None], 0)
        if self.asked is None:
            y = self.y[rows, None].expand(len(rows), len(time), *self.y.shape[1:])
            weight = time == lengths[:, None] - 1
        else:
            y, weight = self.y[place], self.asked[place] & ~ended
            if self.quiet is not None:
                weight &= time >= self.quiet[rows, None]
        return Batch(x, y, weight.float(), lengths if self.unequal else None)

    @cached_property
    def unequal(self) -> bool:
        return bool((self.lengths != self.lengths[0]).any())


class Finite(Task):
    """A task with three fixed sets of sequences. Training visits every example once an epoch, in a new order."""

    block = 128

    @abc.abstractmethod
    def load(self) -> dict[Split, Sequences]:
        """Read the data. Raises DataError where it is absent or wrong. Called once per process."""

    def rows(self, split: Split) -> Sequences:
        if split not in SPLITS:
            raise UsageError(f"{self.name}: split {split!r}; expected one of {', '.join(SPLITS)}")
        return _loaded(self)[split]

    def batch(self, index: int, size: int, *, seed: int, split: Split = "train") -> Batch:
        rows = self.rows(split)
        place = np.arange(index * size, (index + 1) * size)
        epoch = place // len(rows)
        chosen = [_order(len(rows), seed, split, int(e))[place[epoch == e] % len(rows)] for e in np.unique(epoch)]
        return rows.select(torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *chosen])))

    def batches(self, split: Split) -> Iterator[Batch]:
        rows = self.rows(split)
        for some in torch.arange(len(rows)).split(self.block):
            yield rows.select(some)


@lru_cache(maxsize=8)
def _loaded(task: Finite) -> dict[Split, Sequences]:
    return task.load()


@lru_cache(maxsize=16)
def _order(count: int, seed: int, split: Split, epoch: int) -> np.ndarray:
    return rng_of(seed, split, "epoch", epoch).permutation(count)


class Classify(Finite):
    """One class per sequence, asked at its last step."""

    kind = "classification"
    metric = "accuracy"

    def chance(self) -> float:
        return majority(self)

    def baseline(self) -> float:
        return linear_rule(self)


def majority(task: Finite) -> float:
    """The share of the commonest training class in the test set."""
    train, test = task.rows("train").y, task.rows("test").y
    return float((test == train.bincount().argmax()).float().mean())


@lru_cache(maxsize=8)
def linear_rule(task: Finite) -> float:
    """Test accuracy of a ridge classifier: on all steps where lengths are equal and D T <= 1024, else on mean,
    spread, first and last step of each channel and the length. Its strength is chosen on the validation set."""

    def features(rows: Sequences) -> Tensor:
        parts = []
        for some in torch.arange(len(rows)).split(2048):
            batch = rows.select(some)
            lengths = rows.lengths[some]
            if not rows.unequal and batch.x[0].numel() <= 1024:
                parts.append(batch.x.flatten(1))
                continue
            count = lengths[:, None].float()
            mean = batch.x.sum(1) / count
            spread = ((batch.x.square().sum(1) / count) - mean.square()).clamp_min(0).sqrt()
            last = batch.x[torch.arange(len(some)), lengths - 1]
            parts.append(torch.cat([mean, spread, batch.x[:, 0], last, count], 1))
        return torch.cat(parts)

    train = task.rows("train")
    f = features(train)
    mean, spread = f.mean(0), f.std(0).clamp_min(1e-6)
    f = (f - mean) / spread
    checked = [((features(rows) - mean) / spread, rows) for rows in (task.rows("validation"), task.rows("test"))]
    target = F.one_hot(train.y, task.y_width).float()
    offset = target.mean(0)
    gram, cross = (f.T @ f).double() / len(f), (f.T @ (target - offset)).double() / len(f)
    best = -1.0
    for strength in (0.01, 0.1, 1.0):
        weights = torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=torch.float64), cross).float()
        right, score = (
            float(((features @ weights + offset).argmax(1) == rows.y).float().mean()) for features, rows in checked
        )
        if right > best:
            best, found = right, score
    return found


def stratified(y: np.ndarray, sizes: Sequence[int], key: str) -> list[np.ndarray]:
    """Disjoint index sets of the given sizes with the classes in equal shares, fixed by the key. Each is shuffled."""
    rng = rng_of(key)
    order = rng.permutation(len(y))
    depth = np.zeros(len(y))  # how far into its own class a row stands
    for label in np.unique(y):
        members = order[y[order] == label]
        depth[members] = (np.arange(len(members)) + 0.5) / len(members)
    sorted_rows = order[np.argsort(depth[order], kind="stable")]
    return [rng.permutation(part) for part in np.split(sorted_rows, np.cumsum(sizes))[: len(sizes)]]


def three(parts: Sequence[Sequences]) -> dict[Split, Sequences]:
    return dict(zip(SPLITS, parts, strict=True))
