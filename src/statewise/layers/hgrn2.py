"""HGRN2 (Qin et al. 2024, arXiv:2404.07904)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Traits, UsageError, register_layer, wide
from ..nn import HeadNorm
from .outer_cell import Outer, OuterCell, usual_heads


@register_layer(
    "hgrn2",
    paper="arXiv:2404.07904",
    examples=[
        dict(width=3, heads=2, key=2, value=3),
        dict(width=2, heads=1, key=3, value=2, lower_bound=0.5),
    ],
    sized=lambda width: dict(
        width=width, heads=(h := usual_heads(width)), key=max(1, width // h), value=max(2, width // h)
    ),
)
class HGRN2(OuterCell):
    """S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T,  o_t = S_t^T q_t,  y_t = W_o norm(o_t),  per head.

    f_t = b + (1 - b) sigmoid(W_f x_t) with b = lower_bound, q = silu(W_q x), v = W_v x; the norm is RMS per head.
    The paper raises b from layer to layer, from 0 at the bottom, so that upper layers remember longer.
    State S (B, H, K, V), float32 or wider. Linear maps have no bias and start as in torch.nn.Linear.

    Raises UsageError unless lower_bound is 0, or at least 1e-6 and less than 1.
    """

    traits = Traits(time_invariant=True)

    def __init__(self, width: int, *, heads: int, key: int, value: int, lower_bound: float = 0.0):
        super().__init__(width, heads=heads, key=key, value=value)
        if not (lower_bound == 0 or 1e-6 <= lower_bound < 1):  # between, float32 cannot take log(1 - k)
            raise UsageError(f"HGRN2: lower_bound {lower_bound}; expected 0, or at least 1e-6 and less than 1")
        self.lower_bound = lower_bound
        self.norm = HeadNorm(heads, value)

    def encode(self, x: Tensor) -> Outer:
        q, f, v = self.project(x)
        f = f.to(wide(f.dtype))
        k = (1 - self.lower_bound) * torch.sigmoid(-f)  # 1 - f_t, right to the last digit where f_t is near one
        log_decay = torch.log1p(-k) if self.lower_bound else F.logsigmoid(f)
        return Outer(F.silu(q), k.to(v.dtype), v, log_decay[..., None])

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(self.norm(o)).to(x.dtype)
