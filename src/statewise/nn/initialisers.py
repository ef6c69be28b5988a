"""Where the eigenvalues of linear recurrences begin. Everything is computed in float64 and returned in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import UsageError


def ring(states: int, *, r_min: float, r_max: float, max_phase: float) -> tuple[Tensor, Tensor]:
    """nu, theta (N,) such that exp(-e^nu + i e^theta) is uniform by area on a ring (Orvieto et al. 2023, lemma 3.2).

    Radii lie in [r_min, r_max], phases in [0, max_phase]. Raises UsageError unless 0 <= r_min < r_max < 1.
    """
    if not 0 <= r_min < r_max < 1:
        raise UsageError(f"ring: r_min {r_min}, r_max {r_max}; expected 0 <= r_min < r_max < 1")
    if not max_phase > 0:
        raise UsageError(f"ring: max_phase {max_phase}; expected more than 0")
    tiny = torch.finfo(torch.float64).tiny  # neither logarithm below may meet 0
    square = r_min**2 + torch.rand(states, dtype=torch.float64).clamp_min(tiny) * (r_max**2 - r_min**2)
    phase = max_phase * torch.rand(states, dtype=torch.float64).clamp_min(tiny)
    return torch.log(-0.5 * square.log()), phase.log()


def log_uniform(size: int, low: float, high: float) -> Tensor:
    """log of values (size,) that are log-uniform in [low, high]."""
    if not 0 < low <= high < math.inf:
        raise UsageError(f"log_uniform: low {low}, high {high}; expected 0 < low <= high, both finite")
    return math.log(low) + torch.rand(size, dtype=torch.float64) * math.log(high / low)


def check_dt(name: str, dt_min: float, dt_max: float) -> None:
    """Raises UsageError in the name of a layer unless 0 < dt_min <= dt_max, both finite: where its step sizes begin."""
    if not 0 < dt_min <= dt_max < math.inf:
        raise UsageError(f"{name}: dt_min {dt_min}, dt_max {dt_max}; expected 0 < dt_min <= dt_max, both finite")


def inverse_softplus(y: Tensor) -> Tensor:
    """The x (...) with log(1 + e^x) = y, y > 0; expm1, for y may be tiny."""
    return y + torch.log(-torch.expm1(-y))
