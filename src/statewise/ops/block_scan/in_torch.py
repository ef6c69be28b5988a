"""Odd-even reduction by batched matrix products, or one step after another where the blocks are large.

The reduction multiplies neighbouring blocks: 2 T N^3 multiply-adds in log2 T rounds against T N^2 in T. A product of
blocks that leaves the range of numbers gives NaN where one step at a time may not.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 8  # block on a CPU, where a round costs as much as a step


def scan(a: Tensor, x: Tensor, h0: Tensor, *, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if x.shape[1] == 0:
        return x, h0.clone()
    if reset is not None:
        reset = reset[..., None, None]
        a = torch.where(reset[..., None], 0, a)
    large = x.shape[-1] > (LARGEST if x.device.type == "cpu" else 8 * LARGEST)
    h = _one_by_one(a, x, h0, reset) if large else _reduce(a, x, h0, reset)
    return h, h[:, -1]


def _one_by_one(a: Tensor, x: Tensor, h0: Tensor, reset: Tensor | None) -> Tensor:
    h, hs = h0, []
    for t in range(x.shape[1]):
        h = _apply(a[:, t], h if reset is None else torch.where(reset[:, t], 0, h)) + x[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def _reduce(a: Tensor, x: Tensor, h0: Tensor, reset: Tensor | None) -> Tensor:
    steps = x.shape[1]
    if steps == 1:
        return x + _apply(a, _cleared(h0[:, None], reset))
    pairs = steps // 2
    (a1, a2), (x1, x2) = _halves(a, pairs), _halves(x, pairs)
    r1, r2 = (None, None) if reset is None else _halves(reset, pairs)
    cut = None if r1 is None or r2 is None else r1 | r2
    both = a2 @ a1
    both = both if cut is None else torch.where(cut[..., None], 0, both)
    second = _reduce(both, x2 + _apply(a2, _cleared(x1, r2)), h0, cut)
    before = torch.cat([h0[:, None], second[:, :-1]], 1)
    first = x1 + _apply(a1, _cleared(before, r1))
    h = torch.stack([first, second], 2).flatten(1, 2)
    if steps % 2:
        last = x[:, -1:] + _apply(a[:, -1:], _cleared(h[:, -1:], None if reset is None else reset[:, -1:]))
        h = torch.cat([h, last], 1)
    return h


def _apply(a: Tensor, h: Tensor) -> Tensor:
    return (a @ h[..., None])[..., 0]


def _halves(t: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    first, second = t[:, : 2 * pairs].unflatten(1, (pairs, 2)).unbind(2)
    return first, second


def _cleared(t: Tensor, reset: Tensor | None) -> Tensor:
    return t if reset is None else torch.where(reset, 0, t)
