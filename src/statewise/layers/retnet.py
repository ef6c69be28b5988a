"""Retention (Sun et al. 2023, arXiv:2307.08621)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Traits, register_layer, tree_map, wide
from ..nn import HeadNorm, positions, rotate, tail
from ..ops import outer_scan, outer_step
from .outer_cell import MemoryCell, Outer, empty_memory, usual_heads


class RetNetState(NamedTuple):
    s: Tensor  # (B, H, K, V)
    seen: Tensor  # (B,) int64 steps since the start or the last reset


@register_layer(
    "retnet",
    paper="arXiv:2307.08621",
    examples=[dict(width=3, heads=2, key=2, value=3), dict(width=2, heads=1, key=3, value=4)],
    sized=lambda width: dict(
        width=width, heads=(h := usual_heads(width)), key=max(1, width // h), value=max(2, 2 * width // h)
    ),
)
class RetNet(MemoryCell[RetNetState]):
    """S_t = g_h S_{t-1} + (R_t k_t) v_t^T,  o_t = S_t^T R_t q_t,  y_t = W_o (norm(o_t) * silu(W_g x_t)).

    Head h = 0, 1, ... forgets by g_h = 1 - 2^(-5-h); R_t turns channel pair i by t 10000^(-2i/K) (rotary), so that
    o sees differences of time only. k is divided by sqrt(K); the norm is a layer norm per head (GroupNorm).
    State (S, number of steps seen), S float32 or wider. Linear maps have no bias and start as in torch.nn.Linear.
    """

    traits = Traits(time_invariant=True)

    def __init__(self, width: int, *, heads: int, key: int, value: int):
        super().__init__(width, heads=heads, key=key, value=value)
        self.gate = nn.Linear(width, heads * value, bias=False)
        self.norm = HeadNorm(heads, value, centred=True)

    def initial_state(self, batch: int) -> RetNetState:
        s = empty_memory(self, batch)
        return RetNetState(s, torch.zeros(batch, dtype=torch.int64, device=s.device))

    def encode(self, x: Tensor) -> Outer:
        q, k, v = self.project(x)
        return Outer(q, k * self.key**-0.5, v)

    def transition(self, u: Outer, state: RetNetState) -> tuple[Tensor, RetNetState]:
        q, k, v, _ = tree_map(lambda leaf: leaf.to(state.s.dtype), u)
        q, k = rotate(torch.cat([q, k], -2), state.seen).chunk(2, -2)
        o, s = outer_step(q, k, v, self._log_decay(), state.s)
        return o.to(u.v.dtype), RetNetState(s, state.seen + 1)

    def scan(
        self, u: Outer, state: RetNetState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, RetNetState]:
        position = positions(state.seen, u.v.shape[1], reset)  # (B, T)
        q, k = (rotate(z.to(state.s.dtype), position).to(z.dtype) for z in (u.q, u.k))
        o, s = outer_scan(q, k, u.v, state.s, log_decay=self._log_decay(), reset=reset, lengths=lengths)
        seen = tail(torch.cat([state.seen[:, None], position + 1], 1), 1, lengths)[:, 0]
        return o, RetNetState(s, seen)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(self.norm(o) * F.silu(self.gate(x))).to(x.dtype)

    def _log_decay(self) -> Tensor:
        weight = self.out.weight
        head = torch.arange(self.heads, dtype=wide(weight.dtype), device=weight.device)
        return torch.log1p(-torch.exp2(-5 - head))[:, None, None]
