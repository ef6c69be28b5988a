"""The simple recurrent network (Elman 1990, doi:10.1207/s15516709cog1402_1); ReLU after Le et al. 2015."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..core import Cell, UsageError, check_sizes, register_layer, wide
from ..ops.gated_loop import elman_loop, elman_step


@register_layer(
    "elman",
    paper="doi:10.1207/s15516709cog1402_1",
    examples=[{"width": 3, "hidden": 4}, {"width": 2, "hidden": 3, "nonlinearity": "relu"}],
    sized=lambda width: {"width": width, "hidden": width},
)
class Elman(Cell[Tensor]):
    """h_t = f(W x_t + R h_{t-1} + b), f tanh or relu; y_t = h_t.

    R starts orthogonal, so that early gradients neither vanish nor explode. The state is h (B, N).
    """

    def __init__(self, width: int, hidden: int, *, nonlinearity: Literal["tanh", "relu"] = "tanh"):
        super().__init__()
        check_sizes("Elman", width=width, hidden=hidden)
        if nonlinearity not in ("tanh", "relu"):
            raise UsageError(f"Elman: nonlinearity {nonlinearity!r}; expected 'tanh' or 'relu'")
        self.width, self.out_width = width, hidden
        self.nonlinearity = nonlinearity
        self.inp = nn.Linear(width, hidden)
        self.recurrent = nn.Parameter(nn.init.orthogonal_(torch.empty(hidden, hidden)))

    def initial_state(self, batch: int) -> Tensor:
        return self.recurrent.new_zeros(batch, self.out_width, dtype=wide(self.recurrent.dtype))

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = elman_step(u, state, *self._weights(), nonlinearity=self.nonlinearity)
        return h, h

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return elman_loop(u, state, *self._weights(), nonlinearity=self.nonlinearity, reset=reset, lengths=lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inp.weight, self.recurrent, self.inp.bias
