"""Linear Recurrent Unit (Orvieto et al. 2023, arXiv:2303.06349)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, Traits, check_sizes, register_layer, wide
from ..nn import ring
from ..ops import linear_scan


@register_layer(
    "lru",
    paper="arXiv:2303.06349",
    examples=[dict(width=3, hidden=4), dict(width=2, hidden=5, r_min=0.5)],
    sized=lambda width: dict(width=width, hidden=width),
)
class LRU(Cell[Tensor]):
    """h_t = lam h_{t-1} + gamma B x_t,  y_t = Re(C h_t) + D x_t,  lam = exp(-e^nu + i e^theta).

    At birth lam is uniform on the ring r_min <= |lam| <= r_max with phases up to max_phase, and
    gamma = sqrt(1 - |lam|^2), learned from there as a logarithm; B, C, D are Gaussian (sec. 3.3 and 3.4).
    |lam| < 1 whatever is learned. State h (B, N), complex64 or wider.
    """

    traits = Traits(linear_in_input=True, time_invariant=True)

    def __init__(
        self, width: int, hidden: int, *, r_min: float = 0.9, r_max: float = 0.999, max_phase: float = 2 * math.pi
    ):
        super().__init__()
        check_sizes("LRU", width=width, hidden=hidden)
        self.width = self.out_width = width
        dtype = torch.get_default_dtype()
        nu, theta = ring(hidden, r_min=r_min, r_max=r_max, max_phase=max_phase)
        self.nu, self.theta = nn.Parameter(nu.to(dtype)), nn.Parameter(theta.to(dtype))
        # 1 - |lam|^2 as -expm1: the plain form is 0 for |lam| near 1
        self.log_gamma = nn.Parameter((0.5 * torch.log(-torch.expm1(-2 * nu.exp()))).to(dtype))
        self.b = nn.Parameter(torch.randn(hidden, 2, width) / math.sqrt(2 * width))  # real and imaginary part
        self.c = nn.Parameter(torch.randn(width, hidden, 2) / math.sqrt(hidden))  # real and minus imaginary part
        self.d = nn.Parameter(torch.randn(width))

    def initial_state(self, batch: int) -> Tensor:
        zero = self.nu.new_zeros(batch, len(self.nu), dtype=wide(self.nu.dtype))
        return torch.complex(zero, zero)

    def encode(self, x: Tensor) -> Tensor:
        bx = F.linear(x, self.b.flatten(0, 1)).to(wide(self.nu.dtype)).unflatten(-1, (-1, 2))
        return torch.view_as_complex(self._wide(self.log_gamma).exp()[:, None] * bx)

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = self._lam() * state + u
        return h, h

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_scan(self._lam(), u, state, reset=reset, lengths=lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        y = F.linear(torch.view_as_real(o).flatten(-2).to(self.c.dtype), self.c.flatten(1))
        return (y + self.d * x).to(x.dtype)

    def _lam(self) -> Tensor:
        return torch.polar(torch.exp(-self._wide(self.nu).exp()), self._wide(self.theta).exp())

    def _wide(self, parameter: Tensor) -> Tensor:
        return parameter.to(wide(parameter.dtype))
