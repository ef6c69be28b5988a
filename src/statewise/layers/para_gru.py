"""ParaGRU, a GRU whose units do not see each other's state (Danieli et al. 2025, arXiv:2510.21450)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Cell, UsageError, check_sizes, register_layer, wide
from ..ops.newton import Structure, newton


class HeadwiseGates(nn.Module):
    """B x + b for several gates, head by head: x (..., D) -> (..., gates, N), b zero but for the gate that forgets."""

    def __init__(self, width: int, hidden: int, *, gates: int, heads: int, forget: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(gates, heads, hidden // heads, width // heads))
        bound = math.sqrt(6 / (width // heads + hidden // heads))
        nn.init.uniform_(self.weight, -bound, bound)
        self.bias = nn.Parameter(torch.zeros(gates, hidden))
        with torch.no_grad():
            self.bias[forget] = -torch.linspace(0, 1, hidden)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.einsum("...hd,ghnd->...ghn", x.unflatten(-1, (self.weight.shape[1], -1)), self.weight)
        return parts.flatten(-2) + self.bias


def recurrent_weights(gates: int, hidden: int) -> nn.Parameter:
    """A ~ N(0, (2 / sqrt(5 N))^2), one number for each gate and unit."""
    return nn.Parameter(torch.randn(gates, hidden) * 2 / math.sqrt(5 * hidden))


def near_loop(tolerance: float | None, dtype: torch.dtype) -> float:
    """1e-5 in float32, where over a long memory the rounding of the loop itself adds up to more than 1e-6."""
    return tolerance or (1e-10 if dtype == torch.float64 else 1e-5)


def check_heads(name: str, width: int, hidden: int, heads: int) -> None:
    check_sizes(name, width=width, hidden=hidden, heads=heads)
    if width % heads or hidden % heads:
        raise UsageError(f"{name}: width {width} and hidden {hidden}; expected multiples of heads {heads}")


@register_layer(
    "para_gru",
    paper="arXiv:2510.21450",
    examples=[dict(width=3, hidden=4), dict(width=4, hidden=6, heads=2)],
    sized=lambda width: dict(width=width, hidden=width),
)
class ParaGRU(Cell[Tensor]):
    """h_t = (1 - z) h_{t-1} + z tanh(a_c r h_{t-1} + B_c x_t + b_c),  z, r = s(a h_{t-1} + B x_t + b),  y_t = h_t.

    All a are vectors: a unit sees its own past alone, the Jacobian is diagonal, and Newton's method solves all times at
    once (`statewise.ops.newton`). Units are mixed by B, which has blocks where heads > 1, and by the next layer.
    tolerance: how near to the loop, see `newton`; 1e-5 in float32, 1e-10 in float64 unless given.
    State h (B, N), float32 or wider.

    a ~ N(0, 4 / (5 N)), B uniform (Glorot), b zero but for z's, which falls from 0 to -1 over the units: some
    remember longer. Raises UsageError if heads do not divide width and hidden.
    """

    def __init__(self, width: int, hidden: int, *, heads: int = 1, tolerance: float | None = None):
        super().__init__()
        check_heads("ParaGRU", width, hidden, heads)
        self.width, self.out_width, self.tolerance = width, hidden, tolerance
        self.gates = HeadwiseGates(width, hidden, gates=3, heads=heads, forget=0)
        self.a = recurrent_weights(3, hidden)

    def initial_state(self, batch: int) -> Tensor:
        return self.a.new_zeros(batch, self.out_width, dtype=wide(self.a.dtype))

    def encode(self, x: Tensor) -> Tensor:
        return self.gates(x).to(wide(self.a.dtype))

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        z, _, c = self._parts(u, state)
        h = state + z * (c - state)
        return h, h

    def linearise(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """h_t and dh_t / dh_{t-1}."""
        z, r, c = self._parts(u, state)
        a_z, a_r, a_c = self.a.to(state.dtype)
        slope = (1 - z) + (c - state) * a_z * z * (1 - z)
        slope = slope + z * (1 - c * c) * a_c * r * (1 + state * a_r * (1 - r))
        return state + z * (c - state), slope

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        o, last, _ = newton(
            self.transition, u, state, structure=Structure(self.out_width, 1), linearise=self.linearise,
            fresh=self.initial_state(len(state)), reset=reset, lengths=lengths,
            tolerance=near_loop(self.tolerance, state.dtype),
        )  # fmt: skip
        return o, last

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)

    def _parts(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.a.to(h.dtype)
        z, r = torch.sigmoid(u[..., 0, :] + a[0] * h), torch.sigmoid(u[..., 1, :] + a[1] * h)
        return z, r, torch.tanh(u[..., 2, :] + a[2] * (r * h))
