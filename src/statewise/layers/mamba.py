"""Mamba, the selective state space model S6 (Gu & Dao 2023, arXiv:2312.00752)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, UsageError, check_sizes, register_layer, wide
from ..nn import RMSNorm, ShortConvolution, check_dt, inverse_softplus, log_uniform, rate
from ..ops import selective_scan
from ..ops.selective_scan import selective_step

DT_FLOOR = 1e-4  # least step size at birth


class MambaState(NamedTuple):
    conv: Tensor  # (B, P-1, I) last inputs of the convolution, newest last
    h: Tensor  # (B, I, N)


class Branches(NamedTuple):
    x: Tensor  # (..., I) what the recurrence reads
    z: Tensor  # (..., I) the gate of its output


@register_layer(
    "mamba",
    paper="arXiv:2312.00752",
    examples=[
        dict(width=3, states=4),
        dict(width=2, states=3, expand=1, taps=2, dt_rank=2, bias=True, conv_bias=False, inner_norm=True),
    ],
    sized=lambda width: dict(width=width),
)
class Mamba(Cell[MambaState]):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t b_t,  y_t = W_out (silu(z_t) * (c_t . h_t + D x_t)),  channel by channel.

    [u, z] = W_in of the input, x = silu(causal convolution of u), [r, b, c] = W_x x, dt = softplus(W_dt r + bias),
    A = -exp(a_log). I = expand * width channels with N states each; b and c are shared by the channels.

    dt_rank: size of r, ceil(width / 16) where not given. bias: of W_in and W_out. conv_bias: of the convolution.
    inner_norm: an RMS norm, with norm_eps, on each of r, b and c, as Jamba (arXiv:2403.19887) and Falcon-Mamba
    (arXiv:2410.05355) have it; Falcon-Mamba's has no weights, which is this one's at birth.

    At birth a_log = log(1 .. N) in every channel, D = 1, W_dt is uniform in +-dt_rank^-1/2, and its bias makes dt
    log-uniform in [dt_min, dt_max], not below 1e-4; the linear maps start as in torch.nn.Linear. The paper exempts
    a_log and D from weight decay.

    State: MambaState, float32 or wider, as dt and A are in every mode.
    Raises UsageError for sizes below 1 and unless 0 < dt_min <= dt_max and 0 < norm_eps.
    """

    def __init__(
        self,
        width: int,
        *,
        states: int = 16,
        expand: int = 2,
        taps: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bias: bool = False,
        conv_bias: bool = True,
        inner_norm: bool = False,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        check_sizes("Mamba", width=width, states=states, expand=expand, taps=taps)
        if dt_rank is None:
            dt_rank = math.ceil(width / 16)
        check_sizes("Mamba", dt_rank=dt_rank)
        check_dt("Mamba", dt_min, dt_max)
        if not 0 < norm_eps < math.inf:
            raise UsageError(f"Mamba: norm_eps {norm_eps}; expected more than 0")
        self.width = self.out_width = width
        self.inner, self.states, self.dt_rank = expand * width, states, dt_rank
        dtype = torch.get_default_dtype()
        self.inp = nn.Linear(width, 2 * self.inner, bias=bias)
        self.conv = ShortConvolution(self.inner, taps=taps, bias=conv_bias)
        self.select = nn.Linear(self.inner, dt_rank + 2 * states, bias=False)
        self.dt_norm = RMSNorm(dt_rank, eps=norm_eps) if inner_norm else nn.Identity()
        self.b_norm = RMSNorm(states, eps=norm_eps) if inner_norm else nn.Identity()
        self.c_norm = RMSNorm(states, eps=norm_eps) if inner_norm else nn.Identity()
        self.dt = nn.Linear(dt_rank, self.inner)
        nn.init.uniform_(self.dt.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        dt = log_uniform(self.inner, dt_min, dt_max).exp().clamp_min(DT_FLOOR)
        self.dt.bias.data.copy_(inverse_softplus(dt))
        self.a_log = nn.Parameter(torch.arange(1, states + 1, dtype=dtype).log().repeat(self.inner, 1))
        self.d = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, width, bias=bias)

    def initial_state(self, batch: int) -> MambaState:
        h = self.a_log.new_zeros(batch, self.inner, self.states, dtype=wide(self.a_log.dtype))
        return MambaState(self.conv.initial_state(batch), h)

    def encode(self, x: Tensor) -> Branches:
        return Branches(*self.inp(x).chunk(2, -1))

    def transition(self, u: Branches, state: MambaState) -> tuple[Branches, MambaState]:
        x, conv = self.conv.step(u.x, state.conv)
        x, dt, a, b, c = self._select(x)
        y, h = selective_step(x, dt, b, c, state.h, a)
        return Branches(y + self.d * x, u.z), MambaState(conv, h)

    def scan(
        self, u: Branches, state: MambaState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Branches, MambaState]:
        x, conv = self.conv(u.x, state.conv, reset, lengths)
        x, dt, a, b, c = self._select(x)
        y, h = selective_scan(x, dt, a, b, c, state.h, reset=reset, lengths=lengths)
        return Branches(y + self.d * x, u.z), MambaState(conv, h)

    def decode(self, o: Branches, x: Tensor) -> Tensor:
        return self.out((o.x * F.silu(o.z)).to(self.out.weight.dtype)).to(x.dtype)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the convolution gives (..., I) -> x, dt (..., I), a (I, N), b, c (..., N)."""
        x, high, weight = F.silu(x), wide(self.a_log.dtype), self.dt.weight
        r, b, c = self.select(x.to(weight.dtype)).split([self.dt_rank, self.states, self.states], -1)
        # the bias in float32 or wider: it is all that tells the small steps apart
        dt = F.softplus(F.linear(self.dt_norm(r), weight).to(high) + self.dt.bias.to(high))
        return x, dt, -rate(self.a_log.to(high)), self.b_norm(b), self.c_norm(c)
