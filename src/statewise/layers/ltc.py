"""Liquid time-constant networks (Hasani et al. 2020, arXiv:2006.04439)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, check_sizes, register_layer, wide
from ..nn import Elapsed, check_elapsed, inverse_softplus, split_elapsed
from ..ops.recorded_loop import recorded_loop


class Synapses(nn.Module):
    """Conductances f_jn = w_jn sigmoid(s_jn (v_j - m_jn)) from J senders to N units, each pulling towards E_jn.

    w > 0 as the softplus of its parameter. At birth w is uniform in 0.001..1, s in 3..8, m in 0.3..0.8, E is -1 or 1.
    """

    def __init__(self, senders: int, units: int):
        super().__init__()
        shape = senders, units
        self.w = nn.Parameter(inverse_softplus(torch.empty(shape).uniform_(0.001, 1)))
        self.slope = nn.Parameter(torch.empty(shape).uniform_(3, 8))
        self.middle = nn.Parameter(torch.empty(shape).uniform_(0.3, 0.8))
        self.reversal = nn.Parameter(torch.randint(0, 2, shape) * 2.0 - 1)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v (..., J) -> sum_j f_jn and sum_j f_jn E_jn, both (..., N)."""
        slope, middle, reversal = (p.to(v.dtype) for p in (self.slope, self.middle, self.reversal))
        f = F.softplus(self.w.to(v.dtype)) * torch.sigmoid(slope * (v[..., None] - middle))
        return f.sum(-2), (f * reversal).sum(-2)


@register_layer(
    "ltc",
    paper="arXiv:2006.04439",
    examples=[dict(width=3, hidden=4, unfolds=3, dt="input"), dict(width=2, hidden=3, unfolds=1, dt=0.5)],
    sized=lambda width: dict(width=width, hidden=width),
)
class LTC(Cell[Tensor]):
    """c_n dv_n/dt = g_n (r_n - v_n) + sum_j f_jn(t) (E_jn - v_n),  f_jn = w_jn sigmoid(s_jn (v_j - m_jn)),  y_t = v.

    j runs over the units and the inputs x_t, which stay the same for dt_t, the time since the step before. What pulls
    also hastens: f is in the rate at which v moves, so the time constant is liquid. Solved in `unfolds` fused
    (semi-implicit) steps of d = dt_t / unfolds, which no dt makes unstable,

        v <- (v + d/c (g r + sum_j f_j E_j)) / (1 + d/c (g + sum_j f_j)),  f at the old v:

    each v is a mean of what it was and of r and the E with weights that sum to one.
    dt: a constant; or "input", where the last channel of x is that time: `width` counts it, and below 0 it counts as
    0. State v (B, N), float32 or wider.

    c, g and w are softplus of their parameters; g starts uniform in 0.001..1, r in -0.2..0.2, c in 0.4..0.6, the others
    as `Synapses` says. Raises UsageError for a dt that cannot be.
    """

    def __init__(self, width: int, hidden: int, *, unfolds: int = 6, dt: Elapsed = 1.0):
        super().__init__()
        check_sizes("LTC", width=width, hidden=hidden, unfolds=unfolds)
        self.width, self.out_width = width, hidden
        self.unfolds, self.dt = unfolds, dt
        self.sensory = Synapses(check_elapsed("LTC", dt, width), hidden)
        self.recurrent = Synapses(hidden, hidden)
        self.leak = nn.Parameter(inverse_softplus(torch.empty(hidden).uniform_(0.001, 1)))
        self.rest = nn.Parameter(torch.empty(hidden).uniform_(-0.2, 0.2))
        self.capacity = nn.Parameter(inverse_softplus(torch.empty(hidden).uniform_(0.4, 0.6)))

    def initial_state(self, batch: int) -> Tensor:
        return self.rest.new_zeros(batch, self.out_width, dtype=wide(self.rest.dtype))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What leak and inputs pull with and to, and how long."""
        x, elapsed = split_elapsed(x, self.dt)
        f, f_e = self.sensory(x)
        leak, rest, capacity = (p.to(x.dtype) for p in (self.leak, self.rest, self.capacity))
        leak = F.softplus(leak)
        return f + leak, f_e + leak * rest, elapsed / (self.unfolds * F.softplus(capacity))

    def transition(self, u: tuple[Tensor, Tensor, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        given, pulled, d = u
        v = state
        for _ in range(self.unfolds):
            f, f_e = self.recurrent(v)
            v = (v + d * (pulled + f_e)) / (1 + d * (given + f))
        return v, v

    def scan(self, u: Any, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return recorded_loop(self, u, state, reset, lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)
