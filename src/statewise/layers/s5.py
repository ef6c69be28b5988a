"""S5, the simplified state-space layer (Smith, Warrington & Linderman 2023, arXiv:2208.04933)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, Traits, UsageError, check_sizes, register_layer, wide
from ..nn import check_dt, legs_normal, log_uniform
from ..ops import linear_scan


@register_layer(
    "s5",
    paper="arXiv:2208.04933",
    examples=[dict(width=3, states=8), dict(width=2, states=8, blocks=2, dt_min=0.01)],
    sized=lambda width: dict(width=width, states=2 * width, blocks=4 if width % 4 == 0 else 1),
)
class S5(Cell[Tensor]):
    """h_t = exp(lam dt) h_{t-1} + (exp(lam dt) - 1) / lam B x_t,  y_t = 2 Re(C h_t) + D x_t.

    One multi-input multi-output diagonal system, held by the half of its conjugate pairs: `states` real dimensions are
    states / 2 complex numbers. At birth lam is the spectrum of `blocks` copies of the normal part of HiPPO-LegS, B and
    C are Gaussian matrices seen from its eigenvectors, D is Gaussian, and dt is log-uniform in [dt_min, dt_max], one
    for each state. lam = -exp(log_decay) + i frequency, so every learned system is stable. The nonlinearity of the
    paper's block is the model's business. State h (B, N/2), complex64 or wider.
    """

    traits = Traits(linear_in_input=True, time_invariant=True)

    def __init__(self, width: int, states: int, *, blocks: int = 1, dt_min: float = 0.001, dt_max: float = 0.1):
        super().__init__()
        check_sizes("S5", width=width, states=states, blocks=blocks)
        check_dt("S5", dt_min, dt_max)
        if states % (2 * blocks):
            raise UsageError(f"S5: states {states}, blocks {blocks}; expected states to be a multiple of 2 * blocks")
        self.width = self.out_width = width
        dtype = torch.get_default_dtype()
        frequency, vectors = legs_normal(states // blocks)
        basis = torch.block_diag(*[vectors] * blocks)  # (N, N/2)
        b = basis.mH @ (torch.randn(states, width, dtype=torch.float64) / math.sqrt(width)).to(basis.dtype)
        c = (torch.randn(width, states, dtype=torch.float64) / math.sqrt(states)).to(basis.dtype) @ basis
        self.log_decay = nn.Parameter(torch.full((states // 2,), math.log(0.5)))
        self.frequency = nn.Parameter(frequency.repeat(blocks).to(dtype))
        self.log_dt = nn.Parameter(log_uniform(states // 2, dt_min, dt_max).to(dtype))
        self.b = nn.Parameter(torch.stack([b.real, b.imag], 1).to(dtype))  # (N/2, 2, D)
        self.c = nn.Parameter(torch.stack([c.real, -c.imag], 2).to(dtype))  # (D, N/2, 2), minus the imaginary part
        self.d = nn.Parameter(torch.randn(width))

    def initial_state(self, batch: int) -> Tensor:
        zero = self.log_dt.new_zeros(batch, len(self.log_dt), dtype=wide(self.log_dt.dtype))
        return torch.complex(zero, zero)

    def encode(self, x: Tensor) -> Tensor:
        bx = F.linear(x, self.b.flatten(0, 1)).to(wide(self.log_dt.dtype)).unflatten(-1, (-1, 2))
        lam, dt = self._system()
        return torch.expm1(lam * dt) / lam * torch.view_as_complex(bx)

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = self._decay() * state + u
        return h, h

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_scan(self._decay(), u, state, reset=reset, lengths=lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        y = F.linear(torch.view_as_real(o).flatten(-2).to(self.c.dtype), 2 * self.c.flatten(1))
        return (y + self.d * x).to(x.dtype)

    def _system(self) -> tuple[Tensor, Tensor]:
        high = wide(self.log_dt.dtype)
        lam = torch.complex(-self.log_decay.to(high).exp(), self.frequency.to(high))
        return lam, self.log_dt.to(high).exp()

    def _decay(self) -> Tensor:
        lam, dt = self._system()
        return torch.exp(lam * dt)
