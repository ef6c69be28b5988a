"""Running softmax averages and running log-sum-exps: attention with a fixed query as a recurrence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import op
from ..looping import loop


class SoftmaxState(NamedTuple):
    """What a softmax average of the past needs: the average is w / u. Nothing seen: m lowest, u and w zero."""

    m: Tensor  # (B, H) largest score so far
    u: Tensor  # (B, H) sum of exp(score - m)
    w: Tensor  # (B, H, V) sum of exp(score - m) v


def nothing_seen(batch: int, heads: int, value: int, *, like: Tensor) -> SoftmaxState:
    """The state before the first step, in the dtype and on the device of `like`."""
    lowest = like.new_full((batch, heads), torch.finfo(like.dtype).min)  # finite: -inf minus -inf is no number
    return SoftmaxState(lowest, torch.zeros_like(lowest), like.new_zeros(batch, heads, value))


def _samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    one = torch.ones(1, 2, 1, 3, dtype=dtype, device=device)
    yield dict(score=one[..., 0], v=one, state=nothing_seen(1, 1, 3, like=torch.zeros(1, device=device)))


def _log_samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    yield dict(x=torch.ones(1, 2, 3, dtype=dtype, device=device), z0=torch.zeros(1, 3, device=device))


def softmax_step(score: Tensor, v: Tensor, state: SoftmaxState) -> tuple[Tensor, SoftmaxState]:
    """One step in plain arithmetic: score (B, H), v (B, H, V) -> o (B, H, V), state."""
    m = torch.maximum(state.m, score).detach()  # o does not depend on it
    old, new = (state.m - m).exp(), (score - m).exp()
    u = old * state.u + new
    w = old[..., None] * state.w + new[..., None] * v
    # all scores -inf so far: nothing has weight, and the average is 0
    return w / torch.where(u == 0, 1, u)[..., None], SoftmaxState(m, u, w)


@op(samples=_samples)
def softmax_scan(
    score: Tensor,
    v: Tensor,
    state: SoftmaxState,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """o_t = sum_{s <= t} exp(score_s) v_s / sum_{s <= t} exp(score_s), from a running maximum.

    score: (B, T, H), v: (B, T, H, V). state: what was seen before (`nothing_seen` at the start), float32 or wider.
    reset: (B, T) bool; where True, the average begins anew at t. lengths: (B,) integers; o is 0 past a row's end.

    Returns o (B, T, H, V) in the dtype of v, and the state at the end.
    Differentiable in score, v, and the state's u and w, through o and the last u and w; m, on which o does not depend,
    is a constant.

    >>> v = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    >>> softmax_scan(torch.zeros(1, 3, 1), v, nothing_seen(1, 1, 1, like=v))[0].flatten().tolist()
    [1.0, 1.5, 3.0]
    """
    fresh = nothing_seen(*state.w.shape, like=state.w)
    return loop(softmax_step, (score, v), state, fresh=fresh, like=v, reset=reset, lengths=lengths)


@op(samples=_log_samples)
def log_sum_exp_scan(
    x: Tensor, z0: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z_t = log(exp(z_{t-1}) + exp(x_t)), elementwise.

    x: (B, T, N...), z0: (B, N...), float32 or wider; torch.finfo(dtype).min for nothing before.
    reset: (B, T) bool; where True, z_t = x_t. lengths: (B,) integers; z is 0 past a row's end.

    Returns z (B, T, N...) in the dtype of z0, whatever x's is, and z at the end (B, N...).
    Differentiable in x and z0, through both results.

    >>> z, _ = log_sum_exp_scan(torch.zeros(1, 3), torch.full((1,), torch.finfo(torch.float32).min))
    >>> z.exp().round(decimals=4).tolist()
    [[1.0, 2.0, 3.0]]
    """

    def step(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.logaddexp(z, x)
        return z, z

    fresh = torch.full_like(z0, torch.finfo(z0.dtype).min)
    return loop(step, (x,), z0, fresh=fresh, like=x.to(z0.dtype), reset=reset, lengths=lengths)
