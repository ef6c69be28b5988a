"""Mamba-2, or state-space duality (Dao & Gu 2024, arXiv:2405.21060)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, UsageError, check_sizes, register_layer, wide
from ..nn import ShortConvolution, inverse_softplus, log_uniform, rate
from ..ops import outer_scan, outer_step


class Mamba2State(NamedTuple):
    taps: Tensor  # (B, P-1, C) the last inputs of the convolution
    memory: Tensor  # (B, H, K, V)


class Projected(NamedTuple):
    z: Tensor  # (..., H V) gate
    xbc: Tensor  # (..., C) x, B and C before the convolution
    dt: Tensor  # (..., H) step sizes


class Read(NamedTuple):
    y: Tensor  # (..., H V)
    z: Tensor  # (..., H V)


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * silu(z)), each of `groups` parts of the channels by its own size, computed in float32 or wider."""

    def __init__(self, width: int, *, groups: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        y = (y * F.silu(z.to(y.dtype))).unflatten(-1, (self.groups, -1))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.flatten(-2) * self.weight


def _sized(width: int) -> dict[str, int]:
    value = min(64, 2 * width)
    return dict(width=width, heads=math.ceil(2 * width / value), value=value, key=64)


@register_layer(
    "mamba2",
    paper="arXiv:2405.21060",
    examples=[
        dict(width=3, heads=2, value=2, key=3),
        dict(width=2, heads=4, value=1, key=2, groups=2, bias=True, dt_limits=(0.01, 0.5)),
    ],
    sized=_sized,
)
class Mamba2(Cell[Mamba2State]):
    """S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T,  y_t = W RMSNorm((S_t^T C_t + D x_t) * silu(z_t)), head by head.

    z, (x, B, C), dt = in_proj(u); (x, B, C) <- silu(conv(x, B, C)); dt = softplus(dt + dt_bias), held within
    `dt_limits`; A = -exp(a_log) and D are one number per head. This is `outer_scan` with q = C, k = B, v = dt x.
    heads H with `value` V channels of x each and a state of `key` K numbers per channel; `groups` G of heads in a row
    share B and C, and the norm takes each group's channels by themselves. bias: of in_proj and out_proj.
    Order of in_proj's rows, as in the published checkpoints: z (H V), x (H V), B (G K), C (G K), dt (H).

    At birth exp(a_log) is uniform in [1, 16], softplus(dt_bias) log-uniform in [0.001, 0.1], D = 1; linear maps start
    as in torch.nn.Linear. State: memory (B, H, K, V) and the convolution's last inputs, float32 or wider.
    Raises UsageError if groups do not divide heads, or unless 0 <= dt_limits[0] < dt_limits[1] and 0 < eps.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        value: int,
        key: int,
        groups: int = 1,
        taps: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        dt_limits: tuple[float, float] = (0.0, math.inf),
        eps: float = 1e-5,
    ):
        super().__init__()
        check_sizes("Mamba2", width=width, heads=heads, value=value, key=key, groups=groups, taps=taps)
        if heads % groups:
            raise UsageError(f"Mamba2: heads {heads} is not a multiple of groups {groups}")
        low, high = dt_limits
        if not 0 <= low < high:
            raise UsageError(f"Mamba2: dt_limits {dt_limits}; expected 0 <= low < high")
        if not 0 < eps < math.inf:
            raise UsageError(f"Mamba2: eps {eps}; expected more than 0")
        self.width = self.out_width = width
        self.heads, self.value, self.key, self.groups, self.dt_limits = heads, value, key, groups, (low, high)
        inner, shared = heads * value, groups * key
        self.sizes = [inner, inner + 2 * shared, heads]
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=bias)
        self.conv = ShortConvolution(self.sizes[1], taps=taps, bias=conv_bias)
        dt, dtype = log_uniform(heads, 1e-3, 0.1).exp(), torch.get_default_dtype()
        self.dt_bias = nn.Parameter(inverse_softplus(dt).to(dtype))
        self.a_log = nn.Parameter((1 + 15 * torch.rand(heads, dtype=torch.float64)).log().to(dtype))
        self.d = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner, groups=groups, eps=eps)
        self.out_proj = nn.Linear(inner, width, bias=bias)

    def initial_state(self, batch: int) -> Mamba2State:
        weight = self.in_proj.weight
        memory = weight.new_zeros(batch, self.heads, self.key, self.value, dtype=wide(weight.dtype))
        return Mamba2State(self.conv.initial_state(batch), memory)

    def encode(self, x: Tensor) -> Projected:
        z, xbc, dt = self.in_proj(x).split(self.sizes, -1)
        dt = F.softplus(dt.to(wide(self.dt_bias.dtype)) + self.dt_bias)
        return Projected(z, xbc, dt.clamp(*self.dt_limits))

    def transition(self, u: Projected, state: Mamba2State) -> tuple[Read, Mamba2State]:
        xbc, taps = self.conv.step(u.xbc, state.taps)
        x, q, k, log_decay = self._operands(xbc, u.dt)
        o, memory = outer_step(q, k, u.dt[..., None] * x, log_decay, state.memory)
        return self._read(o, x, u.z), Mamba2State(taps, memory)

    def scan(
        self, u: Projected, state: Mamba2State, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Read, Mamba2State]:
        xbc, taps = self.conv(u.xbc, state.taps, reset, lengths)
        x, q, k, log_decay = self._operands(xbc, u.dt)
        v = u.dt[..., None] * x
        o, memory = outer_scan(q, k, v, state.memory, log_decay=log_decay, reset=reset, lengths=lengths)
        return self._read(o, x, u.z), Mamba2State(taps, memory)

    def _operands(self, xbc: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (..., H, V), q = C and k = B (..., G, K), log_decay (..., H, 1, 1)."""
        inner, shared = self.heads * self.value, self.groups * self.key
        x, b, c = F.silu(xbc).split([inner, shared, shared], -1)
        b, c = b.unflatten(-1, (self.groups, self.key)), c.unflatten(-1, (self.groups, self.key))
        log_decay = -rate(self.a_log.to(dt.dtype)) * dt
        return x.unflatten(-1, (self.heads, self.value)), c, b, log_decay[..., None, None]

    def _read(self, o: Tensor, x: Tensor, z: Tensor) -> Read:
        return Read((o + self.d[:, None] * x).flatten(-2), z)

    def decode(self, o: Read, x: Tensor) -> Tensor:
        return self.out_proj(self.norm(o.y, o.z).to(x.dtype)).to(x.dtype)
