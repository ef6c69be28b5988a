"""Both scans from a running maximum and one linear scan, which runs on the fastest backend that there is.

With M_t = max(m_0, score_1 .. score_t), a constant to the gradient, all factors are at most 1:
    u_t = exp(M_{t-1} - M_t) u_{t-1} + exp(score_t - M_t),   w_t likewise with v_t,   o_t = w_t / u_t,
    z_t = M_t + log u_t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import clear_past_end, past_end, tree_map, where
from ..linear_scan import linear_scan
from . import SoftmaxState


def softmax_scan(
    score: Tensor, v: Tensor, state: SoftmaxState, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, SoftmaxState]:
    if v.shape[1] == 0:
        return v, tree_map(Tensor.clone, state)
    score, like = score.to(state.u.dtype), v
    score, reset = _until_end(score, reset, lengths)
    if lengths is not None:
        v = clear_past_end(v, lengths.to(v.device))
    m, decay, push, first = _weights(score, state.m, reset)
    start = first[..., None] * torch.cat([state.w, state.u[..., None]], -1)
    # u is the sum of the same weights with 1 for v
    push = push[..., None] * F.pad(v.to(start.dtype), (0, 1), value=1.0)
    h, last = linear_scan(decay[..., None], push, start, reset=reset)
    w, u = h[..., :-1], h[..., -1:]
    o = (w / torch.where(u == 0, 1, u)).to(like.dtype)  # nothing has weight yet: 0
    after = SoftmaxState(m[:, -1].clone(), last[..., -1].clone(), last[..., :-1].clone())  # not views of the past
    if lengths is not None:
        o = clear_past_end(o, lengths.to(o.device))
        after = where(lengths.to(o.device) == 0, state, after)  # m too as it came
    return o, after


def log_sum_exp_scan(
    x: Tensor, z0: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x = x.to(z0.dtype)
    if x.shape[1] == 0:
        return x, z0.clone()
    x, reset = _until_end(x, reset, lengths)
    m, decay, push, first = _weights(x, z0, reset)
    u, _ = linear_scan(decay, push, first, reset=reset)
    none = u == 0
    z = torch.where(none, -torch.inf, m + torch.where(none, 1, u).log())
    last = z[:, -1].clone()
    if lengths is not None:
        lengths = lengths.to(z.device)
        empty = (lengths == 0).view(-1, *[1] * (z0.ndim - 1))
        z, last = clear_past_end(z, lengths), torch.where(empty, z0, last)
    return z, last


def _until_end(x: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and reset such that past its end a row rests: nothing there has weight."""
    if lengths is None:
        return x, reset
    ended = past_end(lengths.to(x.device), x.shape[1])
    x = x.masked_fill(ended.view(*ended.shape, *[1] * (x.ndim - 2)), -torch.inf)
    return x, None if reset is None else reset & ~ended


def _weights(x: Tensor, first: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """M, exp(M_{t-1} - M_t), exp(x_t - M_t), each (B, T, ...), and exp(first - M_1), the weight of what was before."""
    with torch.no_grad():
        info = torch.finfo(x.dtype)
        m = _running_max(x, first, reset).clamp(info.min, info.max)  # finite: inf - inf is no number
        decay = (torch.cat([m[:, :1], m[:, :-1]], 1) - m).exp()
    past = first if reset is None else torch.where(_along(reset[:, 0], first), m[:, 0], first)
    return m, decay, (x - m).exp(), (past.clamp(info.min, info.max) - m[:, 0]).exp()


def _running_max(x: Tensor, first: Tensor, reset: Tensor | None) -> Tensor:
    head = torch.maximum(x[:, 0], first)
    if reset is None:
        return torch.cat([head[:, None], x[:, 1:]], 1).cummax(1).values
    head = torch.where(_along(reset[:, 0], first), x[:, 0], head)
    m, cut, apart = torch.cat([head[:, None], x[:, 1:]], 1), reset, 1
    while apart < x.shape[1]:  # m: over the `apart` steps up to each, or since the reset that is cut
        joined = torch.where(_along(cut[:, apart:], x), m[:, apart:], torch.maximum(m[:, apart:], m[:, :-apart]))
        m, cut = torch.cat([m[:, :apart], joined], 1), torch.cat([cut[:, :apart], cut[:, apart:] | cut[:, :-apart]], 1)
        apart *= 2
    return m


def _along(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (like.ndim - mask.ndim))
