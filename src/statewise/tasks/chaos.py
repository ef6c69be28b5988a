"""Forecasts of chaotic series: Mackey-Glass (Mackey & Glass 1977) and Lorenz (Lorenz 1963)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, register_task
from .generated import Generated

BETA, GAMMA, POWER = 0.2, 0.1, 10  # of Mackey-Glass
CENTRE, SPREAD = 0.93, 0.226  # its mean and deviation at delay 17
SETTLE = 20  # delays until a series is where it will stay
SIGMA, RHO, B = 10.0, 28.0, 8 / 3  # of Lorenz
LORENZ_CENTRE, LORENZ_SPREAD = np.array([0.0, 0.0, 23.55]), np.array([7.92, 9.01, 8.63])
INNER = 0.0125  # its longest step of integration


@dataclass(frozen=True)
class _Forecast(Generated):
    kind = "regression"
    metric = "loss"
    higher_is_better = False

    def chance(self) -> float:
        return 2.0

    def baseline(self) -> float:
        """What is seen now, or the mean, whichever is nearer."""
        return _best(self)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds skill: the share of the variance that is foretold; 1 is perfect, 0 no better than the mean."""
        found = super().metrics(out, batch)
        loss, count = found["loss"]
        return {**found, "skill": (count - loss, count)}


@register_task
@dataclass(frozen=True)
class MackeyGlass(_Forecast):
    """x       .3 .5 .8 1.1 .9 .4     x' = 0.2 x(t - delay) / (1 + x(t - delay)^10) - 0.1 x, seen at every `step`
    answer           .9 .4 .1 ...    the same, `horizon` steps later, asked from the first whole delay on

    Centred and scaled to variance 1. `delay` is in steps of the series; what comes up to a delay later follows from
    what was seen. Chance (another row's answer): squared error 2. Baseline: the mean (1), or the present value.
    """

    length: int = 200
    horizon: int = 10
    delay: int = 17
    step: float = 1.0
    name = "mackey_glass"
    x_width = 1
    y_width = 1

    def __post_init__(self) -> None:
        if self.delay < 6 or not 1 <= self.horizon <= self.delay - 3:
            given = f"{self.delay}, {self.horizon}"
            raise UsageError(f"mackey_glass: delay, horizon are {given}; expected at least 6, and 1 to delay - 3")
        if self.length < self.delay + 2:
            raise UsageError(f"mackey_glass: length is {self.length}; expected at least delay + 2 = {self.delay + 2}")
        if not 0 < self.step <= 2:
            raise UsageError(f"mackey_glass: step is {self.step}; expected above 0, to 2")

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        d, steps = self.delay, self.length + self.horizon
        past = rng.uniform(0.5, 1.3, (size, 1)) + 0.1 * rng.standard_normal((size, d + 2))
        series = mackey_glass(past, (SETTLE + 1) * d + steps, self.step, d)
        seen = torch.from_numpy(((series[:, -steps:] - CENTRE) / SPREAD).astype(np.float32))[..., None]
        weight = torch.zeros(size, self.length)
        weight[:, d + 1 :] = 1.0
        return Batch(seen[:, : self.length], seen[:, self.horizon :], weight)

    def oracle(self, batch: Batch) -> Tensor:
        """The equation, solved on from what was seen up to each step."""
        x, d = batch.x[..., 0].double().numpy() * SPREAD + CENTRE, self.delay
        windows = np.lib.stride_tricks.sliding_window_view(x, d + 2, axis=1)  # (B, T - d - 1, d + 2)
        ahead = mackey_glass(windows.reshape(-1, d + 2), self.horizon, self.step, d)[:, -1]
        found = torch.zeros_like(batch.y)
        found[:, d + 1 :, 0] = torch.from_numpy((ahead.reshape(len(x), -1) - CENTRE) / SPREAD)
        return found


def mackey_glass(past: np.ndarray, steps: int, step: float, delay: int) -> np.ndarray:
    """past (B, delay + 2), newest last, and `steps` more: (B, delay + 2 + steps).

    Over the time of one delay the delayed term f is known, and what is left is linear: x(t + h) = e^{-0.1 h} x(t) +
    the integral of e^{-0.1 (h - s)} f(t + s) over the step, here of the cubic through four values of the series f.
    """
    decay = math.exp(-GAMMA * step)
    weights = cubic_weights(step)
    series = np.concatenate([past, np.empty((len(past), steps))], 1)
    have, end = past.shape[1], past.shape[1] + steps
    while have < end:
        many = min(delay - 1, end - have)  # as far as f is known, two points beyond each step's beginning
        old = series[:, have - 2 - delay : have + 1 + many - delay]  # from one before the step's beginning
        f = BETA * old / (1 + old**POWER)
        gain = sum(w * f[:, i : i + many] for i, w in enumerate(weights))
        powers = decay ** -np.arange(1, many + 1.0)  # at most e^{0.1 delay step}
        series[:, have : have + many] = (series[:, have - 1 : have] + (gain * powers).cumsum(1)) / powers
        have += many
    return series


@lru_cache
def cubic_weights(step: float) -> np.ndarray:
    """w with sum_i w_i f(t_i) = the integral of e^{-GAMMA (h - s)} p(s) from 0 to h, where p is the cubic through
    f at -h, 0, h, 2 h."""
    nodes, at = np.polynomial.legendre.leggauss(8)
    s, w = (nodes + 1) / 2, at / 2 * step * np.exp(-GAMMA * step * (1 - (nodes + 1) / 2))
    points = np.array([-1.0, 0.0, 1.0, 2.0])
    basis = [np.prod([(s - b) / (a - b) for b in points if b != a], 0) for a in points]
    return np.array([(w * one).sum() for one in basis])


@register_task
@dataclass(frozen=True)
class Lorenz(_Forecast):
    """x       .3 .5 .9      the three coordinates of a point that runs along Lorenz's attractor, seen at every `step`
           .1 .4 .8
          1.1 .9 .5
    answer .9 1.2 .7 ...  where it will be `horizon` steps later, asked at every step

    x' = 10 (y - x), y' = x (28 - z) - y, z' = x y - 8/3 z; centred and scaled to variance 1. hidden: only the first
    coordinate is seen and asked for, so that the others have to be found from the past; there is no oracle then. Chance
    (another row's answer): squared error 2. Baseline: the mean (1), or the present point.
    """

    length: int = 200
    horizon: int = 5
    step: float = 0.05
    hidden: bool = False
    name = "lorenz"

    def __post_init__(self) -> None:
        if self.length < 1 or self.horizon < 1:
            raise UsageError(f"lorenz: length, horizon are {self.length}, {self.horizon}; expected at least 1")
        if not 0 < self.step <= 1:
            raise UsageError(f"lorenz: step is {self.step}; expected above 0, to 1")

    @property
    def x_width(self) -> int:  # type: ignore[override]
        return 1 if self.hidden else 3

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.x_width

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        start = LORENZ_CENTRE + LORENZ_SPREAD * rng.standard_normal((size, 3))
        start = lorenz(start, 1, 5.0)[:, -1]
        points = lorenz(start, self.length + self.horizon - 1, self.step)
        seen = torch.from_numpy(((points - LORENZ_CENTRE) / LORENZ_SPREAD).astype(np.float32))[..., : self.x_width]
        return Batch(seen[:, : self.length], seen[:, self.horizon :], torch.ones(size, self.length))

    def oracle(self, batch: Batch) -> Tensor:
        """The equation, solved on from each point."""
        if self.hidden:
            raise NotImplementedError("lorenz: hidden coordinates are not known, so there is no perfect answer")
        points = batch.x.double().numpy() * LORENZ_SPREAD + LORENZ_CENTRE
        ahead = lorenz(points.reshape(-1, 3), 1, self.step * self.horizon)[:, -1].reshape(points.shape)
        return torch.from_numpy((ahead - LORENZ_CENTRE) / LORENZ_SPREAD).float()


def lorenz(start: np.ndarray, steps: int, step: float, inner: float = INNER) -> np.ndarray:
    """start (B, 3) and `steps` more points (B, steps + 1, 3), by Runge and Kutta's method of order 4."""
    count = max(1, math.ceil(step / inner - 1e-9))
    h, now = step / count, np.ascontiguousarray(start.T)
    found = [now]
    for _ in range(steps):
        for _ in range(count):
            a = _slope(now)
            b = _slope(now + h / 2 * a)
            c = _slope(now + h / 2 * b)
            now = now + h / 6 * (a + 2 * (b + c) + _slope(now + h * c))
        found.append(now)
    return np.stack(found).transpose(2, 0, 1)


def _slope(p: np.ndarray) -> np.ndarray:
    (x, y, z), found = p, np.empty_like(p)
    np.multiply(y - x, SIGMA, out=found[0])
    np.subtract(x * (RHO - z), y, out=found[1])
    np.subtract(x * y, B * z, out=found[2])
    return found


@lru_cache(maxsize=16)
def _best(task: _Forecast) -> float:
    errors = np.zeros(2)
    count = 0.0
    for batch in task.batches("test"):
        for i, guess in enumerate((torch.zeros_like(batch.y), batch.x)):
            total, asked = task.metrics(guess, batch)["loss"]
            errors[i] += total
        count += asked
    return float(errors.min() / count)
