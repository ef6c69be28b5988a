"""S_t = a_t S_{t-1} + k_t v_t^T: the matrix memory under linear attention, RetNet, GLA, Mamba-2 and mLSTM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import UsageError
from ..dispatch import op
from ..looping import loop


def _samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    yield dict(
        q=torch.ones(1, 2, 1, 2, dtype=dtype, device=device),
        k=torch.ones(1, 2, 1, 2, dtype=dtype, device=device),
        v=torch.ones(1, 2, 1, 3, dtype=dtype, device=device),
        state=torch.zeros(1, 1, 2, 3, device=device),
    )


def outer_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step in plain arithmetic: q, k (B, G, K), v (B, H, V), log_decay (B, H, K, V) -> o, state."""
    q, k = (t.repeat_interleave(v.shape[1] // t.shape[1], 1) for t in (q, k))
    if log_decay is not None:
        state = log_decay.exp() * state
    state = state + k[..., None] * v[..., None, :]
    return (q[..., None] * state).sum(-2), state


@op(samples=_samples)
def outer_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T and read o_t = S_t^T q_t, head by head.

    q, k: (B, T, G, K), v: (B, T, H, V); H a multiple of G: query and key head g serves H / G value heads in a row.
    log_decay: None for no decay, or any shape that broadcasts to (B, T, H, K, V); at most 0, -inf forgets. Its last two
        sizes say the kind: (1, 1) a scalar per head, (K, 1) per key channel, (1, V) per value channel, (K, V) full.
    state: (B, H, K, V), S before the first step, float32 or wider; everything is computed in its dtype.
    reset: (B, T) bool; where True, S_{t-1} counts as zero at t, infinities included.
    lengths: (B,) integers; row b ends after lengths[b] steps, o is 0 from there on.

    Returns o (B, T, H, V) in the dtype of v, and S at the end (B, H, K, V) in the dtype of state.
    Differentiable in q, k, v, state and log_decay, through both results.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> outer_scan(one, one, one, torch.zeros(1, 1, 1, 1))[0].flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    if log_decay is not None:
        log_decay = log_decay.expand(torch.broadcast_shapes(log_decay.shape, (*v.shape[:3], 1, 1)))
    fresh = torch.zeros_like(state)
    return loop(outer_step, (q, k, v, log_decay), state, fresh=fresh, like=v, reset=reset, lengths=lengths)


def normalised_outer_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    norm: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """outer_scan and z_t = n_t . q_t of the normaliser n_t = exp(log_decay_t) n_{t-1} + k_t, in one pass.

    norm: (B, H, K), n before the first step, in the dtype of state. log_decay: as in outer_scan, with a last size of 1.

    Returns o (B, T, H, V) in the dtype of v, z (B, T, H) in the dtype of state, and S and n at the end.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> normalised_outer_scan(one, one, 2 * one, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))[1].flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    if log_decay is not None and log_decay.ndim and log_decay.shape[-1] != 1:
        raise UsageError(
            f"normalised_outer_scan: log_decay is {tuple(log_decay.shape)}; expected a last size of 1"
        )
    if norm.shape != state.shape[:-1] or norm.dtype != state.dtype:
        raise UsageError(
            f"normalised_outer_scan: norm is {norm.dtype} {tuple(norm.shape)}; expected {state.dtype} "
            f"{tuple(state.shape[:-1])}, as state without its last size"
        )
    # n is one more column of S, whose value is always 1
    wider = torch.cat([v.to(state.dtype), torch.ones_like(v[..., :1], dtype=state.dtype)], -1)
    start = torch.cat([state, norm[..., None]], -1)
    o, last = outer_scan(q, k, wider, start, log_decay=log_decay, reset=reset, lengths=lengths)
    return o[..., :-1].to(v.dtype), o[..., -1], last[..., :-1], last[..., -1]
