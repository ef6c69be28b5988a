"""Odd-even reduction in plain torch: about 2 T multiply-adds in log2 T rounds, on any device, differentiable anyhow.

Products of neighbouring decays are formed, so decays whose products leave the range of numbers give NaN here where the
other backends, which take one step at a time, may not. Decays of at most 1 are safe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .edges import at_lengths, normal


def scan(
    a: Tensor, x: Tensor, h0: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    a, x, reset = normal(a, x, h0, reset, lengths)
    if x.shape[1] == 0:
        return x, h0.clone()
    if reset is not None:
        reset = reset.view(*reset.shape, *[1] * (x.ndim - 2))
        a = a.masked_fill(reset, 0)
    h = _scan(a, x.to(h0.dtype), h0, reset)
    last = h[:, -1] if lengths is None else at_lengths(h, h0, lengths)
    return h.to(x.dtype), last


def _scan(a: Tensor, x: Tensor, h0: Tensor, reset: Tensor | None) -> Tensor:
    """All of h. a, x, reset: (B, T, ...), a and reset broadcastable."""
    steps = x.shape[1]
    if steps == 1:
        return x + a * _cleared(h0[:, None], reset)
    pairs = steps // 2
    a1, a2 = _halves(a, pairs)
    x1, x2 = _halves(x, pairs)
    r1, r2 = (None, None) if reset is None else _halves(reset, pairs)
    # two steps are one step of a2 a1 with input a2 x1 + x2, which a reset in either cuts from the past
    cut = None if r1 is None or r2 is None else r1 | r2
    second = _scan(_cleared(a2 * a1, cut), x2 + a2 * _cleared(x1, r2), h0, cut)
    before = torch.cat([h0[:, None], second[:, :-1]], 1)
    first = x1 + a1 * _cleared(before, r1)
    h = torch.stack([first, second], 2).flatten(1, 2)
    if steps % 2:
        tail = slice(steps - 1, None)
        last = x[:, tail] + _at(a, tail) * _cleared(h[:, -1:], None if reset is None else reset[:, tail])
        h = torch.cat([h, last], 1)
    return h


def _halves(t: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    if t.shape[1] == 1:  # the same at every step
        return t, t
    first, second = t[:, : 2 * pairs].unflatten(1, (pairs, 2)).unbind(2)
    return first, second


def _at(t: Tensor, span: slice) -> Tensor:
    return t if t.shape[1] == 1 else t[:, span]


def _cleared(t: Tensor, reset: Tensor | None) -> Tensor:
    return t if reset is None else torch.where(reset, 0, t)
