"""Causal depthwise convolution, its last inputs as the state (used by H3, Fu et al. 2023, arXiv:2212.14052)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Cell, Traits, check_sizes, register_layer, wide
from ..nn import tail


@register_layer(
    "short_conv",
    paper="arXiv:2212.14052",
    examples=[dict(width=3, taps=4), dict(width=2, taps=1)],
    sized=lambda width: dict(width=width),
)
class ShortConv(Cell[Tensor]):
    """y_t = sum_{j < P} w_j * x_{t-j}, channel by channel; inputs before the start or a reset count as zero.

    State: the last P - 1 inputs (B, P-1, D), newest last, zero where there was none; float32 or wider.
    w (P, D) starts Gaussian with variance 1 / P.
    """

    traits = Traits(linear_in_input=True, time_invariant=True)

    def __init__(self, width: int, *, taps: int = 4):
        super().__init__()
        check_sizes("ShortConv", width=width, taps=taps)
        self.width = self.out_width = width
        self.taps = taps
        self.weight = nn.Parameter(torch.randn(taps, width) / taps**0.5)

    def initial_state(self, batch: int) -> Tensor:
        return self.weight.new_zeros(batch, self.taps - 1, self.width, dtype=wide(self.weight.dtype))

    def encode(self, x: Tensor) -> Tensor:
        return x.to(wide(self.weight.dtype))

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.scan(u[:, None], state, None, None)
        return y[:, 0], state

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        steps, past = u.shape[1], self.taps - 1
        seen = torch.cat([state, u], 1)  # time t stands at t + P - 1
        segment = None if reset is None else torch.cat([reset.new_zeros(len(u), past), reset], 1).cumsum(1)
        y = self.weight[0] * u
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
        return y, last

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)
