"""LSTM (Hochreiter & Schmidhuber 1997) with the forget gate of Gers et al. 2000, doi:10.1162/089976600300015015."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core import Cell, register_layer, wide
from ..ops.gated_loop import lstm_loop, lstm_step
from ..ops.newton import Structure
from ..ops.opaque import is_traced
from .gated_cell import Parallel, by_gate, check_gated, heard, newton_scan, orthogonal_heads, through


class LSTMState(NamedTuple):
    h: Tensor  # (B, N)
    c: Tensor  # (B, N)


@register_layer(
    "lstm",
    paper="doi:10.1162/089976600300015015",
    examples=[
        {"width": 3, "hidden": 4},
        {"width": 2, "hidden": 1, "forget_bias": 0.0},
        {"width": 3, "hidden": 4, "heads": 2, "parallel": "newton"},
    ],
    sized=lambda width: {"width": width, "hidden": width},
)
class LSTMLayer(Cell[LSTMState]):
    """c_t = s(f) c_{t-1} + s(i) tanh(g),  h_t = s(o) tanh(c_t);  i, f, g, o = W x_t + R h_{t-1} + b;  y_t = h_t.

    Gates in torch.nn.LSTM's order; each block of R starts orthogonal; the forget gate's bias starts at forget_bias,
    since a gate that starts half closed forgets before it can learn to keep (Jozefowicz et al. 2015).
    heads and parallel as for `Elman`. `statewise.LSTM` is the drop-in for torch.nn.LSTM.
    Raises UsageError for heads that do not divide hidden or an unknown parallel.
    """

    multiplied = ("recurrent",)  # as for_streaming has it

    def __init__(
        self, width: int, hidden: int, *, forget_bias: float = 1.0, heads: int = 1, parallel: Parallel = "loop"
    ):
        super().__init__()
        check_gated("LSTMLayer", width, hidden, heads, parallel)
        self.width, self.out_width = width, hidden
        self.heads, self.parallel = heads, parallel
        self.inp = nn.Linear(width, 4 * hidden)
        with torch.no_grad():
            self.inp.bias[hidden : 2 * hidden].fill_(forget_bias)
        self.recurrent = orthogonal_heads(4, hidden, heads)

    def initial_state(self, batch: int) -> LSTMState:
        shape, dtype = (batch, self.out_width), wide(self.recurrent.dtype)
        return LSTMState(self.recurrent.new_zeros(shape, dtype=dtype), self.recurrent.new_zeros(shape, dtype=dtype))

    def transition(self, u: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        inp = self.inp
        h, c = lstm_step(u, state.h, state.c, inp.weight, self.recurrent, inp.bias)
        return h, LSTMState(h, c)

    def scan(
        self, u: Tensor, state: LSTMState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, LSTMState]:
        if self.parallel == "newton" and not is_traced(u):
            return self._newton(u, state, reset, lengths)
        weights = self.inp.weight, self.recurrent, self.inp.bias
        y, h, c = lstm_loop(u, state.h, state.c, *weights, reset=reset, lengths=lengths)
        return y, LSTMState(h, c)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o if o.dtype is x.dtype else o.to(x.dtype)  # a step notices the call

    def linearise(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(h, c) as (M, 2N) -> the next ones and their derivatives, head by head, from u = W x_t + b."""
        r = by_gate(self.recurrent.to(state.dtype), 4)
        h, before = state.chunk(2, -1)
        before = before.unflatten(-1, r.shape[1:3])
        from_x = (part.unflatten(-1, r.shape[1:3]) for part in u.chunk(4, -1))
        i, f, g, o = (x + y for x, y in zip(from_x, heard(r, h), strict=True))
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = f * before + i * g
        squashed = torch.tanh(c)
        d_c = o * (1 - squashed * squashed)
        c_by_h = through([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)], r[:3])
        h_by_h = d_c[..., None] * c_by_h + through([squashed * o * (1 - o)], r[3:])
        jacobian = torch.cat(
            [torch.cat([h_by_h, (d_c * f).diag_embed()], -1), torch.cat([c_by_h, f.diag_embed()], -1)], -2
        )
        return torch.cat([(o * squashed).flatten(1), c.flatten(1)], -1), jacobian

    def _newton(
        self, x: Tensor, state: LSTMState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, LSTMState]:
        def step(u: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
            new = LSTMState(*lstm_step(u, *state, None, self.recurrent))
            return new.h, new

        n, size = self.out_width, self.out_width // self.heads
        heads = torch.arange(2 * n).view(2, self.heads, size).transpose(0, 1).flatten(1)  # h and c of each
        given = x, state, self.inp.weight, self.inp.bias
        return newton_scan(step, self.linearise, Structure.of(heads.tolist()), *given, reset=reset, lengths=lengths)
