"""What a task is: batches as a function of (split, index, seed), and how answers are scored."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Registry, tree_map

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Batch(NamedTuple):
    """x and what is asked of it. Where weight is zero nothing is asked."""

    x: Tensor  # (B, T, D) float, or (B, T) ids
    y: Tensor  # (B, T, E) float to regress, or (B, T) class ids
    weight: Tensor  # (B, T) float
    lengths: Tensor | None = None  # (B,) where rows end before T
    reset: Tensor | None = None  # (B, T) bool where a new document begins inside a row
    truth: Tensor | None = None  # (B, T, E) the probabilities that y was drawn by, where the task draws it

    def to(self, device: torch.device | str) -> Batch:
        return tree_map(lambda leaf: leaf.to(device), self)

    @property
    def tokens(self) -> int:
        """Steps that are not padding."""
        return int(self.lengths.sum()) if self.lengths is not None else self.x.shape[0] * self.x.shape[1]


class Task(abc.ABC):
    """An endless or finite source of batches. Subclasses are frozen dataclasses whose docstring draws an example.

    Exactly one of x_width and x_vocab is set. The answer has y_width channels: numbers when `kind` is "regression",
    logits over classes when it is "classification"; it is scored where `weight` is not zero.
    """

    name: ClassVar[str]
    data: ClassVar[str] = "generated"  # one line: where the data comes from and how to get it
    kind: ClassVar[Literal["regression", "classification"]]
    metric: ClassVar[str]  # the key of `metrics` by which models are ranked
    higher_is_better: ClassVar[bool] = True
    carries: ClassVar[bool] = False  # batch i + 1 continues batch i row by row: carry the state (truncated BPTT)
    model: ClassVar[str] = "stack"  # the name of the description in `statewise.models` that suits it
    x_width: int | None = None
    x_vocab: int | None = None
    y_width: int

    @abc.abstractmethod
    def batch(self, index: int, size: int, *, seed: int, split: Split = "train") -> Batch:
        """Batch number `index`, a pure function of the arguments. Splits never overlap.

        Finite training sets are shuffled anew each epoch by (seed, epoch).
        """

    @abc.abstractmethod
    def batches(self, split: Split) -> Iterator[Batch]:
        """The fixed evaluation set of a split, in order, every example once."""

    def prepare(self, progress: Callable[[str, int, int], None] | None = None) -> None:  # noqa: B027
        """Do at once what would else be done when the data is first read, for a task whose data takes time.

        progress: called with (what is done, so much, of so much).
        """

    def remarks(self) -> list[str]:
        """What the user should know of the data before training, in lines."""
        return []

    def digest(self) -> str | None:
        """What tells the data of this task from others, where the task knows it without reading all of it."""
        return None

    def keep(self, run: Path) -> None:  # noqa: B027
        """Write into the folder of a run what its model needs of the data when the data is gone."""

    @abc.abstractmethod
    def chance(self) -> float:
        """The metric of guessing."""

    @abc.abstractmethod
    def baseline(self) -> float:
        """The metric of the best constant answer, or of the simplest rule worth beating (say which)."""

    def oracle(self, batch: Batch) -> Tensor:
        """Perfect answers (B, T, E), where the task has them. Raises NotImplementedError for real data."""
        raise NotImplementedError(f"{self.name}: real data has no oracle")

    def readable(self, ids: Sequence[int]) -> str:
        """Ids of x as a person reads them; text where they stand for text."""
        return " ".join(map(str, ids))

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        """Mean over what is asked: squared error, or cross entropy in nats. out (B, T, E)."""
        asked = batch.weight.sum().clamp_min(torch.finfo(batch.weight.dtype).tiny)
        if self.kind == "regression":
            each = (out.float() - batch.y).pow(2).mean(-1)
        else:
            each = F.cross_entropy(out.float().flatten(0, 1), batch.y.flatten(), reduction="none").view_as(batch.y)
        return (each.where(batch.weight > 0, 0) * batch.weight).sum() / asked

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Name to (sum, count) over the batch, so that batches add up; the metric is sum / count."""
        asked = float(batch.weight.sum())
        found = {"loss": (float(self.loss(out, batch)) * asked, asked)}
        if self.kind == "classification":
            hit = (out.argmax(-1) == batch.y) * batch.weight
            found["accuracy"] = (float(hit.sum()), asked)
        return found


def rng_of(*key: object) -> np.random.Generator:
    """Random numbers that are a function of the key. 128 bits of its hash, so that no two keys meet."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little"))


def certain(ids: Tensor, classes: int) -> Tensor:
    """Class ids (...) as logits (..., classes) of no doubt: the form of a perfect answer."""
    return F.one_hot(ids, classes).float() * 40


@dataclass(frozen=True)
class TaskInfo:
    """What the registry knows of a task."""

    name: str
    cls: type[Task]


tasks: Registry[TaskInfo] = Registry("task")


def register_task(cls: type[Task]) -> type[Task]:
    """Put a task where `statewise list`, `train` and `compare` find it, under its `name`."""
    tasks.add(cls.name, TaskInfo(cls.name, cls))
    return cls
