"""LMU with a linear memory (Chilkuri & Eliasmith 2021, arXiv:2102.11417; used by Liu et al. 2024, arXiv:2402.04882)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import UsageError, check_sizes, register_layer, wide
from ..nn import LTI, LinearSystem, legendre_memory, zero_order_hold


@register_layer(
    "lmu",
    paper="arXiv:2102.11417",
    examples=[dict(width=3, hidden=4, order=4, window=6.0), dict(width=2, hidden=3, order=3, window=5.0, memories=2)],
    sized=lambda width: dict(width=width, hidden=width, order=width, window=128.0),
)
class LMU(LTI):
    """m_t = A m_{t-1} + B u_t,  u_t = relu(w x_t + b),  y_t = relu(W [m_t; x_t] + c).

    A and B hold the last `window` steps of u in `order` Legendre polynomials (`nn.legendre_memory`), by zero-order hold
    with steps of 1; they are fixed. memories: how many numbers u_t has, each with a memory of its own. The linear maps
    begin as torch.nn.Linear does. State m (B, memories, order), float32 or wider.

    Raises UsageError unless window is finite and more than 0.
    """

    a: Tensor  # (N, N)
    b: Tensor  # (N,)

    def __init__(self, width: int, hidden: int, *, order: int, window: float, memories: int = 1):
        super().__init__()
        check_sizes("LMU", width=width, hidden=hidden, order=order, memories=memories)
        if not 0 < window < math.inf:
            raise UsageError(f"LMU: window is {window}; expected a finite number of steps, more than 0")
        self.width, self.out_width = width, hidden
        self.write = nn.Linear(width, memories)
        self.read = nn.Linear(memories * order + width, hidden)
        one = torch.ones((), dtype=torch.float64)
        a, b = zero_order_hold(*legendre_memory(order, window), one)
        dtype = torch.get_default_dtype()
        self.register_buffer("a", a.to(dtype))
        self.register_buffer("b", b.to(dtype))

    def initial_state(self, batch: int) -> Tensor:
        memories, order = self.write.out_features, len(self.b)
        return self.b.new_zeros(batch, memories, order, dtype=wide(self.b.dtype))

    def system(self) -> LinearSystem:
        high = wide(self.b.dtype)
        eye = torch.eye(len(self.b), dtype=high, device=self.b.device)
        return LinearSystem(self.a.to(high)[None], self.b.to(high)[None], eye[None])

    def encode(self, x: Tensor) -> Tensor:
        return self.write(x).relu()

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        seen = torch.cat([o.flatten(-2).to(x.dtype), x], -1)
        return self.read(seen).relu().to(x.dtype)
