"""Gated maps of one time step: what stands between recurrent layers."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """y = W (gate(G x) * U x) (Shazeer 2020, arXiv:2002.05202). x (..., D) -> (..., D) through `hidden` channels."""

    def __init__(self, width: int, hidden: int, *, bias: bool = True, gate: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.gate = gate
        self.up = nn.Linear(width, 2 * hidden, bias=bias)
        self.out = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.out(self.gate(gate) * value)


class GLU(nn.Module):
    """y = V g * sigmoid(G g), g = gelu(x): the nonlinearity behind a linear recurrence. x (..., D) -> (..., E)."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.out = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.out(F.gelu(x)), -1)
