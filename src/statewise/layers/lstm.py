"""LSTM (Hochreiter & Schmidhuber 1997) with the forget gate of Gers et al. 2000, doi:10.1162/089976600300015015."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core import Cell, check_sizes, register_layer, wide
from ..ops.gated_loop import lstm_loop, lstm_step


class LSTMState(NamedTuple):
    h: Tensor  # (B, N)
    c: Tensor  # (B, N)


@register_layer(
    "lstm",
    paper="doi:10.1162/089976600300015015",
    examples=[{"width": 3, "hidden": 4}, {"width": 2, "hidden": 1, "forget_bias": 0.0}],
    sized=lambda width: {"width": width, "hidden": width},
)
class LSTMLayer(Cell[LSTMState]):
    """c_t = s(f) c_{t-1} + s(i) tanh(g),  h_t = s(o) tanh(c_t);  i, f, g, o = W x_t + R h_{t-1} + b;  y_t = h_t.

    Gates in torch.nn.LSTM's order; each block of R starts orthogonal; the forget gate's bias starts at forget_bias,
    since a gate that starts half closed forgets before it can learn to keep (Jozefowicz et al. 2015).
    `statewise.LSTM` is the drop-in for torch.nn.LSTM.
    """

    def __init__(self, width: int, hidden: int, *, forget_bias: float = 1.0):
        super().__init__()
        check_sizes("LSTMLayer", width=width, hidden=hidden)
        self.width, self.out_width = width, hidden
        self.inp = nn.Linear(width, 4 * hidden)
        with torch.no_grad():
            self.inp.bias[hidden : 2 * hidden].fill_(forget_bias)
        blocks = [nn.init.orthogonal_(torch.empty(hidden, hidden)) for _ in range(4)]
        self.recurrent = nn.Parameter(torch.cat(blocks))

    def initial_state(self, batch: int) -> LSTMState:
        shape, dtype = (batch, self.out_width), wide(self.recurrent.dtype)
        return LSTMState(self.recurrent.new_zeros(shape, dtype=dtype), self.recurrent.new_zeros(shape, dtype=dtype))

    def transition(self, u: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        h, c = lstm_step(u, state.h, state.c, self.inp.weight, self.recurrent, self.inp.bias)
        return h, LSTMState(h, c)

    def scan(
        self, u: Tensor, state: LSTMState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, LSTMState]:
        weights = self.inp.weight, self.recurrent, self.inp.bias
        y, h, c = lstm_loop(u, state.h, state.c, *weights, reset=reset, lengths=lengths)
        return y, LSTMState(h, c)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)
