"""HiPPO: matrices whose states hold the past in polynomials (Gu et al. 2020, arXiv:2008.07669), and their step.

x' = A x + B u. Everything is computed in float64 and returned in it.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core import UsageError, near

Measure = Literal["legs", "legt", "lagt"]
Diagonal = Literal["lin", "inv", "legs", "real"]


def hippo(measure: Measure, states: int) -> tuple[Tensor, Tensor]:
    """A (N, N) and B (N,), with r_n = sqrt(2n+1).

    legs: A_nk = -r_n r_k below, -(n+1) on, 0 above the diagonal; B_n = r_n. All of the past, stretched.
    legt: A_nk = -r_n r_k / 2 on and below, -(-1)^(n-k) r_n r_k / 2 above; B_n = r_n / 2. A sliding window of length 2.
    lagt: A_nk = -1 below, -1/2 on, 0 above; B_n = 1. A window that decays as exp(-t).

    Raises UsageError for an unknown measure.
    """
    if measure not in get_args(Measure):
        raise UsageError(f"hippo: unknown measure {measure!r}; {near(str(measure), get_args(Measure))}")
    n = torch.arange(states, dtype=torch.float64)
    r = (2 * n + 1).sqrt()
    if measure == "legs":
        return -torch.tril(r[:, None] * r, -1) - torch.diag(n + 1), r
    if measure == "legt":
        sign = torch.where(n[:, None] < n, (-1.0) ** (n[:, None] - n), 1.0)
        return -0.5 * r[:, None] * sign * r, 0.5 * r
    one = torch.ones(states, states, dtype=torch.float64)
    return 0.5 * torch.eye(states, dtype=torch.float64) - one.tril(), one[0]


def legendre_memory(order: int, window: float) -> tuple[Tensor, Tensor]:
    """A (N, N) and B (N,) of the memory that holds the last `window` of u in shifted Legendre polynomials.

    A_ij = (2i+1) / window times -1 for i < j and (-1)^(i-j+1) else, B_i = (2i+1) (-1)^i / window (Voelker et al. 2019).
    The state m reads u(t - tau) = sum_i m_i P_i(2 tau / window - 1), P_i Legendre's polynomials.
    """
    i = torch.arange(order, dtype=torch.float64)
    scale = (2 * i + 1) / window
    sign = torch.where(i[:, None] < i, -1.0, -((-1.0) ** (i[:, None] - i)))
    return scale[:, None] * sign, scale * (-1.0) ** i


def bilinear(a: Tensor, b: Tensor, dt: Tensor, *, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """One step of x' = a x + b u by the generalised bilinear rule: a (..., N, N), b (..., N), dt (...).

    (I - alpha dt a)^-1 (I + (1 - alpha) dt a) and (I - alpha dt a)^-1 dt b: Euler's rule for alpha = 0, Tustin's for
    1/2, backward Euler for 1. Differentiable.
    """
    a, b, dt = a.double(), b.double(), dt.double()
    da = dt[..., None, None] * a
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    right = torch.cat([eye + (1 - alpha) * da, (dt[..., None] * b)[..., None]], -1)
    both = torch.linalg.solve(eye - alpha * da, right)
    return both[..., :-1], both[..., -1]


def zero_order_hold(a: Tensor, b: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """One step of x' = a x + b u for u that is constant in between: a (..., N, N), b (..., N), dt (...).

    exp(dt a) and the integral of exp(s a) b over s in [0, dt], both from the exponential of one matrix, so a may be
    singular. Differentiable.
    """
    a, b, dt = a.double(), b.double(), dt.double()
    da, db = dt[..., None, None] * a, dt[..., None] * b
    both = torch.nn.functional.pad(torch.cat([da, db[..., None]], -1), (0, 0, 0, 1))
    e = torch.linalg.matrix_exp(both)
    return e[..., :-1, :-1], e[..., :-1, -1]


def legs_normal(states: int) -> tuple[Tensor, Tensor]:
    """The normal part of HiPPO-LegS: frequencies w (N/2,) and eigenvectors V (N, N/2), N even.

    With p_n = sqrt(n + 1/2), A + p p^T = -I/2 + K with K skew: its eigenvalues are -1/2 +- i w; the half with +i w is
    here.
    """
    if states < 2 or states % 2:
        raise UsageError(f"legs_normal: {states} states; expected an even number of at least 2")
    a, _ = hippo("legs", states)
    p = (torch.arange(states, dtype=torch.float64) + 0.5).sqrt()
    skew = a + p[:, None] * p + 0.5 * torch.eye(states, dtype=torch.float64)
    frequency, vectors = torch.linalg.eigh(-1j * skew)
    return frequency[states // 2 :], vectors[:, states // 2 :]


def legs_dplr(states: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS as diagonal plus low rank: lam, p, b (N/2,), complex, one of each conjugate pair.

    In the eigenvectors of its normal part A is diag(lam) - p p^*, and B is b.
    """
    frequency, v = legs_normal(states)
    n = torch.arange(states, dtype=torch.float64)
    p, b = (v.mH @ r.to(v.dtype) for r in ((n + 0.5).sqrt(), (2 * n + 1).sqrt()))
    return torch.complex(torch.full_like(frequency, -0.5), frequency), p, b


def diagonal(start: Diagonal, states: int) -> tuple[Tensor, Tensor]:
    """Where a diagonal system begins (Gu et al. 2022, arXiv:2206.11893): lam and b (N/2,), complex, of each pair one.

    lin: -1/2 + i pi n. inv: -1/2 + i N/pi (N/(2n+1) - 1). legs: the spectrum and B of the normal part of HiPPO-LegS.
    real: -(n+1). b is 1 but for legs.

    Raises UsageError for an unknown name or an odd number of states.
    """
    if start not in get_args(Diagonal):
        raise UsageError(f"diagonal: unknown start {start!r}; {near(str(start), get_args(Diagonal))}")
    if states < 2 or states % 2:
        raise UsageError(f"diagonal: {states} states; expected an even number of at least 2")
    if start == "legs":
        lam, _, b = legs_dplr(states)
        return lam, b
    n = torch.arange(states // 2, dtype=torch.float64)
    half = torch.full_like(n, -0.5)
    lam = {
        "lin": torch.complex(half, math.pi * n),
        "inv": torch.complex(half, states / math.pi * (states / (2 * n + 1) - 1)),
        "real": torch.complex(-(n + 1), torch.zeros_like(n)),
    }[start]
    return lam, torch.ones_like(lam)
