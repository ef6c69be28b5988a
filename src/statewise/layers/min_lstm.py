"""Minimal LSTM (Feng et al. 2024, arXiv:2410.01201)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, check_sizes, register_layer, wide
from ..ops import linear_scan
from .min_gru import Candidate, Gated, candidate_values, check_candidate


@register_layer(
    "min_lstm",
    paper="arXiv:2410.01201",
    examples=[dict(width=3, hidden=4), dict(width=2, hidden=5, candidate="positive")],
    sized=lambda width: dict(width=width, hidden=width),
)
class MinLSTM(Cell[Tensor]):
    """h_t = f' h_{t-1} + i' g(W x_t),  f' = f / (f + i),  i' = i / (f + i),  f, i = sigmoid(U x_t),  y_t = h_t.

    candidate as in MinGRU. f' = sigmoid(log f - log i), which never divides. State h (B, N), float32 or wider.
    Linear maps start as in torch.nn.Linear.
    """

    def __init__(self, width: int, hidden: int, *, candidate: Candidate = "linear"):
        super().__init__()
        check_sizes("MinLSTM", width=width, hidden=hidden)
        check_candidate("MinLSTM", candidate)
        self.width, self.out_width = width, hidden
        self.candidate = candidate
        self.inp = nn.Linear(width, 3 * hidden)

    def initial_state(self, batch: int) -> Tensor:
        weight = self.inp.weight
        return weight.new_zeros(batch, self.out_width, dtype=wide(weight.dtype))

    def encode(self, x: Tensor) -> Gated:
        f, i, c = self.inp(x).to(wide(self.inp.weight.dtype)).chunk(3, -1)
        k = F.logsigmoid(f) - F.logsigmoid(i)
        return Gated(torch.sigmoid(k), torch.sigmoid(-k) * candidate_values(c, self.candidate))

    def transition(self, u: Gated, state: Tensor) -> tuple[Tensor, Tensor]:
        h = u.a * state + u.x
        return h, h

    def scan(self, u: Gated, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_scan(u.a, u.x, state, reset=reset, lengths=lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)
