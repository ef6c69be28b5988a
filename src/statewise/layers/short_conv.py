"""Causal depthwise convolution, its last inputs as the state (used by H3, Fu et al. 2023, arXiv:2212.14052)."""

from __future__ import annotations

from torch import Tensor

from ..core import Cell, Traits, register_layer
from ..nn import ShortConvolution


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
        self.conv = ShortConvolution(width, taps=taps)
        self.width = self.out_width = width

    def initial_state(self, batch: int) -> Tensor:
        return self.conv.initial_state(batch)

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv.step(u, state)

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.conv(u, state, reset, lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)
