"""h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t, y_t = c_t . h_t: Mamba's scan, whose states are never all in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..dispatch import op
from ..looping import loop


def _samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    one = torch.ones(1, 2, 3, dtype=dtype, device=device)
    a, state = -torch.ones(3, 2, device=device), torch.zeros(1, 3, 2, device=device)
    yield dict(x=one, dt=one, a=a, b=one[..., :2], c=one[..., :2], state=state)


def selective_step(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """One step in plain arithmetic: x, dt (B, D), b, c (B, N), state (B, D, N), a (D, N) -> y (B, D), state."""
    state = (dt[..., None] * a).exp() * state + (dt * x)[..., None] * b[:, None]
    return (state * c[:, None]).sum(-1), state


@op(samples=_samples)
def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t and read y_t = c_t . h_t, channel by channel.

    x, dt: (B, T, D), dt >= 0; a: (D, N), negative for a stable system; b, c: (B, T, N), shared by the channels.
    state: (B, D, N), h before the first step, float32 or wider; everything is computed in its dtype.
    reset: (B, T) bool; where True, h_{t-1} counts as zero at t. lengths: (B,) integers; y is 0 past a row's end.

    Returns y (B, T, D) in the dtype of x, and h at the end (B, D, N) in the dtype of state. No (B, T, D, N) is formed
    by the fast backends: the backward pass computes the states anew.
    Differentiable in x, dt, a, b, c and state, through both results.

    >>> one = torch.ones(1, 3, 1)
    >>> selective_scan(one, one, torch.zeros(1, 1), one, one, torch.zeros(1, 1, 1))[0].flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    a = a.to(state.dtype)
    fresh = torch.zeros_like(state)
    return loop(
        lambda x, dt, b, c, h: selective_step(x, dt, b, c, h, a),
        (x, dt, b, c), state, fresh=fresh, like=x, reset=reset, lengths=lengths,
    )  # fmt: skip
