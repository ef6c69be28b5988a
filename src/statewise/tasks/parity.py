"""Parity of a bit string: the smallest task that needs a state which no later input erases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, certain, register_task
from .generated import Generated


@register_task
@dataclass(frozen=True)
class Parity(Generated):
    """x       0 1 1 0 1 .     rows of unequal length
    answer            1       whether the ones are odd in number, asked at the row's last step

    streaming asks at every step. Training and validation lengths are uniform from shortest to longest, test lengths
    from longest to test_longest: the state has to be kept for longer than it was ever trained for. Chance and
    baseline: accuracy 1/2. (Ranges of Beck et al. 2024, arXiv:2405.04517, app. D.)
    """

    shortest: int = 3
    longest: int = 40
    test_longest: int = 256
    streaming: bool = False
    name = "parity"
    kind = "classification"
    metric = "accuracy"
    x_vocab = 2
    y_width = 2

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest <= self.test_longest:
            lengths = f"{self.shortest}, {self.longest}, {self.test_longest}"
            raise UsageError(f"parity: lengths are {lengths}; expected 1 <= shortest <= longest <= test_longest")

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        low, high = (self.longest, self.test_longest) if split == "test" else (self.shortest, self.longest)
        lengths = torch.from_numpy(rng.integers(low, high + 1, size))
        time = torch.arange(high)
        x = torch.from_numpy(rng.integers(0, 2, (size, high)))
        x = x.masked_fill(time >= lengths[:, None], 0)
        asked = time < lengths[:, None] if self.streaming else time == lengths[:, None] - 1
        return Batch(x, (x.cumsum(1) % 2) * asked, asked.float(), lengths)

    def chance(self) -> float:
        return 1 / 2

    def baseline(self) -> float:
        """Always even."""
        return 1 / 2

    def oracle(self, batch: Batch) -> Tensor:
        """Exclusive or, bit by bit."""
        odd, answers = torch.zeros_like(batch.x[:, 0]), []
        for bit in batch.x.unbind(1):
            odd = odd ^ bit
            answers.append(odd)
        return certain(torch.stack(answers, 1), 2)
