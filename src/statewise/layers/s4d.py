"""S4D, the diagonal state-space layer (Gu, Gupta, Goel & Re 2022, arXiv:2206.11893)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..core import Traits, UsageError, check_sizes, near, register_layer, wide
from ..nn import LTI, LinearSystem, check_dt, diagonal, log_uniform
from ..nn.hippo import Diagonal

Rule = Literal["zoh", "bilinear"]


@register_layer(
    "s4d",
    paper="arXiv:2206.11893",
    examples=[
        dict(width=3, states=8),
        dict(width=2, states=4, start="inv", rule="bilinear"),
        dict(width=2, states=6, start="legs"),
        dict(width=2, states=4, start="real"),
    ],
    sized=lambda width: dict(width=width, states=64),
)
class S4D(LTI):
    """x_t = exp(lam dt) x_{t-1} + (exp(lam dt) - 1) / lam b u_t,  y_t = 2 Re(c x_t) + d u_t, for each feature alone.

    x is complex and holds one of each conjugate pair: `states` real dimensions are states / 2 numbers. start, where
    lam and b begin, is "lin", "inv", "legs" or "real" (`nn.diagonal`); c is a complex Gaussian, d Gaussian, dt
    log-uniform in [dt_min, dt_max], one for each feature. lam = -exp(log_decay) + i frequency: every learned system is
    stable. rule "zoh" is as above; "bilinear" has (1 + lam dt / 2) / (1 - lam dt / 2) and dt / (1 - lam dt / 2) b.
    The GELU and gated linear unit of the paper's block are the model's business. State x (B, D, N/2), complex64 or
    wider.

    Raises UsageError for an odd number of states, an unknown start or rule, and unless 0 < dt_min <= dt_max.
    """

    traits = Traits(linear_in_input=True, time_invariant=True)

    def __init__(
        self,
        width: int,
        states: int = 64,
        *,
        start: Diagonal = "lin",
        rule: Rule = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ):
        super().__init__()
        check_sizes("S4D", width=width, states=states)
        check_dt("S4D", dt_min, dt_max)
        if rule not in get_args(Rule):
            raise UsageError(f"S4D: unknown rule {rule!r}; {near(str(rule), get_args(Rule))}")
        self.width = self.out_width = width
        self.rule = rule
        dtype = torch.get_default_dtype()
        lam, b = diagonal(start, states)
        lam, b = lam.expand(width, -1), b.expand(width, -1)
        self.log_decay = nn.Parameter((-lam.real).log().to(dtype))
        self.frequency = nn.Parameter(lam.imag.to(dtype).clone())
        self.log_dt = nn.Parameter(log_uniform(width, dt_min, dt_max).to(dtype))
        self.b = nn.Parameter(torch.view_as_real(b.resolve_conj()).to(dtype).clone())  # (D, N/2, 2)
        self.c = nn.Parameter(torch.randn(width, states // 2, 2) / 2**0.5)
        self.d = nn.Parameter(torch.randn(width))

    def initial_state(self, batch: int) -> Tensor:
        zero = self.frequency.new_zeros(batch, *self.frequency.shape, dtype=wide(self.frequency.dtype))
        return torch.complex(zero, zero)

    def system(self) -> LinearSystem:
        high = wide(self.frequency.dtype)
        lam = torch.complex(-self.log_decay.to(high).exp(), self.frequency.to(high))
        b, c = (torch.view_as_complex(p.to(high).contiguous()) for p in (self.b, self.c))
        dt = self.log_dt.to(high).exp()[:, None]
        if self.rule == "zoh":  # expm1, for dt lam may be tiny
            step = torch.polar((lam.real * dt).exp(), lam.imag * dt)  # several times as fast as the complex exp
            return LinearSystem(step, torch.expm1(lam * dt) / lam * b, 2 * c[:, None])
        half = lam * dt / 2
        return LinearSystem((1 + half) / (1 - half), dt / (1 - half) * b, 2 * c[:, None])

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return (o[..., 0] + self.d * x).to(x.dtype)
