"""Aaren, attention as a recurrent network (Feng et al. 2024, arXiv:2405.13956)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, UsageError, check_sizes, register_layer, wide
from ..ops import softmax_scan
from ..ops.softmax_scan import SoftmaxState, nothing_seen, softmax_step


class Scored(NamedTuple):
    score: Tensor  # (..., H)
    v: Tensor  # (..., H, V)


@register_layer(
    "aaren",
    paper="arXiv:2405.13956",
    examples=[dict(width=4, heads=2), dict(width=3, heads=1)],
    sized=lambda width: dict(width=width, heads=next(h for h in (8, 4, 2, 1) if width % h == 0)),
)
class Aaren(Cell[SoftmaxState]):
    """y_t = W_o sum_{s <= t} softmax_s(q . k_s / sqrt(K)) v_s, per head, k and v linear in x_s, q = W_q theta.

    Attention whose query theta (D,) is learned and the same at all times, so that a running maximum and two sums
    replace the cache. The answers of a step do not depend on what is asked: associative recall is out of reach.

    State: SoftmaxState (m, u, w), H (V + 2) numbers, float32 or wider. theta starts Gaussian, the linear maps as in
    torch.nn.Linear; keys need no bias, which would move all scores alike.
    Raises UsageError if heads do not divide width.
    """

    def __init__(self, width: int, *, heads: int):
        super().__init__()
        check_sizes("Aaren", width=width, heads=heads)
        if width % heads:
            raise UsageError(f"Aaren: width {width} is not a multiple of heads {heads}")
        self.width = self.out_width = width
        self.heads = heads
        self.query = nn.Parameter(torch.randn(width))
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def initial_state(self, batch: int) -> SoftmaxState:
        like = self.query.new_zeros((), dtype=wide(self.query.dtype))
        return nothing_seen(batch, self.heads, self.width // self.heads, like=like)

    def encode(self, x: Tensor) -> Scored:
        # q . (W_k x) = (W_k^T q) . x: one row for each head, where the keys would be one for each channel
        q = (self.q.weight @ self.query).view(self.heads, -1)
        keys = self.k.weight.unflatten(0, (self.heads, -1))
        rows = torch.einsum("hk,hkd->hd", q, keys) / math.sqrt(q.shape[1])
        return Scored(F.linear(x, rows).to(wide(x.dtype)), self.v(x).unflatten(-1, (self.heads, -1)))

    def transition(self, u: Scored, state: SoftmaxState) -> tuple[Tensor, SoftmaxState]:
        return softmax_step(u.score, u.v, state)

    def scan(
        self, u: Scored, state: SoftmaxState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, SoftmaxState]:
        return softmax_scan(u.score, u.v, state, reset=reset, lengths=lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(o.flatten(-2).to(self.out.weight.dtype)).to(x.dtype)
