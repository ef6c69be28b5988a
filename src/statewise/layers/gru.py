"""GRU (Cho et al. 2014, arXiv:1406.1078), the reset gate applied after the product as cuDNN does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Cell, check_sizes, register_layer, wide
from ..ops.gated_loop import gru_loop, gru_step


@register_layer(
    "gru",
    paper="arXiv:1406.1078",
    examples=[{"width": 3, "hidden": 4}, {"width": 2, "hidden": 1}],
    sized=lambda width: {"width": width, "hidden": width},
)
class GRULayer(Cell[Tensor]):
    """h_t = (1 - z) n + z h_{t-1};  r, z = s(W x_t + R h_{t-1}),  n = tanh(W_n x_t + r R_n h_{t-1});  y_t = h_t.

    W and R carry biases, R's inside the product with r. Gates in torch.nn.GRU's order r, z, n; each block of R starts
    orthogonal. The state is h (B, N).
    `statewise.GRU` is the drop-in for torch.nn.GRU.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        check_sizes("GRULayer", width=width, hidden=hidden)
        self.width, self.out_width = width, hidden
        self.inp = nn.Linear(width, 3 * hidden)
        blocks = [nn.init.orthogonal_(torch.empty(hidden, hidden)) for _ in range(3)]
        self.recurrent = nn.Parameter(torch.cat(blocks))
        self.recurrent_bias = nn.Parameter(torch.zeros(3 * hidden))

    def initial_state(self, batch: int) -> Tensor:
        return self.recurrent.new_zeros(batch, self.out_width, dtype=wide(self.recurrent.dtype))

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = gru_step(u, state, *self._weights())
        return h, h

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return gru_loop(u, state, *self._weights(), reset=reset, lengths=lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.inp.weight, self.recurrent, self.inp.bias, self.recurrent_bias
