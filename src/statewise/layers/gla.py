"""Gated linear attention (Yang et al. 2024, arXiv:2312.06635)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Traits, UsageError, check_sizes, register_layer, wide
from ..nn import HeadNorm
from .outer_cell import Outer, OuterCell, usual_heads


@register_layer(
    "gla",
    paper="arXiv:2312.06635",
    examples=[
        dict(width=3, heads=2, key=2, value=3, rank=2),
        dict(width=2, heads=1, key=3, value=2, rank=1, temper=1.0),
    ],
    sized=lambda width: dict(
        width=width, heads=(h := usual_heads(width)), key=max(1, width // h // 2), value=max(2, width // h)
    ),
)
class GLA(OuterCell):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t,  y_t = W_o (norm(o_t) * silu(W_g x_t)),  per head.

    q, k, v = W x without bias, q divided by sqrt(K). a_t = sigmoid(W_2 W_1 x_t + b)^(1 / temper), the decay of each key
    channel, through a bottleneck of `rank`; temper 16 keeps it near one at birth. The norm is RMS per head.
    State S (B, H, K, V), float32 or wider. Linear maps start as in torch.nn.Linear.
    Raises UsageError for a temper that is not positive.
    """

    traits = Traits(time_invariant=True)

    def __init__(self, width: int, *, heads: int, key: int, value: int, rank: int = 16, temper: float = 16.0):
        super().__init__(width, heads=heads, key=key, value=value)
        check_sizes("GLA", rank=rank)
        if not 0 < temper < math.inf:
            raise UsageError(f"GLA: temper {temper}; expected more than 0")
        self.temper = temper
        self.decay = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, heads * key))
        self.gate = nn.Linear(width, heads * value, bias=False)
        self.norm = HeadNorm(heads, value)

    def encode(self, x: Tensor) -> Outer:
        q, k, v = self.project(x)
        log_decay = F.logsigmoid(self.decay(x).to(wide(x.dtype))) / self.temper
        return Outer(q * self.key**-0.5, k, v, log_decay.unflatten(-1, (self.heads, -1))[..., None])

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(self.norm(o) * F.silu(self.gate(x))).to(x.dtype)
