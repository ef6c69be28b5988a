"""S_t = a_t (I - b k k^T) S_{t-1} + b k v^T: the error-correcting memory under DeltaNet, its products and RWKV-7."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..dispatch import op
from ..looping import loop


def _samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    one = torch.ones(1, 2, 1, 2, dtype=dtype, device=device)
    yield dict(q=one, k=one, v=one, beta=one[..., 0], state=torch.zeros(1, 1, 2, 2, device=device))


def _dplr_samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    one = torch.ones(1, 2, 1, 2, dtype=dtype, device=device)
    yield dict(q=one, k=one, v=one, a=one, b=-one, state=torch.zeros(1, 1, 2, 2, device=device))


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step in plain arithmetic: q (B, H, K), k (B, [n,] H, K), v (B, [n,] H, V), beta (B, [n,] H),
    log_decay (B, H, K | 1, 1) -> o (B, H, V), state."""
    if k.ndim == 3:
        k, v, beta = k[:, None], v[:, None], beta[:, None]
    if log_decay is not None:
        state = log_decay.exp() * state
    for k_j, v_j, beta_j in zip(k.unbind(1), v.unbind(1), beta.unbind(1), strict=True):
        error = v_j - (k_j[..., None] * state).sum(-2)
        state = state + (beta_j[..., None] * k_j)[..., None] * error[..., None, :]
    return (q[..., None] * state).sum(-2), state


@op(samples=_samples)
def delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve S_t = (I - beta_t k_t k_t^T) exp(log_decay_t) S_{t-1} + beta_t k_t v_t^T and read o_t = S_t^T q_t.

    q: (B, T, H, K), k: (B, T, H, K), v: (B, T, H, V), beta: (B, T, H).
    Several corrections a step (DeltaProduct): k (B, T, n, H, K), v (B, T, n, H, V), beta (B, T, n, H); the decay comes
        first, once, then correction 1 to n, then the reading.
    log_decay: None, or any shape that broadcasts to (B, T, H, K, 1); at most 0, -inf forgets.
    state: (B, H, K, V), S before the first step, float32 or wider; everything is computed in its dtype.
    reset: (B, T) bool; where True, S_{t-1} counts as zero at t. lengths: (B,) integers; o is 0 past a row's end.
    A step stays bounded if |k| = 1 and 0 <= beta <= 2: I - beta k k^T then has the eigenvalue 1 - beta in [-1, 1].

    Returns o (B, T, H, V) in the dtype of v, and S at the end (B, H, K, V) in the dtype of state.
    Differentiable in q, k, v, beta, state and log_decay, through both results.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> delta_scan(one, one, one, one[..., 0] / 2, torch.zeros(1, 1, 1, 1))[0].flatten().tolist()
    [0.5, 0.75, 0.875]
    """
    if log_decay is not None:
        log_decay = log_decay.expand(torch.broadcast_shapes(log_decay.shape, (*q.shape[:3], 1, 1)))
    like = v if v.ndim == 4 else v[:, :, 0]
    fresh = torch.zeros_like(state)
    return loop(delta_step, (q, k, v, beta, log_decay), state, fresh=fresh, like=like, reset=reset, lengths=lengths)


def dplr_step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step in plain arithmetic: q, k, a, b (B, H, K), v (B, H, V), log_decay (B, H, K | 1, 1) -> o, state."""
    read = (a[..., None] * state).sum(-2)
    decayed = state if log_decay is None else log_decay.exp() * state
    state = decayed + b[..., None] * read[..., None, :] + k[..., None] * v[..., None, :]
    return (q[..., None] * state).sum(-2), state


@op(samples=_dplr_samples)
def dplr_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve S_t = (diag(exp(log_decay_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T and read o_t = S_t^T q_t.

    The diagonal plus low rank form that RWKV-7 needs; with a = k, b = -beta exp(log_decay) k and keys beta k it is
    `delta_scan`.
    q, k, a, b: (B, T, H, K), v: (B, T, H, V). The rest as in `delta_scan`.

    Returns o (B, T, H, V) in the dtype of v, and S at the end (B, H, K, V) in the dtype of state.
    Differentiable in q, k, v, a, b, state and log_decay, through both results.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> dplr_scan(one, one, one, one, -one / 2, torch.zeros(1, 1, 1, 1))[0].flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    if log_decay is not None:
        log_decay = log_decay.expand(torch.broadcast_shapes(log_decay.shape, (*v.shape[:3], 1, 1)))
    fresh = torch.zeros_like(state)
    return loop(dplr_step, (q, k, v, a, b, log_decay), state, fresh=fresh, like=v, reset=reset, lengths=lengths)
