"""The Jordan network (Jordan 1986, ICS Report 8604; 1997, doi:10.1016/S0166-4115(97)80111-2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Cell, check_sizes, register_layer, wide
from ..ops.gated_loop import jordan_loop, jordan_step
from ..ops.recorded_loop import recorded_loop


@register_layer(
    "jordan",
    paper="doi:10.1016/S0166-4115(97)80111-2",
    examples=[{"width": 3, "hidden": 4, "out": 2}, {"width": 2, "hidden": 2, "out": 3, "decay": 0.5}],
    sized=lambda width: {"width": width, "hidden": width, "out": width},
)
class Jordan(Cell[Tensor]):
    """y_t = V h_t + b,  h_t = tanh(W x_t + U s_{t-1} + a),  s_t = decay s_{t-1} + y_t: the output is fed back, not h.

    The state is the context s (B, E). At the same weights and decay 0 it is an Elman network whose R is U V, of rank E.
    """

    multiplied = ("feedback",)  # as for_streaming has it

    def __init__(self, width: int, hidden: int, out: int, *, decay: float = 0.0):
        super().__init__()
        check_sizes("Jordan", width=width, hidden=hidden, out=out)
        self.width, self.out_width = width, out
        self.decay = decay
        self.inp = nn.Linear(width, hidden)
        self.feedback = nn.Parameter(nn.init.orthogonal_(torch.empty(hidden, out)))
        self.out = nn.Linear(hidden, out)
        nn.init.orthogonal_(self.out.weight)

    def initial_state(self, batch: int) -> Tensor:
        return self.feedback.new_zeros(batch, self.out_width, dtype=wide(self.feedback.dtype))

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y = jordan_step(u, state, *self._weights())
        return y, self.decay * state + y

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.decay != 0:  # the state is no output: another loop
            return recorded_loop(self, u, state, reset, lengths)
        return jordan_loop(u, state, *self._weights(), decay=self.decay, reset=reset, lengths=lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)

    def _weights(self) -> tuple[Tensor, ...]:
        return self.inp.weight, self.feedback, self.out.weight, self.inp.bias, self.out.bias
