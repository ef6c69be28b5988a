"""A small task whose stream is carried from batch to batch, and a small model with dropout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statewise.core import Cell, RecurrentLayer
from statewise.tasks.base import Batch, Split, Task
from statewise.training import Experiment, Train


@dataclass(frozen=True)
class Trail(Task):
    """x       .3 -.9  .5       one long stream per row, cut into batches; a row forgets now and then
    answer  .3 -.75 .1       the leaky sum of x since then
    """

    length: int = 5
    poison: int = -1  # the batch whose x is NaN
    stream: bool = True
    name = "trail"
    kind = "regression"
    metric = "loss"
    higher_is_better = False
    x_width = 2
    y_width = 1

    @property
    def carries(self) -> bool:  # type: ignore[override]
        return self.stream

    def batch(self, index: int, size: int, *, seed: int, split: Split = "train") -> Batch:
        rng = torch.Generator().manual_seed(
            seed * 7919 + index + {"train": 0, "validation": 10**6, "test": 2 * 10**6}[split]
        )
        x = torch.randn(size, self.length, 2, generator=rng)
        reset = torch.rand(size, self.length, generator=rng) < 0.1
        if index == self.poison:
            x[0, 0, 0] = torch.nan
        return Batch(x, x.cumsum(1)[..., :1].tanh(), torch.ones(size, self.length), None, reset)

    def batches(self, split: Split) -> Iterator[Batch]:
        return (self.batch(i, 3, seed=0, split=split) for i in range(3))

    def chance(self) -> float:
        return 1.0

    def baseline(self) -> float:
        return 1.0


class Leak(Cell[Tensor]):
    """h_t = a h_{t-1} + W x_t,  y_t = V dropout(tanh h_t)."""

    def __init__(self, width: int, hidden: int, out_width: int, dropout: float = 0.0):
        super().__init__()
        self.width, self.out_width = width, out_width
        self.inp, self.out = nn.Linear(width, hidden), nn.Linear(hidden, out_width)
        self.decay = nn.Parameter(torch.zeros(hidden))
        self.dropout = nn.Dropout(dropout)

    def initial_state(self, batch: int) -> Tensor:
        return self.decay.new_zeros(batch, len(self.decay), dtype=torch.float32)

    def encode(self, x: Tensor) -> Tensor:
        return self.inp(x)

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.sigmoid(self.decay) * state + u
        return h, h

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(self.dropout(o.tanh()))


@dataclass(frozen=True)
class Leaky:
    """Describes a Leak."""

    hidden: int = 4
    dropout: float = 0.0

    def build(self, *, x_width: int | None = None, x_vocab: int | None = None, y_width: int) -> RecurrentLayer[Any]:
        return Leak(x_width or 1, self.hidden, y_width, self.dropout)


def toy(*, dropout: float = 0.0, stream: bool = True, poison: int = -1, seed: int = 1, **train: Any) -> Experiment:
    """An experiment of milliseconds."""
    return Experiment(
        Trail(stream=stream, poison=poison), Leaky(dropout=dropout), Train(**{"steps": 20, "batch": 3, **train}), seed
    )


def in_child(work: Callable[[], int]) -> int:
    """Run in a forked process; returns its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def litter(run: Path) -> list[str]:
    """Whatever a save should have cleared away."""
    return [str(p) for p in run.rglob("*") if ".tmp" in p.name or p.name.endswith((".gone", ".old"))]
