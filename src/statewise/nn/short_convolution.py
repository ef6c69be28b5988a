"""Causal depthwise convolution with a few taps: the short memory in front of many recurrences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import check_sizes, wide
from .segments import tail


class ShortConvolution(nn.Module):
    """y_t = sum_{j < P} w_j * x_{t-j} + bias, channel by channel; inputs before the start or a reset count as zero.

    State: the last P - 1 inputs (B, P-1, D), newest last, zero where there was none; float32 or wider, as y is.
    weight (P, D), w_0 for the newest input, starts Gaussian with variance 1 / P; bias, if there is one, at zero.
    """

    def __init__(self, width: int, *, taps: int = 4, bias: bool = False):
        super().__init__()
        check_sizes("ShortConvolution", width=width, taps=taps)
        self.width, self.taps = width, taps
        self.weight = nn.Parameter(torch.randn(taps, width) / taps**0.5)
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def initial_state(self, batch: int) -> Tensor:
        return self.weight.new_zeros(batch, self.taps - 1, self.width, dtype=wide(self.weight.dtype))

    def forward(
        self, x: Tensor, state: Tensor, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D), state (B, P-1, D) -> y (B, T, D) and the state after the last step, or at each row's end."""
        x, steps, past = x.to(state.dtype), x.shape[1], self.taps - 1
        seen = torch.cat([state, x], 1)  # time t stands at t + P - 1
        segment = None if reset is None else torch.cat([reset.new_zeros(len(x), past), reset], 1).cumsum(1)
        y = self.weight[0] * x
        for j in range(1, self.taps):
            tap = seen[:, past - j : past - j + steps]
            if segment is not None:
                other = segment[:, past - j : past - j + steps] != segment[:, past:]
                tap = tap.masked_fill(other[..., None], 0)
            y = y + self.weight[j] * tap
        last = tail(seen, past, lengths)
        if segment is not None:
            ids = tail(segment, past, lengths)
            last = last.masked_fill((ids != ids[:, -1:])[..., None], 0)
        return (y if self.bias is None else y + self.bias), last

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D), state (B, P-1, D) -> y (B, D) and the next state. Pure."""
        seen = torch.cat([state, x.to(state.dtype)[:, None]], 1)
        y = (self.weight.flip(0) * seen).sum(1)
        return (y if self.bias is None else y + self.bias), seen[:, 1:]
