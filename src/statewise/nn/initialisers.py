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


def legs_normal(states: int) -> tuple[Tensor, Tensor]:
    """The normal part of HiPPO-LegS: frequencies w (N/2,) and eigenvectors V (N, N/2), N even.

    A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 above (Gu et al. 2020, arXiv:2008.07669). With
    p_n = sqrt(n + 1/2), A + p p^T = -I/2 + K with K skew: its eigenvalues are -1/2 +- i w; the half with +i w is here.
    """
    if states < 2 or states % 2:
        raise UsageError(f"legs_normal: {states} states; expected an even number of at least 2")
    n = torch.arange(states, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    a = -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1)
    p = (n + 0.5).sqrt()
    skew = a + p[:, None] * p + 0.5 * torch.eye(states, dtype=torch.float64)
    frequency, vectors = torch.linalg.eigh(-1j * skew)
    return frequency[states // 2 :], vectors[:, states // 2 :]


def log_uniform(size: int, low: float, high: float) -> Tensor:
    """log of values (size,) that are log-uniform in [low, high]."""
    if not 0 < low <= high:
        raise UsageError(f"log_uniform: low {low}, high {high}; expected 0 < low <= high")
    return math.log(low) + torch.rand(size, dtype=torch.float64) * math.log(high / low)
