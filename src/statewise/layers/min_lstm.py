"""Minimal LSTM (Feng et al. 2024, arXiv:2410.01201)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import register_layer, wide
from .min_gru import Gated, Minimal, candidate_values


@register_layer(
    "min_lstm",
    paper="arXiv:2410.01201",
    examples=[dict(width=3, hidden=4), dict(width=2, hidden=5, candidate="positive")],
    sized=lambda width: dict(width=width, hidden=width),
)
class MinLSTM(Minimal):
    """h_t = f' h_{t-1} + i' g(W x_t),  f' = f / (f + i),  i' = i / (f + i),  f, i = sigmoid(U x_t),  y_t = h_t.

    candidate as in MinGRU. f' = sigmoid(log f - log i), which never divides. State h (B, N), float32 or wider.
    Linear maps start as in torch.nn.Linear.
    """

    blocks = 3

    def encode(self, x: Tensor) -> Gated:
        f, i, c = self.inp(x).to(wide(self.inp.weight.dtype)).chunk(3, -1)
        k = F.logsigmoid(f) - F.logsigmoid(i)
        return Gated(torch.sigmoid(k), torch.sigmoid(-k) * candidate_values(c, self.candidate))
