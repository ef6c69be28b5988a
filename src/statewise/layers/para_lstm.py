"""ParaLSTM: peepholes, and units that do not see each other's state (Danieli et al. 2025, arXiv:2510.21450)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Cell, register_layer, wide
from ..ops.newton import Structure, newton
from .para_gru import HeadwiseGates, check_heads, near_loop, recurrent_weights


class ParaLSTMState(NamedTuple):
    h: Tensor  # (B, N)
    c: Tensor  # (B, N)


class Parts(NamedTuple):
    f: Tensor
    g: Tensor  # the candidate
    o: Tensor
    c: Tensor  # the new cell
    squashed: Tensor  # tanh of it


@register_layer(
    "para_lstm",
    paper="arXiv:2510.21450",
    examples=[dict(width=3, hidden=4), dict(width=4, hidden=6, heads=2)],
    sized=lambda width: dict(width=width, hidden=width),
)
class ParaLSTM(Cell[ParaLSTMState]):
    """c_t = f c_{t-1} + (1 - f) g,  h_t = o tanh(c_t),  y_t = h_t;  f = s(a_f h_{t-1} + p_f c_{t-1} + B_f x_t + b_f),
    g = tanh(a_g h_{t-1} + B_g x_t + b_g),  o = s(a_o h_{t-1} + p_o c_t + B_o x_t + b_o).

    All a and p are vectors: a unit sees its own h and c alone, the Jacobian has blocks of two, and Newton's method
    solves all times at once (`statewise.ops.newton`). Units are mixed by B, which has blocks where heads > 1.
    tolerance: how near to the loop, as for `ParaGRU`. State: h and c (B, N), float32 or wider.

    Starts as `ParaGRU` does, b_f falling from 0 to -1 over the units. Raises UsageError if heads do not divide width or
    hidden.
    """

    def __init__(self, width: int, hidden: int, *, heads: int = 1, tolerance: float | None = None):
        super().__init__()
        check_heads("ParaLSTM", width, hidden, heads)
        self.width, self.out_width, self.tolerance = width, hidden, tolerance
        self.gates = HeadwiseGates(width, hidden, gates=3, heads=heads, forget=0)
        self.a = recurrent_weights(3, hidden)
        self.peep = recurrent_weights(2, hidden)
        self.blocks = Structure.of([[n, hidden + n] for n in range(hidden)])

    def initial_state(self, batch: int) -> ParaLSTMState:
        zero = self.a.new_zeros(batch, self.out_width, dtype=wide(self.a.dtype))
        return ParaLSTMState(zero, zero.clone())

    def encode(self, x: Tensor) -> Tensor:
        return self.gates(x).to(wide(self.a.dtype))

    def transition(self, u: Tensor, state: ParaLSTMState) -> tuple[Tensor, ParaLSTMState]:
        parts = self._parts(u, state)
        h = parts.o * parts.squashed
        return h, ParaLSTMState(h, parts.c)

    def linearise(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(h, c) as (M, 2N) -> the next ones, and the blocks d(h, c) / d(h, c) of every unit, (M, N, 2, 2)."""
        h, c = state.chunk(2, -1)
        p = self._parts(u, ParaLSTMState(h, c))
        a, peep = self.a.to(h.dtype), self.peep.to(h.dtype)
        d_f = p.f * (1 - p.f) * (c - p.g)
        d_g = (1 - p.f) * (1 - p.g * p.g)
        c_by_c = p.f + d_f * peep[0]
        c_by_h = d_f * a[0] + d_g * a[1]
        d_o = p.o * (1 - p.o) * p.squashed
        through_c = d_o * peep[1] + p.o * (1 - p.squashed * p.squashed)
        h_by_h, h_by_c = d_o * a[2] + through_c * c_by_h, through_c * c_by_c
        blocks = torch.stack([h_by_h, h_by_c, c_by_h, c_by_c], -1).unflatten(-1, (2, 2))
        return torch.cat([p.o * p.squashed, p.c], -1), blocks

    def scan(
        self, u: Tensor, state: ParaLSTMState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, ParaLSTMState]:
        o, last, _ = newton(
            self.transition, u, state, structure=self.blocks, linearise=self.linearise,
            fresh=self.initial_state(len(u)), reset=reset, lengths=lengths,
            tolerance=near_loop(self.tolerance, state.h.dtype),
        )  # fmt: skip
        return o, last

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)

    def _parts(self, u: Tensor, state: ParaLSTMState) -> Parts:
        (h, c), a, peep = state, self.a.to(state.h.dtype), self.peep.to(state.h.dtype)
        f = torch.sigmoid(u[..., 0, :] + a[0] * h + peep[0] * c)
        g = torch.tanh(u[..., 1, :] + a[1] * h)
        new = g + f * (c - g)
        o = torch.sigmoid(u[..., 2, :] + a[2] * h + peep[1] * new)
        return Parts(f, g, o, new, torch.tanh(new))
