"""LightNet's additive recurrence along one axis (Qin et al. 2024, arXiv:2405.21022)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import check_sizes, clear_past_end, register_layer, wide
from ..nn import HeadNorm
from ..ops import log_sum_exp_scan, outer_scan, outer_step
from .outer_cell import MemoryCell, Outer, empty_memory, usual_heads


class LightNetState(NamedTuple):
    s: Tensor  # (B, H, K, V) the memory
    z: Tensor  # (B, H, K) log of the sum of exp(k), the lowest number where there was none


@register_layer(
    "lightnet",
    paper="arXiv:2405.21022",
    examples=[dict(width=3, heads=2, key=2, value=3, rank=2), dict(width=2, heads=1, key=3, value=2, rank=1)],
    sized=lambda width: dict(
        width=width, heads=(h := usual_heads(width)), key=max(1, width // h), value=max(2, width // h)
    ),
)
class LightNet(MemoryCell[LightNetState]):
    """z_t = log(e^{z_{t-1}} + e^{k_t}),  S_t = diag(e^{z_{t-1} - z_t}) S_{t-1} + e^{k_t - z_t} v_t^T,  o_t = S_t^T q_t.

    Per head; decay and input weight of each key channel sum to one, so S_t is the softmax average of v over all steps
    so far, weighted by k channel by channel; it starts with the first step, and a large k is never forgotten.
    q = silu(W_q x), k = W_k x, v = W_v x, y = W_o (norm(o) * sigmoid(W_2 W_1 x)) with an RMS norm per head and a
    bottleneck of `rank`. Without the paper's position encodings. State (S, z), float32 or wider.
    Linear maps have no bias and start as in torch.nn.Linear.
    """

    def __init__(self, width: int, *, heads: int, key: int, value: int, rank: int = 16):
        super().__init__(width, heads=heads, key=key, value=value)
        check_sizes("LightNet", rank=rank)
        self.gate = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, heads * value, bias=False))
        self.norm = HeadNorm(heads, value)

    def initial_state(self, batch: int) -> LightNetState:
        s = empty_memory(self, batch)
        return LightNetState(s, torch.full_like(s[..., 0], torch.finfo(s.dtype).min))

    def encode(self, x: Tensor) -> Outer:
        q, k, v = self.project(x)
        return Outer(F.silu(q), k.to(wide(k.dtype)), v)

    def transition(self, u: Outer, state: LightNetState) -> tuple[Tensor, LightNetState]:
        z = torch.logaddexp(state.z, u.k)
        q, v = u.q.to(z.dtype), u.v.to(z.dtype)
        o, s = outer_step(q, (u.k - z).exp(), v, (state.z - z)[..., None], state.s)
        return o.to(u.v.dtype), LightNetState(s, z)

    def scan(
        self, u: Outer, state: LightNetState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, LightNetState]:
        z, last = log_sum_exp_scan(u.k, state.z, reset=reset, lengths=lengths)
        log_decay = torch.cat([state.z[:, None], z[:, :-1]], 1) - z
        if reset is not None:  # the memory is cleared there, whatever the decay
            log_decay = log_decay.masked_fill(reset[..., None, None], 0)
        if lengths is not None:
            log_decay = clear_past_end(log_decay, lengths)
        k = (u.k - z).exp()
        o, s = outer_scan(
            u.q, k.to(u.v.dtype), u.v, state.s, log_decay=log_decay[..., None], reset=reset, lengths=lengths
        )
        return o, LightNetState(s, last)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(self.norm(o) * self.gate(x).sigmoid()).to(x.dtype)
