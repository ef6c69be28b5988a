"""The selective scan in plain torch, on any device: chunks of time, each computed anew in the backward pass.

Within a chunk all decays and states are formed, and neighbouring steps are joined to one, round by round. A chunk has
as many steps as keep that within CHUNK numbers, so memory does not grow with time beyond inputs and outputs.

Decays stand as r = decay - 1, since float32 has few numbers near 1 and what they miss would be missed at every step.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...core import clear_past_end, past_end

CHUNK = 1 << 19  # numbers (B, steps, D, N) at a time
SHORTEST = 16  # steps


def _chunk(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, dt, b, c = (t.to(state.dtype) for t in (x, dt, b, c))
    r, push = torch.expm1(dt[..., None] * a), (dt * x)[..., None] * b[:, :, None]
    h = _solve(r, push, state, None if reset is None else reset[..., None, None])
    return (h * c[:, :, None]).sum(-1), h[:, -1].clone()  # a view would keep all of h


def _solve(r: Tensor, push: Tensor, state: Tensor, reset: Tensor | None) -> Tensor:
    """All h_t = (1 + r_t) h_{t-1} + push_t. r, push: (B, T, D, N), T >= 1; reset: (B, T, 1, 1)."""
    steps = r.shape[1]
    if steps == 1:
        return _step(r, push, state[:, None], reset)
    even, (r1, r2), (p1, p2) = 2 * (steps // 2), _halves(r), _halves(push)
    # two steps are one, which a reset in either cuts from the past
    reset1, reset2 = (None, None) if reset is None else _halves(reset)
    both = None if reset1 is None or reset2 is None else reset1 | reset2
    second = _solve(r1 + r2 + r1 * r2, _step(r2, p2, p1, reset2), state, both)
    first = _step(r1, p1, torch.cat([state[:, None], second[:, :-1]], 1), reset1)
    h = torch.stack([first, second], 2).flatten(1, 2)
    if even < steps:
        end = _step(r[:, even:], push[:, even:], h[:, -1:], None if reset is None else reset[:, even:])
        h = torch.cat([h, end], 1)
    return h


def _step(r: Tensor, push: Tensor, h: Tensor, reset: Tensor | None) -> Tensor:
    if reset is not None:
        h = torch.where(reset, 0, h)
    return h + r * h + push


def _halves(t: Tensor) -> tuple[Tensor, Tensor]:
    pairs = t[:, : 2 * (t.shape[1] // 2)].unflatten(1, (-1, 2))
    return pairs[:, :, 0], pairs[:, :, 1]


def scan(
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
    steps, a = x.shape[1], a.to(state.dtype)
    if steps == 0:
        return x, state.clone()
    if lengths is not None:  # from its end on a row rests: steps of size 0
        lengths = lengths.to(x.device)
        x, dt, b, c = (clear_past_end(t, lengths) for t in (x, dt, b, c))
        reset = None if reset is None else reset & ~past_end(lengths, steps)
    size = max(SHORTEST, CHUNK // max(1, state.numel()))
    run = _chunk
    if size < steps and torch.is_grad_enabled():
        run = functools.partial(checkpoint, _chunk, use_reentrant=False, preserve_rng_state=False)
    ys = []
    cuts = (None,) * -(-steps // size) if reset is None else reset.split(size, 1)
    for x_, dt_, b_, c_, cut in zip(*(t.split(size, 1) for t in (x, dt, b, c)), cuts):
        y, state = run(x_, dt_, a, b_, c_, state, cut)
        ys.append(y.to(x.dtype))
    y = torch.cat(ys, 1)
    return (y if lengths is None else clear_past_end(y, lengths)), state
