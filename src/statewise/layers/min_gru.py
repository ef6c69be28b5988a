"""Minimal GRU (Feng et al. 2024, arXiv:2410.01201)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core import Cell, UsageError, check_sizes, register_layer, wide
from ..ops import linear_scan

Candidate = Literal["linear", "positive"]


class Gated(NamedTuple):
    a: Tensor  # (..., N) decay in (0, 1)
    x: Tensor  # (..., N) what enters


def candidate_values(c: Tensor, kind: Candidate) -> Tensor:
    """c itself, or the paper's g(c) = c + 1/2 where c >= 0, sigmoid(c) elsewhere, which is positive."""
    return c if kind == "linear" else torch.where(c >= 0, c + 0.5, c.sigmoid())


class Minimal(Cell[Tensor]):
    """h_t = a_t h_{t-1} + b_t,  y_t = h_t,  a_t in (0, 1) and b_t from x_t alone: what MinGRU and MinLSTM share."""

    blocks: int  # of the linear map, N rows each

    def __init__(self, width: int, hidden: int, *, candidate: Candidate = "linear"):
        super().__init__()
        name = type(self).__name__
        check_sizes(name, width=width, hidden=hidden)
        if candidate not in ("linear", "positive"):
            raise UsageError(f"{name}: candidate {candidate!r}; expected 'linear' or 'positive'")
        self.width, self.out_width = width, hidden
        self.candidate = candidate
        self.inp = nn.Linear(width, self.blocks * hidden)

    def initial_state(self, batch: int) -> Tensor:
        weight = self.inp.weight
        return weight.new_zeros(batch, self.out_width, dtype=wide(weight.dtype))

    def transition(self, u: Gated, state: Tensor) -> tuple[Tensor, Tensor]:
        h = u.a * state + u.x
        return h, h

    def scan(self, u: Gated, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_scan(u.a, u.x, state, reset=reset, lengths=lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)


@register_layer(
    "min_gru",
    paper="arXiv:2410.01201",
    examples=[dict(width=3, hidden=4), dict(width=2, hidden=5, candidate="positive")],
    sized=lambda width: dict(width=width, hidden=width),
)
class MinGRU(Minimal):
    """h_t = (1 - z_t) h_{t-1} + z_t g(W x_t),  z_t = sigmoid(U x_t),  y_t = h_t.

    candidate: "linear" for g(c) = c, "positive" for the paper's g, which keeps h above zero.
    The gates see only x, so one layer cannot track a state that x alone does not show (parity).
    State h (B, N), float32 or wider. Linear maps start as in torch.nn.Linear.
    """

    blocks = 2

    def encode(self, x: Tensor) -> Gated:
        k, c = self.inp(x).to(wide(self.inp.weight.dtype)).chunk(2, -1)
        return Gated(torch.sigmoid(-k), torch.sigmoid(k) * candidate_values(c, self.candidate))
