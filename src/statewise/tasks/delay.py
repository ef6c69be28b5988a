"""A smooth signal as it was some time ago: the memory of a linear layer, bare (Voelker et al. 2019; Gu et al. 2021,
arXiv:2110.13985, app. E)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, register_task
from .generated import Generated


@register_task
@dataclass(frozen=True)
class Delay(Generated):
    """x       .1 .4 .6 .7 .5 .2     noise of low frequencies, variance 1
    answer           .1 .4 .6 .7     the same, `delay` steps later, asked from there on

    delay 2. band: the share of the spectrum, from below, that the noise fills; at 1 it is white, and the finest detail
    is then lost on any state of few numbers. Chance (another row's answer): squared error 2. Baseline (always 0): 1,
    the variance.
    """

    length: int = 512
    delay: int = 200
    band: float = 0.1
    name = "delay"
    kind = "regression"
    metric = "loss"
    higher_is_better = False
    x_width = 1
    y_width = 1

    def __post_init__(self) -> None:
        if not 0 <= self.delay < self.length:
            raise UsageError(f"delay: delay is {self.delay}; expected 0 to below length = {self.length}")
        if not 0 < self.band <= 1 or self.band * self.length < 1:
            raise UsageError(f"delay: band is {self.band}; expected 1 / length = {1 / self.length:.3g} to 1")

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        waves = int(self.band * self.length)
        spectrum = np.zeros((size, self.length + 1), np.complex64)  # of twice the length: half of it never repeats
        spectrum[:, 1 : waves + 1] = rng.standard_normal((size, waves, 2), np.float32).view(np.complex64)[..., 0]
        spectrum[:, -1] = spectrum[:, -1].real * 2  # the highest frequency has a cosine and no sine
        u = np.fft.irfft(spectrum, axis=1)[:, : self.length] * (self.length / waves**0.5)
        x = torch.from_numpy(u.astype(np.float32))[..., None]
        y, weight = torch.zeros_like(x), torch.zeros(size, self.length)
        y[:, self.delay :], weight[:, self.delay :] = x[:, : self.length - self.delay], 1.0
        return Batch(x, y, weight)

    def chance(self) -> float:
        return 2.0

    def baseline(self) -> float:
        return 1.0

    def oracle(self, batch: Batch) -> Tensor:
        return batch.x.roll(self.delay, 1)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds skill: the share of the baseline's squared error that is gone; 1 is perfect, 0 no better."""
        found = super().metrics(out, batch)
        loss, count = found["loss"]
        return {**found, "skill": (count - loss, count)}
